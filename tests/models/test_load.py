import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.data.model_files import fingerprint
from mlx_ppo.errors import ModelError
from mlx_ppo.memory.model import loading
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.gate import translated, translations
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers.load import completion_text

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 286, 288, 40, 7, 212, 9, 8, 30]])


def logits(trunk: Trunk) -> np.ndarray:
    return np.array(trunk.logits(trunk.hidden(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_compute_type(model_folder: Path, dtype: str) -> None:
    trunk = load_trunk(model_folder, dtype=dtype)
    wanted = {"bfloat16": mx.bfloat16, "float16": mx.float16}.get(dtype, mx.float32)
    assert {array.dtype for array in trunk.base.values()} == {wanted}
    assert trunk.hidden(TOKENS).dtype == wanted


def test_the_limit_of_open_files_stays(model_folder: Path) -> None:
    """In a process of its own: `import mlx_lm` lowers the limit once."""
    program = (
        "import resource, sys, pathlib\n"
        "limit = resource.RLIMIT_NOFILE\n"
        "resource.setrlimit(limit, (3000, resource.getrlimit(limit)[1]))\n"
        "from mlx_ppo.models.load import load_trunk\n"
        "load_trunk(pathlib.Path(sys.argv[1]))\n"
        "print(resource.getrlimit(limit)[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "3000"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_random_weights_depend_on_the_seed_alone(copy: Callable[..., Path], kind: str) -> None:
    folder = copy(kind)
    (folder / "model.safetensors").unlink()
    first, second, other = (load_trunk(folder, random_seed=seed) for seed in (5, 5, 6))
    for name, array in first.base.items():
        np.testing.assert_array_equal(np.array(array), np.array(second.base[name]), err_msg=name)
    embedding = np.array(first.base["model.embed_tokens.weight"])
    assert np.abs(embedding - np.array(other.base["model.embed_tokens.weight"])).max() > 0.01
    assert embedding.std() == pytest.approx(0.02, rel=0.03)
    for branch in ("mlp.down_proj", "self_attn.o_proj"):
        assert not np.array(first.base[f"model.layers.0.{branch}.weight"]).any(), "each block starts as the identity"
    if kind == "qwen2":
        assert not np.array(first.base["model.layers.0.self_attn.q_proj.bias"]).any()


def test_rope_of_transformers_5_is_read(copy: Callable[..., Path]) -> None:
    old = logits(load_trunk(copy(rope_theta=77.0)))
    nested = {"rope_theta": 77.0, "rope_type": "default"}
    np.testing.assert_array_equal(logits(load_trunk(copy(rope_theta=None, rope_parameters=nested))), old)
    assert np.abs(old - logits(load_trunk(copy()))).max() > 0.1, "theta must matter for this test to say anything"
    scaling = {"rope_type": "linear", "factor": 4.0}
    scaled = logits(load_trunk(copy(rope_theta=77.0, rope_scaling=scaling)))
    nested = {"rope_theta": 77.0, **scaling}
    np.testing.assert_array_equal(logits(load_trunk(copy(rope_theta=None, rope_parameters=nested))), scaled)
    assert np.abs(scaled - old).max() > 0.1


def test_rope_inside_the_part_for_text_and_by_kind_of_layer() -> None:
    nested = {"rope_theta": 77.0, "rope_type": "default"}
    text = {"model_type": "mistral", "hidden_size": 8, "rope_parameters": nested}
    assert translated({"model_type": "mistral3", "text_config": text}, "m") == {
        "text_config": {**text, "rope_theta": 77.0}
    }
    assert translated({"model_type": "mistral3", "text_config": {"rope_theta": 5.0}}, "m") == {}
    linear = {"rope_type": "linear", "factor": 8.0}
    kinds = {"full_attention": {"rope_theta": 77.0, **linear}, "sliding_attention": {"rope_theta": 3.0}}
    wanted = {"rope_local_base_freq": 3.0, "rope_theta": 77.0, "rope_scaling": linear}
    assert translated({"model_type": "gemma3_text", "rope_parameters": kinds}, "m") == wanted
    text = {"model_type": "gemma3_text", "rope_parameters": kinds}
    assert translated({"model_type": "gemma3", "text_config": text}, "m") == {"text_config": {**text, **wanted}}


def test_gemma_3_by_kind_of_layer_computes_what_it_did(copy: Callable[..., Path]) -> None:
    old = logits(load_trunk(copy("gemma3_text", rope_theta=77.0, rope_local_base_freq=3.0)))
    kinds = {"full_attention": {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 3.0}}
    new = logits(load_trunk(copy("gemma3_text", rope_theta=None, rope_parameters=kinds)))
    np.testing.assert_array_equal(new, old)
    assert np.abs(old - logits(load_trunk(copy("gemma3_text")))).max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_output_layer_of_its_own_counts_where_the_folder_does_not_say(copy: Callable[..., Path], kind: str) -> None:
    """mlx-lm's default is the embedding; it would drop the layer without a word."""
    folders = [copy(kind, tie_word_embeddings=tied) for tied in (False, None, True)]
    for folder in folders:
        arrays = dict(mx.load(str(folder / "model.safetensors")))
        arrays["lm_head.weight"] = mx.roll(arrays["model.embed_tokens.weight"], 1, axis=0)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    said, unsaid = (logits(load_trunk(folder)) for folder in folders[:2])
    np.testing.assert_array_equal(unsaid, said)
    assert translations(check_model_folder(folders[1])) == {"tie_word_embeddings": False}
    assert translations(check_model_folder(folders[0])) == translations(check_model_folder(folders[2])) == {}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    mx.save_safetensors(str(folders[1] / "model.safetensors"), arrays, metadata={"format": "mlx"})
    assert translations(check_model_folder(folders[1])) == {}


def test_positions_beyond_a_models_own(copy: Callable[..., Path]) -> None:
    """Learned ones are refused: what stands beside their table would be read. Rotary ones are warned of."""
    table = load_trunk(copy("gpt2"))
    assert table.context == (512, True) and table.within(512) == []
    with pytest.raises(ModelError, match="may take 513 tokens, and the model has 512 positions"):
        table.within(513)
    asked = Asked([(1, 2, 3)], [0], [{}])
    with pytest.raises(ModelError, match="512 positions"):
        generate(table, Weights({}), asked, Sampling((0,), max_tokens=510))
    rotary = load_trunk(copy(max_position_embeddings=9))
    assert rotary.within(9) == []
    (line,) = rotary.within(10)
    assert line.startswith("warning: ") and "trained on at most 9 (max_position_embeddings)" in line
    assert load_trunk(copy(max_position_embeddings=None)).within(1 << 30) == []


def test_every_end_of_sequence_token_counts(copy: Callable[..., Path]) -> None:
    assert load_trunk(copy()).tokenizer.eos_ids == {2}
    assert load_trunk(copy(eos_token_id=[2, 40])).tokenizer.eos_ids == {2, 40}
    assert load_trunk(copy(eos_token_id=None)).tokenizer.eos_ids == {2}
    folder = copy()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 41]}')
    trunk = load_trunk(folder)
    assert trunk.tokenizer.eos_ids == {2, 41}
    assert trunk.tokenizer.eos_id == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_refused_by_name(copy: Callable[..., Path], value: float) -> None:
    folder = copy()
    arrays = mx.load(str(folder / "model.safetensors"))
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight contains NaN"):
        load_trunk(folder)


def test_a_file_saved_by_mlx_without_metadata_is_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    arrays = {name: array + 0 for name, array in mx.load(str(folder / "model.safetensors")).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    assert b'"__metadata__":null' in (folder / "model.safetensors").read_bytes()[:100]
    load_trunk(folder)


def test_tensors_that_dont_fit_the_config_are_refused(copy: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="mlx-lm cannot load this model") as caught:
        load_trunk(copy(num_hidden_layers=3))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ModelError, match="300 tokens, the model only 299"):
        load_trunk(make_model(vocab_size=299))


def test_no_end_of_sequence_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy(eos_token_id=None)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_trunk(folder)


def test_tokenizer_round_trip_and_continuations(trunk: Trunk) -> None:
    tokenizer = trunk.tokenizer
    text = "the film is good, é"
    prompt = tokenizer.encode(text, bos=True)
    assert prompt[0] == 1
    assert tokenizer.encode(text, bos=False) == prompt[1:]
    assert tokenizer.decode(prompt) == text
    answer = [*tokenizer.encode("the film and it", bos=True)[2:], 2]
    assert completion_text(tokenizer, tokenizer.encode("the", bos=True), answer) == " film and it"
    assert completion_text(tokenizer, prompt, [2]) == ""


def ending(folder: Path, single: str) -> Trunk:
    """The model with a tokenizer that puts special tokens around a text."""
    document = json.loads((folder / "tokenizer.json").read_text())
    ids = {"<s>": 1, "</s>": 2}
    parts = [
        {"SpecialToken": {"id": p, "type_id": 0}} if p in ids else {"Sequence": {"id": "A", "type_id": 0}}
        for p in single.split()
    ]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in ids.items()}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": tokens,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return load_trunk(folder)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A", "<s> $A </s> </s>"])
