"""The Modelfile with which Ollama takes a GGUF file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.tokenizers.chat_template import TemplateLimitError
from mlx_ppo.tokenizers.load import FolderTokenizer
from mlx_ppo.tokenizers.piece_tokenizer import PieceTokenizer

Messages = list[dict[str, str]]

_SYSTEM, _USER, _ANSWER, _NEXT = "zqsysqz", "zqusrqz", "zqansqz", "zqnxtqz"  # contents that no template has


def modelfile(file: str, tokenizer: Tokenizer, *, temperature: float, bounds: Mapping[str, float] | None = None) -> str:
    """The content of a Modelfile.

    A TEMPLATE is written for a model without a chat template (the prompt alone), and where the model's can be said in
    Ollama's language; otherwise Ollama is left to what it makes of the one in the GGUF file.

    Args:
        file: the GGUF file's name, in the same folder.
        tokenizer: of the model.
        temperature: of sampling.
        bounds: top_k, top_p and min_p where sampling is truncated; all three, because Ollama has other defaults.
    Raises:
        ModelError: the chat template takes too long, or too much memory.
    """
    lines = [f"FROM ./{file}"]
    template = "{{ .Prompt }}" if not tokenizer.has_chat_template else _ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append(f"PARAMETER temperature {temperature:g}")
    lines += [f"PARAMETER {name} {value}" for name, value in (bounds or {}).items()]
    for text in _stops(tokenizer):
        lines.append(f"PARAMETER stop {text}")
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Tokenizer) -> list[str]:
    """Texts of the tokens that end a response, quoted; one that a Modelfile can't hold is left to the GGUF's ids."""
    if not isinstance(tokenizer, FolderTokenizer | PieceTokenizer):
        return []
    texts = [tokenizer.piece(index) for index in sorted(tokenizer.eos_ids) if index < tokenizer.vocab_size]
    return [f'"{text}"' for text in texts if text and '"' not in text and text.isprintable()]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the messages, where it is that simple."""

    before: str  # of a conversation without a system message
    system: tuple[str, str]  # around a system message, from the conversation's start
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Messages) -> str:
        """A conversation, up to where the assistant is to speak."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        parts = [around[message["role"]][0] + message["content"] + around[message["role"]][1] for message in messages]
        start = "" if messages[0]["role"] == "system" else self.before
        return start + "".join(parts) + self.assistant[0]

    def ollama(self) -> str:
        """The same in Ollama's (Go's) template language."""
        user = "{{ .Content }}".join(self.user)
        answer = "{{ .Content }}".join(self.assistant)
        return (
            f"{{{{ if .System }}}}{'{{ .System }}'.join(self.system)}{{{{ else }}}}{self.before}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{self.assistant[0]}'
        )


def _ollama_template(tokenizer: Tokenizer) -> str | None:
    """A template that renders as the model's own does, tried on conversations with and without a system message."""
    if not isinstance(tokenizer, FolderTokenizer | PieceTokenizer):
        return None

    def render(messages: Messages, *, ask: bool = True) -> str:
        return tokenizer.chat_text(messages, add_generation_prompt=ask)

    talk = [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _NEXT)]
    trials = [talk, talk[:1], [_message("system", _SYSTEM), *talk]]
    try:
        turns = _turns(render)
        if any(turns.render(trial) != render(trial) for trial in trials):
            return None
    except TemplateLimitError:
        raise
    except (ModelError, ValueError, IndexError):  # it may refuse what it likes, and leave out or repeat what it likes
        return None
    bos = tokenizer.special_ids.get("bos")
    if bos is not None and tokenizer.encode("a", bos=True)[:1] == [bos]:
        # Ollama puts it before what the template gives
        start = tokenizer.piece(bos)
        system = (turns.system[0].removeprefix(start), turns.system[1])
        turns = Turns(turns.before.removeprefix(start), system, turns.user, turns.assistant)
    literal = "".join([turns.before, *turns.system, *turns.user, *turns.assistant])
    return None if '"""' in literal or "{{" in literal or "}}" in literal else turns.ollama()


def _turns(render: Callable[..., str]) -> Turns:
    """Split the text of a few conversations at the messages' contents."""
    user, answer, after = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _NEXT)
    alone = render([user], ask=False)
    before_user, user_end = alone.split(_USER)
    answer_start = render([user]).removeprefix(alone)
    both = render([user, answer], ask=False)
    answer_end = both.split(_ANSWER)[1]
    longer = render([user, answer, after], ask=False)
    user_start = longer.split(_ANSWER)[1].split(_NEXT)[0].removeprefix(answer_end)
    system_start, rest = render([_message("system", _SYSTEM), user], ask=False).split(_SYSTEM)
    system_end = rest.split(_USER)[0].removesuffix(user_start)
    return Turns(
        before_user.removesuffix(user_start),
        (system_start, system_end),
        (user_start, user_end),
        (answer_start, answer_end),
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
