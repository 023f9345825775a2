"""Adapters of PEFT, both ways, by the logits of transformers and peft themselves."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from torch_python import PYTHON, by_torch

from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.merging import merged_arrays
from mlx_ppo.models.peft import fill_with_peft, given_adapters

HERE = Path(__file__).parent
# Found, not imported, which takes seconds: every process of the tests asks.
HAS_PEFT = "import importlib.util, sys; sys.exit(importlib.util.find_spec('peft') is None)"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON or subprocess.run([PYTHON, "-c", HAS_PEFT], check=False).returncode != 0,
        reason="MLX_PPO_TORCH_PYTHON names no Python with torch, transformers and peft",
    ),
]
TOKENS = mx.array([[1, 5, 77, 1234, 9, 4021, 300, 7, 11, 4567, 12, 13]])
KINDS = ("llama", "qwen3", "gemma2", "phi3", "gpt2")
READ, MERGED = ("plain", "rslora", "patterns"), ("plain", "dora", "embedding")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    by_torch(HERE / "torch_models.py", out)
    for folder in out.iterdir():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(HERE.parents[1] / "models" / "reviews" / name, folder / name)
    return out


@pytest.fixture(scope="module")
def made(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapters of every form for every kind, in `kind/form`, with the logits."""
    out = tmp_path_factory.mktemp("adapters")
    forms = sorted({*READ, *MERGED})
    by_torch(HERE / "torch_peft.py", "make", folders, out, *(f"{kind}/{form}" for kind in KINDS for form in forms))
    return out


def logits(model: Path, weights: Weights) -> np.ndarray:
    trunk = load_trunk(model, dtype="float32")
    with trunk.using(weights):
        return np.array(trunk.logits(trunk.hidden(TOKENS)))[0]


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_gives_its_logits(folders: Path, made: Path, kind: str, form: str) -> None:
    adapters = made / kind / form
    found = logits(folders / kind, given_adapters(adapters, load_trunk(folders / kind).adapted))
    wanted, plain = np.load(adapters / "logits.npy"), np.load(adapters / "plain.npy")
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def written(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, make_adapters: Callable[..., Weights]
) -> tuple[Path, dict[str, Weights]]:
    """This project's adapters for every kind as PEFT's, with its logits, and what they were written from."""
    out, weights = tmp_path_factory.mktemp("written"), {}
    for kind in KINDS:
        weights[kind] = make_adapters(load_trunk(folders / kind, dtype="float32"), scale=0.7)
        (out / kind).mkdir()
        fill_with_peft(out / kind, weights[kind], check_model_folder(folders / kind).tensors, base=kind)
    by_torch(HERE / "torch_peft.py", "read", folders, out, *KINDS)
    return out, weights


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_written(folders: Path, written: tuple[Path, dict[str, Weights]], kind: str) -> None:
    adapters, weights = written[0] / kind, written[1][kind]
    found = logits(folders / kind, weights)
    np.testing.assert_allclose(np.load(adapters / "logits.npy"), found, rtol=0, atol=1e-4)
    assert np.abs(np.load(adapters / "plain.npy") - found).max() > 1e-2


@pytest.mark.parametrize("form", MERGED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_is_merged_to_its_logits(folders: Path, made: Path, kind: str, form: str) -> None:
    adapters = made / kind / form
    trunk = load_trunk(folders / kind, dtype="float32")
    if form == "embedding" and trunk.output_layer is None:
        with pytest.raises(ModelError, match="is the output layer, too"):
            merged_arrays(adapters, trunk)
        return
    found = logits(folders / kind, Weights(merged_arrays(adapters, trunk)))
    wanted, plain = np.load(adapters / "logits.npy"), np.load(adapters / "plain.npy")
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
