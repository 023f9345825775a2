"""A model in another process that is asked: several questions at a time, each again where it must, none twice."""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mlx_ppo.config.addresses import parse_address
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.errors import ConfigError, JudgeLost, RunError, printable
from mlx_ppo.rewards.judge_answers import ANSWERS, Answers, key_of
from mlx_ppo.rewards.judge_questions import Question, Value
from mlx_ppo.rewards.judge_server import JudgeServer, LostError, UselessError

_KEY = re.compile(r"[!#-\[\]-~]{1,4096}")  # nothing that a header or JSON would write otherwise
_TRIAL = 8  # tokens of an answer by which a judge shows that it is there
_LOOK = 0.5  # seconds between two looks for a signal
_LONGEST_WAIT = 8.0  # seconds before a question is asked again; the first wait is 0.5, each further one twice as long


class Surroundings(NamedTuple):
    """What a judge has from the run that it serves."""

    folder: Path | None = None  # where answers are kept
    samples: int = 1  # completions of a prompt, one after the other
    seed: int = 0
    check: Callable[[], None] = lambda: None  # may end the questions by an exception, as a signal does


class _Asked(NamedTuple):
    """How a question ended."""

    value: Value | None
    requests: int
    seconds: float  # that these took
    why: str  # there is no value


def _key(variable: str | None) -> str | None:
    """The key in an environment variable."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"reward.key_env: the environment variable {variable} isn't set; put the judge's key in it")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"reward.key_env: what {variable} holds can't be sent as a key; it has spaces or other signs")
    return key


class Judge:
    """Asks one model at one address."""

    def __init__(self, source: RewardSource, surroundings: Surroundings) -> None:
        """Nothing is asked yet; `mlx_ppo.config.checks` has found the source to be right.

        Raises:
            RunError: the answers that are kept can't be read.
            ConfigError: the environment has no key, or it can't be sent.
        """
        assert source.address is not None and source.model is not None
        address, most, key = parse_address(source.address), source.answer_tokens, _key(source.key_env)
        self._server = JudgeServer(address, source.model, timeout=source.timeout, max_tokens=most, key=key)
        self._source = source
        self._around = surroundings
        self._answers = Answers(surroundings.folder)
        self._ending = threading.Event()
        self.described = printable(f"the judge {source.model} at {address}")
        self.requests = 0  # in all
        self.spent = 0.0  # seconds that they took, those at the same time each for itself
        self.first_useless = ""  # why a question of the last call has no value: the first of them

    @property
    def damaged(self) -> list[str]:
        """A line, where answers that were kept aren't as they were."""
        lines = self._answers.damaged
        if not lines:
            return []
        where = printable(f"{self._around.folder}/{ANSWERS}:{lines[0]}")
        return [f"warning: {where}: damaged ({len(lines)} lines of this file are); what they answered is asked again"]

    def start(self) -> None:
        """Ask something, so that a judge that isn't there is found before training; not where it has answered before.

        Raises:
            JudgeLost: it isn't there, or gives no completions.
        """
        if len(self._answers):
            return
        try:
            trial = [{"role": "user", "content": "Answer with the number 1 and nothing else."}]
            self._server.ask(trial, at_most=_TRIAL)  # a model that goes on talking mustn't cost a whole answer
        except UselessError as error:
            if not error.answered:
                raise JudgeLost(f"{self.described} can't be used: {error}") from None
        except LostError as error:
            raise JudgeLost(
                f"{self.described} can't be reached: {error}; start its server or mend the address"
            ) from None

    def ask(self, questions: Sequence[Question], *, most: float) -> list[Value | None]:
        """The value of each question's answer, None where no attempt gave a usable one; the order decides nothing.

        What has an answer is kept at once; that a question has none, only when all are done.

        Args:
            questions: equal ones are asked once.
            most: share of the questions that may stay without a value; more of them, or all, end it.
        Raises:
            JudgeLost: the server can't be reached, or too many questions stay without a value.
        """
        keys = [key_of(self._server.model, question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._answers}
        without = [key for key in keys if key in self._answers and self._answers[key] is None]
        failed: dict[str, str] = {}
        pool = ThreadPoolExecutor(self._source.parallel, "judge")
        pending = {pool.submit(self._one, question): key for key, question in new.items()}
        try:
            while pending:
                done, _ = wait(pending, _LOOK, FIRST_COMPLETED)
                for future in done:
                    self._note(pending.pop(future), future, failed)
                lost = len(without) + sum(key in failed for key in keys)
                if failed and (lost > most * len(keys) or lost == len(keys)):
                    what = f"{lost} of {len(keys)} questions without a usable answer"
                    raise JudgeLost(f"{self.described} left {what}; the first: {next(iter(failed.values()))}")
                self._around.check()
        except BaseException:
            self.close()
            pool.shutdown(wait=True, cancel_futures=True)
            self._keep(pending)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for key in failed:
            self._answers.keep(key, None)
        self.first_useless = next(iter(failed.values()), "one that had none when it was asked before")
        return [self._answers[key] for key in keys]

    def close(self) -> None:
        """Ask nothing more; questions that are open end."""
        self._ending.set()
        self._server.abort()

    def _keep(self, pending: Mapping["Future[_Asked]", str]) -> None:
        """Keep the answers that came in while another one failed."""
        for future, key in pending.items():
            if not future.cancelled() and future.exception() is None and future.result().value is not None:
                with suppress(RunError):  # a full disk may be why all ends
                    self._answers.keep(key, future.result().value)

    def _note(self, key: str, future: "Future[_Asked]", failed: dict[str, str]) -> None:
        try:
            found = future.result()
        except LostError as error:
            raise JudgeLost(f"{self.described} was lost: {error}") from None
        self.requests += found.requests
        self.spent += found.seconds
        if found.value is None:
            failed[key] = found.why
        else:
            self._answers.keep(key, found.value)

    def _one(self, question: Question) -> _Asked:
        """Ask a question until it has a usable answer; after nonsense, in other words.

        Raises:
            LostError: the last attempt found no server, or all is to end.
        """
        messages, last, why, seconds = question.messages, self._source.retries, "", 0.0
        for attempt in range(last + 1):
            began = time.monotonic()
            try:
                said = self._server.ask(messages)
                seconds += time.monotonic() - began
                return _Asked(question.read(said), attempt + 1, seconds, "")
            except LostError:
                if attempt == last:
                    raise
                self._pause(attempt)
            except UselessError as error:
                seconds += time.monotonic() - began
                why, messages = str(error), question.again(error.said)
                if not error.answered and attempt < last:
                    self._pause(attempt)
            except ValueError as error:
                why, messages = f"{error}: {self._server.shown(said)}", question.again(said)
        return _Asked(None, last + 1, seconds, why)

    def _pause(self, attempt: int) -> None:
        if self._ending.wait(min(_LOOK * 2**attempt, _LONGEST_WAIT)):
            raise LostError("it was ended")
