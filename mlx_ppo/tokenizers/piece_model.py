"""What is in a SentencePiece `tokenizer.model`, read from its protocol buffer, of which the library shows a part."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Fields of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE = 3
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }; what comes last counts


@dataclass(frozen=True)
class PieceModel:
    """Pieces in the order of their ids, and how a text is prepared."""

    pieces: tuple[tuple[str, float, int], ...]  # text, score, type (the numbers are llama.cpp's too)
    kind: str  # "unigram", "bpe" or "other"
    adds_space: bool  # before a text
    normalises: bool  # in ways that change more than spaces into ▁


def read_piece_model(content: bytes) -> PieceModel:
    """Read a model that SentencePiece has loaded.

    Raises:
        ValueError: it is cut off or malformed.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(content):
        if field == _PIECE and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
            (trainer if field == _TRAINER else normalizer).update(_fields(value))
    kinds = {_UNIGRAM: "unigram", _BPE: "bpe"}
    return PieceModel(
        tuple(pieces),
        kinds.get(int(trainer.get(_MODEL_TYPE, _UNIGRAM)), "other"),
        adds_space=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        normalises=bool(normalizer.get(_CHARACTER_MAP, b""))
        or bool(normalizer.get(_REMOVE_SPACES, 1))
        or not normalizer.get(_ESCAPE_SPACES, 1),
    )


def without_prefix(content: bytes) -> bytes:
    """The same model without the space before a text."""
    return content + _WITHOUT_PREFIX


def _piece(content: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(content))
    text, score = fields.get(_TEXT, b""), fields.get(_SCORE, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a malformed piece")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], int(fields.get(_KIND, 1))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields: integers, or the bytes of anything else."""
    position = 0
    while position < len(content):
        key, position = _integer(content, position)
        kind = key & 7
        if kind == 0:
            value, position = _integer(content, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError(f"a field of type {kind}")
            size, position = _integer(content, position)
        if position + size > len(content):
            raise ValueError("cut off")
        yield key >> 3, content[position : position + size]
        position += size


def _integer(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("cut off")
