"""`export --format gguf`: tensors, metadata and vocabulary as llama.cpp expects them, read by the gguf package."""

import json

import gguf
import numpy as np
import pytest

from mlx_ppo.errors import ConfigError, ModelError, RunError
from mlx_ppo.exporting import export as story
from mlx_ppo.exporting import gguf_writer
from mlx_ppo.exporting.export import export
from mlx_ppo.models.load import load_trunk
from mlx_ppo.runs.targets import load_target

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(run, target, dtype=None):
    said = export(run, target, form="gguf", dtype=dtype, bits=None)
    return said, gguf.GGUFReader(target / f"{target.name}.gguf")


def fields(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def own_name(name):
    """mlx-lm's name of a GGUF tensor."""
    stem, _, kind = name.rpartition(".")
    inverse = {other: own for own, other in NAMES.items()}
    if stem.startswith("blk."):
        _, number, inner = stem.split(".")
        return f"model.layers.{number}.{inverse[inner]}.{kind}"
    return f"{inverse[stem]}.{kind}"


def interleaved(array, heads):
    """llama.cpp's order of rows: row i of a head's first half goes to 2 i, of its second half to 2 i + 1."""
    rows = np.empty_like(array)
    size = len(array) // heads
    for head in range(heads):
        for index in range(size):
            half, place = divmod(index, size // 2)
            rows[head * size + 2 * place + half] = array[head * size + index]
    return rows


def values(tensor):
    return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(tensor.shape[::-1])


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("llama", "f16"), ("llama", "q8_0"), ("qwen2", "q8_0"), ("qwen3", "f16")]
)
def test_every_tensor_is_the_fused_one(model_type, dtype, make_model, with_tokenizer, make_run, tmp_path):
    run = make_run(with_tokenizer(make_model(model_type), "qwen2"))
    export(run, tmp_path / "fused", form="fused", dtype="float32", bits=None)
    wanted = load_trunk(tmp_path / "fused").base
    said, reader = write(run, tmp_path / "out", dtype)
    assert said.startswith(f"{tmp_path / 'out/out.gguf'}: {len(wanted)} tensors, {dtype}, ")
    assert {own_name(tensor.name) for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        own = own_name(tensor.name)
        array = np.array(wanted[own])
        if model_type == "llama" and tensor.name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            array = interleaved(array, 4 if "attn_q" in tensor.name else 2)
        stored = "F32" if array.ndim == 1 else "F16" if array.shape[-1] == 48 else dtype.upper()  # 48 is no whole block
        assert tensor.tensor_type.name == stored
        scale = np.abs(array).max()
        allowed = {"F32": 0.0, "F16": scale * 2**-11, "Q8_0": scale / 200}[stored]
        assert np.abs(values(tensor) - array).max() <= allowed, tensor.name


def test_metadata(make_model, make_run, tmp_path):
    _, reader = write(make_run(make_model("qwen3", rope_theta=5e5)), tmp_path / "out", "q8_0")
    found = fields(reader)
    own = {key.removeprefix("qwen3."): value for key, value in found.items() if key.startswith("qwen3.")}
    assert own == {
        "block_count": 2, "context_length": 512, "embedding_length": 32, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 5e5, "vocab_size": 304,
    }  # fmt: skip
    assert found["general.architecture"] == "qwen3" and found["general.file_type"] == 7


def test_positions_of_llama_3_1(make_model, make_run, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    run = make_run(make_model(rope_scaling={**scaling, "original_max_position_embeddings": 64}))
    _, reader = write(run, tmp_path / "out")
    divisors = values(next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"))
    rope = load_target(run).trunk.model.layers[0].self_attn.rope
    plain = 10000.0 ** (np.arange(0, 8, 2) / 8)
    assert divisors == pytest.approx(np.array(rope._freqs) / plain, rel=1e-5)
    assert divisors[0] == 1 and divisors[-1] == 8


def test_linear_positions(make_model, make_run, tmp_path):
    _, reader = write(make_run(make_model(rope_scaling={"type": "linear", "factor": 2.0})), tmp_path / "out")
    found = fields(reader)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 2.0)


def test_a_unigram_vocabulary(model_folder, make_run, tmp_path):
    _, reader = write(make_run(model_folder), tmp_path / "out")
    found = fields(reader)
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens, scores, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert found["tokenizer.ggml.model"] == "t5" and len(tokens) == len(scores) == len(types) == 304
    for index, (token, score) in enumerate(vocabulary):
        byte = int(token[1:-1], 16) if token.startswith("<0x") else None
        if byte is not None and 0 < byte < 128 and chr(byte) not in {" ", *map(chr, range(97, 123))}:
            assert (tokens[index], types[index]) == (chr(byte), 1) and scores[index] < -10
        else:
            assert tokens[index] == token and scores[index] == pytest.approx(score)
            assert types[index] == (6 if byte is not None else {"<unk>": 2, "<s>": 3, "</s>": 3}.get(token, 1))
    assert tokens[300:] == [f"[PAD{index}]" for index in range(300, 304)] and set(types[300:]) == {5}
    special = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items() if key.endswith("token_id")}
    assert special == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True and "tokenizer.chat_template" not in found
    text = (tmp_path / "out/Modelfile").read_text()
    assert text == ('FROM ./out.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER temperature 0.7\nPARAMETER stop "</s>"\n')


def test_a_modelfile_states_all_bounds_of_truncated_sampling(model_folder, make_run, tmp_path):
    """Or Ollama's own defaults would stand for those that are off."""
    run = make_run(model_folder)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("top_p = 1.0", "top_p = 0.9"))
    write(run, tmp_path / "out")
    said = [line for line in (tmp_path / "out/Modelfile").read_text().splitlines() if line.startswith("PARAMETER")]
    assert said[:4] == [f"PARAMETER {one}" for one in ("temperature 0.7", "top_k 0", "top_p 0.9", "min_p 0.0")]


