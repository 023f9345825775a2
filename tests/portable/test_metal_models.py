"""The self-check, batches and gradients with models that were trained, in half precision with Metal's rounding.

`pytest tests/portable/test_metal_models.py --seeds 20 -s` prints what was found; without it one seed of the
bundled model is tried, and SmolLM2, which takes minutes, is not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from forms import FORMS, dtype_of, in_float32, is_quantised
from recording import gradients_of, judged

from mlx_ppo.bundle import bundle_root
from mlx_ppo.errors import RunError
from mlx_ppo.importing.convert import import_model
from mlx_ppo.models.load import load_trunk

STEPS = {"bundled": 3, "SmolLM2": 1}  # of which each moves so small a model less
ROWS = {"samples": 2, "only": 2, "max_tokens": 6}  # prompts that two responses share
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=STEPS)
def name(request: pytest.FixtureRequest) -> str:
    """A trained model's."""
    if request.param == "SmolLM2" and not request.config.getoption("--seeds"):
        pytest.skip("takes minutes: --seeds N tries it")
    return str(request.param)


@pytest.fixture(scope="module")
def trained(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quantised: Callable[..., Path],
) -> Callable[[str], Path]:
    """Its folder for a form."""

    def make(form: str) -> Path:
        if name == "bundled":
            folder = bundle_root() / "models" / "reviews"
            return quantised(folder) if is_quantised(form) else folder
        folder = tmp_path_factory.getbasetemp() / f"smollm2 {form}"
        if not folder.exists():  # in 4 bits it is stored; in other types these bits, written out
            dtype = "auto" if is_quantised(form) else dtype_of(form)
            import_model(request.getfixturevalue("smollm2"), folder, dtype=dtype)
        return folder

    return make


@pytest.mark.parametrize("form", FORMS[1:])
def test_no_false_stop_and_a_real_fault_is_caught(
    metal: Any,
    name: str,
    trained: Callable[[str], Path],
    make_world: Callable[..., Any],
    found: list[tuple[float, float]],
    rows_read: list[int],
    request: pytest.FixtureRequest,
    form: str,
) -> None:
    """The fault: scored by adapters, and updated from those of some steps later. Rows are decoded together.

    One is updated by itself, without the others of its prompt, beside which it was scored.
    """
    trunk = load_trunk(trained(form), dtype=dtype_of(form))
    assert trunk.capabilities.batches and trunk.capabilities.joins and trunk.capabilities.shares
    healthy, faulty = [], []
    for seed in range(request.config.getoption("--seeds") or 1):
        rows_read.clear()
        world = make_world(None, given=trunk, seed=seed, size=0.02, **ROWS)
        assert max(rows_read) == len(world.rollout.responses) == 4
        world.update(minibatches=1, epochs=STEPS[name], micro_batch=3)
        healthy.append(found[-1])
        with pytest.raises(RunError, match="self-check failed"):
            world.update(minibatches=1, epochs=1, micro_batch=3)
        faulty.append(found[-1])
        judged(f"{name}, {form}, seed {seed}", healthy[-1:], faulty[-1:])
    largest, smallest = judged(f"{name}, {form}", healthy, faulty)
    assert largest < 0.8 and smallest > 1.1


@pytest.mark.parametrize("form", FORMS[1:])
def test_gradients_point_where_float32s_do(
    metal: Any, name: str, trained: Callable[[str], Path], make_world: Callable[..., Any], form: str
) -> None:
    """Those of policy and critic, against float32 with the same, rounded weights."""
    trunk = load_trunk(trained(form), dtype=dtype_of(form))
    exact = in_float32(trunk, load_trunk(trained("float32"), dtype="float32"))
    worlds = [make_world(given=one, size=0.02, **ROWS) for one in (trunk, exact)]
    worlds[1].rollout, worlds[1].batch = worlds[0].rollout, worlds[0].batch
    scored = worlds[1].logprobs(worlds[1].policy.weights)
    worlds[1].batch = worlds[1].batch._replace(old_logprobs=mx.array(scored))
    for learner in ("policy", "critic"):
        seen, wanted = (gradients_of(world, learner, "off") for world in worlds)
        cosine = seen @ wanted / np.sqrt((seen @ seen) * (wanted @ wanted))
        print(f"{name}, {form}: {learner} {cosine:.5f}")
        assert cosine >= 0.999
