import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlx_ppo
from mlx_ppo.errors import ModelError
from mlx_ppo.models.folder import check_model_folder

CONFIG = {"model_type": "llama", "hidden_size": 4}
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
GOOD = {"a": ("F32", [2, 3], 0, 24), "b": ("BF16", [], 24, 26)}
Build = Callable[..., Path]


def write_safetensors(file: Path, header: dict[str, Any] | bytes, data: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def entries(tensors: dict[str, tuple[str, list[int], int, int]]) -> dict[str, Any]:
    return {name: {"dtype": d, "shape": s, "data_offsets": [b, e]} for name, (d, s, b, e) in tensors.items()}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(*, config: Any = CONFIG, tokenizer: Any = TOKENIZER, weights: bool = True, name: str = "tiny") -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        for file, content in (("config.json", config), ("tokenizer.json", tokenizer)):
            if content is not None:
                (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if weights:
            write_safetensors(folder / "model.safetensors", entries(GOOD), 26)
        return folder

    return make


def shard(folder: Path, index: dict[str, str] | None, **files: list[str]) -> None:
    """Replace the weights: files `s1` to `s9` hold the given tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in files.items():
        save_file({tensor: np.ones(2, np.float32) for tensor in tensors}, folder / shard_name(name))
    if index is not None:
        content = {"metadata": {}, "weight_map": {tensor: shard_name(name) for tensor, name in index.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def shard_name(name: str) -> str:
    return f"model-0000{name[1]}-of-00002.safetensors" if name in ("s1", "s2") else name


def problem(path: Path, *, weights: bool = True) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(path, weights=weights)
    message = str(caught.value)
    assert message.isprintable(), "one line, no control characters"
    assert len(message) < 500 + len(str(path))
    return message


def test_a_good_folder_passes(build: Build) -> None:
    folder = build()
    checked = check_model_folder(folder)
    assert checked.path == folder
    assert checked.config == CONFIG
    assert checked.weight_files == (folder / "model.safetensors",)
    assert checked.tensors == {"a": ("F32", (2, 3)), "b": ("BF16", ())}


def test_shards_pass_with_and_without_an_index(build: Build) -> None:
    folder = build()
    shard(folder, {"a": "s1", "b": "s2"}, s1=["a"], s2=["b"])
    assert [file.name[:11] for file in check_model_folder(folder).weight_files] == ["model-00001", "model-00002"]
    (folder / "model.safetensors.index.json").unlink()
    assert set(check_model_folder(folder).tensors) == {"a", "b"}


def test_what_mlx_saves_passes(build: Build) -> None:
    import mlx.core as mx

    folder = build()
    types = (mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.bool_, mx.int64)
    arrays = {f"t{i}": mx.zeros((3, i), dtype) for i, dtype in enumerate(types)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    assert set(check_model_folder(folder).tensors) == set(arrays)


def test_nothing_heavy_is_imported_and_limits_stay(build: Build) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from mlx_ppo.models.folder import check_model_folder\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        f"check_model_folder(Path({str(build())!r}))\n"
        "assert not {'mlx', 'mlx.core', 'mlx_lm', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "assert before == resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_ppo.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_weights_may_be_missing_where_they_are_not_asked_for(build: Build) -> None:
    folder = build(weights=False)
    checked = check_model_folder(folder, weights=False)
    assert checked.weight_files == ()
    assert checked.tensors == {}
    assert "no weights: no model*.safetensors" in problem(folder)
    (folder / "model.safetensors").write_bytes(b"junk, and more junk")
    assert "truncated, or not safetensors" in problem(folder, weights=False)


# The place


def test_a_missing_folder_names_its_neighbour(build: Build) -> None:
    folder = build(name="smollm")
    assert f"Did you mean '{folder}'?" in problem(folder.with_name("smolm"))
    assert "no such folder; nothing is ever downloaded" in problem(folder.with_name("quite-another"))
    assert "no such folder" in problem(folder / "nowhere" / "at" / "all")


def test_a_hub_id_is_explained(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.chdir(tmp_path)
    assert "Hugging Face Hub id: nothing is ever downloaded" in problem(Path("HuggingFaceTB/SmolLM2-135M"))
    assert "an address, not a folder" in problem(Path("https://huggingface.co/gpt2"))
    assert "Did you mean 'models/tiny'?" in problem(Path("models/tyny"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "a GGUF file has to be imported"),
        ("model.tar.gz", "an archive, which is never unpacked here"),
        ("model.safetensors", "give the folder"),
    ],
)
def test_a_file_is_not_a_folder(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" if name.endswith("gguf") else bytes(9))
    assert words in problem(tmp_path / name)


def test_a_folder_around_the_model_names_the_model(build: Build) -> None:
    folder = build(name="models--org--tiny/snapshots/0123")
    assert f"Did you mean '{folder}'?" in problem(folder.parents[1])
    assert f"Did you mean '{folder}'?" in problem(folder.parent)
    (folder / "config.json").unlink()
    assert "no config.json" in problem(folder)


# The configuration


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "config.json: an empty file"),
        (b"{\n", "malformed JSON: Expecting property name"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "malformed JSON: maximum recursion depth"),
        (b"1" * 5000, "malformed JSON: Exceeds the limit"),
        ([], "not a JSON object"),
        ({}, "no 'model_type'"),
        ({"model_type": 3}, "must be a string, not '3'"),
        ({"model_type": "lama"}, "no model type 'lama'. Did you mean 'llama'?"),
        ({"model_type": "llama\n\x1b[2J" + "x" * 1000}, r"llama\n\x1b[2J"),
        ({"model_type": "zzz"}, "A newer mlx-lm may know it"),
        ({"model_type": "rope_utils"}, "no model type 'rope_utils'"),
        ({"model_type": "cache"}, "no model type 'cache'"),
        ({"model_type": "..utils"}, "no model type"),
        ({"model_type": "llama", "model_file": "model.py"}, "'model_file' asks to run code"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "m.M"}}, "'auto_map' asks to run code"),
        ({"model_type": "llama", "trust_remote_code": True}, "'trust_remote_code' asks to run code"),
        ({"model_type": "llama", "num_hidden_layers": 9}, "'num_hidden_layers' is '9', more than there can be (2)"),
        ({"model_type": "llama", "text_config": {"n_layer": 1e300}}, "'n_layer' is '1e+300', more than there can be"),
    ],
)
def test_bad_configs(build: Build, config: Any, words: str) -> None:
    assert words in problem(build(config=config))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "Klear", "nemotron-nas", "solar_open", "bailing_hybrid"])
def test_known_and_remapped_model_types_pass(build: Build, kind: str) -> None:
    assert check_model_folder(build(config={"model_type": kind, "auto_map": {}})).config["model_type"] == kind


def test_every_type_that_mlx_lm_loads_is_known() -> None:
    from mlx_lm.utils import MODEL_REMAPPING

    from mlx_ppo.models.folder import _model_types

    types = _model_types()
    assert set(MODEL_REMAPPING) <= types
    assert set(MODEL_REMAPPING.values()) <= types
    assert not {"base", "cache", "switch_layers", "__init__"} & types


def test_python_files_in_the_folder_are_left_alone(build: Build) -> None:
    folder = build()
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "tokenizer_config.json").write_text('{"auto_map": null, "eos_token": "a"}')
    check_model_folder(folder)


# The tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (None, "no tokenizer: neither tokenizer.json nor tokenizer.model"),
        (b"", "tokenizer.json: an empty file"),
        (b"{", "tokenizer.json: malformed JSON"),
        ([1], "tokenizer.json: not a JSON object"),
        ({"model": None}, "it has no object 'model'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
def test_bad_tokenizers(build: Build, tokenizer: Any, words: str) -> None:
    assert words in problem(build(tokenizer=tokenizer))


def test_other_tokenizer_files(build: Build) -> None:
    folder = build(tokenizer=None)
    (folder / "tokenizer.model").write_bytes(b"\n\x01a")
    check_model_folder(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model: an empty file" in problem(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x01a")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    assert "tokenizer_config.json: 'auto_map' asks to run code" in problem(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: not a JSON object" in problem(folder)


# Links and special files


def test_links_inside_the_folder_and_to_the_folder_pass(build: Build, tmp_path: Path) -> None:
    folder = build()
    (folder / "copy.json").symlink_to("config.json")
    (tmp_path / "alias").symlink_to(folder)
    check_model_folder(tmp_path / "alias")


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "sub/notes.txt"])
def test_links_that_lead_out_are_refused(build: Build, tmp_path: Path, name: str) -> None:
    folder = build()
    (tmp_path / "secret").write_text("x")
    (folder / "sub").mkdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    assert f"a link that leads out of the model folder, to '{tmp_path / 'secret'}'" in problem(folder)


def test_a_linked_subfolder_a_dangling_link_and_a_loop_are_refused(build: Build, tmp_path: Path) -> None:
    folder = build()
    (folder / "sub").symlink_to(tmp_path, target_is_directory=True)
    assert "leads out" in problem(folder)
    (folder / "sub").unlink()
    (folder / "gone").symlink_to("nothing")
    assert "which doesn't exist" in problem(folder)
    (folder / "gone").unlink()
    (folder / "gone").symlink_to("gone")
    assert "a link" in problem(folder)


@pytest.mark.parametrize("place", ["models--org--tiny/blobs", "blobs/ab"])
def test_the_hugging_face_cache_passes(build: Build, place: str) -> None:
    folder = build(name="models--org--tiny/snapshots/0123")
    blobs = folder.parents[2] / place
    blobs.mkdir(parents=True)
    for file in list(folder.iterdir()):
        file.rename(blobs / f"x-{file.name}")
        file.symlink_to(os.path.relpath(blobs / f"x-{file.name}", folder))
    assert set(check_model_folder(folder).tensors) == {"a", "b"}


def test_only_the_caches_own_layout_has_blobs(build: Build) -> None:
    folder = build(name="tiny/snapshots/0123")
    (folder.parents[1] / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder.parents[1] / "blobs" / "x")
    (folder / "model.safetensors").symlink_to("../../blobs/x")
    assert "leads out" in problem(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_does_not_block(build: Build, name: str) -> None:
    folder = build()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: can't be read: not a regular file" in problem(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_told(build: Build) -> None:
    folder = build()
    (folder / "config.json").chmod(0)
    assert "config.json: can't be read: Permission denied" in problem(folder)


# Which weight files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin' is a pickle, which can run code; only safetensors are read"),
        ("weights.PT", "is a pickle"),
        ("last.ckpt", "is a pickle"),
        ("tiny.gguf", "is a GGUF file"),
        ("adapters.safetensors", "'adapters.safetensors' is not named model*.safetensors"),
    ],
)
def test_other_weights_are_explained(build: Build, name: str, words: str) -> None:
    folder = build(weights=False)
    (folder / name).write_bytes(b"\x80\x04.")
    assert words in problem(folder)


def test_pickles_beside_safetensors_are_ignored(build: Build) -> None:
    folder = build()
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    check_model_folder(folder)


def test_a_path_that_mlx_lm_cannot_search_is_told(build: Build) -> None:
    assert "rename the folder" in problem(build(name="tiny [v2]"))


@pytest.mark.parametrize(
    ("index", "files", "words"),
    [
        ({"a": "s1", "b": "s2"}, {"s1": ["a"]}, "'model-00002-of-00002.safetensors' missing, though"),
        ({"a": "s1"}, {"s1": ["a"], "s2": ["b"]}, "00002-of-00002.safetensors: a stray file"),
        ({"a": "s1", "b": "s2"}, {"s1": ["a", "b"], "s2": ["c"]}, "tensor '"),
        ({"a": "s1", "b": "s1"}, {"s1": ["a"]}, "puts it in model-00001-of-00002.safetensors, it is in no file"),
        ({"a": "s1"}, {"s1": ["a", "b"]}, "tensor 'b': model.safetensors.index.json puts it in no file"),
        ({"a": "../other.safetensors"}, {"s1": ["a"]}, "names the file '../other.safetensors'"),
        ({"a": "model/../x.safetensors"}, {"s1": ["a"]}, "names the file"),
        ({"a": "s1", "b": "s2"}, {"s1": ["a", "b"], "s2": ["b"]}, "tensor 'b' is also in model-00001-of-00002"),
        (None, {"s2": ["a"]}, "'model-00001-of-00002.safetensors' is missing"),
        (None, {"model.safetensors": ["a"], "model-extra.safetensors": ["a"]}, "tensor 'a' is also in model-extra"),
    ],
)
def test_shards_that_do_not_fit(build: Build, index: Any, files: dict[str, list[str]], words: str) -> None:
    folder = build()
    shard(folder, index, **files)
    assert words in problem(folder)


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_a_malformed_index(build: Build, content: bytes) -> None:
    folder = build()
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert "'weight_map' must be an object" in problem(folder)


# Inside a safetensors file


@pytest.mark.parametrize(
    ("tensors", "data", "words"),
    [
        (GOOD, 25, "truncated: its tensors need 26 bytes, 25 are there"),
        (GOOD, 30, "4 bytes after the last tensor"),
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}, 12, "the range of tensor 'b' overlaps"),
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 0, 8)}, 8, "the range of tensor 'b' overlaps"),
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 12, 20)}, 20, "tensor 'b' leaves 4 bytes before it unused"),
        ({"a": ("F32", [2], 4, 12)}, 12, "tensor 'a' leaves 4 bytes before it unused"),
        ({"a": ("F32", [3], 0, 8)}, 8, "tensor 'a': F32 [3] needs 12 bytes, its range has 8"),
        ({"a": ("F32", [2], 8, 0)}, 8, "needs 8 bytes, its range has -8"),
        ({"a": ("F64", [1], 0, 8)}, 8, "has the type 'F64', which mlx doesn't read"),
        ({"a": ("F32", [-2], 0, 8)}, 8, "tensor 'a' is malformed"),
        ({"a": ("F32", [True], 0, 4)}, 4, "tensor 'a' is malformed"),
        ({"a": ("F32", [2.0], 0, 8)}, 8, "tensor 'a' is malformed"),
        ({"a": ("F32", [1] * 100, 0, 4)}, 4, "tensor 'a' is malformed"),
        ({"a": ("F32", [2**62, 2**62, 0], 0, 4)}, 4, "needs 0 bytes"),
        ({"x" * 5000 + "\n": ("F32", [3], 0, 8)}, 8, "xxx…': F32"),
        ({}, 0, "holds no tensors"),
    ],
)
def test_ranges_that_lie(build: Build, tensors: Any, data: int, words: str) -> None:
    folder = build()
    write_safetensors(folder / "model.safetensors", entries(tensors), data)
    message = problem(folder)
    assert words in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8"}}', "the key 'a' appears twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', "the key 'dtype' appears twice"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', "tensor 'a' is malformed"),
        (b'{"a":{"dtype":"U8","shape":[1]}}', "tensor 'a' is malformed"),
        (b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', "tensor 'a' is malformed"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', "tensor 'a' is malformed"),
        (b'{"a":[]}', "tensor 'a' is malformed"),
        (b'{"__metadata__":{"format":1},"a":{}}', "'__metadata__' must hold strings"),
        (b'{"__metadata__":{"format":"mlx"}}', "holds no tensors"),
        (b'{"a":', "header: malformed JSON"),
        (b'{"a\xff":1}', "header: not UTF-8"),
        (b"[]", "header: doesn't begin with {"),
        (b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "header: doesn't begin with {"),
        (rb'{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "safetensors refuses it"),
    ],
)
def test_headers_that_are_malformed(build: Build, header: bytes, words: str) -> None:
    folder = build()
    write_safetensors(folder / "model.safetensors", header, 1)
    assert words in problem(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\x00\x01", "truncated, or not safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "its header should have 9223372036854775808 bytes"),
        (struct.pack("<Q", 40) + b'{"a":', "its header should have 40 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"version two of something else", "truncated, or not safetensors"),
    ],
)
def test_files_that_are_not_safetensors(build: Build, content: bytes, words: str) -> None:
    folder = build()
    (folder / "model.safetensors").write_bytes(content)
    assert words in problem(folder)


def test_a_header_over_the_limit_is_not_read(build: Build) -> None:
    folder = build()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse
    assert "a header of 200000000 bytes; safetensors allows 100000000" in problem(folder)


def test_every_cut_of_a_good_file_is_found(build: Build) -> None:
    folder = build()
    whole = (folder / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors: " in problem(folder)
