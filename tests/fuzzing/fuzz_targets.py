"""What is fuzzed: for each reader the inputs, and a function that reads one and says whether it was taken."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import mlx.core as mx
from fuzz_inputs import edited, json_values, jsonl_files, replaced, safetensors_files, toml_files
from hypothesis import strategies as st
from tiny_models import COMMON, KINDS, write_weights, write_word_tokenizer

from mlx_ppo.bundle import bundle_root
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.config.supervised import RewardConfig, SFTConfig
from mlx_ppo.data.examples import load_examples
from mlx_ppo.data.model_files import fingerprint, read_arrays
from mlx_ppo.data.preferences import load_pairs, load_rated
from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.errors import UserError
from mlx_ppo.importing.gguf_file import read_gguf
from mlx_ppo.importing.gguf_names import plan_model
from mlx_ppo.importing.gguf_tokenizer import write_tokenizer
from mlx_ppo.importing.gguf_weights import floating_type, read_tensor
from mlx_ppo.models.load import load_trunk
from mlx_ppo.tokenizers.load import load_tokenizer

_JOBS = (TrainConfig, SFTConfig, RewardConfig)
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
_TEXT = "The film — 3.5 \u65e5\u672c </s>\n\ta"


@dataclass(frozen=True)
class Target:
    """One reader."""

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], None]  # UserError where the input is refused


def config(folder: Path) -> Target:
    """TOML, and `--set`."""
    file = folder / "a.toml"
    files = sorted((bundle_root() / "configs").glob("*.toml"))
    seeds = [
        bytes([1 if "sft" in path.name else 2 if "reward." in path.name else 0]) + path.read_bytes() for path in files
    ]
    sections: dict[str, list[str]] = {}
    for job in _JOBS:
        for name, field in job.model_fields.items():
            model: Any = getattr(field.annotation, "__args__", (field.annotation,))[0]
            if hasattr(model, "model_fields"):
                sections.setdefault(name, []).extend(model.model_fields)

    def read(content: bytes) -> None:
        job, (first, _, rest) = _JOBS[content[0] % 3] if content else TrainConfig, content[1:].partition(b"\0")
        file.write_bytes(rest or first)
        overrides = [part.decode("utf-8", "surrogateescape") for part in first.split(b"\n") if rest][:4]
        read_config(job, file, overrides)

    built = st.tuples(st.sampled_from((b"\0", b"\1", b"\2")), toml_files(sections)).map(b"".join)
    rows = toml_files(sections).map(lambda text: text.replace(b"\n", b".").replace(b"[", b"").replace(b"]", b""))
    overridden = st.tuples(st.lists(rows, max_size=2).map(b"\n".join), st.sampled_from(seeds)).map(
        lambda parts: parts[1][:1] + parts[0] + b"\0" + parts[1][1:]
    )
    return Target(st.one_of(edited(seeds), built, overridden), read)


def jsonl(folder: Path) -> Target:
    """Data of every kind, with the tokenizer of a tiny model."""
    model = _tiny(folder)
    tokenizer = load_tokenizer(model, _config())
    file = folder / "a.jsonl"
    bundled = sorted((bundle_root() / "models/reviews/data").glob("*.jsonl"))
    seeds = [b"".join(path.read_bytes().splitlines(keepends=True)[:3]) for path in bundled]
    limits: dict[str, Any] = {"max_tokens": 16, "overlong": "truncate"}

    loaders: tuple[Callable[..., object], ...] = (load_prompts, load_examples, load_pairs, load_rated)

    def read(content: bytes) -> None:
        file.write_bytes(content[1:])
        try:
            loaders[content[0] % 4 if content else 0](file, tokenizer, **limits)
        except UserError as error:
            assert str(error).startswith(str(file)), error
            raise

    first = st.sampled_from((b"\0", b"\1", b"\2", b"\3"))
    return Target(st.tuples(first, edited(seeds) | jsonl_files()).map(b"".join), read)


def safetensors(folder: Path) -> Target:
    """Weights: checked, then read by mlx."""
    file = folder / "model.safetensors"
    arrays = {
        "a": mx.arange(6).reshape(2, 3),
        "b": mx.ones((4,), mx.bfloat16),
        "c": mx.zeros(()),
        "d": mx.zeros((0, 2)),
    }
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    seeds = [file.read_bytes()]
    mx.save_safetensors(str(file), {"a": mx.array([1.0, 2.0])})
    seeds.append(file.read_bytes())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        found = read_arrays(file)
        mx.eval(found)
        assert sum(array.nbytes for array in found.values()) <= len(content)
        fingerprint([file])

    return Target(edited(seeds, _header_of_safetensors) | safetensors_files(), read)


def _header_of_safetensors(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def gguf_files(folder: Path) -> Target:
    """A whole import but for the last check: header, names, tokenizer, tensors."""
    file, made = folder / "m.gguf", folder / "made"
    seeds = []
    for kind, architecture, tokenizer in (
        ("F16", "llama", gguf_models.byte_level),
        ("Q8_0", "gemma", gguf_models.pieces),
    ):
        gguf_models.write_model(file, architecture, kind=kind, tokenizer=tokenizer)
        seeds.append(file.read_bytes())
    parts = [_parts(file, content) for content in seeds]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        header = read_gguf(file)
        plan = plan_model(header)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        write_tokenizer(header, made, plan.config["vocab_size"])
        computed = floating_type(header, plan.tensors)
        for tensor in plan.tensors:
            found = read_tensor(header, tensor, None, computed)
            assert all(array.size <= 8 * len(content) for array in found.values())

    return Target(edited(seeds, lambda content: min(len(content), 16000)) | _rebuilt(parts), read)


@dataclass(frozen=True)
class _Parts:
    entries: dict[str, bytes]
    tensors: list[bytes]
    data: bytes


def _parts(file: Path, content: bytes) -> _Parts:
    file.write_bytes(content)
    reader = gguf.GGUFReader(file)
    entries = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = [b"".join(part.tobytes() for part in tensor.field.parts) for tensor in reader.tensors]
    return _Parts(entries, tensors, content[reader.data_offset :])


@st.composite
def _rebuilt(draw: st.DrawFn, all_parts: list[_Parts]) -> bytes:
    """A sound file of which a few metadata entries and tensors were replaced, dropped or repeated."""
    parts = draw(st.sampled_from(all_parts))
    entries, tensors = dict(parts.entries), list(parts.tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(parts.entries)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            entries.pop(name, None)
        elif kind == 1:
            at = draw(st.integers(0, len(tensors) - 1))
            tensors[at] = draw(edited([tensors[at]]))
        else:
            entries[name] = _string(name.encode()) + draw(_gguf_values())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries.values()) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + parts.data


def _string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _gguf_values() -> st.SearchStrategy[bytes]:
    texts = st.text(max_size=6) | st.sampled_from(
        ("llama", "gpt2", "t5", "qwen2", "gemma", "linear", "llama-bpe", "▁", "<0x00>")
    )
    raw = texts.map(lambda text: _string(text.encode("utf-8", "surrogatepass")))
    strings = st.lists(raw, max_size=300).map(lambda found: struct.pack("<IQ", 8, len(found)) + b"".join(found))
    counts = st.sampled_from((0, 1, 2, 261, 264, 266, 300))
    numbers = st.tuples(st.sampled_from(((4, "I"), (5, "i"), (6, "f"), (10, "Q"))), counts, st.integers(0, 400)).map(
        lambda drawn: struct.pack(f"<IQ{drawn[1]}{drawn[0][1]}", drawn[0][0], drawn[1], *[drawn[2]] * drawn[1])
    )
    return st.one_of(
        st.integers(0, 2**32 - 1).map(lambda number: struct.pack("<II", 4, number)),
        st.sampled_from((0, 1, 2, 3, 16, 64, 2**31 - 1)).map(lambda number: struct.pack("<II", 4, number)),
        st.floats(width=32).map(lambda number: struct.pack("<If", 6, number)),
        st.integers(0, 1).map(lambda number: struct.pack("<IB", 7, number)),
        raw.map(lambda text: struct.pack("<I", 8) + text),
        (strings | numbers).map(lambda array: struct.pack("<I", 9) + array),
    )


def model_config(folder: Path) -> Target:
    """A model folder whose config.json says something else than its weights."""
    model = _tiny(folder)
    words = st.sampled_from(("gemma2", "qwen2", "mamba", "phi3", "float16", "silu", "yarn", "linear", 10**9, -1, 0))
    extra = {"rope_scaling": {"type": "linear", "factor": 2.0}, "quantization": {"bits": 4, "group_size": 32}}
    seeds = [_config(), {**_config(), **extra}, {**_config(), "text_config": {"vocab_size": 3}, "sliding_window": 4}]

    def read(content: bytes) -> None:
        (model / "config.json").write_bytes(content)
        trunk = load_trunk(model)
        hidden = trunk.hidden(mx.array([trunk.tokenizer.encode("it was", bos=True)]))
        assert math.isfinite(hidden.astype(mx.float32).sum().item())

    return Target(
        st.sampled_from(seeds).flatmap(lambda seed: replaced(seed, json_values(words))).map(_json_bytes), read
    )


def tokenizer_json(folder: Path) -> Target:
    """A tokenizer.json and tokenizer_config.json, one of them changed."""
    model = _tiny(folder)
    files = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: (model / name).read_bytes() for name in files}
    kinds = ("BPE", "Unigram", "WordPiece", "Metaspace", "ByteLevel", "Split", "Replace", "Precompiled", "Strip")
    words = st.sampled_from((*kinds, "deepseek_v32", "..utils", "<s>", "LlamaTokenizer", "BertTokenizer", 10**9))
    documents = [json.loads(content) for content in whole.values()]
    settings = {**documents[1], "chat_template_type": "deepseek_v32", "tool_parser_type": "json_tools", "legacy": False}
    changed = [replaced(documents[0], json_values(words)), replaced(settings, json_values(words))]
    chosen = st.integers(0, 1).flatmap(lambda at: changed[at].map(lambda found: bytes([at]) + _json_bytes(found)))

    def read(content: bytes) -> None:
        for at, name in enumerate(files):
            (model / name).write_bytes(content[1:] if content[:1] == bytes([at]) else whole[name])
        _use(load_tokenizer(model, _config()))

    return Target(chosen | edited([b"\0" + whole["tokenizer.json"]]), read)


def tokenizer_model(folder: Path) -> Target:
    """A SentencePiece model, read by its own library."""
    model = folder / "pieces"
    model.mkdir()
    source = bundle_root() / "models/reviews/tokenizer.model"
    shutil.copy(source.with_name("tokenizer_config.json"), model)
    seeds = [source.read_bytes()]

    def read(content: bytes) -> None:
        (model / "tokenizer.model").write_bytes(content)
        _use(load_tokenizer(model, {"eos_token_id": 2}))

    return Target(edited(seeds, lambda content: len(content)), read)


def _use(tokenizer: Any) -> None:
    tokens = tokenizer.encode(_TEXT, bos=True)
    assert all(0 <= token < 1 << 31 for token in tokens)
    tokenizer.decode(tokens)


def check_lines(error: UserError) -> None:
    for line in str(error).split("\n"):
        assert line.isprintable() and len(line) < 2000, line


def _config() -> dict[str, Any]:
    return {"model_type": "llama", **COMMON, **KINDS["llama"]}


def _tiny(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_config()))
    write_word_tokenizer(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": _TEMPLATE}))
    write_weights(model, _config(), 0, 0.25)
    return model


def _json_bytes(document: object) -> bytes:
    return json.dumps(document).encode()


TARGETS: dict[str, Callable[[Path], Target]] = {
    "config": config,
    "jsonl": jsonl,
    "safetensors": safetensors,
    "gguf": gguf_files,
    "model_config": model_config,
    "tokenizer_json": tokenizer_json,
    "tokenizer_model": tokenizer_model,
}
