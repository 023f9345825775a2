"""The tokenizer of a model folder behind the project's own small interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError


class FolderTokenizer:
    """`mlx_ppo.data.tokenizer.Tokenizer` over the Hugging Face tokenizer that mlx-lm loads."""

    def __init__(self, wrapper: Any, path: Path) -> None:
        """Wrap an mlx-lm tokenizer.

        Raises:
            ModelError: it knows no end-of-sequence token.
        """
        self._hf = wrapper._tokenizer
        self._wrapper = wrapper
        self.eos_ids: frozenset[int] = frozenset(int(token) for token in wrapper.eos_token_ids)
        if not self.eos_ids:
            raise ModelError(f"{path}: no end-of-sequence token; set eos_token in tokenizer_config.json")
        own = self._hf.eos_token_id
        self.eos_id: int = int(own) if own is not None else min(self.eos_ids)
        self.vocab_size: int = len(self._hf)
        self.has_chat_template: bool = bool(wrapper.has_chat_template)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids; with `bos` the special tokens that this tokenizer puts before a text, never those after it."""
        tokens = [int(token) for token in self._hf.encode(text, add_special_tokens=bos)]
        while bos and tokens and tokens[-1] in self.eos_ids and len(tokens) > 1:
            tokens.pop()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        text: str = self._hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of messages in the model's own chat template."""
        tokens = self._wrapper.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return [int(token) for token in tokens]


def load_tokenizer(path: Path, config: dict[str, Any]) -> FolderTokenizer:
    """Load the tokenizer of a checked model folder.

    Raises:
        ModelError: it is broken.
    """
    from mlx_lm.tokenizer_utils import load

    eos = config.get("eos_token_id")
    try:
        wrapper = load(path, {"trust_remote_code": False, "local_files_only": True}, eos_token_ids=eos)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {first})") from None
    return FolderTokenizer(wrapper, path)


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> str:
    """A response's text as it continues its prompt (decoding it alone may lose a leading space)."""
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *response])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(response)
