"""The child process of a chat template: compiles it and renders conversations, in bounded memory and time.

`child_start.py` runs `serve` in a process that holds the standard library and jinja2 only. The first request has the
template, the following ones have messages. A template sees what transformers would show it and nothing else.
"""

import json
import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_LONGEST_SUMMARY = 300
_NOTHING = {"tools": None, "documents": None}
_NO_MEMORY = b'{"limit": "memory"}\n'


class Generation(Extension):
    """`{% generation %}`, which marks what the assistant says; it is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        """A block whose content is called in place."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return str(caller())


class PlainNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        """As jinja2's, which lets `self` be the name of an attribute."""
        own, *rest = arguments
        given = dict(*rest, **attributes)
        for name in given:
            _check_name(name)
        Namespace.__init__(own, given)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute, as `{% set space.name = value %}` does."""
        _check_name(name)
        super().__setitem__(name, value)


_TODAY = datetime(2024, 7, 26)  # a run is to be the same tomorrow: the date that templates of Llama fall back to


class PlainDict:
    """The `dict` of a template: it makes dictionaries, and has no attributes of a class."""

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        """A dictionary."""
        return dict(*arguments, **items)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """A dictionary with equal values."""
        return dict.fromkeys(*arguments)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't have the attribute {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = PlainDict()
    made.globals["namespace"] = PlainNamespace
    return made


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return _TODAY.strftime(format)


def serve(source: int, descriptor: int, arguments: list[str]) -> None:
    """Answer until the requests end: `{"ready": true}`, `{"compiled": true}`, then `{"text": …}` for each messages.

    Instead of these, `{"refused": …}` has the template's own words, `{"failed": …}` what went wrong in it, and
    `{"limit": …}` the limit that it ran into.

    Args:
        source: descriptor of the requests.
        descriptor: of the answers.
        arguments: SECONDS of computing in a request after which the kernel ends this process by SIGPROF; BYTES of
            memory; CHARACTERS that a text may have beyond its messages.
    """
    seconds, memory, longest = float(arguments[0]), int(arguments[1]), int(arguments[2])
    _limit(memory)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever started the parent may have had it ignored
    template, names = Template(""), {}
    _send(descriptor, _line({"ready": True}))
    with open(source, "rb") as requests:
        for line in requests:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                request = json.loads(line)
                if "template" in request:
                    names = request["names"]
                    template = environment().from_string(request["template"])
                    sent = _line({"compiled": True})
                else:
                    sent = _line(rendered(template, {**_NOTHING, **request, **names}, longest))
            except MemoryError:
                sent = _NO_MEMORY  # made before: there may be none for it now
            except BaseException as error:
                sent = _line(_problem(error))
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(descriptor, sent)


def _limit(memory: int) -> None:
    """As the system has such limits: macOS leaves the first without effect, or refuses it."""
    for kind, size in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_DATA, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (size, size))


def rendered(template: Template, variables: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The text of one conversation, or that it became too long."""
    room = longest + sum(len(message["content"]) for message in variables["messages"])
    parts = []
    for part in template.generate(variables):
        room -= len(part)
        if room < 0:
            return {"limit": "length"}
        parts.append(part)
    return {"text": "".join(parts)}


def _problem(error: BaseException) -> dict[str, str]:
    said = " ".join(str(error)[: 4 * _LONGEST_SUMMARY].split())
    said = said if len(said) <= _LONGEST_SUMMARY else said[:_LONGEST_SUMMARY] + "…"
    if type(error) is TemplateError:
        return {"refused": said}
    at = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else _line_of(error)
    return {"failed": f"{at}{type(error).__name__}: {said}"}


def _line_of(error: BaseException) -> str:
    """Where the template was, which jinja2 writes into the traceback."""
    frame, line = error.__traceback__, 0
    while frame is not None:
        line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "<template>" else line
        frame = frame.tb_next
    return f"line {line}: " if line else ""


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode("ascii") + b"\n"


def _send(descriptor: int, content: bytes) -> None:
    """All of it: one write to a pipe may take a part. Without a reader there is nothing left to do."""
    unsent = memoryview(content)
    try:
        while unsent:
            unsent = unsent[os.write(descriptor, unsent) :]
    except BrokenPipeError:
        os._exit(0)
