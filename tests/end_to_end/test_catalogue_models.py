"""The catalogue of bad models: each, under every command that reads one, ends in one line and changes nothing."""

import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from project import Project

Spoil = Callable[[Path], None]
READERS = (
    "train",
    "train --dry-run",
    "sft",
    "reward",
    "sample",
    "compare",
    "import",
    "export",
    "plan",
    "bench",
    "resume",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model_folder):
    """A project whose model is a folder of its own, with a run of one iteration."""
    folder = tmp_path_factory.mktemp("catalogue") / "project"
    folder.mkdir()
    project = Project(folder, model_folder)
    shutil.copytree(model_folder, folder / "own")
    project.done("train", project.config(model={"path": "own"}, run={"iterations": 1, "name": "made"}))
    return project


@pytest.fixture
def home(trained, tmp_path, model_folder, reward_folders):
    """A copy of it: a run's paths are absolute, and its record has their SHA-256."""
    folder = tmp_path / "project"
    shutil.copytree(trained.folder, folder, symlinks=True)
    (folder / "model").unlink()
    (folder / "train.toml").unlink()
    project = Project(folder, model_folder)
    shutil.copytree(reward_folders["folder"], folder / "judge")
    run = project.run("made")
    for name in ("config.toml", "run.json"):
        text = (run / name).read_text().replace(str(trained.folder), str(folder))
        (run / name).write_text(text)
    record = json.loads((run / "run.json").read_text())
    record["config"] = hashlib.sha256((run / "config.toml").read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(record))
    for job in ("train", "sft", "reward"):
        project.config(job, model={"path": "own"})
    return project


def arguments(reader: str, own: str = "own") -> tuple[str, ...]:
    """The command that reads the model `own`."""
    return {
        "train": ("train", "train.toml"),
        "train --dry-run": ("train", "train.toml", "--dry-run"),
        "sft": ("sft", "sft.toml"),
        "reward": ("reward", "reward.toml"),
        "sample": ("sample", own, "--prompt", "it"),
        "compare": ("compare", "runs/made", own, "--reward", "judge", "--prompts", "prompts.jsonl", "--count", "2"),
        "import": ("import", own, "out"),
        "export": ("export", "runs/made", "out", "--format", "fused"),
        "plan": ("plan", "train.toml"),
        "bench": ("bench", own, "--iterations", "1"),
        "resume": ("resume", "runs/made"),
    }[reader]


def config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def header(change: Callable[[dict], object], extra: bytes = b"") -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        made = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :] + extra)

    return spoil