def test_a_vocabulary_with_byte_fallback(model_folder, with_tokenizer, make_run, tmp_path):
    source = with_tokenizer(model_folder, "fallback")
    _, reader = write(make_run(source), tmp_path / "out")
    found = fields(reader)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens, scores, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert [tokens.index(token) for token in model["vocab"]] == list(model["vocab"].values())
    made = ["".join(merge) for merge in model["merges"]]
    order = [scores[tokens.index(token)] for token in made]
    assert len(made) > 5 and order == sorted(order, reverse=True) == [-float(n) for n in range(len(made))]
    assert types[:3] == [2, 3, 3] and set(types[3:259]) == {6} and set(types[259:300]) == {1}


@pytest.mark.parametrize(("kind", "name"), [
    ("smollm", "smollm"), ("qwen2", "qwen2"), ("gpt-2", "gpt-2"), ("llama-bpe", "llama-bpe"), ("llama", "smaug-bpe"),
])  # fmt: skip
def test_a_byte_level_vocabulary(kind, name, model_folder, with_tokenizer, make_run, tmp_path):
    source = with_tokenizer(model_folder, kind)
    _, reader = write(make_run(source), tmp_path / "out")
    found = fields(reader)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    tokens = found["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in model["vocab"]} == model["vocab"]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]] != []
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.add_bos_token"] is (kind == "llama-bpe")
    assert "<|im_start|>system\nYou help." in found["tokenizer.chat_template"]


def test_a_modelfile_says_the_chat_template_in_ollamas_words(model_folder, with_tokenizer, make_run, tmp_path):
    write(make_run(with_tokenizer(model_folder, "smollm", eos_token_id=[0, 2])), tmp_path / "out")
    assert (tmp_path / "out/Modelfile").read_text() == (
        'FROM ./out.gguf\nTEMPLATE """'
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n"
        "{{ else }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER temperature 0.7\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}. {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'system' }}<{{ m['content'] }}>{% endfor %}",
        "{% for m in messages %}{{ '{{' }}{{ m['content'] }}{{ m['role'] }}{% endfor %}",
    ],
)
def test_a_template_that_is_not_so_simple_is_left_to_the_gguf(
    template, model_folder, with_tokenizer, make_run, tmp_path
):
    source = with_tokenizer(model_folder, "smollm")
    document = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**document, "chat_template": template}))
    _, reader = write(make_run(source), tmp_path / "out")
    assert fields(reader)["tokenizer.chat_template"] == template
    assert "TEMPLATE" not in (tmp_path / "out/Modelfile").read_text()


def test_what_gguf_cannot_say_is_refused_in_one_line(make_model, with_tokenizer, make_run, tmp_path):
    for words, source in (
        ("gemma2 models aren't written as GGUF, only llama, qwen2, qwen3", make_model("gemma2")),
        ("'yarn' isn't written as GGUF", make_model(rope_scaling={"type": "yarn", "factor": 2.0})),
        ("rope_traditional can't be written", make_model(rope_traditional=True)),
        ("the tokenizer has no merges", make_model("qwen2")),  # as transformers reads this folder
        ("the tokenizer's NFKC can't be said in GGUF", normalised(with_tokenizer(make_model(), "unigram"))),
        ("cuts texts in a way that isn't known", other_cut(with_tokenizer(make_model(), "smollm"))),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            write(make_run(source), tmp_path / "new" / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def normalised(source):
    document = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**document, "normalizer": {"type": "NFKC"}}))
    return source


def other_cut(source):
    document = json.loads((source / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (source / "tokenizer.json").write_text(json.dumps(document))
    return source


def test_what_is_not_read_back_as_meant_is_not_left(model_folder, make_run, tmp_path, monkeypatch):
    run = make_run(model_folder)
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer, "_stored", lambda name, array, kind: 1.01 * gguf.quants.quantize(array, kind))
        with pytest.raises(RunError, match=r"out.gguf: \S+ differs by more than F"):
            write(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer, "_add", lambda writer, key, value: None)
        with pytest.raises(RunError, match="was not read back as written"):
            write(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        large = {name: 1e6 * array for name, array in load_target(run).trunk.base.items()}
        patch.setattr(story, "fused_arrays", lambda trunk, _: large)
        with pytest.raises(ModelError, match="don't fit into float16"):
            write(run, tmp_path / "out", "q8_0")
    with pytest.raises(ConfigError, match="gguf has no type 'float32'; choose from f16, q8_0"):
        write(run, tmp_path / "out", "float32")
    assert set(tmp_path.iterdir()) == before


def test_ollama_is_not_told_twice_to_begin_with_bos(model_folder, with_tokenizer, make_run, tmp_path):
    source = with_tokenizer(model_folder, "llama-bpe")
    document = json.loads((source / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}" + document["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps({**document, "chat_template": template}))
    _, reader = write(make_run(source), tmp_path / "out")
    text = (tmp_path / "out/Modelfile").read_text()
    assert fields(reader)["tokenizer.ggml.add_bos_token"] is True
    assert "{{ if .System }}<|im_start|>system" in text and "<|endoftext|>" not in text
