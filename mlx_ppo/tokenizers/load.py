"""The tokenizer of a model folder behind the project's own small interface."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_ppo.data.model_files import wrong
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.tokenizers.chat_template import ChatTemplate, chosen_template
from mlx_ppo.tokenizers.piece_tokenizer import PieceTokenizer

_LONGEST_ERROR = 300  # characters


class FolderTokenizer:
    """`mlx_ppo.data.tokenizer.Tokenizer` over the Hugging Face tokenizer that mlx-lm loads."""

    def __init__(self, wrapper: Any, path: Path) -> None:
        """Wrap an mlx-lm tokenizer.

        Raises:
            ModelError: it knows no end-of-sequence token, or its chat template isn't a text.
        """
        self.hf = wrapper._tokenizer
        self._wrapper = wrapper
        self._path = path
        self.eos_ids: frozenset[int] = frozenset(int(token) for token in wrapper.eos_token_ids)
        if not self.eos_ids:
            raise ModelError(f"{path}: no end-of-sequence token; set eos_token in tokenizer_config.json")
        own = self.hf.eos_token_id
        self.eos_id: int = int(own) if own is not None else min(self.eos_ids)
        self.vocab_size: int = 1 + max(self.hf.get_vocab().values(), default=-1)
        with _failures_told(path):
            self._after = _specials_after(self.hf, self.eos_ids)
            around = max(self.hf.encode("a", add_special_tokens=True), default=0)
        if around >= self.vocab_size:
            raise wrong(path, f"the tokenizer puts the token {around} around a text, beyond its vocabulary")
        self.template: ChatTemplate | None = None
        source = chosen_template(path, self.hf.chat_template)
        self._by_library = wrapper._chat_template is not None or _overrides_rendering(self.hf)
        if source is not None and not self._by_library:
            switches = {wrapper._thinking_kwarg: bool(wrapper.has_thinking)}
            self.template = ChatTemplate(path, source, {**self.hf.special_tokens_map, **switches})

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered: by the folder's template or, for a few models, by a library's code."""
        return self.template is not None or self._by_library

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of "bos", "unk" and "pad", those that there are."""
        found = {"bos": self.hf.bos_token_id, "unk": self.hf.unk_token_id, "pad": self.hf.pad_token_id}
        return {name: int(index) for name, index in found.items() if index is not None}

    def piece(self, index: int) -> str:
        """How a token is written in the vocabulary."""
        return str(self.hf.convert_ids_to_tokens(index))

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids; with `bos` the special tokens that this tokenizer puts before a text, never those after it."""
        with _failures_told(self._path):
            tokens = [int(token) for token in self.hf.encode(text, add_special_tokens=bos)]
        return tokens[: len(tokens) - self._after] if bos else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        with _failures_told(self._path):
            text: str = self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat_text(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """A conversation in the model's own chat template."""
        if self.template is None:
            return str(self._library(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
        return self.template.render(messages, add_generation_prompt=add_generation_prompt)

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of the same; the template writes BOS where it wants it.

        A message that spells a control token gives that token, as with transformers.
        """
        if self.template is None:
            return [int(token) for token in self._library(messages, add_generation_prompt=add_generation_prompt)]
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt), bos=False)

    def _library(self, messages: list[dict[str, str]], **options: Any) -> Any:
        """What mlx-lm's or transformers' own code makes of a conversation, in this process.

        A folder can only name a module that mlx-lm brings; nothing of the folder runs or is rendered there.
        """
        try:
            return self._wrapper.apply_chat_template(messages, **options)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise wrong(self._path, f"its chat template fails ({type(error).__name__}: {first})") from None


def _specials_after(hf: Any, ends: frozenset[int]) -> int:
    """How many special tokens this tokenizer puts after a text."""
    bare, whole = hf.encode("a", add_special_tokens=False), hf.encode("a", add_special_tokens=True)
    extra = len(whole) - len(bare)
    if not bare:  # not even this letter: only the ends can be told from what comes before
        return next((index for index, token in enumerate(reversed(whole)) if token not in ends), len(whole))
    before = next((index for index in range(extra + 1) if whole[index : index + len(bare)] == bare), extra)
    return int(extra - before)


def _overrides_rendering(hf: Any) -> bool:
    """Whether the tokenizer's class has code of its own instead of a template."""
    owner = next((kind for kind in type(hf).__mro__ if "apply_chat_template" in vars(kind)), type(hf))
    return owner.__name__ != "PreTrainedTokenizerBase"


def load_tokenizer(path: Path, config: dict[str, Any]) -> FolderTokenizer | PieceTokenizer:
    """Load the tokenizer of a checked model folder.

    Raises:
        ModelError: it is broken.
    """
    from mlx_lm.tokenizer_utils import load

    eos = config.get("eos_token_id")
    if not (path / "tokenizer.json").exists():
        given = eos if isinstance(eos, list) else [eos]
        return PieceTokenizer(path, frozenset(token for token in given if isinstance(token, int)))
    with _failures_told(path, "cannot be loaded"):
        wrapper = load(path, {"trust_remote_code": False, "local_files_only": True}, eos_token_ids=eos)
    return FolderTokenizer(wrapper, path)


@contextmanager
def _failures_told(path: Path, what: str = "fails") -> Iterator[None]:
    """Whatever a tokenizer's library raises as a ModelError; its Rust code panics with a BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if type(error).__name__.startswith("StrictDataclass"):  # what transformers checks of config.json
            words = " ".join(str(error).split())[:_LONGEST_ERROR]
            raise wrong(path / "config.json", f"transformers can't take a value: {words}") from None
        first = str(error).strip().split("\n")[0][:_LONGEST_ERROR]
        raise wrong(path, f"the tokenizer {what} ({type(error).__name__}: {first})") from None


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> str:
    """A response's text as it continues its prompt (decoding it alone may lose a leading space)."""
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *response])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(response)
