"""Scalar heads on final hidden states, and reward models on disk."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.data.model_files import fingerprint, json_object, read_arrays
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights, load_adapters
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

REWARD_FILE = "reward.json"
HEAD_FILE = "head.safetensors"
_SCORE = "score.weight"
_LARGEST_NUMBER = 1e30


def new_head(width: int) -> dict[str, mx.array]:
    """A scalar head that gives 0 for every state of size `width`."""
    return {f"{HEAD}weight": mx.zeros((width,)), f"{HEAD}bias": mx.zeros(())}


def apply_head(arrays: Mapping[str, mx.array], states: mx.array) -> mx.array:
    """Scalars [...] of states [..., D], in float32."""
    return states.astype(mx.float32) @ arrays[f"{HEAD}weight"] + arrays[f"{HEAD}bias"]


def pooled(states: mx.array, sequences: Sequences, pooling: str) -> mx.array:
    """One state [B, D] a text from all states [n, D], in float32.

    Args:
        states: final hidden states, in the order that `Sequences` tells; prompts may be shared only for "last".
        sequences: the texts, for their lengths.
        pooling: "last" takes the last token's; "mean" the mean over the tokens; "sqrt" their sum divided by the root
            of their number, whose spread doesn't shrink with length.
    """
    if pooling == "last":
        return states[sequences.last].astype(mx.float32)
    states = states.reshape(*sequences.tokens.shape, -1)
    counted = mx.arange(states.shape[1])[None, :] < sequences.lengths[:, None]
    kept = mx.where(counted[..., None], states.astype(mx.float32), 0.0)
    divisor = sequences.lengths if pooling == "mean" else mx.sqrt(sequences.lengths.astype(mx.float32))
    return kept.sum(axis=1) / divisor[:, None]


def text_states(trunk: Trunk, sequences: Sequences, pooling: str, *, learning: bool = False) -> mx.array:
    """One state [B, D] a text, in float32, see `pooled`; `learning`: a gradient will be taken."""
    read = sequences.last if pooling == "last" else None
    return pooled(trunk.states(sequences, read=read, learning=learning), sequences, pooling)


@dataclass(frozen=True)
class RewardFacts:
    """What a trained reward model says of itself in `reward.json`.

    A raw output x becomes the normalised score (x - mean) / deviation: mean 0 and deviation 1 over reference texts.
    Where the feedback was ratings, slope * x + intercept is the rating that x predicts, in rating points.
    Folders of earlier versions don't tell between which scores their training texts lie.
    """

    placement: Literal["adapters", "folder"]
    pooling: Literal["last", "mean", "sqrt"]
    mean: float
    deviation: float
    slope: float | None = None
    intercept: float | None = None
    trunk: str | None = None  # fingerprint of the weights that adapters were trained on
    lowest: float | None = None  # normalised scores of the training texts lie between these two
    highest: float | None = None
    format: int = 1

    def write(self, folder: Path) -> None:
        """Write `reward.json` into a folder."""
        (folder / REWARD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def read_reward_facts(folder: Path) -> RewardFacts:
    """Read `reward.json`.

    Raises:
        ModelError: the folder isn't a reward model.
    """
    file = folder / REWARD_FILE
    if not os.path.lexists(file):
        raise ModelError(f"{folder}: not a reward model ({_why_none(folder)}")
    content = json_object(file)
    try:
        facts = RewardFacts(**content)
    except TypeError:
        raise ModelError(f"{file}: not a description this version understands") from None
    optional = (facts.slope, facts.intercept, facts.lowest, facts.highest)
    numbers = (facts.mean, facts.deviation, *(value for value in optional if value is not None))
    finite = all(type(value) in (int, float) and abs(value) < _LARGEST_NUMBER for value in numbers)
    known = facts.placement in ("adapters", "folder") and facts.pooling in ("last", "mean", "sqrt")
    if not (finite and known and facts.deviation > 0 and facts.format == 1):
        raise ModelError(f"{file}: not a description this version understands")
    return facts


def _why_none(folder: Path) -> str:
    """What is in the place of a reward model, and what could have been meant."""
    if folder.is_file():
        return f"a file); give the folder that holds {REWARD_FILE}"
    if not folder.is_dir():
        names = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names, n=1)
        mend = f"Did you mean '{folder.with_name(near[0])}'?" if near else "`mlx-ppo reward` writes one"
        return f"no such folder). {mend}"
    inner = sorted([*folder.glob(f"*/{REWARD_FILE}"), *folder.glob(f"*/reward/{REWARD_FILE}")])
    mend = f". Did you mean '{inner[0].parent}'?" if inner else "; `mlx-ppo reward` writes one"
    return f"no {REWARD_FILE}){mend}"


def lies_on(folder: Path, trunk: Trunk) -> bool:
    """Whether adapters were trained on the weights of this trunk; those of earlier versions don't tell."""
    known = read_reward_facts(folder).trunk
    return known is None or known == trunk_fingerprint(trunk)


