"""Models in the forms that a Mac computes with, by the portable engine and with Metal's rounding."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forms import FORMS, dtype_of, is_quantised

from mlx_ppo.compute.choose import SWITCH, using
from mlx_ppo.compute.portable import ModelReader, PortableEngine
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages import update

ROUNDING = Path(__file__).parent / "rounding"
sys.path[:0] = [str(ROUNDING), str(Path(__file__).parents[1] / "end_to_end")]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """The engine, and the rounding, here and in subprocesses; how often attention was fused, and unfused."""
    import metal_rounding

    monkeypatch.setenv(SWITCH, PortableEngine.name)
    monkeypatch.setenv("PYTHONPATH", str(ROUNDING))
    with metal_rounding.imitated(), using(PortableEngine()):
        yield metal_rounding.attended


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """What to compute in."""
    return str(request.param)


@pytest.fixture
def folder_in(make_model: Callable[..., Path], quantised: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny llama's folder for a form; its responses end after about four tokens."""

    def make(form: str, *, seed: int = 0) -> Path:
        folder = make_model(seed=seed, eos_token_id=[2, *range(100, 179)])
        return quantised(folder) if is_quantised(form) else folder

    return make


@pytest.fixture
def trunk_in(metal: Any, folder_in: Callable[..., Path]) -> Callable[..., Trunk]:
    """The model of `folder_in`, loaded."""

    def make(form: str, *, seed: int = 0) -> Trunk:
        return load_trunk(folder_in(form, seed=seed), dtype=dtype_of(form))

    return make


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What every self-check from now on judges: the largest |ratio - 1|, and the mean |log ratio| over its bound."""
    seen: list[tuple[float, float]] = []
    check = update._Step._check_itself

    def recording(step: update._Step, most: float, mean: float, tokens: float) -> None:
        seen.append((most, mean / update.log_ratio_tolerance(tokens)))
        check(step, most, mean, tokens)

    monkeypatch.setattr(update._Step, "_check_itself", recording)
    return seen


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decoding pass from now on reads together."""
    counts: list[int] = []
    read = ModelReader.read

    def counting(reader: ModelReader, tokens: Any, caches: Any) -> Any:
        counts.append(len(tokens))
        return read(reader, tokens, caches)

    monkeypatch.setattr(ModelReader, "read", counting)
    return counts
