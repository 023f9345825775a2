"""What the data loaders need from a tokenizer; the implementation over mlx_lm lives with the models."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a response."""

    @property
    def eos_id(self) -> int:
        """The one of `eos_ids` that is written where a text ends."""

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be called."""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Tokens of a text without EOS; with `bos`, after the BOS token if the model has one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens."""

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Tokens of a conversation by the model's chat template, BOS included where the template has it.

        Raises:
            ModelError: the template refuses the messages or is broken.
        """
