"""How often the program waits for a GPU: what a token, and a step of the optimizer, may cost beside computing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launches import Counts, counting

from mlx_ppo.compute.choose import using
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.models.load import load_trunk
from mlx_ppo.stages.decoding import Decoder
from mlx_ppo.stages.update import _Step

MakeModel = Callable[..., Path]
MakeWorld = Callable[..., Any]


def test_what_counts() -> None:
    a, b = mx.ones((3, 3)), mx.ones((3,))
    mx.eval(a, b)
    with counting() as counts:
        c = mx.exp(a) @ a
        assert (counts.operations, counts.waits) == (0, 0)
        mx.async_eval(c)
        assert (counts.operations, counts.waits) == (2, 0)
        np.asarray(c), c.tolist()
        assert (counts.operations, counts.waits) == (2, 1), "what has been waited for costs nothing again"
        (b * b).tolist(), float(b[0]), mx.eval(b + b)
        assert (counts.operations, counts.waits) == (6, 4)
    mx.eval(b - b)
    assert counts.operations == 6


def per_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Counts]:
    """What each call of a method costs from now on."""
    found: list[Counts] = []
    method = getattr(owner, name)

    def counted(*given: Any, **named: Any) -> Any:
        with counting() as counts:
            result = method(*given, **named)
        found.append(counts)
        return result

    monkeypatch.setattr(owner, name, counted)
    return found


@pytest.mark.parametrize("ends", [False, True])
def test_a_token_of_every_row_is_waited_for_once(
    make_model: MakeModel, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Where responses have ended, the others' caches are moved together, a block at a time."""
    steps = per_call(monkeypatch, Decoder, "_step")
    with using(PortableEngine()):
        trunk = load_trunk(make_model(eos_token_id=[2, *(range(100, 179) if ends else ())]))
    make_world(given=trunk, max_tokens=8)
    waits = [step.waits for step in steps]
    assert len(waits) == 8 or ends
    assert max(waits[:-1]) == (1 + trunk.blocks if ends else 1), "but for the last tokens, which nothing follows"
    assert max(step.numbers for step in steps) <= 3 * 10, "tokens, log-probabilities, paddings; not the vocabulary"
    print(f"a decoding step: {[step.operations for step in steps]} operations, {waits} waits")


def test_a_step_of_policy_and_critic(
    make_model: MakeModel, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with using(PortableEngine()):
        trunk = load_trunk(make_model(eos_token_id=[2, *range(100, 179)]))
    steps = per_call(monkeypatch, _Step, "run")
    for minibatches in (2, 1):
        make_world(given=trunk).update(epochs=2, minibatches=minibatches, micro_batch=5)
    one, two = steps[3], steps[5]
    assert one.waits <= 13 and two.waits <= one.waits + 4, "a micro-batch more: two gradients, and their sums"
    print(f"a step: {one.operations} operations, {one.waits} waits; two micro-batches: {two.operations}, {two.waits}")