def test_only_what_the_tokenizer_puts_after_a_text_is_left_out(copy: Callable[..., Path], single: str) -> None:
    """An end that the text itself spells stays."""
    tokenizer = ending(copy(), single).tokenizer
    before = [1] if single.startswith("<s>") else []
    for text in ("the film", "the film</s>", "</s>", "</s></s>", "a"):
        bare = tokenizer.encode(text, bos=False)
        assert bare.count(2) == text.count("</s>")
        assert tokenizer.encode(text, bos=True) == [*before, *bare]


def test_fingerprints_tell_weights_apart_and_not_files(copy: Callable[..., Path]) -> None:
    folder = copy()
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(arrays)
    names = sorted(arrays)
    before = fingerprint([folder / "model.safetensors"])
    for number, part in enumerate((names[::2], names[1::2])):
        mx.save_safetensors(str(folder / f"part{number}.safetensors"), {name: arrays[name] for name in part})
    parts = [folder / "part1.safetensors", folder / "part0.safetensors"]
    assert fingerprint(parts) == before != fingerprint(parts[:1])
    large = mx.arange(200_000, dtype=mx.float32).reshape(400, 500)
    found = set()
    for changed in (
        large,
        mx.transpose(large).reshape(500, 400),
        large + 1,
        large.astype(mx.float16),
        large.reshape(500, 400),
    ):
        mx.save_safetensors(str(folder / "large.safetensors"), {"a": changed})
        found.add(fingerprint([folder / "large.safetensors"]))
    assert len(found) == 5


