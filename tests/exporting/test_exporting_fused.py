"""`export --format adapters` and `fused`: the run's policy, in stock programs."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from torch_python import by_torch, needs_torch

from mlx_ppo.cli.main import main
from mlx_ppo.errors import ConfigError, ModelError, RunError
from mlx_ppo.exporting import export as story
from mlx_ppo.exporting.check import Difference, difference, within
from mlx_ppo.exporting.export import export
from mlx_ppo.models.load import load_trunk
from mlx_ppo.runs.targets import load_target

PROMPT = "the film is"


def fused(run, target, **options):
    return export(run, target, **{"form": "fused", "dtype": None, "bits": None, **options})


def policy(run, tokens):
    target = load_target(run)
    with target.trunk.using(target.weights):
        return np.array(target.trunk.model(mx.array([tokens])).astype(mx.float32))[0]


def greedy(run, count=8):
    target = load_target(run)
    tokens = target.trunk.tokenizer.encode(PROMPT, bos=True)
    start = len(tokens)
    while len(tokens) < start + count and (len(tokens) == start or tokens[-1] not in target.trunk.tokenizer.eos_ids):
        tokens.append(int(policy(run, tokens)[-1].argmax()))
    return tokens[start:]


def stock(folder, **options):
    """A model and its greedy tokens by mlx-lm alone."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(folder), **options)
    written = []
    for token, _ in generate_step(mx.array(tokenizer.encode(PROMPT)), model, max_tokens=8):
        written.append(int(token))
        if written[-1] in tokenizer.eos_token_ids:
            break
    return model, written


def nothing_left(folder: Path):
    return {item.name for item in folder.iterdir()} - {"run.toml", "prompts.jsonl", "rule.py", "runs"} == set()


@pytest.mark.parametrize(
    ("kind", "train"), [("llama", "lora"), ("llama", "full"), ("qwen2", "lora"), ("qwen3", "full")]
)
def test_the_fused_model_is_the_policy(kind, train, make_model, make_run, tmp_path):
    run = make_run(make_model(kind), train=train)
    said = fused(run, tmp_path / "out")
    assert said.startswith(f"{tmp_path / 'out'}: a fused model, float32, ") and "\n" not in said
    tokens = [1, 286, 288, 40, 7, 212]
    own = load_trunk(tmp_path / "out")
    assert np.abs(np.array(own.model(mx.array([tokens])))[0] - policy(run, tokens)).max() < 1e-3
    model, written = stock(tmp_path / "out")
    assert np.abs(np.array(model(mx.array([tokens])))[0] - policy(run, tokens)).max() < 1e-3
    assert written == greedy(run)
    base = load_trunk(make_model(kind))  # the test would be empty if the run had learnt nothing
    assert np.abs(np.array(base.model(mx.array([tokens])))[0] - policy(run, tokens)).max() > 0.1


def test_a_checkpoint_of_a_run_is_exported_where_it_is_named(model_folder, make_run, tmp_path):
    run = make_run(model_folder)
    fused(run, tmp_path / "newest")
    fused(run / "checkpoints" / "000001", tmp_path / "first")
    arrays = [mx.load(str(tmp_path / name / "model.safetensors")) for name in ("newest", "first")]
    assert not mx.allclose(*(found["model.layers.0.mlp.up_proj.weight"] for found in arrays)).item()
    tokens = [1, 286, 288, 40]
    first = load_trunk(tmp_path / "first").model(mx.array([tokens]))
    assert np.abs(np.array(first)[0] - policy(run / "checkpoints" / "000001", tokens)).max() < 1e-3


