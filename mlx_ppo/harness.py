"""Tasks of lm-evaluation-harness, answered by a policy as it was trained: without a fused folder.

The harness asks three things of a model: how probable a continuation is, how probable a text is, and what the model
writes. Conventions are those of its own model for Hugging Face: spaces at a context's end belong to the continuation,
what is too long loses its beginning, and where a model has no BOS, EOS stands before an empty context.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import mlx.core as mx
import numpy as np
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.passages import Passage, Passages
from mlx_ppo.errors import ConfigError, DataError, UserError
from mlx_ppo.forgetting import losses, windows
from mlx_ppo.models.roles import token_statistics
from mlx_ppo.runs.targets import Target
from mlx_ppo.runtime.offline import NetworkRefused
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers.load import completion_text

_ROWS, _TOKENS = 64, 4096  # of a forward pass
_LOGITS = 256  # positions whose logits are there together
_WINDOW = 1024  # tokens of a text that are read together, where the model has as many positions
_ANSWER = 256  # tokens of an answer, where a task doesn't say it
_LONGEST_ERROR = 200  # characters
_OFFLINE = ("offline", "couldn't reach", "doesn't exist on the hub", "couldn't find", "localentrynotfound")
_Pair = tuple[tuple[int, ...], tuple[int, ...]]


class How(NamedTuple):
    """What is measured, the same for every model."""

    tasks: tuple[str, ...]  # names of tasks, groups or tags
    include: Path | None  # a folder with tasks of one's own
    limit: int | None  # documents of a task, the first ones
    shots: int | None  # examples before a question; None: as the task has it
    chat: bool  # questions are put into the model's chat template


class PolicyLM(LM):  # type: ignore[misc]
    """A target as the harness's model."""

    def __init__(self, target: Target, *, chat: bool) -> None:
        """Nothing is computed yet."""
        super().__init__()
        self._target, self._chat = target, chat
        self._tokenizer: Any = target.trunk.tokenizer
        context = target.trunk.context
        self._most = context.tokens if context is not None else math.inf
        self.cut = 0  # contexts and prompts so far that lost their beginning

    @property
    def tokenizer_name(self) -> str:
        """Which template was used, for the harness."""
        return self._target.trunk.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the model reads it; without the last flag the last message is the beginning of the answer."""
        if add_generation_prompt:
            return str(self._tokenizer.chat_text(chat_history, add_generation_prompt=True))
        *before, begun = chat_history
        return str(self._tokenizer.chat_text(before, add_generation_prompt=True)) + begun["content"]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of pairs (context, continuation): log P(continuation | context), and whether greedy decoding writes it."""
        rows, trunk = [self._pair(*request.args) for request in requests], self._target.trunk
        found = [(0.0, True)] * len(rows)
        lengths = [len(context) + len(after) for context, after in rows]
        with trunk.using(self._target.weights):
            for group in length_batches(lengths, max_rows=_ROWS, max_tokens=_TOKENS, seed_parts=None):
                chosen = sorted(group)  # continuations of a context are together
                contexts, after = zip(*(rows[row] for row in chosen), strict=True)
                read = make_sequences(contexts, after, sharing=trunk.capabilities.shares)
                states = trunk.response_states(read)
                logprobs, _ = token_statistics(trunk, states, read, temperature=1.0)
                likeliest = [
                    mx.argmax(trunk.logits(states[at : at + _LOGITS]), axis=-1)
                    for at in range(0, states.shape[0], _LOGITS)
                ]
                right = read.spread((mx.concatenate(likeliest) == read.targets).astype(mx.float32))
                sums, same = np.array(logprobs, np.float64).sum(axis=1), np.array(right).sum(axis=1)
                for row, total, count in zip(chosen, sums, same, strict=True):
                    found[row] = (float(total), int(count) == len(rows[row][1]))
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of texts (text,): log P of all of it, in windows of which half was read before (`mlx_ppo.forgetting`)."""
        texts = [self._context(request.args[0]) for request in requests]
        start = [] if self._bos else [self._tokenizer.eos_id]
        rows = [(*start, *tokens) for tokens in texts]
        passages = tuple(Passage(row, (-1, *[number] * (len(row) - 1))) for number, row in enumerate(rows))
        parts = windows(passages, int(min(_WINDOW, self._most)), sum(map(len, rows)), rows[0][0] if rows else None)
        read = losses(self._target.trunk, self._target.weights, parts, Passages(passages, len(rows), "texts"))
        return [-value for value in read.nats.tolist()]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Of (prompt, settings): what greedy decoding writes, up to the first of the settings' `until`.

        Raises:
            ConfigError: the settings ask for samples.
        """
        found, bounds = [""] * len(requests), [request.args[1].get("max_gen_toks", _ANSWER) for request in requests]
        if any(request.args[1].get("do_sample") for request in requests):
            raise ConfigError("it asks for samples (do_sample), and answers are greedy here; change the task")
        for bound in sorted(set(bounds)):
            rows = [row for row, own in enumerate(bounds) if own == bound]
            prompts = [self._shortened(self._context(requests[row].args[0]), bound) for row in rows]
            how = Sampling((0, "harness"), bound, 0.0, batch_size=_ROWS, supports=False)
            asked = Asked(prompts, range(len(rows)), [{}] * len(rows))
            rollout = generate(self._target.trunk, self._target.weights, asked, how)
            for row, prompt, response in zip(rows, rollout.prompts, rollout.responses, strict=True):
                ends = requests[row].args[1].get("until") or []
                text = completion_text(self._tokenizer, prompt, response)
                for end in [ends] if isinstance(ends, str) else ends:
                    text = text.partition(end)[0] if end else text
                found[row] = text
        return found

    @property
    def _bos(self) -> bool:
        """Whether texts begin with a token of their own."""
        return bool(self._tokenizer.encode("", bos=True))

    def _context(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, bos=not self._chat))

    def _pair(self, context: str, after: str) -> _Pair:
        bare = context.rstrip()
        whole, before = self._context(context + after), self._context(bare)
        if not bare:
            before = before or (self._tokenizer.eos_id,)
            whole = whole if whole[: len(before)] == before else (*before, *whole)
        start = min(len(before), len(whole) - 1)  # one token may hold the end of one and the beginning of the other
        return self._shortened(whole[:start] or before, len(whole) - start), whole[start:]

    def _shortened(self, tokens: tuple[int, ...], after: int) -> tuple[int, ...]:
        """The end of some tokens that leaves room for so many more; at least one."""
        room = int(max(1, min(self._most - after, len(tokens))))
        self.cut += room < len(tokens)
        return tokens[-room:]