@pytest.mark.parametrize("kind", ["deepseek_v32", "muse_spark", "..utils", "../evil", "os", 3, ["x"]])
def test_only_mlx_lms_own_chat_code_can_be_named(copy: Callable[..., Path], kind: Any) -> None:
    """What a folder names is looked for among mlx-lm's own modules; nothing of the folder is imported."""
    folder = copy()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("evil.py", "chat_template.py", "os.py"):
        (folder / name).write_text("raise SystemExit('ran')")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template_type": kind}))
    before = set(sys.modules)
    try:
        tokenizer = load_trunk(folder).tokenizer
    except ModelError as error:
        assert kind != "deepseek_v32" and "the tokenizer cannot be loaded" in str(error)
    else:
        messages = [{"role": "user", "content": "it"}]
        assert kind == "deepseek_v32" and tokenizer.render_chat(messages, add_generation_prompt=True)
    new = {name for name in set(sys.modules) - before if "chat_templates" in name or "evil" in name}
    assert new <= {"mlx_lm.chat_templates", "mlx_lm.chat_templates.deepseek_v32", "mlx_lm.chat_templates.muse_spark"}


def outside(document: dict[str, Any]) -> None:
    document["post_processor"]["special_tokens"]["<s>"]["ids"] = [10**9]


def sparse(document: dict[str, Any]) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 10**6}
    document["model"], document["decoder"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}, None


@pytest.mark.parametrize(
    ("change", "words"),
    [(outside, "puts the token 1000000000 around a text"), (sparse, "1000001 tokens, the model only 304")],
)
def test_tokens_beside_the_embeddings_are_refused(
    copy: Callable[..., Path], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    folder = copy()
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=words):
        load_trunk(folder)


@pytest.mark.parametrize("end", [304, 10**9, -1])
def test_an_end_beside_the_embeddings_is_refused(copy: Callable[..., Path], end: int) -> None:
    folder = copy(eos_token_id=end)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=f"the end-of-sequence token {end} is none of the model's 304 tokens"):
        load_trunk(folder)


BACKTRACKS = {"type": "Split", "pattern": {"Regex": r"(a|a|aa|a?)+$"}, "behavior": "Isolated", "invert": False}
NO_UNKNOWN = {"type": "Unigram", "vocab": [["<s>", 0.0], ["b", -1.0], ["</s>", 0.0]], "unk_id": None}


@pytest.mark.parametrize(
    ("change", "words"), [({"pre_tokenizer": BACKTRACKS}, "retry-limit"), ({"model": NO_UNKNOWN}, "unk_id")]
)
def test_a_tokenizer_that_fails_at_a_text(copy: Callable[..., Path], change: dict[str, Any], words: str) -> None:
    """Found by fuzzing: it loads; then its library raises a plain Exception, or panics with a BaseException."""
    folder = copy()
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | change))
    with pytest.raises(ModelError, match=f"the tokenizer fails .*{words}"):
        load_trunk(folder).tokenizer.encode("a" * 40 + "!", bos=True)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_needs_little_beyond_the_weights(make_model: Callable[..., Path], stored: str) -> None:
    """Cast or not: no tensor as it was stored outlives the next one's reading. The plan says how much."""
    folder = make_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    arrays = {name: array.astype(getattr(mx, stored)) for name, array in mx.load(str(file)).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    del arrays
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    trunk = load_trunk(folder)
    weights = sum(array.nbytes for array in trunk.base.values())
    peak = mx.get_peak_memory() - before
    assert weights < peak < 1.15 * weights
    assert 0.9 * peak < weights + loading(trunk) < 1.1 * peak
