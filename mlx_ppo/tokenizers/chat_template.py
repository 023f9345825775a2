"""A model folder's chat template, rendered where it can't do harm: in a child process with limits.

The sandbox keeps a template from files and other objects, but not from looping for hours or filling the memory.
"""

import json
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ppo.data.model_files import json_object, quoted, wrong
from mlx_ppo.errors import ModelError
from mlx_ppo.runtime.child import Child, DiedError, GarbledError, HungError, OversizeError

SECONDS = 10.0  # of computing for the template, and for each conversation
MEMORY = 1 << 30  # bytes of the child
CHARACTERS = 4_000_000  # of a rendered conversation, beyond its messages

_LONGEST_SOURCE = 1_000_000  # characters; those of models have up to 20,000
_START_SECONDS = 60.0
_PATIENCE = 6.0  # times longer by the clock: a busy machine isn't the template's fault
_LONGEST_ESCAPE = 12  # bytes of a character in JSON
_WORKER = Path(__file__).with_name("template_worker.py")
_HOSTILE = "it is broken or hostile; use a model folder with another one"


class TemplateLimitError(ModelError):
    """A template ran into a limit of time, memory or length."""


class ChatTemplate:
    """Renders conversations. The child starts with the first and ends with this object, or with the process."""

    def __init__(self, folder: Path, source: str, names: Mapping[str, Any]) -> None:
        """Keep the template; nothing runs yet.

        Args:
            folder: the model's, for messages.
            source: the template.
            names: what it sees besides messages, such as `bos_token`.
        Raises:
            ModelError: it is too long to be one.
        """
        if len(source) > _LONGEST_SOURCE:
            raise wrong(folder, f"its chat template has {len(source)} characters, more than {_LONGEST_SOURCE}")
        self.source = source
        self._folder = folder
        self._names = dict(names)
        self._child: Child | None = None
        self._end: weakref.finalize[..., ChatTemplate] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, None when there is no child."""
        return None if self._child is None else self._child.pid

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            TemplateLimitError: it takes too long, too much memory, or becomes too long.
            ModelError: the template refuses the messages, or is broken.
        """
        if self._child is None:
            self._start()
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        answer = self._ask({"messages": turns, "add_generation_prompt": add_generation_prompt})
        text = answer.get("text")
        if "refused" in answer:
            raise wrong(self._folder, f"its chat template refuses this conversation: {answer['refused']}")
        if "failed" in answer:
            raise wrong(self._folder, f"its chat template can't render this conversation ({answer['failed']})")
        if not isinstance(text, str):
            self.close()
            raise wrong(self._folder, "the process for its chat template sent a garbled answer")
        if not text:
            raise wrong(self._folder, "its chat template writes nothing for this conversation")
        try:
            text.encode()  # libraries that cut it into tokens would end in a TypeError
        except UnicodeEncodeError:
            raise wrong(self._folder, "its chat template wrote half a character (a lone surrogate)") from None
        return text

    def close(self) -> None:
        """End the child; the next `render` starts another."""
        self._child = None
        if self._end is not None:
            self._end()

    def _start(self) -> None:
        limits = [str(SECONDS), str(MEMORY), str(CHARACTERS)]
        self._child = Child(_WORKER, limits)
        self._end = weakref.finalize(self, self._child.end)
        if self._ask(None).get("ready") is not True:
            self.close()
            raise wrong(self._folder, "the process for its chat template sent a garbled answer")
        answer = self._ask({"template": self.source, "names": self._names})
        if answer.get("compiled") is not True:
            self.close()
            raise wrong(self._folder, f"its chat template is broken ({answer.get('failed') or answer.get('refused')})")

    def _ask(self, request: Mapping[str, Any] | None) -> dict[str, Any]:
        """The child's answer, that of its start where nothing is asked; without one the child is ended."""
        assert self._child is not None
        content = b"" if request is None else json.dumps(request).encode("ascii") + b"\n"
        seconds = _START_SECONDS if request is None else _PATIENCE * SECONDS
        try:
            largest = _LONGEST_ESCAPE * (CHARACTERS + len(content)) + 1000
            answer = self._child.exchange(content, seconds, largest=largest, memory=MEMORY)
            reached = _LIMITS.get(str(answer.get("limit")))
        except HungError:
            reached = "gave no answer within {seconds:g} s"
        except DiedError as death:
            if death.status != -signal.SIGPROF:
                self.close()
                raise wrong(self._folder, f"the process that rendered its chat template ended: {death}") from None
            reached, seconds = "took longer than {seconds:g} s", SECONDS
        except GarbledError:
            reached = _LIMITS["length"]
        except OversizeError:
            reached = _LIMITS["memory"]
        except BaseException:
            self.close()  # the answer to this request would be taken for the next one's
            raise
        if reached is not None:
            self.close()
            limit = reached.format(seconds=seconds, megabytes=MEMORY >> 20, characters=CHARACTERS)
            raise TemplateLimitError(str(wrong(self._folder, f"its chat template {limit} and was ended; {_HOSTILE}")))
        return answer


_LIMITS = {
    "memory": "needed more than {megabytes} MB of memory",
    "length": "wrote more than {characters} characters beyond the messages",
}


def folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template that transformers would take from a folder: of chat_template.jinja, else of tokenizer_config.json.

    Args:
        folder: a model's.
        settings: its tokenizer_config.json.

    Raises:
        ModelError: it isn't a text, or there are several and none is the default.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise wrong(file, f"not UTF-8 at byte {error.start}") from None
    return chosen_template(folder, settings.get("chat_template"))


def chosen_template(folder: Path, given: Any) -> str | None:
    """The template itself, or the default one of several by name; ModelError when it isn't a text."""
    if isinstance(given, list):
        pairs = [(row.get("name"), row.get("template")) for row in given if isinstance(row, dict)]
        given = {name: text for name, text in pairs if isinstance(name, str)}
    if isinstance(given, dict):
        if "default" not in given:
            found = ", ".join(quoted(name) for name in sorted(given, key=str)[:5]) or "none"
            raise wrong(folder, f"several chat templates ({found}) and no 'default' one; name one of them so")
        given = given["default"]
    if given is not None and not isinstance(given, str):
        raise wrong(folder, f"'chat_template' must be a text, not {quoted(json.dumps(given, default=str))}")
    return given


def optional_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file; ModelError when it is another thing."""
    return json_object(file) if file.is_file() else {}
