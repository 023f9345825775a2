"""The figures of a run: which columns of its log each shows, with the sentences of `mlx_ppo.runs.metrics`."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_ppo.runs.metrics import BY_KEY, METRICS, NORMAL, NORMAL_SUPERVISED, SUPERVISED

Column = list[float | None]

SHARE, PLANNED = "share/", "planned"  # of a phase's peak in its plan; the plan's largest phase, in GiB
_SUPERVISED = {metric.key: metric for metric in SUPERVISED}


@dataclass(frozen=True)
class Figure:
    """One picture with its words."""

    group: str
    title: str
    keys: tuple[str, ...] = ()  # columns; those that a run lacks are left out
    prefix: str = ""  # or all columns whose names begin so
    band: tuple[str, str] | None = None  # columns between which the picture is shaded
    form: str = ""  # how values are written; by default that of the first column
    sentence: str = ""  # by default those of the columns
    normal: str = ""
    log: bool = False  # logarithmic; values of 0 and below are left out
    frontier: bool = False  # score against the square root of the KL

    def document(self, present: Collection[str]) -> dict[str, Any] | None:
        """The figure for a page; None where the logs have nothing for it.

        Args:
            present: the columns that the logs have.
        """
        keys = [key for key in self.keys if key in present]
        if self.prefix:
            keys += sorted(key for key in present if key.startswith(self.prefix))
        if not keys or (self.frontier and len(keys) < 2):
            return None
        scale = "; the scale is logarithmic, and a value of 0 isn't drawn" if self.log else ""
        sentences = [_sentence(key, alone=len(self.keys) == 1) for key in keys] if not self.sentence else []
        band = self.band if self.band is not None and set(self.band) <= set(present) else None
        return {
            **asdict(self),
            "keys": keys,
            "labels": [self._label(key) for key in keys],
            "band": band,
            "form": self.form or _metric(keys[0]).form,
            "sentence": (self.sentence or "; ".join(sentences)) + scale,
            "normal": self.normal or _normal(keys[0]),
        }

    def _label(self, key: str) -> str:
        if self.prefix and key.startswith(self.prefix):
            return key.removeprefix(self.prefix)
        return "planned" if key == PLANNED else _metric(key).label


_EARNS, _WRITES = "What it earns, and what that costs", "What it writes"
_LEARNS, _NEEDS, _REST = "How it learns", "Time and memory", "Settings, losses, and the rest"

TRAIN = (
    Figure(_EARNS, "Score", ("score", "score_median"), band=("score_low", "score_high"),
           sentence="mean and median score of the responses, all sources weighted, before the KL penalty; eight of ten "
           "responses lie in the shaded band"),
    Figure(_EARNS, "Score by source", prefix="score/",
           sentence="mean score that each reward source gives, before weights, penalties and clipping",
           form="+.3f", normal="sources rise together; one that falls while another rises is paid for by it"),
    Figure(_EARNS, "Rating points", prefix="points/", form="+.3f",
           sentence="the rating that people would give, as the reward model predicts it",
           normal="rises with the score; beyond the ratings that the reward model learned from, it guesses"),
    Figure(_EARNS, "Total reward", ("total_reward",)),
    Figure(_EARNS, "KL to the reference", ("kl",)),
    Figure(_EARNS, "The frontier: score against √KL", ("score", "kl"), frontier=True, form="+.3f",
           sentence="what the score costs: each point is an iteration, further right is further from the reference; "
           "paler points are earlier",
           normal="rises steeply, then bends; where it runs to the right without rising, KL is spent for nothing"),
    Figure(_WRITES, "Entropy", ("entropy",)),
    Figure(_WRITES, "Length", ("length",)),
    Figure(_WRITES, "Share finished", ("finished",)),
    Figure(_WRITES, "Repetition", ("repetition",)),
    Figure(_WRITES, "Different pairs of tokens", ("distinct_2",)),
    Figure(_EARNS, "Disagreement of an ensemble", prefix="disagreement/",
           sentence="mean over the responses of the deviation of the members' scores: how unsure an ensemble of reward "
           "models is of itself",
           normal="rises where the policy leaves what the members have seen; score.combine = 'cautious' holds it back"),
    Figure(_WRITES, "Beyond the reward model's training", prefix="beyond/", form=".0%",
           sentence="share of the responses that score above every text the reward model was trained on, where it only "
           "guesses", normal="a few in a hundred at most"),
    Figure(_LEARNS, "Clipped tokens", ("clip_low", "clip_high")),
    Figure(_LEARNS, "Ratio: distance of an update", ("kl_old",)),
    Figure(_LEARNS, "Ratio: effective samples", ("effective_samples",)),
    Figure(_LEARNS, "Ratio: errors at the start of an update", ("ratio_error", "logprob_error"), log=True),
    Figure(_LEARNS, "Gradient norms", ("policy_norm", "critic_norm"),
           sentence="norms of the policy's and the critic's gradient before clipping, mean over the update"),
    Figure(_LEARNS, "Explained variance of the critic", ("explained_variance",)),
    Figure(_LEARNS, "Signal", ("signal",)),
    Figure(_LEARNS, "Deviation of the scores", ("score_deviation",)),
    Figure(_NEEDS, "Tokens a second", ("tokens_per_second",)),
    Figure(_NEEDS, "Seconds by phase", ("seconds",), prefix="seconds/",
           sentence="time of the iteration, and of each phase of it",
           normal="steady; the rollout and the update of the policy take most"),
    Figure(_NEEDS, "Memory", ("memory", PLANNED),
           sentence="GiB at mlx's peak in the iteration, freed buffers not counted, and what was planned for the "
           "largest phase"),
    Figure(_NEEDS, "Memory of each phase against its plan", prefix=SHARE, form=".0%",
           sentence="peak of each phase as a share of what was planned for it", normal="at or below 100 %"),
)  # fmt: skip


def figures(present: Collection[str], *, supervised: bool) -> list[dict[str, Any]]:
    """What a page draws: each as `Figure.document` says, columns that no figure names in one of their own."""
    if supervised:
        drawn = [Figure("Training", _title(metric.label), (metric.key,)) for metric in SUPERVISED]
    else:
        named = {key for figure in TRAIN for key in (*figure.keys, *(figure.band or ()))} | {"time"}
        rest = [metric for metric in METRICS if metric.key not in named]
        drawn = [*TRAIN, *(Figure(_REST, _title(metric.label), (metric.key,)) for metric in rest)]
    documents = [figure.document(present) for figure in drawn]
    return [{"id": f"figure-{number}", **found} for number, found in enumerate(documents) if found is not None]


def _title(label: str) -> str:
    return label[:1].upper() + label[1:]


def _metric(key: str) -> Any:
    return BY_KEY.get(key) or _SUPERVISED.get(key) or BY_KEY[key.partition("/")[0]]


def _sentence(key: str, *, alone: bool) -> str:
    metric = _metric(key)
    return str(metric.sentence if alone else f"{metric.label}: {metric.sentence}")


def _normal(key: str) -> str:
    return NORMAL.get(key) or NORMAL_SUPERVISED.get(key, "")


def thinned(
    columns: Mapping[str, Column], x: Sequence[float], buckets: int
) -> tuple[int, list[float], dict[str, Column]]:
    """Columns for a picture with less points than rows, that hides no peak.

    Rows are taken together, so many at a time; of each such bucket two points are left, at its first and last row:
    a column's lowest and highest value, in their order. The first and the last row stay as they are.

    Args:
        columns: each as long as `x`.
        x: what they are drawn over.
        buckets: at most.
    Returns:
        rows in a bucket (1: nothing was taken together), the places, and the columns over them.
    """
    count = len(x)
    if count <= 2 * buckets:
        return 1, list(x), {key: [rounded(value) for value in column] for key, column in columns.items()}
    size = -(-(count - 2) // max(buckets - 2, 1))
    bounds = [(start, min(start + size, count - 1)) for start in range(1, count - 1, size)]
    places = [x[0], *(x[row] for start, end in bounds for row in sorted({start, end - 1})), x[-1]]
    found: dict[str, Column] = {}
    for key, column in columns.items():
        extremes = (value for start, end in bounds for value in _extremes(column[start:end]))
        found[key] = [rounded(value) for value in (column[0], *extremes, column[-1])]
    return size, places, found


def _extremes(values: Column) -> Column:
    if len(values) == 1:
        return values
    known = [(value, row) for row, value in enumerate(values) if value is not None]
    if not known:
        return [None, None]
    low, high = min(known), max(known)
    return [low[0], high[0]] if low[1] <= high[1] else [high[0], low[0]]


def frontier(kl: Column, score: Column, x: Sequence[float], most: int) -> list[list[float]]:
    """Points [square root of the KL, score, step]: every k-th iteration's, and the last one's."""
    if not x:
        return []
    every = -(-len(x) // most)
    rows = [*range(0, len(x) - 1, every), len(x) - 1]
    return [point for row in rows if (point := frontier_point(kl[row], score[row], x[row])) is not None]


def frontier_point(kl: float | None, score: float | None, step: float) -> list[float] | None:
    """A point of `frontier`; a KL below 0, which is chance, counts as 0. None where something isn't known."""
    if kl is None or score is None:
        return None
    return [float(f"{math.sqrt(max(kl, 0.0)):.5g}"), float(f"{score:.5g}"), step]


def rounded(value: float | None) -> float | None:
    """Five digits; None for what isn't a number."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
