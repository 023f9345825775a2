"""Is a run healthy? Follows the rows of metrics.jsonl with the rules of `health_rules`, and says what they find.

All follows from the rows, so a resumed run says the same.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.runs.health_rules import FLAT, RECENT, RULES, Facts, Row, View, mean

COLLAPSED = "THE POLICY COLLAPSED"  # how the lines above the closing table begin, where it did
SOONEST = 3  # as many after the first step at least
WORSE = 2.0  # how much worse it is said again


class Finding(NamedTuple):
    """A row of health.jsonl: what is wrong, in a sentence that ends with what to change."""

    step: int
    rule: str
    sentence: str
    key: str  # the configuration's, that it names first
    level: str  # "warn", "stop" or "best"


def facts_of(config: TrainConfig, judges: Iterable[str]) -> Facts:
    """What the rules need of a configuration; `judges` are the names of the sources with weight 0."""
    return Facts(
        config.health,
        config.critic_warmup,
        config.rollout.prompts * config.rollout.samples_per_prompt,
        config.optimizer.gradient_clip,
        config.kl.target if config.kl.controller == "adaptive" else None,
        tuple(judges),
    )


class Monitor:
    """Follows a run row by row. Something is said once; again when it has become much worse, or had gone."""

    def __init__(self, facts: Facts) -> None:
        """Nothing was followed yet."""
        self._facts = facts
        self._before: list[Row] = []
        self._start: Row = {}
        self._rows: tuple[Row, ...] = ()
        self._said: dict[str, float] = {}  # severity at which a rule spoke last
        self._quiet: dict[str, int] = {}  # rows since it was last unhealthy
        self.current: dict[str, Finding] = {}  # what is wrong now

    def follow(self, row: Row) -> list[Finding]:
        """Take the next row; what is to be said about it."""
        if row["step"] <= self._facts.warmup + 1:
            self._before.append(row)
            self._start = {key: mean(self._before, key) for key in row if all(key in one for one in self._before)}
            return []
        self._rows = (*self._rows, row)[-2 * FLAT :]
        if len(self._rows) < SOONEST:
            return []
        view = View(self._facts, self._start, self._rows)
        return [found for name in RULES if (found := self._judge(name, view)) is not None]

    def _judge(self, name: str, view: View) -> Finding | None:
        level = getattr(self._facts.section, name)
        if level == "off":
            return None
        try:
            reading = RULES[name](view)
        except KeyError:  # the row has no such column: no critic, or an earlier version wrote it
            return None
        if reading.severity < 1:
            self._quiet[name] = self._quiet.get(name, 0) + 1
            if self._quiet[name] >= RECENT:
                self._said.pop(name, None)
                self.current.pop(name, None)
            return None
        self._quiet[name] = 0
        finding = Finding(int(view.rows[-1]["step"]), name, reading.sentence, reading.key, level)
        self.current[name] = finding
        if name in self._said and reading.severity < WORSE * self._said[name]:
            return None
        self._said[name] = reading.severity
        return finding


def collapsed(current: Mapping[str, Finding]) -> bool:
    """Whether what is wrong together means that the policy writes nothing of use any more."""
    signs = {"entropy", "kl", "unfinished", "repetition", "diversity"} & current.keys()
    if "unfinished" in signs and current["unfinished"].key == "rollout.max_tokens":  # it was so from the start
        signs.remove("unfinished")
    return "repetition" in signs or len(signs) > 1


def verdict(current: Mapping[str, Finding]) -> list[str]:
    """The lines above the table at a run's end: what is still wrong; whether the policy collapsed comes first."""
    lines = [f"health.{found.rule}: {found.sentence}" for found in current.values()]
    if collapsed(current):
        return [f"{COLLAPSED}. A score in the table below is no success; don't use this policy.", *lines]
    return lines