class Figure(NamedTuple):
    """A metric of a task."""

    value: float
    error: float | None  # standard error
    of_each: tuple[float, ...] | None  # of every document, where the value is their mean


class Result(NamedTuple):
    """What a model reached in one of the tasks, by "metric" or "metric, filter"."""

    figures: dict[str, Figure]
    documents: int | None  # None: a group of tasks
    shots: int | None


def measure(target: Target, how: How) -> tuple[dict[str, Result], int]:
    """Every task's result, and how many contexts lost their beginning.

    Raises:
        ConfigError: there is no such task.
        DataError: a task can't be read, or its data aren't on this machine.
    """
    model, found = PolicyLM(target, chat=how.chat), dict[str, Result]()
    manager = _tasks(how)
    for name in how.tasks:
        try:
            said = lm_eval.simple_evaluate(
                model=model, tasks=[name], task_manager=manager, num_fewshot=how.shots, limit=how.limit,
                apply_chat_template=how.chat,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"the task {name}: {error}") from None
        except (UserError, NetworkRefused, MemoryError):
            raise
        except Exception as error:
            raise _failed(f"the task {name}", error) from None
        found |= {each: _result(each, said) for each in said["results"]}
    return found, model.cut


def _tasks(how: How) -> TaskManager:
    """What knows all of the tasks: those of the folder alone where that will do, since the harness has thousands."""
    for defaults in (False, True) if how.include is not None else (True,):
        try:
            include = None if how.include is None else str(how.include)
            manager = TaskManager(include_path=include, include_defaults=defaults)
        except Exception as error:
            raise _failed(f"--include: {how.include}", error) from None
        unknown = [name for name in how.tasks if name not in manager.task_index]
        if not unknown:
            return manager
    raise ConfigError(f"--tasks: lm_eval knows no {unknown[0]!r}; --include names a folder with tasks of your own")


def _failed(what: str, error: Exception) -> DataError:
    """A library's error in a line; it reads files that a user wrote, and may raise anything."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_ERROR]
    if any(word in text.lower() for word in _OFFLINE):
        return DataError(f"{what}: its data aren't on this machine, and nothing is fetched ({text})")
    return DataError(f"{what}: can't be evaluated ({text})")


def _result(name: str, said: dict[str, Any]) -> Result:
    samples = said.get("samples", {}).get(name, [])
    figures = {}
    for key, value in said["results"][name].items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not chosen:
            continue
        error = said["results"][name].get(f"{metric}_stderr,{chosen}")
        each = tuple(row[metric] for row in samples if row.get("filter") == chosen and metric in row)
        plain = len(each) > 1 and all(isinstance(one, int | float) for one in each)
        mean = plain and math.isclose(math.fsum(each) / len(each), value, rel_tol=1e-9, abs_tol=1e-12)
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        figures[shown] = Figure(value, error if isinstance(error, float) else None, each if mean else None)
    documents = len({row["doc_id"] for row in samples}) if samples else None
    return Result(figures, documents, said.get("n-shot", {}).get(name))


def paired_error(before: Sequence[float], after: Sequence[float]) -> float:
    """Standard error of a mean's difference on the same n documents: the deviation of theirs over sqrt(n).

    Raises:
        ValueError: the two differ in length, or there are fewer than two.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError("fewer than two documents")
    mean = math.fsum(differences) / count
    return math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (count - 1) / count)
