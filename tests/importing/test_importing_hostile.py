"""Malformed and hostile GGUF files: each ends in one ModelError line, quickly and in little memory."""

import struct
import tracemalloc

import gguf_models as tiny
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.importing.convert import import_model
from mlx_ppo.importing.gguf_file import read_gguf

HUGE = 2**63 - 1


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name="t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


SOUND = (tensor(),)


def built(entries=(), tensors=SOUND, *, magic=b"GGUF", version=3, counts=None, data=256):
    count, pairs = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, count, pairs) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


CASES = {
    "empty": (b"", "empty file"),
    "magic": (built(magic=b"GGML"), "not a GGUF file"),
    "short": (b"GGUF\x03", "truncated or forged: the version needs 4 bytes, 1 are left"),
    "version 1": (built(version=1), "GGUF version 1;"),
    "version 99": (built(version=99), "GGUF version 99;"),
    "big-endian": (built(version=0x03000000), "version 3 in big-endian order"),
    "huge tensor count": (built(counts=(HUGE, 0)), f"{HUGE} tensors"),
    "huge metadata count": (built(counts=(1, HUGE)), f"{HUGE} metadata entries"),
    "no tensors": (built(tensors=()), "holds no tensors"),
    "counts past the end": (built(counts=(60000, 0), data=0), "truncated or forged"),
    "key length": (built([struct.pack("<Q", HUGE)]), f"a metadata key of {HUGE} bytes"),
    "string length": (built([entry("k", 8, struct.pack("<Q", 2**62))]), f"metadata 'k' of {2**62} bytes"),
    "string past the end": (built([entry("k", 8, struct.pack("<Q", 10**6))]), "needs 1000000 bytes"),
    "string not UTF-8": (built([entry("k", 8, text(b"a\xff"))]), "metadata 'k' isn't UTF-8 at its byte 1"),
    "key not UTF-8": (built([entry(b"\xc3\x28", 4, bytes(4))]), "a metadata key isn't UTF-8"),
    "type": (built([entry("k", 77, bytes(8))]), "metadata 'k' has the unknown type 77"),
    "array length": (built([entry("k", 9, struct.pack("<IQ", 4, HUGE))]), "needs"),
    "array of strings": (built([entry("k", 9, struct.pack("<IQ", 8, HUGE))]), f"a list of {HUGE} strings"),
    "array of arrays": (built([entry("k", 9, struct.pack("<IQ", 9, 1))]), "a list of the unknown type 9"),
    "duplicate key": (built([entry("k", 4, bytes(4))] * 2), "'k' appears twice"),
    "alignment": (built([entry("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is '0'"),
    "alignment type": (built([entry("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "odd alignment": (built([entry("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is '48'"),
    "duplicate tensor": (built(tensors=(tensor(), tensor())), "tensor 't' appears twice"),
    "rank 0": (built(tensors=(tensor(dims=()),)), "0 dimensions"),
    "rank": (built(tensors=(text("t") + struct.pack("<I", 2**31),)), "2147483648 dimensions"),
    "zero dimension": (built(tensors=(tensor(dims=(0, 5)),)), "has the shape"),
    "absurd dimensions": (built(tensors=(tensor(dims=(2**40, 2**40)),)), "has the shape"),
    "product that wraps": (built(tensors=(tensor(dims=(2**32, 2**32)),)), "has the shape"),
    "unknown type": (built(tensors=(tensor(kind=999),)), "has the type 999; read are"),
    "type not read": (built(tensors=(tensor(kind=24),)), "has the type I8; read are"),
    "block": (built(tensors=(tensor(dims=(33,), kind=8),)), "rows of 33 don't divide into Q8_0 blocks of 32"),
    "offset": (built(tensors=(tensor(offset=2**62),)), "ends at byte"),
    "offset near 2^64": (built(tensors=(tensor(offset=2**64 - 32),)), "ends at byte"),
    "unaligned": (built(tensors=(tensor(offset=4),)), "no multiple of the alignment"),
    "overlap": (built(tensors=(tensor("a"), tensor("b"))), "tensors 'a' and 'b' overlap"),
    "data cut off": (built(data=100), "ends at byte"),
    "name with an escape": (built(tensors=(tensor("\x1b[2J\n", kind=24),)), r"\\x1b\[2J\\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_ends_in_one_line(tmp_path, case):
    content, message = CASES[case]
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as caught:
            import_model(tmp_path / "m.gguf", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "m.gguf"))
    assert peak < 10_000_000 and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_sound_header_passes(tmp_path):
    (tmp_path / "m.gguf").write_bytes(built([entry("k", 9, struct.pack("<IQ", 4, 2) + bytes(8))]))
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["k"].tolist() == [0, 0] and file.tensors["t"].shape == (32,)


def test_every_truncation_and_many_flipped_bytes(tmp_path):
    """Only ModelError, or a file that is still sound."""
    tiny.write_model(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    header = min(t.offset for t in read_gguf(tmp_path / "m.gguf").tensors.values())
    broken = tmp_path / "b.gguf"
    for length in [*range(0, 400), *range(400, header, 97), len(whole) - 1]:
        broken.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_gguf(broken)
    for place in [*range(0, 600), *range(header - 3000, header, 7)]:
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        broken.write_bytes(changed)
        try:
            read_gguf(broken)
        except ModelError as error:
            assert "\n" not in str(error)


def array(key, value):
    return lambda writer, _: (writer.kv_data[0].pop(key, None), writer.add_array(key, value))


def number(key, value):
    return lambda writer, _: (writer.kv_data[0].pop(key, None), writer.add_uint32(key, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (number("llama.block_count", 2**31 - 1), "contradict each other"),
        (number("llama.block_count", 0), "can't be"),
        (number("llama.embedding_length", 2**31 - 1), "contradict"),
        (number("llama.attention.head_count", 2**30), "has the shape|contradict"),
        (number("llama.attention.key_length", 15), "contradict"),
        (number("tokenizer.ggml.eos_token_id", 2**31), "can't be"),
        (array("tokenizer.ggml.merges", ["a b c", "zz zz"]), "the merge 'a b c' isn't"),
        (array("tokenizer.ggml.tokens", ["a", "a"]), "the token 'a' appears twice"),
        (array("tokenizer.ggml.tokens", [f"t{n}" for n in range(999)]), "999 tokens for"),
        (array("tokenizer.ggml.token_type", [1, 2]), "isn't a list of"),
        (array("tokenizer.ggml.tokens", ["x" * 5000]), "more than 4096 characters"),
        (number("tokenizer.ggml.pre", 5), "'tokenizer.ggml.pre' is '5'"),
        (number("tokenizer.chat_template", 5), "chat_template' is '5'"),
    ],
)
def test_lying_metadata(tmp_path, change, message):
    tiny.write_model(tmp_path / "m.gguf", change=change)
    with pytest.raises(ModelError, match=message) as caught:
        import_model(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value) and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
