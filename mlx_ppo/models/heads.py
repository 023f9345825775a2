"""Scalar heads on final hidden states, and reward models on disk."""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import Sequences, make_sequences
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.model_files import fingerprint, json_object, read_arrays
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights, adapters_scale, fitting_adapters, load_adapters
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

REWARD_FILE = "reward.json"
HEAD_FILE = "head.safetensors"
MOST_MEMBERS = 100  # of an ensemble
_SCORE = "score.weight"
_LARGEST_NUMBER = 1e30
_ROWS = 64  # texts that are read together

Floats = np.ndarray[Any, np.dtype[np.float32]]


def new_head(width: int) -> dict[str, mx.array]:
    """A scalar head that gives 0 for every state of size `width`."""
    return {f"{HEAD}weight": mx.zeros((width,)), f"{HEAD}bias": mx.zeros(())}


def drawn_head(width: int, key: mx.array) -> dict[str, mx.array]:
    """A scalar head for a member of an ensemble: normal weights of variance 1 / (width + 1), so that members differ.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix B.1.
    """
    weight = mx.random.normal((width,), key=key) / np.sqrt(np.float32(width + 1))
    return {f"{HEAD}weight": weight, f"{HEAD}bias": mx.zeros(())}


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


def text_outputs(trunk: Trunk, weights: Weights, texts: Sequence[Sequence[int]], pooling: str) -> Floats:
    """Raw outputs [n] of a head and the weights it belongs to, for any number of texts, in their order."""
    found = np.zeros(len(texts), np.float32)
    for rows in length_batches([len(text) for text in texts], max_rows=_ROWS, max_tokens=None, seed_parts=None):
        sequences = make_sequences([texts[row] for row in rows], [()] * len(rows))
        with trunk.using(weights):
            found[rows] = np.array(apply_head(weights.arrays, text_states(trunk, sequences, pooling)))
    return found


@dataclass(frozen=True)
class RewardFacts:
    """What a trained reward model says of itself in `reward.json`.

    A raw output x becomes the normalised score (x - mean) / deviation: mean 0 and deviation 1 over reference texts.
    Where the feedback was ratings, slope * x + intercept is the rating that x predicts, in rating points.
    Folders of earlier versions don't tell between which scores their training texts lie.

    An ensemble's raw output is the mean of its members'. The score of one member is (x - its own mean) / deviation, so
    that the mean of the members' scores is the ensemble's.
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
    member_means: tuple[float, ...] = ()  # of an ensemble: the mean of each member's raw outputs; format is 2 then

    @property
    def members(self) -> int:
        """Of how many models it consists."""
        return max(1, len(self.member_means))

    def write(self, folder: Path) -> None:
        """Write `reward.json` into a folder."""
        content = asdict(self)
        if not self.member_means:
            del content["member_means"]
        (folder / REWARD_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


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
        means = content.get("member_means", [])
        facts = RewardFacts(**{**content, "member_means": tuple(means)})
    except TypeError:
        raise ModelError(f"{file}: not a description this version understands") from None
    optional = (facts.slope, facts.intercept, facts.lowest, facts.highest)
    numbers = (facts.mean, facts.deviation, *facts.member_means, *(value for value in optional if value is not None))
    finite = all(type(value) in (int, float) and abs(value) < _LARGEST_NUMBER for value in numbers)
    known = facts.placement in ("adapters", "folder") and facts.pooling in ("last", "mean", "sqrt")
    ensemble = facts.format == 2 and 2 <= len(facts.member_means) <= MOST_MEMBERS
    if not (finite and known and facts.deviation > 0 and (ensemble or (facts.format == 1 and not means))):
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
    """A trained reward model: adapters and head on a shared trunk, or a model of its own; or several on one trunk."""

    def __init__(self, trunk: Trunk, weights: Weights, facts: RewardFacts, others: Sequence[Weights] = ()) -> None:
        """Join a trunk, the weights on it (with the head), and the facts; `others`: further members of an ensemble."""
        self.trunk = trunk
        self.weights = weights
        self.facts = facts
        self.members = (weights, *others)

    def raw(self, sequences: Sequences) -> mx.array:
        """Raw outputs [B] for whole texts, an ensemble's mean; see `raw_of` for shared prompts."""
        return joined([self.raw_of(member, sequences) for member in range(len(self.members))])

    def raw_of(self, member: int, sequences: Sequences) -> mx.array:
        """A member's raw outputs [B]; prompts may be shared where only the last token's state is read."""
        weights = self.members[member]
        with self.trunk.using(weights):
            return apply_head(weights.arrays, text_states(self.trunk, sequences, self.facts.pooling))

    def of_texts(self, texts: Sequence[Sequence[int]]) -> Floats:
        """Every member's raw outputs [M, n] for any number of texts, in their order."""
        return np.stack([text_outputs(self.trunk, member, texts, self.facts.pooling) for member in self.members])

    @property
    def shares_prompts(self) -> bool:
        """Whether `raw` may be given shared prompts."""
        return self.facts.pooling == "last" and self.trunk.capabilities.shares

    def normalised(self, raw: mx.array) -> mx.array:
        """Scores of mean 0 and deviation 1 on the reference texts."""
        return (raw - self.facts.mean) / self.facts.deviation

    def member_scores(self, raw: Sequence[mx.array]) -> list[mx.array]:
        """Every member's scores, on the scale of the ensemble's, from its own raw outputs."""
        means = self.facts.member_means or (self.facts.mean,)
        return [(own - mean) / self.facts.deviation for own, mean in zip(raw, means, strict=True)]

    def points(self, raw: mx.array) -> mx.array | None:
        """Predicted ratings in rating points, where the model was trained on ratings."""
        if self.facts.slope is None or self.facts.intercept is None:
            return None
        return raw * self.facts.slope + self.facts.intercept


