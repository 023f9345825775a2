"""Tiny models of each architecture and type, written as llama.cpp writes them, come back as they were."""

import json

import gguf_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from mlx_ppo.errors import ModelError
from mlx_ppo.importing.convert import import_model
from mlx_ppo.importing.gguf_weights import _blocks, _floats
from mlx_ppo.importing.shards import ShardWriter
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk


def arrays_of(folder):
    found = {}
    for file in check_model_folder(folder).weight_files:
        found |= mx.load(str(file))
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_configuration_come_back(tmp_path, architecture, tied):
    weights = tiny.write_model(tmp_path / "m.gguf", architecture, tied=tied)
    if architecture == "gemma" and not tied:
        with pytest.raises(ModelError, match=r"'output\.weight' has no place"):
            import_model(tmp_path / "m.gguf", tmp_path / "out")
        return
    summary = import_model(tmp_path / "m.gguf", tmp_path / "out")
    found = arrays_of(tmp_path / "out")
    assert found.keys() == weights.keys() and summary.tensors == len(weights)
    for name, array in found.items():
        assert np.abs(np.array(array) - weights[name]).max() < 1e-6, name
    config = tiny.json_of(tmp_path / "out" / "config.json")
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"]) == (50000.0, 1e-05, tiny.HEAD)
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (tied, "float32")


