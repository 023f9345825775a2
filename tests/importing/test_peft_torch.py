"""Adapters of PEFT, both ways, by the logits of transformers and peft themselves."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.merging import merged_arrays
from mlx_ppo.models.peft import fill_with_peft, given_adapters

PYTHON = os.environ.get("MLX_PPO_TORCH_PYTHON")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON or subprocess.run([PYTHON, "-c", "import peft"], capture_output=True, check=False).returncode != 0,
        reason="MLX_PPO_TORCH_PYTHON names no Python with torch, transformers and peft",
    ),
]
TOKENS = mx.array([[1, 5, 77, 1234, 9, 4021, 300, 7, 11, 4567, 12, 13]])
KINDS = ("llama", "qwen3", "gemma2", "phi3", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    by_torch("torch_models.py", out)
    for folder in out.iterdir():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(HERE.parents[1] / "models" / "reviews" / name, folder / name)
    return out


def by_torch(script: str, *words: object) -> None:
    done = subprocess.run(
        [str(PYTHON), str(HERE / script), *map(str, words)], timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def logits(model: Path, weights: Weights) -> np.ndarray:
    trunk = load_trunk(model, dtype="float32")
    with trunk.using(weights):
        return np.array(trunk.logits(trunk.hidden(TOKENS)))[0]


@pytest.mark.parametrize("form", ["plain", "rslora", "patterns"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_gives_its_logits(folders: Path, tmp_path: Path, kind: str, form: str) -> None:
    by_torch("torch_peft.py", "make", folders / kind, tmp_path, form)
    found = logits(folders / kind, given_adapters(tmp_path, load_trunk(folders / kind).adapted))
    wanted, plain = np.load(tmp_path / "logits.npy"), np.load(tmp_path / "plain.npy")
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_written(
    folders: Path, tmp_path: Path, make_adapters: Callable[..., Weights], kind: str
) -> None:
    trunk = load_trunk(folders / kind, dtype="float32")
    weights = make_adapters(trunk, scale=0.7)
    fill_with_peft(tmp_path, weights, check_model_folder(folders / kind).tensors, base=kind)
    by_torch("torch_peft.py", "read", folders / kind, tmp_path)
    found = logits(folders / kind, weights)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), found, rtol=0, atol=1e-4)
    assert np.abs(np.load(tmp_path / "plain.npy") - found).max() > 1e-2


@pytest.mark.parametrize("form", ["plain", "dora", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_is_merged_to_its_logits(folders: Path, tmp_path: Path, kind: str, form: str) -> None:
    by_torch("torch_peft.py", "make", folders / kind, tmp_path, form)
    trunk = load_trunk(folders / kind, dtype="float32")
    if form == "embedding" and trunk.output_layer is None:
        with pytest.raises(ModelError, match="is the output layer, too"):
            merged_arrays(tmp_path, trunk)
        return
    found = logits(folders / kind, Weights(merged_arrays(tmp_path, trunk)))
    wanted, plain = np.load(tmp_path / "logits.npy"), np.load(tmp_path / "plain.npy")
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