def trunk_fingerprint(trunk: Trunk) -> str:
    """The fingerprint of the weights in a trunk's folder."""
    return fingerprint(check_model_folder(Path(trunk.name)).weight_files)


class RewardModel:
    """A trained reward model: adapters and head on a shared trunk, or a model of its own."""

    def __init__(self, trunk: Trunk, weights: Weights, facts: RewardFacts) -> None:
        """Join a trunk, the weights on it (with the head), and the facts."""
        self.trunk = trunk
        self.weights = weights
        self.facts = facts

    def raw(self, sequences: Sequences) -> mx.array:
        """Raw outputs [B] for whole texts; prompts may be shared where only the last token's state is read."""
        with self.trunk.using(self.weights):
            return apply_head(self.weights.arrays, text_states(self.trunk, sequences, self.facts.pooling))

    @property
    def shares_prompts(self) -> bool:
        """Whether `raw` may be given shared prompts."""
        return self.facts.pooling == "last" and self.trunk.capabilities.shares

    def normalised(self, raw: mx.array) -> mx.array:
        """Scores of mean 0 and deviation 1 on the reference texts."""
        return (raw - self.facts.mean) / self.facts.deviation

    def points(self, raw: mx.array) -> mx.array | None:
        """Predicted ratings in rating points, where the model was trained on ratings."""
        if self.facts.slope is None or self.facts.intercept is None:
            return None
        return raw * self.facts.slope + self.facts.intercept


def is_classifier(folder: Path) -> bool:
    """Whether a folder has to be a sequence classifier, if it is a reward model at all."""
    return not (folder / REWARD_FILE).is_file() and (folder / "config.json").is_file()


def check_classifier(folder: Path) -> None:
    """Raises ModelError where a model folder is no sequence classifier with one label."""
    found = check_model_folder(folder).tensors.get(_SCORE)
    if found is None or found[1][:1] != (1,):
        raise ModelError(f"{folder}: not a reward model (no {REWARD_FILE}, and no {_SCORE} with one label)")


def check_lies_on(folder: Path, trunk: Trunk) -> None:
    """Raises ModelError where adapters were trained on other weights than those of this trunk."""
    if not lies_on(folder, trunk):
        raise ModelError(
            f"{folder}: these adapters were trained on other weights than those in {trunk.name}; "
            "train the reward model on these (if they are the same in another type, delete 'trunk' in "
            f"{REWARD_FILE})"
        )


def _load_classifier(folder: Path, dtype: str) -> RewardModel:
    """A sequence classifier with one label, as transformers exports it: its `score.weight` reads the last state."""
    check_classifier(folder)
    trunk = load_trunk(folder, dtype=dtype, classifier=True)
    file = next(file for file in sorted(folder.glob("model*.safetensors")) if _SCORE in read_arrays(file))
    weight = read_arrays(file)[_SCORE][0].astype(mx.float32)
    facts = RewardFacts(placement="folder", pooling="last", mean=0.0, deviation=1.0)
    return RewardModel(trunk, Weights({f"{HEAD}weight": weight, f"{HEAD}bias": mx.zeros(())}), facts)


def load_reward_model(folder: Path, shared: Trunk | None, *, dtype: str = "auto") -> RewardModel:
    """Load a reward model; adapters lie on the `shared` trunk.

    Raises:
        ModelError: it is damaged, or its adapters have no trunk here that they fit.
    """
    if is_classifier(folder):
        return _load_classifier(folder, dtype)
    facts = read_reward_facts(folder)
    if facts.placement == "adapters":
        if shared is None:
            raise ModelError(f"{folder}: these are adapters for a trunk; give the trunk's folder as the model")
        check_lies_on(folder, shared)
        trunk, weights = shared, load_adapters(folder, shared.adapted)
    else:
        trunk, weights = load_trunk(folder, dtype=dtype), Weights({})
    head = read_arrays(folder / HEAD_FILE)
    expected = {name: array.shape for name, array in new_head(trunk.width).items()}
    if {name: array.shape for name, array in head.items()} != expected:
        raise ModelError(f"{folder / HEAD_FILE}: not a scalar head for states of size {trunk.width}")
    if not all(mx.isfinite(array).all().item() for array in head.values()):
        raise ModelError(f"{folder / HEAD_FILE}: contains NaN or infinity; the weights are damaged")
    arrays = {**weights.arrays, **{name: array.astype(mx.float32) for name, array in head.items()}}
    return RewardModel(trunk, weights.holding(arrays), facts)