def test_what_is_not_permuted_differs(tmp_path):
    """The test above would pass with any order of the rows if the writer didn't permute."""
    weights, stored = tiny.random_weights("llama", 300)
    before, after = weights["model.layers.0.self_attn.q_proj.weight"], stored["blk.0.attn_q.weight"]
    assert not np.array_equal(before, after) and np.array_equal(after[1], before[tiny.HEAD // 2])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_types_keep_their_values(tmp_path, kind):
    weights = tiny.write_model(tmp_path / "m.gguf", "llama", kind=kind)
    import_model(tmp_path / "m.gguf", tmp_path / "exact", dtype="float32")
    import_model(tmp_path / "m.gguf", tmp_path / "kept")
    exact, kept = arrays_of(tmp_path / "exact"), arrays_of(tmp_path / "kept")
    name = "model.layers.0.mlp.down_proj.weight"
    stored = GGMLQuantizationType[kind]
    wanted = dequantize(quantize(weights[name], stored), stored)
    assert np.array_equal(np.array(exact[name]), wanted)
    bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}.get(kind)
    if bits:
        parts = [kept[name], *(kept[name.replace("weight", part)].astype(mx.float32) for part in ("scales", "biases"))]
        whole = mx.dequantize(*parts, group_size=32, bits=bits)
        assert np.abs(np.array(whole) - wanted).max() < 1e-6
        assert load_trunk(tmp_path / "kept").model is not None
    else:
        assert kept[name].dtype == (mx.bfloat16 if kind == "BF16" else mx.float16)
        assert kept["model.norm.weight"].dtype == kept[name].dtype


@pytest.mark.parametrize(("kind", "size", "scale"), [("Q4_K", 144, 0), ("Q6_K", 210, 208), ("Q3_K", 110, 108)])
def test_k_quants_are_dequantised_by_the_package(kind, size, scale):
    raw = np.random.default_rng(0).integers(0, 255, (3, size), dtype=np.uint8)
    raw[:, scale : scale + 2] = np.array([0.01], "<f2").view(np.uint8)
    if kind == "Q4_K":
        raw[:, 2:4] = raw[:, :2]
    stored = GGMLQuantizationType[kind]
    assert np.array_equal(np.array(_floats(raw, stored)), dequantize(raw, stored))
    assert np.isfinite(dequantize(raw, stored)).all() and dequantize(raw, stored).std() > 0


def test_blocks_by_hand():
    """One Q4_0 block: scale 0.5, numbers 0..15 low and 15..0 high; the value is 0.5 (q - 8)."""
    body = bytes(low | ((15 - low) << 4) for low in range(16))
    raw = np.frombuffer(np.array([0.5], "<f2").tobytes() + body, np.uint8)[None]
    packed, scales, biases = _blocks(raw, GGMLQuantizationType.Q4_0)
    whole = mx.dequantize(mx.array(packed), mx.array(scales), mx.array(biases), group_size=32, bits=4)
    assert np.array(whole)[0].tolist() == [0.5 * (q - 8) for q in [*range(16), *range(15, -1, -1)]]


def test_shards_are_bounded_and_indexed(tmp_path):
    writer = ShardWriter(tmp_path, largest=1000)
    for number in range(5):
        writer.add({f"t{number}": mx.full((100,), number, dtype=mx.float32)})
    writer.finish()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    places = tiny.json_of(tmp_path / "model.safetensors.index.json")["weight_map"]
    assert all(mx.load(str(tmp_path / place))[name][0].item() == int(name[1]) for name, place in places.items())


def test_folder_in(tmp_path):
    tiny.write_model(tmp_path / "m.gguf", "llama", kind="Q4_0")
    import_model(tmp_path / "m.gguf", tmp_path / "first")
    config = tiny.json_of(tmp_path / "first" / "config.json")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    import_model(tmp_path / "first", tmp_path / "copy")
    assert tiny.json_of(tmp_path / "copy" / "config.json")["rope_theta"] == 50000.0
    assert arrays_of(tmp_path / "copy").keys() == arrays_of(tmp_path / "first").keys()
    import_model(tmp_path / "first", tmp_path / "floats", dtype="float32")
    import_model(tmp_path / "m.gguf", tmp_path / "direct", dtype="float32")
    direct = arrays_of(tmp_path / "direct")
    for name, array in arrays_of(tmp_path / "floats").items():
        assert mx.allclose(array, direct[name], atol=1e-6), name
    assert "quantization" not in tiny.json_of(tmp_path / "floats" / "config.json")
    trunk = load_trunk(tmp_path / "first")
    unpacked = [line for line in trunk.remarks if "first: quantised; computed in float32 here" in line]
    assert bool(unpacked) == trunk.engine.unpacks("auto") == (mx.uint32 not in {a.dtype for a in trunk.base.values()})
    assert not any("quantised" in line for line in load_trunk(tmp_path / "floats").remarks)


def test_refusals(tmp_path):
    tiny.write_model(tmp_path / "m.gguf")
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        import_model(tmp_path / "m.gguf", tmp_path / "there")
    with pytest.raises(ModelError, match="no such file"):
        import_model(tmp_path / "missing.gguf", tmp_path / "out")
    cases = {
        "is missing": lambda w, t: t.pop("blk.1.attn_k.weight"),
        "no place": lambda w, t: t.__setitem__("blk.0.extra.weight", np.ones(3, np.float32)),
        "has the shape": lambda w, t: t.__setitem__("output_norm.weight", np.ones(3, np.float32)),
        "NaN or infinity": lambda w, t: t.__setitem__("output_norm.weight", np.full(tiny.H, np.nan, np.float32)),
        "mixture of experts": lambda w, t: w.add_expert_count(4),
        "rope scaling 'yarn'": lambda w, t: w.add_rope_scaling_type(tiny.gguf.RopeScalingType.YARN),
    }
    for message, change in cases.items():
        tiny.write_model(tmp_path / "bad.gguf", change=change)
        with pytest.raises(ModelError, match=message) as caught:
            import_model(tmp_path / "bad.gguf", tmp_path / "out")
        assert "\n" not in str(caught.value) and sorted(p.name for p in tmp_path.iterdir()) == [
            "bad.gguf",
            "m.gguf",
            "there",
        ]
    tiny.write_model(tmp_path / "falcon.gguf", "falcon")
    with pytest.raises(ModelError, match="architecture 'falcon' can't be imported; llama, qwen2, qwen3, gemma can"):
        import_model(tmp_path / "falcon.gguf", tmp_path / "out")
