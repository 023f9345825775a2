"""Verifiable rewards that are ready to name: what is right is checked, not judged.

A completion is text of a stranger. It is checked in a child process, one at a time: a check that takes too long or too
much memory, or kills the child, costs that completion its score and is counted; the run goes on with a new child.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from mlx_ppo.config.checks import RULE_KEYS, source_problems
from mlx_ppo.config.rewards import RewardSource, Rule
from mlx_ppo.errors import ConfigError, RunError, printable
from mlx_ppo.rewards.rule_worker import boxed, number_of
from mlx_ppo.rewards.scorer import TextScorer
from mlx_ppo.runtime.child import Child, DiedError, GarbledError, HungError, OversizeError

_WORKER = Path(__file__).with_name("rule_worker.py")
_LOAD_SECONDS = 60.0
_LARGEST = 4096  # bytes of an answer: a number or a sentence
_MEMORY = 1 << 30  # bytes that a check may take
_SHOWN = 60


class RewardRule(TextScorer):
    """1 for a completion that keeps a rule, 0 for one that doesn't, or whose check had to be ended."""

    def __init__(self, source: RewardSource) -> None:
        """Keep the settings, which `mlx_ppo.config.checks` has found to be right."""
        assert source.rule is not None
        self.name: str = source.rule
        self._source = source
        self._child: Child | None = None
        self._closed = False
        self._seen = 0  # completions, and those whose check was ended, since `news`
        self._ended: list[str] = []

    @property
    def described(self) -> str:
        """What judges, in words."""
        return f"the rule {self.name!r}"

    def start(self) -> None:
        """Start the child, unless there is one.

        Raises:
            ConfigError: the rule can't be used here.
            RunError: this object is closed, or no child can be started.
        """
        if self._closed:
            raise RunError(f"rule {self.name!r} can't be asked again: it was closed")
        if self._child is not None:
            return
        keys = ("rule", "limit", *RULE_KEYS[self.name])
        settings = {key: value for key, value in self._source.model_dump(mode="json").items() if key in keys}
        self._child = Child(_WORKER, [json.dumps({**settings, "memory": _MEMORY})])
        try:
            ready = self._child.exchange(b"", _LOAD_SECONDS, largest=_LARGEST)
        except (HungError, DiedError, GarbledError) as error:
            self._end()
            raise RunError(f"rule {self.name!r}: its process can't be started: {error or 'no answer'}") from None
        except BaseException:
            self._end()
            raise
        if "error" in ready:
            self._end()
            raise ConfigError(f"rule {self.name!r}: {ready['error']}")

    def score(self, prompts: list[str], completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """1 or 0 for each completion.

        Raises:
            RunError: no child can be started.
        """
        if not len(prompts) == len(completions) == len(records):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(records)} records")
        self._seen += len(completions)
        return [
            self._one(completion, record.get(self._source.field), self._source.pattern)
            for completion, record in zip(completions, records, strict=True)
        ]

    def _one(self, completion: str, answer: Any, pattern: str | None) -> float:
        self.start()
        assert self._child is not None
        request = json.dumps({"completion": completion, "answer": answer, "pattern": pattern}).encode("ascii") + b"\n"
        try:
            found = self._child.exchange(request, self._source.limit, largest=_LARGEST, memory=_MEMORY)
            if "error" not in found and type(found.get("score")) is float and found["score"] in (0.0, 1.0):
                return float(found["score"])
            why = str(found.get("error", "a garbled answer"))
        except HungError:
            why = f"it took longer than {self._source.limit:g} s"
        except OversizeError:
            why = f"it took more than {_MEMORY >> 20} MiB"
        except GarbledError:
            why = "a garbled answer"
        except DiedError as death:
            why = str(death)
        except BaseException:
            self._end()  # the answer to this completion would be taken for the next one's
            raise
        self._end()
        self._ended.append(f"{why}, at {completion[:_SHOWN]!r}{'…' if len(completion) > _SHOWN else ''}")
        return 0.0

    def require_fields(self, records: Iterable[dict[str, Any]]) -> None:
        """Refuse prompts whose records lack the field that the rule compares with, or hold what it can't read.

        Raises:
            ConfigError: names the field, and the prompt.
        """
        if "field" not in RULE_KEYS[self.name]:
            return
        field = self._source.field
        for record in records:
            wrong = ""
            if field not in record:
                has = ", ".join(repr(key) for key in list(record)[:8])
                wrong = f"there are prompts without one (their fields: {has}); add it, or name another by 'field'"
            elif problem := self._problem(record[field]):
                said = str(record.get("prompt", record.get("messages")))
                wrong = f"{problem}, at the prompt {said[:_SHOWN]!r}"
            if wrong:
                raise ConfigError(f"rule {self.name!r} needs the field {field!r} of the prompts: {wrong}")

    def _problem(self, answer: Any) -> str:
        """Why this can't be what is right; "" if it can."""
        if self.name == "code":
            return _problem_of_tests(answer)
        wanted = answer if isinstance(answer, list) else [answer]
        if not wanted or any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in wanted):
            return f"{_cut(answer)} is no text, number or list of these"
        if any(not str(one).strip() for one in wanted):
            return "an empty text would be right"
        if self.name == "number" and any(number_of(str(one)) is None for one in wanted):
            return f"there is no number in {_cut(answer)}"
        if self.name == "math":
            for one in map(str, wanted):
                if self._one(boxed(one), one, None) != 1.0:
                    return f"math-verify can't read {_cut(one)}" + (f": {self._ended.pop()}" if self._ended else "")
        return ""

    def news(self) -> list[str]:
        """How many checks were ended since this was asked last, and why the first one was."""
        seen, ended, self._seen, self._ended = self._seen, self._ended, 0, []
        if not ended:
            return []
        what = f"warning: the rule {self.name!r} scored {len(ended)} of {seen} completions 0 as their check was ended"
        return [printable(f"{what}; the first: {ended[0]}")]

    def close(self) -> None:
        """End the child; does nothing the second time."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


def rule_named(name: str) -> RewardSource:
    """A rule without settings of its own, as a command line names it.

    Raises:
        ConfigError: there is no such rule, or it needs settings.
    """
    try:
        source = RewardSource.model_validate({"kind": "rule", "rule": name})
    except ValueError:
        raise ConfigError(f"no rule {name!r}; there are {', '.join(get_args(Rule))}") from None
    problems = source_problems(source)
    if problems:
        key, problem = problems[0]
        raise ConfigError(f"rule {name!r}: {key}: {problem}; only a run's configuration can say it")
    return source


def _problem_of_tests(tests: Any) -> str:
    if not isinstance(tests, list) or not tests:
        return f"{_cut(tests)} is no list of tests"
    for test in tests:
        whole = isinstance(test, dict) and "output" in test and test.keys() <= {"output", "input", "call"}
        if not whole or not all(isinstance(value, str) for value in test.values()):
            return f"a test is {{'output': TEXT}} with 'input' or 'call', not {_cut(test)}"
    return ""


def _cut(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
