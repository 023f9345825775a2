"""Tiny models of transformers, in the layouts of its versions 4 and 5: the same logits here, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from torch_python import by_torch, needs_torch

from mlx_ppo.errors import ModelError
from mlx_ppo.models.load import load_trunk

pytestmark = [pytest.mark.slow, needs_torch]
TOKENS = mx.array([[1, 5, 77, 1234, 9, 4021, 300, 7, 11, 4567, 12, 13]])
SAME = (
    "llama", "llama3", "yarn", "linear", "mistral", "mistral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
    "phi3long", "smollm3", "olmo2", "granite", "gemma", "starcoder2", "gpt_neox", "gpt2", "gpt2gelu",
)  # fmt: skip
REFUSED = {"gelu": "'hidden_act'", "qwen3_moe": "'rope_scaling'"}
TOKENIZER = Path(__file__).parents[2] / "models" / "reviews"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("matrix")
    by_torch(Path(__file__).with_name("torch_models.py"), out)
    for folder in out.iterdir():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, folder / name)
    return out


def as_before(section: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the layout of 4."""
    found = {key: value for key, value in section.items() if key != "rope_parameters"}
    rope = dict(section.get("rope_parameters", {}))
    if "full_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        found["sliding_window_pattern"] = found.pop("layer_types").index("full_attention") + 1
        rope = dict(rope["full_attention"])
    found |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope
    if "text_config" in found:
        found["text_config"] = as_before(found["text_config"])
    return found


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("kind", [*SAME, *REFUSED])
def test_logits_are_those_of_transformers_or_the_folder_is_refused(
    folders: Path, tmp_path: Path, kind: str, layout: int
) -> None:
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    if layout == 4:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(as_before(config)), "utf-8")
    if kind in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind]):
            load_trunk(folder, dtype="float32")
        return
    trunk = load_trunk(folder, dtype="float32")
    found = np.array(trunk.logits(trunk.hidden(TOKENS)))[0]
    np.testing.assert_allclose(found, np.load(folder / "logits.npy"), rtol=0, atol=1e-3)
