import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mlx_ppo.errors import ModelError


class ByteTokenizer:
    """BOS 1, EOS 2, byte b as b + 3; a chat is `u:...|a:...` with EOS and a newline after each answer."""

    eos_ids = frozenset({2})
    eos_id = 2
    vocab_size = 259
    has_chat_template = True

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [1] * bos + [byte + 3 for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token - 3 for token in tokens if token > 2).decode()

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        tokens = [1]
        for message in messages:
            if message["content"] == "refuse me":
                raise ModelError("the chat template refuses this; leave it out")
            tokens += self.encode(f"{message['role'][0]}:{message['content']}|", bos=False)
            if message["role"] == "assistant":
                tokens += [2, *self.encode("\n", bos=False)]
        return tokens + self.encode("a:", bos=False) * add_generation_prompt


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write lines (bytes as they are, anything else as JSON) to a file."""

    def _write(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return _write