def joined(raw: Sequence[mx.array]) -> mx.array:
    """The raw output of an ensemble from its members': their mean."""
    return raw[0] if len(raw) == 1 else mx.stack(list(raw)).mean(axis=0)


def member_file(number: int) -> str:
    """The file of an ensemble's member, counted from 1: what it lays on the trunk, and its head."""
    return f"member-{number}.safetensors"


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
        trunk = shared
    else:
        trunk = load_trunk(folder, dtype=dtype)
    first, *others = load_members(folder, trunk, facts)
    return RewardModel(trunk, first, facts, others)


def load_members(folder: Path, trunk: Trunk, facts: RewardFacts) -> list[Weights]:
    """The weights on a trunk, with the head, of a reward model's members, or of the only one.

    Raises:
        ModelError: a file is missing or damaged, or doesn't fit the trunk.
    """
    if facts.members == 1:
        head = _checked_head(folder / HEAD_FILE, read_arrays(folder / HEAD_FILE), trunk)
        body = load_adapters(folder, trunk.adapted) if facts.placement == "adapters" else Weights({})
        return [body.holding({**body.arrays, **head})]
    found = []
    for number in range(1, facts.members + 1):
        file = folder / member_file(number)
        arrays = read_arrays(file)
        head = _checked_head(file, {name: array for name, array in arrays.items() if name.startswith(HEAD)}, trunk)
        own = {name: array for name, array in arrays.items() if not name.startswith(HEAD)}
        if facts.placement == "adapters":
            body = fitting_adapters(file, own, adapters_scale(folder), trunk.adapted)
        else:
            body = Weights(_checked_model(file, own, trunk, whole=number > 1))
        found.append(body.holding({**body.arrays, **head}))
    return found


def _checked_head(file: Path, head: Mapping[str, mx.array], trunk: Trunk) -> dict[str, mx.array]:
    expected = {name: array.shape for name, array in new_head(trunk.width).items()}
    if {name: array.shape for name, array in head.items()} != expected:
        raise ModelError(f"{file}: not a scalar head for states of size {trunk.width}")
    if not all(mx.isfinite(array).all().item() for array in head.values()):
        raise ModelError(f"{file}: contains NaN or infinity; the weights are damaged")
    return {name: array.astype(mx.float32) for name, array in head.items()}


def _checked_model(file: Path, arrays: Mapping[str, mx.array], trunk: Trunk, *, whole: bool) -> dict[str, mx.array]:
    """A member's own weights in the trunk's type; the first member's are those in the folder's model.safetensors."""
    expected = {name: array.shape for name, array in trunk.base.items()} if whole else {}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise ModelError(f"{file}: its weights aren't those of a member of this ensemble")
    if not all(mx.isfinite(array).all().item() for array in arrays.values()):
        raise ModelError(f"{file}: contains NaN or infinity; the weights are damaged")
    cast = {name: array.astype(trunk.base[name].dtype) for name, array in arrays.items()}
    mx.eval(cast)
    return cast