@pytest.mark.parametrize(("dtype", "item"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_types(dtype, item, model_folder, make_run, tmp_path):
    run = make_run(model_folder, dtype="bfloat16")  # what the run computed in does not matter
    said = fused(run, tmp_path / "out", dtype=dtype)
    assert f"a fused model, {dtype}, " in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == dtype and config["tie_word_embeddings"] is False
    content = (tmp_path / "out/model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {item}


def test_the_default_type_is_the_sources(model_folder, with_tokenizer, make_run, tmp_path):
    source = with_tokenizer(model_folder, "unigram")
    arrays = mx.load(str(source / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    mx.eval(half)
    mx.save_safetensors(str(source / "model.safetensors"), half)
    assert "a fused model, bfloat16, " in fused(make_run(source), tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_as_mlx_lm_does(bits, make_model, make_run, tmp_path):
    source = make_model(hidden_size=64, head_dim=16, intermediate_size=128)
    run = make_run(source)
    said = fused(run, tmp_path / "out", bits=bits)
    assert f"{bits} bits a weight, the rest float32" in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]
    model, written = stock(tmp_path / "out")
    assert written and "model.layers.0.mlp.up_proj.scales" in dict(tree_flatten(model.parameters()))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", source)]
    assert sizes[0] < {4: 0.2, 8: 0.35}[bits] * sizes[1]


def test_a_quantised_trunk_is_dequantised(make_model, with_tokenizer, make_run, tmp_path):
    plain = make_model(hidden_size=64, head_dim=16, intermediate_size=128)
    fused(make_run(plain), tmp_path / "quantised", bits=8)
    said = fused(make_run(tmp_path / "quantised"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "a fused model, float32" in said and not {"quantization", "quantization_config"} & config.keys()
    assert stock(tmp_path / "out")[1] == greedy(tmp_path / "runs/a-2")


def test_positions_of_transformers_5_are_read_right_by_stock_mlx_lm(model_folder, with_tokenizer, make_run, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 100.0}
    run = make_run(with_tokenizer(model_folder, "smollm", rope_parameters=rope, rope_theta=None, dtype="bfloat16"))
    fused(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 100.0 and config["dtype"] == "float32"
    assert "im_start" in json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]
    tokens = [1, 86, 88, 40, 7, 212, 200, 100]
    assert np.abs(np.array(stock(tmp_path / "out")[0](mx.array([tokens])))[0] - policy(run, tokens)).max() < 1e-3


def test_adapters_load_in_stock_mlx_lm(model_folder, make_run, tmp_path):
    run = make_run(model_folder)
    said = export(run, tmp_path / "out", form="adapters", dtype=None, bits=None)
    assert "14 adapters for " in said
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    assert stock(model_folder, adapter_path=str(tmp_path / "out"))[1] == greedy(run)


def test_adapters_of_peft_are_written_and_start_another_run(model_folder, make_run, tmp_path):
    run = make_run(model_folder)
    assert "14 adapters for " in export(run, tmp_path / "out", form="peft", dtype=None, bits=None)
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert str(tmp_path) not in (tmp_path / "out" / "adapter_config.json").read_text()
    order = ["train", str(tmp_path / "run.toml"), "--dry-run", "--set", f"model.adapter={tmp_path / 'out'}"]
    shown = CliRunner().invoke(main, order)  # the planner reads them, too
    assert shown.exit_code == 0, shown.output


def test_refusals_leave_nothing(model_folder, make_run, tmp_path):
    run = make_run(model_folder, train="full")
    (tmp_path / "runs" / "there").mkdir()
    with pytest.raises(ConfigError, match="there: already there"):
        fused(run, tmp_path / "runs" / "there")
    with pytest.raises(ConfigError, match="trained all weights, not adapters; use --format fused"):
        export(run, tmp_path / "new" / "out", form="adapters", dtype=None, bits=None)
    with pytest.raises(ConfigError, match="trained all weights, not adapters; use --format fused"):
        export(run, tmp_path / "new" / "out", form="peft", dtype=None, bits=None)
    with pytest.raises(ConfigError, match="not a run of"):
        fused(model_folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="fused has no type 'f16'; choose from float32"):
        fused(run, tmp_path / "out", dtype="f16")
    with pytest.raises(ConfigError, match="only with --format fused; use --dtype q8_0"):
        export(run, tmp_path / "out", form="gguf", dtype=None, bits=4)
    (run / "checkpoints/000002/adapters.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="damaged"):
        fused(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_what_cannot_be_kept_is_refused_and_leaves_nothing(make_model, make_run, tmp_path, monkeypatch):
    run = make_run(make_model())
    with monkeypatch.context() as patch:
        patch.setattr(story, "fused_arrays", lambda trunk, _: {name: 1e6 * array for name, array in trunk.base.items()})
        with pytest.raises(ModelError, match=r"don't fit into float16; export with --dtype bfloat16 or float32"):
            fused(run, tmp_path / "new" / "out", dtype="float16")
    with monkeypatch.context() as patch:  # a policy lost on the way is found when the export is read back
        patch.setattr(story, "fused_arrays", lambda trunk, _: dict(trunk.base))
        with pytest.raises(RunError, match=r"float32 allows at most 0.001; nothing was written"):
            fused(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_differences():
    wanted = [np.array([[1.0, -1.0]], np.float32)]
    assert difference(wanted, [np.array([[1.0, -0.5]], np.float32)]) == Difference(0.5, pytest.approx(0.125**0.5))
    with pytest.raises(RunError, match="bfloat16 allows at most 10% of their deviation"):
        within(wanted, [np.array([[np.nan, -1.0]], np.float32)], "bfloat16")
    with pytest.raises(RunError, match="other shapes"):
        within(wanted, [np.zeros((1, 3), np.float32)], "float32")


def test_command(model_folder, make_run, tmp_path):
    run = make_run(model_folder)
    words = ["export", str(run), str(tmp_path / "out"), "--format", "fused"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and done.output.count("\n") == 1 and "logits differ by at most" in done.output
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2 and again.stderr == f"error: {tmp_path / 'out'}: already there; name a new folder\n"


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(("kind", "rope"), [("llama", 100.0), ("qwen2", None), ("qwen3", None)])
def test_transformers_writes_the_same_text(kind, rope, make_model, with_tokenizer, make_run, tmp_path):
    source = make_model(kind)
    if rope is not None:
        parameters = {"rope_type": "default", "rope_theta": rope}
        source = with_tokenizer(source, "unigram", rope_parameters=parameters, rope_theta=None)
    run = make_run(source)
    fused(run, tmp_path / "out")
    shown = by_torch(Path(__file__).with_name("torch_greedy.py"), tmp_path / "out", PROMPT)
    assert json.loads(shown) == greedy(run)
