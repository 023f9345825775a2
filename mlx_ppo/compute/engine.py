"""What an engine offers: everything that is computed with a model, chosen once as the model is loaded.

`compute.portable` has the engine that a GPU runs, in mlx only; `compute.cpu` takes its place piece by piece where mlx's
CPU backend is slow. A trunk is given one engine and asks it; nothing else asks which device there is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.sequences import Sequences

Numbers = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, mx.array]


class Capabilities(NamedTuple):
    """What was found out about a model as it was loaded, by trying."""

    batches: bool  # rows of different length, decoded together, get the states that they get alone
    joins: bool  # so do rows that join others which are being decoded
    shares: bool  # so do responses that are read on top of prompts that several of them share
    rows: bool = False  # the engine's own kernels read whole rows, both ways
    steps: bool = False  # and a token of each row
    remarks: tuple[str, ...] = ()  # a line for each thing that isn't done the fastest way, and why


class Body(Protocol):
    """A model as an engine sees it, with the weights of one role on it; `models.trunk.Trunk` is one."""

    model: nn.Module
    base: dict[str, mx.array]  # the frozen parameters
    adapted: dict[str, nn.Module]  # layers that may have an adapter
    replaced: Mapping[str, mx.array]  # what a role that trains all weights has put on the model
    split: int  # states that enter this block may be kept; 0: none
    positions: int  # whose logits are computed together; 0: as many as is fast
    capabilities: Capabilities

    @property
    def inner(self) -> nn.Module:
        """The part of the model that gives hidden states."""

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that makes logits of states; None where the embedding does."""

    @property
    def blocks(self) -> int:
        """The number of transformer blocks."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""

    @property
    def is_noisy(self) -> bool:
        """Whether dropout acts just now."""

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None, *, kept: mx.array | None = None) -> mx.array:
        """Final hidden states [B, S, D] of tokens [B, S]."""

    def hidden_and_entering(self, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array | None]:
        """The same, and the states that enter block `split`."""

    def entering(self, tokens: mx.array) -> mx.array:
        """The states that enter block `split`."""

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of hidden states [..., D]."""

    def bearing(self, arrays: Mapping[str, mx.array]) -> AbstractContextManager[None]:
        """Other arrays in place of some of the model's parameters."""


class Sampled(NamedTuple):
    """A token for each of some rows."""

    tokens: Any  # [B] integers
    logprobs: Any  # [B] float32, of what was drawn from
    support: Any  # [B, ceil(V / 32)] uint32: the sets that they were drawn from, None where those were all tokens


class Reader(Protocol):
    """Reads one token of each of some rows, and samples the next."""

    ahead: bool  # reading begins before the tokens are known to the caller, for rows that have ended too
    in_place: bool  # reading writes into the caches' memory, so that their arrays may be parts of larger ones

    def sample(self, states: mx.array, draws: Numbers, how: Distribution) -> Sampled:
        """Tokens from final states [B, D], by uniform draws [B]; see `Engine.reader`."""

    def read(self, tokens: Any, caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Final states [B, D] of tokens [B], and those that enter block `split`; the caches hold the tokens then."""

    def detach(self) -> None:
        """Let go of the caches, whose rows are about to change."""


class Step(NamedTuple):
    """One step of AdamW."""

    number: int  # counted from 1
    rate: float
    factor: float  # on the gradients: the clipping
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Engine(Protocol):
    """How a device computes."""

    name: str
    why: str  # this one and not another
    runs_ahead: bool  # mlx is handed whole passes, and begins their work until its limit makes it wait

    def prepare(self, model: nn.Module) -> None:
        """Lay this engine's own parts on a model that has just been made."""

    def dtype(self, wanted: str, stored: mx.Dtype, parameters: int) -> mx.Dtype:
        """The type to compute in, for a setting of `model.dtype`."""

    def unpacks(self, wanted: str) -> bool:
        """Whether quantised models are dequantised, for a setting of `model.dtype`."""

    def unpacked(self, model: nn.Module, wanted: str, *, compact: bool) -> tuple[nn.Module, str]:
        """A quantised model in the form that this engine computes with, and what a person should know of it."""

    def capabilities(self, body: Body, *, checked: bool) -> Capabilities:
        """Find out what a model can do; without `checked` nothing is computed, and what usually holds is assumed."""

    def computing(self) -> AbstractContextManager[None]:
        """Around whatever a model computes."""

    def states(
        self, body: Body, sequences: Sequences, read: mx.array | None, *, learning: bool, saving: bool
    ) -> mx.array:
        """Final hidden states [n, D] of all positions, in the order that `Sequences` tells; see `Trunk.states`."""

    def shares_learning(self, body: Body, *, saving: bool) -> bool:
        """Whether a pass with a gradient may share prompts."""

    def checkpointed(self, body: Body, block: nn.Module) -> Callable[..., mx.array]:
        """A function that does what a block does, and keeps only what enters it for its gradient."""

    def statistics(
        self,
        body: Body,
        states: mx.array,
        tokens: mx.array,
        *,
        temperature: float,
        support: mx.array | None = None,
        learning: bool,
    ) -> tuple[mx.array, mx.array]:
        """Log-probabilities and entropies [N]; see `OutputHead.statistics`."""

    def reader(self, body: Body, rows: int, *, full: bool) -> Reader:
        """Decodes at most so many rows; `full`: the caches keep keys and values as they are."""

    def norm(self, arrays: Iterable[mx.array]) -> float:
        """The global norm of some arrays; infinite or NaN where they are not finite."""

    def adamw(
        self, weights: Mapping[str, mx.array], gradients: Arrays, moments: dict[str, Arrays], step: Step
    ) -> Arrays:
        """New weights; the moments `m` and `v` are changed. Gradients may be used up.

        Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980.
        """

    def exact(self, body: Body) -> bool:
        """Whether everything is computed in float32."""

    def truncation_needs(self, rows: int, vocabulary: int) -> dict[str, int]:
        """Bytes in mlx that truncated sampling of some rows needs beside their logits."""

    def step_needs(self, own: int, others: int, largest: int, *, transposed: bool) -> dict[str, int]:
        """Bytes that an optimizer step needs beside weights, gradients and moments; see `memory.phases`."""
