"""Pairs of completions, sampled ahead in a process of its own while a person reads.

Its argument is an `Order` as JSON. It appends to the set's file, goes on where an earlier one stopped, and stays behind
whatever else wants the processors.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.data.prompts import Prompt, PromptStream, load_prompts
from mlx_ppo.errors import ModelError, UserError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import apply_head, load_reward_model, text_states
from mlx_ppo.models.roles import same_tokens
from mlx_ppo.runs.targets import Target, load_target
from mlx_ppo.runtime.offline import refuse_connections
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.studio.lines import Lines, Row, end_torn_line
from mlx_ppo.studio.order import NO_MORE, Order
from mlx_ppo.studio.selection import BY_REWARD, packed
from mlx_ppo.tokenizers.load import completion_text

_FIRST, _MOST = 2, 16  # prompts that are answered together: few at first, so that nobody waits
_LONGEST_PROMPT = 4096  # tokens
_NICENESS = 10

Tokens = tuple[int, ...]
# Of two completions with their prompt: their states; for each member of an ensemble, what it gives to a above b.
States = Callable[[Sequence[Tokens]], tuple[list[str], list[float]]]


def main(argument: str) -> int:
    """Sample until the set is full; the exit code."""
    with suppress(OSError):
        os.nice(_NICENESS)
    return obey(argument, _filled)


def obey(argument: str, work: Callable[[Order], str]) -> int:
    """Do an order that came as JSON, without a network; print what `work` says, and give the exit code."""
    refuse_connections()
    try:
        said = work(Order(**json.loads(argument)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(said)
    return 0


def _filled(order: Order) -> str:
    done = sample(order)
    return f"{done} pairs in {Path(order.file).name}{'' if done >= order.total else NO_MORE}"


def sample(order: Order) -> int:
    """Append pairs to the set's file until it has as many as ordered, or every prompt was asked twice over.

    Returns:
        How many pairs there are.
    Raises:
        UserError: a model or the prompts can't be read.
    """
    path = Path(order.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a second server may have had the same idea
        kept = Lines(path)
        kept.read()
        return len(kept.rows) if len(kept.rows) >= order.total else _fill(file, kept.rows, order)


def _fill(file: IO[bytes], kept: Sequence[Row], order: Order) -> int:
    writers = [load_target(Path(model)) for model in order.models]
    given = [  # each with its own model's tokens, in the same order
        load_prompts(Path(order.prompts), writer.trunk.tokenizer, max_tokens=_LONGEST_PROMPT, overlong="error").prompts
        for writer in writers
    ]
    states = _states(writers, order.reward)
    streams = [PromptStream(prompts, order.seed) for prompts in given]
    have, at = len(kept), 1 + max((int(row["id"]) for row in kept), default=-1)
    bound = max(2 * len(given[0]), order.total)  # the same completion twice makes no pair
    size = _FIRST
    while have < order.total and at < bound:
        count = min(size, order.total - have, bound - at)
        taken = [[prompt for _, prompt in stream.take(at, count)] for stream in streams]
        rows = list(_pairs(writers, taken, at, order, states))
        end_torn_line(file)
        file.write(b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows))
        file.flush()
        have, at, size = have + len(rows), at + count, min(2 * size, _MOST)
    return have


def _pairs(
    writers: Sequence[Target], prompts: Sequence[Sequence[Prompt]], at: int, order: Order, states: States | None
) -> Iterator[dict[str, Any]]:
    """Two completions of each prompt; those that are the same are left out."""
    sides = 2 if len(writers) == 1 else 1
    written = [_write(writer, own, at, sides, order) for writer, own in zip(writers, prompts, strict=True)]
    for number, prompt in enumerate(prompts[0]):
        both = [answer for each in written for answer in each[number]]
        if both[0].text == both[1].text:
            continue
        names = (*order.models, order.models[0])[:2]
        row = {
            "id": f"{at + number:06}",
            "prompt": prompt.record.get("prompt", prompt.record.get("messages")),
            "shown": prompt.text,
            **{side: answer.text for side, answer in zip("ab", both, strict=True)},
            "cut": {side: not answer.finished for side, answer in zip("ab", both, strict=True)},
            "by": dict(zip("ab", names, strict=True)),
        }
        if states is not None:
            found, leads = states([answer.tokens for answer in both])
            row["states"] = dict(zip("ab", found, strict=True))
            row |= {"leads": leads} if leads else {}
            row["states_by"] = BY_REWARD if order.reward else "model"
        yield row


def _states(writers: Sequence[Target], reward: str) -> States | None:
    """What gives the states by which the next pair is chosen: the reward model's, without one the writer's own.

    A comparison of two models isn't there to teach, so that it has none.
    """
    if len(writers) > 1:
        return None
    members: Sequence[Weights] = (writers[0].weights,)
    trunk, pooling = writers[0].trunk, "mean"
    if reward:
        model = load_reward_model(Path(reward), trunk)
        if not same_tokens(model.trunk, trunk):
            raise ModelError(f"{reward}: its tokenizer differs from that of {trunk.name}; train one on that model")
        trunk, members, pooling = model.trunk, model.members, model.facts.pooling

    def states(texts: Sequence[Tokens]) -> tuple[list[str], list[float]]:
        sequences, each = make_sequences(texts, [()] * len(texts)), []
        for weights in members:
            with trunk.using(weights):
                each.append(text_states(trunk, sequences, pooling))
                mx.eval(each)
        first = [packed(row) for row in np.array(each[0], np.float64)]
        if len(members) == 1:
            return first, []
        scores = [np.array(apply_head(own.arrays, found)) for own, found in zip(members, each, strict=True)]
        return first, [float(one[0] - one[1]) for one in scores]

    return states


class _Answer(NamedTuple):
    """A completion: its text, whether it ended by itself, and its tokens behind the prompt's."""

    text: str
    finished: bool
    tokens: Tokens


def _write(writer: Target, prompts: Sequence[Prompt], at: int, sides: int, order: Order) -> list[list[_Answer]]:
    """For each prompt its completions."""
    how = Sampling((order.seed, "pairs"), order.max_tokens, order.temperature, sides, supports=False)
    how = how._replace(top_k=order.top_k, top_p=order.top_p, min_p=order.min_p)
    tokenizer = writer.trunk.tokenizer
    tokens = [prompt.tokens for prompt in prompts]
    asked = Asked(tokens, range(at, at + len(prompts)), [prompt.record for prompt in prompts])
    rollout = generate(writer.trunk, writer.weights, asked, how)
    finished = np.array(rollout.finished)
    texts = [
        _Answer(completion_text(tokenizer, prompt, response), bool(ended), (*prompt, *response))
        for prompt, response, ended in zip(rollout.prompts, rollout.responses, finished, strict=True)
    ]
    return [texts[row : row + sides] for row in range(0, len(texts), sides)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
