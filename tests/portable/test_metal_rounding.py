"""PPO's stages in half precision and 4-bit, with the rounding that a Mac's GPU has by mlx's source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from forms import FORMS, dtype_of, in_float32, is_quantised
from recording import gradients_of, judged

from mlx_ppo.bundle import bundle_root
from mlx_ppo.compute import portable
from mlx_ppo.compute.portable import PortableEngine, read_rows
from mlx_ppo.errors import RunError
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

HALF = FORMS[1:]
SEEDS = 8  # 20 with --thorough

MakeTrunk = Callable[..., Trunk]
MakeWorld = Callable[..., Any]


@pytest.mark.parametrize("saving", ["off", "on"])
def test_no_false_stop_in_many_seeds_and_a_real_fault_is_caught(
    trunk_in: MakeTrunk,
    make_world: MakeWorld,
    found: list[tuple[float, float]],
    form: str,
    saving: str,
    pytestconfig: pytest.Config,
) -> None:
    """The fault: scored by the adapters of one step, and updated from those of the next."""
    healthy, faulty = [], []
    for seed in range(20 if pytestconfig.getoption("--thorough") else SEEDS):
        world = make_world(given=trunk_in(form, seed=seed % 5), seed=seed)
        how = {"epochs": 1, "micro_batch": 3, "gradient_checkpointing": saving}
        stats = world.update(minibatches=1, **how)
        assert len(stats.policy_loss) == 1 and np.isfinite(stats.policy_norm).all()
        healthy.append(found[-1])
        with pytest.raises(RunError, match="self-check failed"):
            world.update(minibatches=2, **how)
        faulty.append(found[-1])
    assert np.median([most for most, _ in healthy]) < {"float32": 1e-5, "float16": 0.005}.get(form, 0.05)
    largest, smallest = judged(form, healthy, faulty)
    assert largest < 0.5 and smallest > 1.2


@pytest.mark.parametrize("bounds", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}], ids=str)
def test_truncated_sampling_has_a_ratio_of_1_too(
    trunk_in: MakeTrunk, make_world: MakeWorld, found: list[tuple[float, float]], form: str, bounds: dict[str, float]
) -> None:
    """Scored and updated on the sets that were sampled from, whatever rounding would make of others."""
    for seed in range(5):
        world = make_world(given=trunk_in(form, seed=seed), seed=seed, bounds=bounds)
        assert np.isfinite(np.array(world.batch.old_logprobs)).all()
        world.update(minibatches=1, epochs=1, micro_batch=3)
        off = np.abs(np.array(world.rollout.logprobs) - np.array(world.batch.old_logprobs))
        assert off[np.array(world.rollout.mask)].mean() < {"float32": 1e-5, "float16": 0.01}.get(form, 0.05)
    assert max(share for _, share in found) < 0.5


@pytest.mark.parametrize("form", HALF)
def test_scoring_attends_as_updating_does(
    trunk_in: MakeTrunk,
    make_world: MakeWorld,
    metal: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """Scored over the same rows as updated, every ratio is 1 but for float32.

    With mlx's own attention, scored by its kernel and updated by its single operations, it isn't; with those in
    float32 it is, whichever attention scores.
    """
    sizes = {"samples": 1, "given": trunk_in(form)}
    stats = make_world(**sizes).update(epochs=1, minibatches=1)
    assert stats.first_ratio_error < 1e-5

    def untraced(engine: PortableEngine, body: Any, sequences: Any, read: Any, **_: Any) -> mx.array:
        return read_rows(body, sequences)

    with monkeypatch.context() as scoring:
        scoring.setattr(PortableEngine, "states", untraced)
        metal.update(fused=0, unfused=0)
        world, again = make_world(**sizes), make_world(**sizes)
        assert metal["fused"] and not metal["unfused"]
    assert again.update(epochs=1, minibatches=1).first_ratio_error < 1e-5
    own = lambda attend, *given, planned, **how: attend(*given, **how)  # noqa: E731
    monkeypatch.setattr(portable, "attention_with_gradient", own)
    try:
        error = world.update(epochs=1, minibatches=1).first_ratio_error
    except RunError as stopped:
        error = float(str(stopped).split("up to ")[1].split(",")[0])
    assert error > 1e-3


def test_rows_are_decoded_together(trunk_in: MakeTrunk, make_world: MakeWorld, rows_read: list[int], form: str) -> None:
    for seed in range(5):
        trunk = trunk_in(form, seed=seed)
        assert trunk.capabilities.batches and trunk.capabilities.joins and trunk.capabilities.shares
        assert not trunk.remarks or form != "float32", trunk.remarks
        rows_read.clear()
        world = make_world(given=trunk, seed=seed)
        assert max(rows_read) == len(world.rollout.responses) == 10
        off = np.abs(np.array(world.rollout.logprobs) - np.array(world.batch.old_logprobs))[
            np.array(world.rollout.mask)
        ]
        assert off.mean() < {"float32": 1e-5, "float16": 0.01}.get(form, 0.05)


@pytest.mark.parametrize("saving", ["off", "on"])
def test_gradients_point_where_float32s_do(
    metal: Any, quantised: Callable[..., Path], make_world: MakeWorld, form: str, saving: str
) -> None:
    """Those of policy and critic on the bundled model, against float32 with the same, rounded weights."""
    folder = bundle_root() / "models" / "reviews"
    if is_quantised(form):
        folder = quantised(folder)
    cosines = []
    for seed in range(2):
        trunk = load_trunk(folder, dtype=dtype_of(form))
        exact = in_float32(trunk, load_trunk(bundle_root() / "models" / "reviews", dtype="float32"))
        worlds = [make_world(given=one, seed=seed) for one in (trunk, exact)]
        worlds[1].rollout, worlds[1].batch = worlds[0].rollout, worlds[0].batch
        scored = worlds[1].logprobs(worlds[1].policy.weights)
        worlds[1].batch = worlds[1].batch._replace(old_logprobs=mx.array(scored))
        for learner in ("policy", "critic"):
            found, wanted = (gradients_of(world, learner, saving) for world in worlds)
            cosines.append(found @ wanted / np.sqrt((found @ found) * (wanted @ wanted)))
    assert min(cosines) >= 0.999, cosines