def arrays(change: Callable[[dict[str, mx.array]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = dict(mx.load(str(folder / "model.safetensors")))
        mx.eval(found)
        change(found)
        mx.save_safetensors(str(folder / "model.safetensors"), found)

    return spoil


def swapped_offsets(entries):
    first, second = sorted(name for name in entries if name.endswith("norm.weight"))[:2]
    entries[first]["data_offsets"] = entries[second]["data_offsets"]


def longer(entries):
    entries["model.norm.weight"]["shape"] = [33]


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def stray(folder):
    tensors = mx.load(str(folder / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mx.save_safetensors(str(folder / "model-2.safetensors"), {"x": mx.ones(3)})


def doubled(folder):
    mx.save_safetensors(str(folder / "model-2.safetensors"), {"model.norm.weight": mx.ones(32)})


def fewer_rows(folder):
    def keep(found):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found[name] = mx.contiguous(found[name][:200])

    arrays(keep)(folder)
    config(vocab_size=200)(folder)


def no_end(folder):
    config(eos_token_id=None)(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def outside(folder):
    (folder.parent / "secret").write_text("x")
    (folder / "notes.txt").symlink_to("../secret")


def fifo(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def pickles(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def instead(content: bytes, name: str = "own") -> Spoil:
    """A file in the place of the folder."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.write_bytes(content)

    return spoil


def archive(kind: str) -> bytes:
    """With a member that would land outside, and one with an absolute path."""
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as zipped:
            zipped.writestr("../evil.json", "{}")
            zipped.writestr("/tmp/evil.json", "{}")
    else:
        with tarfile.open(fileobj=made, mode="w:gz" if kind == "gz" else "w") as tarred:
            for name in ("../evil.json", "/tmp/evil.json"):
                tarred.addfile(tarfile.TarInfo(name))
    return made.getvalue()


def missing(folder):
    folder.rename(folder.with_name("owns"))


EVERY = set(READERS)
WEIGHTS = EVERY - {"plan"}  # a plan reads config.json alone
CASES: dict[str, tuple[Spoil, str, set[str]]] = {
    "missing folder": (missing, "own: no such f", EVERY),
    "truncated safetensors": (cut, "model.safetensors: truncated", WEIGHTS),
    "header that lies about a length": (
        text("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
        "truncated",
        WEIGHTS,
    ),
    "header that lies about a shape": (header(longer), "'model.norm.weight': F32 [33] needs 132 bytes", WEIGHTS),
    "overlap": (header(swapped_offsets), "overlaps the one before; the file is damaged or forged", WEIGHTS),
    "trailing bytes": (header(lambda _: None, b"12345"), "5 bytes after the last tensor", WEIGHTS),
    "missing tensor": (arrays(lambda found: found.pop("model.norm.weight")), "model.norm.weight", WEIGHTS),
    "extra tensor": (arrays(lambda found: found.update(spare=mx.ones(3))), "spare", WEIGHTS),
    "stray shard": (stray, "a stray file that model.safetensors.index.json doesn't name", WEIGHTS),
    "tensor in two files": (doubled, "'model.norm.weight' is also in", WEIGHTS),
    "NaN weights": (
        arrays(lambda found: found.update({"model.norm.weight": mx.full((32,), mx.nan)})),
        "model.norm.weight contains NaN or infinity",
        WEIGHTS,
    ),
    "unknown model type": (config(model_type="lama"), "no model type 'lama'. Did you mean 'llama'?", EVERY),
    "auto_map": (config(auto_map={"AutoModel": "x.Y"}), "'auto_map' asks to run code", WEIGHTS),
    "model_file": (config(model_file="evil.py"), "'model_file' asks to run code", WEIGHTS),
    "trust_remote_code": (config(trust_remote_code=True), "'trust_remote_code' asks to run code", WEIGHTS),
    "code in the tokenizer": (
        text("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'),
        "tokenizer_config.json: 'auto_map' asks to run code",
        WEIGHTS,
    ),
    "tokenizer larger than the model": (fewer_rows, "the tokenizer has 300 tokens, the model only 200", WEIGHTS),
    "no end of sequence": (no_end, "no end-of-sequence token; set eos_token", WEIGHTS),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer: neither", WEIGHTS),
    "tokenizer that isn't JSON": (text("tokenizer.json", "{"), "tokenizer.json: malformed JSON", WEIGHTS),
    "tokenizer of nothing": (text("tokenizer.json", '{"model": {}}'), "the tokenizer cannot be loaded", WEIGHTS),
    "tokenizer of another class": (
        text("tokenizer_config.json", '{"tokenizer_class": "os.system", "chat_template_type": "../../evil"}'),
        "the tokenizer cannot be loaded",
        WEIGHTS,
    ),
    "chat template that is no text": (
        text("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 5}'),
        "",
        WEIGHTS,
    ),
    "config that isn't JSON": (text("config.json", "{"), "config.json: malformed JSON", EVERY),
    "config nested too deeply": (text("config.json", "[" * 100_000), "config.json: malformed JSON: maximum rec", EVERY),
    "config of one long number": (text("config.json", "1" * 5000), "config.json: malformed JSON: Exceeds", EVERY),
    "config not UTF-8": (text("config.json", b'{"a": "\xff"}'), "config.json: not UTF-8 at byte 7", EVERY),
    "empty config": (text("config.json", ""), "config.json: an empty file", EVERY),
    "a billion blocks": (
        config(num_hidden_layers=10**9),
        "'num_hidden_layers' is '1000000000', more than there can be",
        EVERY,
    ),
    "sizes that fit and don't compute": (
        config(num_attention_heads=32, head_dim=1, num_key_value_heads=16),
        "mlx-lm cannot compute with this model (ValueError",
        EVERY,
    ),
    "link out of the folder": (outside, "own/notes.txt: a link that leads out of the model folder", WEIGHTS),
    "pipe for a config": (fifo("config.json"), "config.json: can't be read: not a regular file", EVERY),
    "pipe for weights": (fifo("model.safetensors"), "model.safetensors: can't be read: not a regular file", WEIGHTS),
    "pickle for weights": (pickles, "'pytorch_model.bin' is a pickle, which can run code", WEIGHTS),
    "pickle for a folder": (instead(b"\x80\x04."), "own: a pickle, which can run code", EVERY),
    "zip": (instead(archive("zip")), "own: an archive, which is never unpacked here", EVERY),
    "tar": (instead(archive("tar")), "own: an archive, which is never unpacked here", EVERY),
    "tar.gz": (instead(archive("gz")), "own: an archive, which is never unpacked here", EVERY),
}


@pytest.mark.parametrize("case", CASES)
def test_each_ends_in_one_line_and_changes_nothing(home, case):
    spoil, words, readers = CASES[case]
    spoil(home.folder / "own")
    for reader in sorted(readers - {"resume"}):
        shown = home.refused(3, words, *arguments(reader))
        assert len(shown.splitlines()) == 1, (reader, shown)
    if "resume" in readers:
        shown = home.refused(4, " since the run was started; re", *arguments("resume"))
        assert len(shown.splitlines()) == 1, shown


def test_a_good_model_serves_every_reader(home):
    """What the cases begin with: so it is the spoiling that each of them ends at."""
    for reader in READERS:
        shown = home.done(*arguments(reader))
        assert shown, reader
        shutil.rmtree(home.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("name", ["org/model-7b", "https://huggingface.co/org/model", "hf://org/model"])
def test_names_of_the_hub_are_explained(home, name):
    for job in ("train", "sft", "reward"):
        home.refused(3, "nothing is ever downloaded", job, home.config(job, model={"path": name}))
    home.refused(3, "nothing is ever downloaded", "plan", home.config(model={"path": name}))
    home.refused(3, "nothing is ever downloaded", "bench", name)
    home.refused(3, "nothing is ever downloaded", "sample", name, "--prompt", "it")
    home.refused(3, "nothing is ever downloaded", "compare", name, "own", "--prompts", "prompts.jsonl")
    home.refused(3, "no such file or folder", "import", name, "out")


def test_a_missing_model_names_its_neighbour(home):
    missing(home.folder / "own")
    for reader in ("train", "sft", "reward", "sample", "compare", "export", "plan", "bench"):
        assert "Did you mean '" in home.refused(3, "owns'?", *arguments(reader))
    home.refused(3, "no such file or folder (did you mean 'owns'?)", *arguments("import"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03", "m.gguf: truncated or forged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63 - 1, 0), "tensors; at most 65536 are read"),
        (b"GGML" + bytes(100), "m.gguf: not a GGUF file"),
        (b"", "m.gguf: an empty file"),
    ],
)
def test_malformed_gguf(home, content, words):
    (home.folder / "m.gguf").write_bytes(content)
    home.refused(3, words, "import", "m.gguf", "out")
    home.refused(
        3, "m.gguf: a file, not a model folder: a GGUF file has to be imported", "sample", "m.gguf", "--prompt", "it"
    )
    home.refused(3, "m.gguf: a file, not a model folder", "train", home.config(model={"path": "m.gguf"}))


def test_places_to_write_that_are_taken(home):
    (home.folder / "out").write_text("mine")
    home.refused(3, "out: exists already; give a new folder", *arguments("import"))
    home.refused(2, "out: already there; name a new folder", *arguments("export"))
    home.refused(2, "out: already there and not an empty folder", "init", "out")
    (home.folder / "loop").symlink_to("loop")
    for command in (("import", "own", "loop"), ("export", "runs/made", "loop", "--format", "fused")):
        home.refused(3 if command[0] == "import" else 2, "loop: ", *command)


@pytest.mark.parametrize("name", ["x" * 5000, "loop", "\udcff\udcfe", "\x1b[2J\n\u202e"])
def test_names_that_no_file_has(home, name):
    """One printable line, whatever the code."""
    (home.folder / "loop").symlink_to("loop")
    for command in (
        ("train", name), ("sft", name), ("reward", name), ("resume", name), ("plan", name), ("bench", name),
        ("sample", name, "--prompt", "it"),
        ("compare", name, "own", "--prompts", "prompts.jsonl"), ("import", name, "out"),
        ("compare", "own", "own", "--reward", name, "--prompts", "prompts.jsonl"), ("sample", "own", "--prompts", name),
        ("export", name, "out", "--format", "fused"), ("plan", "train.toml", "--model-config", name),
    ):  # fmt: skip
        before = home.everything()
        result = home.cli(*command)
        assert result.exit_code in (2, 3, 4) and isinstance(result.exception, SystemExit), (command, result.exception)
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, (command, result.stderr)
        assert result.stderr[:-1].isprintable() and home.everything() == before, command
