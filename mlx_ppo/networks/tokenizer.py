"""The tokenizer of a model folder behind the project's own small interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.networks.model_files import json_object


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


class PieceTokenizer:
    """`mlx_ppo.data.tokenizer.Tokenizer` over a folder's `tokenizer.model`, read by SentencePiece itself.

    transformers 5 reads such a file without its BOS and its leading space.
    """

    has_chat_template = False

    def __init__(self, path: Path, eos_ids: frozenset[int]) -> None:
        """Read the file.

        Raises:
            ModelError: it isn't a SentencePiece model, or knows no end-of-sequence token.
        """
        try:
            self._pieces = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path / 'tokenizer.model'}: not a SentencePiece model ({error})") from None
        settings_file = path / "tokenizer_config.json"
        settings = json_object(settings_file) if settings_file.is_file() else {}
        self._bos = self._pieces.bos_id() if settings.get("add_bos_token", True) else -1
        own = self._pieces.eos_id()
        self.eos_ids = eos_ids | ({own} if own >= 0 else set())
        if not self.eos_ids:
            raise ModelError(f"{path}: no end-of-sequence token; set eos_token_id in config.json")
        self.eos_id = own if own >= 0 else min(self.eos_ids)
        self.vocab_size: int = self._pieces.vocab_size()

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids, with BOS first where it is asked for and the model has one."""
        tokens: list[int] = self._pieces.encode(text)
        return [self._bos, *tokens] if bos and self._bos >= 0 else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        text: str = self._pieces.decode([int(token) for token in tokens if token < self.vocab_size])
        return text

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Such a folder has no chat template that is read here."""
        raise ModelError("a folder with only tokenizer.model has no chat template; use plain text prompts")


def load_tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer of a checked model folder.

    Raises:
        ModelError: it is broken.
    """
    from mlx_lm.tokenizer_utils import load

    eos = config.get("eos_token_id")
    if not (path / "tokenizer.json").exists():
        given = eos if isinstance(eos, list) else [eos]
        return PieceTokenizer(path, frozenset(token for token in given if isinstance(token, int)))
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
