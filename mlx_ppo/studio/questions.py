"""Which pair is asked about next, to whom, and in which order its two sides are shown."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.errors import harmless
from mlx_ppo.studio.lines import Lines, Row
from mlx_ppo.studio.project import is_text

MODES = ("pair", "rating", "rewrite")
REPEAT_EVERY, REPEAT_AFTER = 10, 8  # one question in so many is an old one, answered at least so many answers ago
AGAIN = "#2"
_LEASE_SECONDS = 600.0

# Among the pairs that could be asked about now, the one to ask about.
Choose = Callable[[Sequence[Row]], Row | None]


class Question(NamedTuple):
    """What a person is shown."""

    id: str  # mode, set and number of the pair; `AGAIN` behind it where it was asked before
    mode: str
    pair: Row
    swapped: bool  # the pair's second completion is on the left

    def shown(self) -> Row:
        """What the page gets: no word on which model wrote what."""
        left, right = ("b", "a") if self.swapped else ("a", "b")
        base: Row = {"question": self.id, "kind": self.mode, "prompt": harmless(self.pair["shown"])}
        if self.mode == "pair":
            cut = {"left": self.pair["cut"][left], "right": self.pair["cut"][right]}
            return {**base, "left": harmless(self.pair[left]), "right": harmless(self.pair[right]), "cut": cut}
        text = self.pair[left] if self.mode == "rewrite" else harmless(self.pair[left])  # that one is typed over
        return {**base, "completion": text, "cut": self.pair["cut"][left]}

    def kept(self) -> Row:
        """What stands in the answer's row beside the answer."""
        left, right = ("b", "a") if self.swapped else ("a", "b")
        base: Row = {"question": self.id, "kind": self.mode, "set": self.pair["set"], "prompt": self.pair["prompt"]}
        if self.mode == "pair":
            sides = {"left": self.pair[left], "right": self.pair[right]}
            return {**base, **sides, "left_by": self.pair["by"][left], "right_by": self.pair["by"][right]}
        return {**base, "completion": self.pair[left], "by": self.pair["by"][left]}


