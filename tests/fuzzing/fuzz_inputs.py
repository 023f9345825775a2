"""Hostile inputs as hypothesis strategies: valid files with edits, and files built from right and wrong parts."""

import json
import struct
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

NUMBERS = (0, 1, 2, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_WILD = st.one_of(st.sampled_from(NUMBERS), st.integers(-(2**66), 2**66))


@st.composite
def edited(draw: st.DrawFn, seeds: Sequence[bytes], hot: Callable[[bytes], int] = len) -> bytes:
    """One of the files with up to four edits, most of them before `hot` (where a header ends)."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        end = max(1, min(len(content), hot(bytes(content))) if draw(st.integers(0, 6)) else len(content))
        at = draw(st.integers(0, end))
        kind = draw(st.sampled_from(("bit", "byte", "number", "number", "cut", "drop", "repeat", "splice", "insert")))
        size = draw(st.integers(1, 64))
        if kind == "bit" and content:
            content[at % len(content)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and content:
            content[at % len(content)] = draw(st.sampled_from((0, 1, 0x0A, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xC3, 0xFF)))
        elif kind == "number":
            number = draw(st.one_of(st.sampled_from(NUMBERS), st.integers(0, 2 * len(content) + 1)))
            form = draw(st.sampled_from(("<B", "<H", "<I", "<Q")))
            raw = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
            content[at : at + len(raw)] = raw
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + size]
        elif kind == "repeat":
            content[at:at] = content[at : at + size] * draw(st.integers(1, 3))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(0, len(other) - 1)))
            content[at : at + size] = other[start : start + size]
        else:
            content[at:at] = draw(st.binary(max_size=16))
    return bytes(content)


def json_values(leaves: st.SearchStrategy[object] | None = None) -> st.SearchStrategy[object]:
    """Whatever JSON can hold, and numbers that it can't."""
    words = st.sampled_from(("user", "assistant", "system", "content", "role", "it was", "\u2028", "\ud83d", "\x1b[2J"))
    plain = st.one_of(st.none(), st.booleans(), _WILD, st.floats(), st.text(max_size=8), words)
    base = plain if leaves is None else leaves | plain
    return st.recursive(
        base, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
    )


def replaced(document: object, values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """The JSON document with one to three of its values, at any depth, replaced, removed or repeated."""

    @st.composite
    def changed(draw: st.DrawFn) -> object:
        copy = json.loads(json.dumps(document))
        for _ in range(draw(st.integers(1, 3))):
            copy = _changed_once(draw, copy, values)
        return copy

    return changed()


def _changed_once(draw: st.DrawFn, document: object, values: st.SearchStrategy[object]) -> object:
    place, holder, key = document, None, None
    while isinstance(place, dict | list) and place and (holder is None or draw(st.integers(0, 3))):
        keys = sorted(place) if isinstance(place, dict) else range(min(len(place), 40))
        holder, key = place, draw(st.sampled_from(list(keys)))
        place = holder[key]
    if holder is None:
        return draw(values)
    kind = draw(st.integers(0, 5))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.append(place)
    elif kind == 2 and isinstance(place, int) and not isinstance(place, bool):
        holder[key] = draw(st.sampled_from((place + 1, place - 1, -place, place * 2, str(place), float(place), 0)))
    else:
        holder[key] = draw(values)
    return document


_DTYPES = ("F32", "F16", "BF16", "U8", "I64", "BOOL", "U32", "F8_E4M3", "C64", "F4", "", "f32", 3, None)
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8, "BOOL": 1, "U32": 4, "F8_E4M3": 1, "C64": 8}


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A header of entries that are mostly right, a length that is mostly true, and data that mostly fit."""
    entries, position = [], 0
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(("a", "b", "c", "__metadata__", "", "x\n\x1b[31m", "ü" * 50)))
        dtype = draw(st.sampled_from(_DTYPES[: draw(st.sampled_from((4, 9, 14)))]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = _BYTES.get(dtype, 1) if isinstance(dtype, str) else 1
        for count in shape:
            size *= count
        offsets: object = [position, position + size]
        if not draw(st.integers(0, 5)):
            offsets = draw(st.lists(_WILD, max_size=3) | st.tuples(st.integers(0, 9), st.integers(0, 40)).map(list))
        entry: object = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        if not draw(st.integers(0, 7)):
            entry = draw(replaced(entry, json_values()))
        entries.append((name, entry))
        position += size
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    header = text.encode() + b" " * draw(st.integers(0, 8))
    length = len(header) + draw(st.sampled_from((0, 0, 0, 0, 1, -1, 8, 2**32, 2**63)))
    data = bytes(max(0, position + draw(st.sampled_from((0, 0, 0, 0, 1, -1, 100)))))
    return struct.pack("<Q", length % 2**64) + header + data


_TOML_VALUES = (
    *("1", "0", "-1", "1.5", "true", '"4"', "nan", "inf", "-inf", "1e999", "[]", "{}", '""', '"a.py:f"', "1_0", "0x7f"),
    *("9" * 30, "2026-01-01", "'''\n'''", '"\\u0000"', '"\\u202e"', '"a\\nb"', '["a", 1]', "{a = 1}", '"lora"'),
    *('"full"', '"gae"', '"rloo"', '"model"', '"function"'),
)


def toml_files(sections: dict[str, list[str]]) -> st.SearchStrategy[bytes]:
    """Tables of known and unknown keys with values of right and wrong types."""
    values = st.one_of(
        st.sampled_from((*_TOML_VALUES, "1" * 5000, "[" * 300, '"' + "x" * 5000 + '"')),
        st.integers(-(2**70), 2**70).map(str),
        st.floats().map(repr),
        st.text(max_size=10).map(lambda text: json.dumps(text)),
        st.text(max_size=6),
    )
    names = sorted({name for keys in sections.values() for name in keys})

    @st.composite
    def table(draw: st.DrawFn) -> str:
        section = draw(st.sampled_from([*sections, "reward", "reward", "pppo", "a.b", '"x\u2028"', "", "run.name"]))
        header = draw(
            st.sampled_from((f"[{section}]", f"[{section}]", f"[{section}]", f"[[{section}]]", f"[{section}"))
        )
        known = sections.get(section, names)
        keys = st.sampled_from(known) | st.sampled_from([*names, "minibatch_sise", "a.b", '"\\n"', "x" * 3000, "é"])
        rows = draw(st.lists(st.tuples(keys, values), max_size=4))
        return "\n".join([header, *(f"{key} = {value}" for key, value in rows)])

    return st.lists(table(), max_size=5).map(lambda tables: "\n".join(tables).encode("utf-8", "surrogatepass"))


def jsonl_files() -> st.SearchStrategy[bytes]:
    """Lines with the fields of every kind of data, right and wrong."""
    names = ("prompt", "completion", "text", "messages", "chosen", "rejected", "rating", "ratings", "margin", "promt")
    message = st.fixed_dictionaries(
        {
            "role": st.sampled_from(("user", "assistant", "system", "user", "assistant", "tool")) | json_values(),
            "content": st.text(max_size=5) | json_values(),
        }
    )
    fields = st.one_of(
        st.text(max_size=6),
        st.sampled_from(("it was", "the film</s>", "a\x00b", "\x1b[2J", "<|im_end|>", " ")),
        st.integers(-5, 5),
        st.floats(),
        st.lists(message, max_size=4),
        json_values(),
    )
    talk = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "was"}]
    sound: list[dict[str, object]] = [
        {"prompt": "it"},
        {"prompt": talk[:1], "completion": " was"},
        {"messages": talk},
        {"prompt": "it", "chosen": " was", "rejected": " is", "margin": 1},
        {"text": "it", "ratings": [1, 2.5]},
    ]
    extended = st.tuples(st.sampled_from(sound), st.dictionaries(st.sampled_from(names), fields, max_size=1))
    record = st.dictionaries(st.sampled_from(names), fields, max_size=4) | extended.map(lambda both: both[0] | both[1])
    line = record.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    escaped = record.map(lambda row: json.dumps(row).encode())
    odd = st.sampled_from(
        (b"", b"null", b"[1]", b"\xff", b'{"a":' * 3000, b"1" * 5000, b'{"prompt": "a", "prompt": "b"}', b"\r")
    )
    ends = st.sampled_from((b"\n", b"\r\n", b"\n\n", b"\xe2\x80\xa8", b""))
    return st.tuples(
        st.sampled_from((b"", b"", b"\xef\xbb\xbf")), st.lists(line | escaped | odd, max_size=4), ends
    ).map(lambda parts: parts[0] + parts[2].join(parts[1]))