class Set:
    """The pairs that were sampled for one purpose, a file of them, and who is being asked about which."""

    def __init__(self, file: Path) -> None:
        """The set's name is that of the file; more pairs may come."""
        self.name = file.stem
        self._lines = Lines(file, is_pair)
        self._pairs: dict[str, Row] = {}
        self._leases: dict[str, tuple[str, float]] = {}  # question: tab, when
        self._lock = threading.Lock()

    def pairs(self) -> dict[str, Row]:
        """All pairs by number."""
        with self._lock:
            self._lines.read()
            if len(self._pairs) != len(self._lines.rows):
                self._pairs = {str(row["id"]): {**row, "set": self.name} for row in self._lines.rows}
            return self._pairs

    def open(self, mode: str, standing: Mapping[str, Row]) -> list[Row]:
        """The pairs without an answer in this mode."""
        return [pair for number, pair in self.pairs().items() if f"{mode}:{self.name}/{number}" not in standing]

    def next(
        self, mode: str, standing: Mapping[str, Row], tab: str, seed: int, choose: Choose | None
    ) -> Question | None:
        """The next question for a tab; the one it has and hasn't answered comes again.

        Args:
            mode: one of `MODES`.
            standing: the answers that count, oldest first.
            tab: who asks; others aren't asked the same at the same time.
            seed: of the order, of the sides, and of what is asked again.
            choose: picks among the open pairs; where it is missing or picks none, their order is a random one.
        Returns:
            None where no pair is open.
        """
        free = self.open(mode, standing)
        with self._lock:
            now = time.monotonic()
            old = [name for name, (_, when) in self._leases.items() if name in standing or now - when > _LEASE_SECONDS]
            for name in old:
                del self._leases[name]
            held = next(
                (name for name, (owner, _) in self._leases.items() if owner == tab and name.startswith(mode)), None
            )
            if held is not None:
                question = self._question(held, mode, seed)
                if question is not None:
                    self._leases[held] = (tab, now)
                    return question
            name = self._again(mode, standing, seed) or ""
            if not name:
                free = [pair for pair in free if f"{mode}:{self.name}/{pair['id']}" not in self._leases]
                if not free:
                    return None
                pair = choose(free) if choose is not None and mode == "pair" else None
                pair = pair or min(free, key=lambda pair: _mixed(seed, pair["id"]))
                name = f"{mode}:{self.name}/{pair['id']}"
            self._leases[name] = (tab, now)
            return self._question(name, mode, seed)

    def ask_again(self, name: str, tab: str) -> None:
        """Let a question be a tab's next one."""
        with self._lock:
            for held in [held for held, (owner, _) in self._leases.items() if owner == tab]:
                del self._leases[held]
            self._leases[name] = (tab, time.monotonic())

    def find(self, name: str, seed: int) -> Question | None:
        """The question of this name."""
        mode = name.partition(":")[0]
        self.pairs()
        return self._question(name, mode, seed) if mode in MODES else None

    def _again(self, mode: str, standing: Mapping[str, Row], seed: int) -> str | None:
        """An old question to ask again, where it is time for one."""
        start = f"{mode}:{self.name}/"
        asked = [name for name in standing if name.startswith(start)]
        again = {name for name in asked if name.endswith(AGAIN)}
        first = [name for name in asked if name not in again]
        if mode != "pair" or len(first) // REPEAT_EVERY <= len(again):
            return None
        old = [
            name
            for name in first[:-REPEAT_AFTER]
            if standing[name]["verdict"] != "skip" and name + AGAIN not in again and name + AGAIN not in self._leases
        ]
        return min(old, key=lambda name: _mixed(seed, name)) + AGAIN if old else None

    def _question(self, name: str, mode: str, seed: int) -> Question | None:
        number = name.removeprefix(f"{mode}:{self.name}/").removesuffix(AGAIN)
        pair = self._pairs.get(number)
        if pair is None:
            return None
        swapped = bool(_mixed(seed, f"{self.name}/{number}") % 2) != name.endswith(AGAIN)
        return Question(name, mode, pair, swapped)


def is_pair(row: Row) -> bool:
    """Whether a line is one that the process which samples pairs writes."""
    cut, by = row.get("cut"), row.get("by")
    return (
        all(isinstance(row.get(key), str) and is_text(row[key]) for key in ("id", "shown", "a", "b"))
        and isinstance(row.get("prompt"), str | list)
        and isinstance(cut, dict)
        and all(isinstance(cut.get(side), bool) for side in "ab")
        and isinstance(by, dict)
        and all(isinstance(by.get(side), str) for side in "ab")
    )


def _mixed(seed: int, name: Any) -> int:
    """A number without a pattern, the same for the same seed and name."""
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def verdict_on(row: Row, source: str) -> float | None:
    """1 where a source's completion won a pair, 0 where it lost, a half for a tie; None where that isn't known."""
    verdict = row.get("verdict")
    if verdict in ("tie", "bad"):
        return 0.5
    if verdict not in ("left", "right") or row.get("left_by") == row.get("right_by"):
        return None
    return 1.0 if row.get(f"{verdict}_by") == source else 0.0


def agreement(standing: Mapping[str, Row]) -> tuple[int, int]:
    """How many questions were answered twice, and how many of them alike, sides counted."""
    turned = {"left": "right", "right": "left"}
    both = [(standing[name.removesuffix(AGAIN)], row) for name, row in standing.items()
            if name.endswith(AGAIN) and name.removesuffix(AGAIN) in standing]  # fmt: skip
    alike = sum(first["verdict"] == turned.get(second["verdict"], second["verdict"]) for first, second in both)
    return len(both), alike


def pace(standing: Mapping[str, Row], last: int = 20) -> float | None:
    """Answers a minute, by the median time of the last ones; None before there are three."""
    times = sorted(float(row["seconds"]) for row in list(standing.values())[-last:] if row.get("seconds"))
    return 60 / times[len(times) // 2] if len(times) > 2 and times[len(times) // 2] > 0 else None
