"""The child process of a reward function: loads the user's file, scores batches, answers in JSON lines.

`child_start.py` runs `serve` in a process that holds the standard library and the user's code only: no mlx, no BLAS.
"""

import hashlib
import inspect
import json
import math
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from difflib import get_close_matches
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

GRACE_SECONDS = 1.0
_LONGEST_TRACEBACK = 4000
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")  # ours: not what users read
_LONGEST_SUMMARY = 300
_OWN = ("prompts", "completions", "records")  # what a parameter of that name gets


class Unusable(Exception):
    """The user's code can't be used: `str(error)` is the sentence for the user, the rest says where."""

    def __init__(self, sentence: str, *, line: int | None = None, sample: int | None = None, details: str = "") -> None:
        """Keep the line in the user's file, the index of the sample in the batch, and the user's traceback."""
        super().__init__(sentence)
        self.line = line
        self.sample = sample
        self.details = details

    def answer(self) -> dict[str, Any]:
        """The JSON that the parent turns into its own error."""
        return {"error": str(self), "line": self.line, "sample": self.sample, "details": self.details}


def serve(source: int, descriptor: int, arguments: list[str]) -> None:
    """Serve a function until the requests end.

    Args:
        source: descriptor of the requests.
        descriptor: of the answers.
        arguments: the user's FILE and the function's NAME.
    """
    file, name = arguments
    seen = Seen(file)
    sys.addaudithook(seen.hear)
    _seed(b"")
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(source, requests), daemon=True).start()
    with open(descriptor, "wb", buffering=0) as answers:
        try:
            digest, function = load(file, name)
            call = call_of(function, name)
        except Unusable as problem:
            answers.write(_line(problem.answer()))
            return
        answers.write(_line({"sha256": digest, "needs": call.needs, "read": seen.new()}))
        while (request := requests.get()) is not None:
            _seed(request)
            answer = score(function, call, json.loads(request), file)
            answers.write(_line({**answer, "read": seen.new()}))


def _seed(content: bytes) -> None:
    """Have the usual generators start anew, so that the same batch gets the same scores, also in a resumed run."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "big")
    random.seed(seed)
    for name, start in _GENERATORS.items():
        if name in sys.modules:
            start(sys.modules[name], seed)
    sys.meta_path[:] = [_Seeding(seed), *(finder for finder in sys.meta_path if not isinstance(finder, _Seeding))]


_GENERATORS: dict[str, Callable[[Any, int], Any]] = {  # modules with a generator of their own, and how it starts
    "numpy.random": lambda module, seed: module.seed(seed),
    "torch": lambda module, seed: module.manual_seed(seed),
}


class _Seeding(MetaPathFinder):
    """Starts the generators of modules that the user's code imports later, such as inside the function."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with a loader that starts the generator as well."""
        if name not in _GENERATORS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Seeding))
        found = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if found is not None and found.loader is not None:
            executed = found.loader.exec_module

            def execute(module: ModuleType) -> None:
                executed(module)
                _GENERATORS[name](module, self._seed)

            found.loader.exec_module = execute  # type: ignore[method-assign]
        return found


class Seen:
    """Which files the user's code reads beside its own: modules and data, not what is installed or the system's."""

    def __init__(self, file: str) -> None:
        """`file`: the user's, which is recorded elsewhere."""
        self._told = {os.path.realpath(file)}
        self._opened: set[str] = set()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: nothing that fails here may disturb the user's code."""
        if event == "open" and isinstance(arguments[0], str):
            path, writes = os.path.realpath(arguments[0]), bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            self._told.add(path) if writes else self._opened.add(path)  # what it writes itself is no input

    def new(self) -> list[str]:
        """Those that weren't told yet."""
        modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        found = {os.path.realpath(path) for path in modules if isinstance(path, str)} | self._opened
        fresh = sorted(path for path in found - self._told if _is_own(path))
        self._told.update(fresh)
        return fresh


def _is_own(path: str) -> bool:
    elsewhere = {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}
    elsewhere |= {_PACKAGE, "/usr", "/lib", "/etc", "/proc", "/sys", "/dev", "/System", "/Library"}
    outside = not any(path == root or path.startswith(os.path.join(root, "")) for root in elsewhere)
    return outside and not path.endswith(".pyc") and os.path.isfile(path)


def load(file: str, name: str) -> tuple[str, Callable[..., Any]]:
    """Run the user's file as a module and pick the function.

    Returns:
        The SHA-256 of the bytes that were run, and the function.
    Raises:
        Unusable: the file raises, or holds no such function.
    """
    path = Path(file)
    content = path.read_bytes()
    module = ModuleType(path.stem if path.stem not in sys.modules else f"reward_file_{path.stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))
    try:
        exec(compile(content, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        raise _raised(error, file) from None
    if name not in module.__dict__:
        own = [key for key, value in module.__dict__.items() if getattr(value, "__module__", None) == module.__name__]
        near = get_close_matches(name, own, n=1)
        raise Unusable(f"no function '{name}' in this file." + (f" Did you mean '{near[0]}'?" if near else ""))
    function = module.__dict__[name]
    if not callable(function):
        kind = type(function).__name__
        raise Unusable(f"'{name}' is of type {kind}, not a function; write def {name}(prompts, completions)")
    return hashlib.sha256(content).hexdigest(), function


class Call(NamedTuple):
    """How a user's function is called: every parameter by what its name says."""

    ordered: tuple[str, ...]  # parameters that have no keyword
    named: tuple[str, ...]
    needs: tuple[str, ...]  # fields of the records that it can't do without
    rest: bool  # `**`: it takes the other fields as well


def call_of(function: Callable[..., Any], name: str) -> Call:
    """By its signature: prompts, completions, records, and fields of the records under their own names.

    Raises:
        Unusable: it takes no completions, or what a parameter stands for can't be told.
    """
    wanted = "write (prompts, completions), or with records and fields of the records by name"
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        raise Unusable(f"'{name}' doesn't tell its parameters; put it into a function of yours: {wanted}") from None
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    rest = inspect.Parameter.VAR_KEYWORD in kinds.values()
    single = [key for key, kind in kinds.items() if kind not in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL)]
    if "completions" not in single and not (rest and not single):
        raise Unusable(f"'{name}{signature}' doesn't say which parameter gets the completions; {wanted}")
    ordered = tuple(key for key in single if kinds[key] is inspect.Parameter.POSITIONAL_ONLY)
    others = [signature.parameters[key] for key in single if key not in _OWN]
    needs = tuple(p.name for p in others if p.default is p.empty)
    return Call(ordered, tuple(key for key in single if key not in ordered), needs, rest)


def values_of(call: Call, request: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for one batch; a field of the records is a list with None where a record lacks it."""
    records = request["records"]
    fields = dict.fromkeys(key for record in records for key in record)
    values: dict[str, Any] = {key: [record.get(key) for record in records] for key in fields}
    values |= {key: list(request[key]) for key in _OWN}
    lacking = next((key for key in call.needs if any(key not in record for record in records)), None)
    if lacking is not None:
        raise Unusable(f"has a parameter '{lacking}', which the records of these prompts lack")
    ordered = [values[key] for key in call.ordered if key in values]
    named = values if call.rest else {key: values[key] for key in call.named if key in values}
    return ordered, {key: value for key, value in named.items() if key not in call.ordered}


def score(function: Callable[..., Any], call: Call, request: dict[str, Any], file: str) -> dict[str, Any]:
    """Call the user's function on one batch; the answer holds either `scores` or `error`."""
    prompts, completions = request["prompts"], request["completions"]
    try:
        ordered, named = values_of(call, request)
        try:
            result = function(*ordered, **named)
        except BaseException as error:
            raise _raised(error, file, prompts, completions) from None
        return {"scores": checked_scores(result, len(completions))}
    except Unusable as problem:
        return problem.answer()


def checked_scores(result: Any, count: int) -> list[float]:
    """The user's return value as `count` finite floats; Unusable says what else it is."""
    wanted = f"return a list of {count} floats, one per completion"
    if isinstance(result, str | bytes | Mapping | Set) or not hasattr(result, "__iter__"):
        raise Unusable(f"returned {_kind(result)}; {wanted}")
    try:
        length, values = len(result), list(result)
    except Exception:  # generators, arrays without dimensions, whatever a user's class raises
        raise Unusable(f"returned {_kind(result)}, which has no length; {wanted}") from None
    if length != count or len(values) != count:
        raise Unusable(f"returned {len(values)} scores for {count} completions; {wanted}")
    return [_number(value, index) for index, value in enumerate(values)]


def _number(value: Any, index: int) -> float:
    """One score as a finite float; arrays of one element count as their element."""
    kind = _kind(value)
    try:
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception:  # __float__ and item are the user's or a library's code
        raise Unusable(f"returned {kind} where a float belongs", sample=index) from None
    if not math.isfinite(number):
        raise Unusable(f"returned {number}; scores must be finite", sample=index)
    return number


def _kind(value: Any) -> str:
    if value is None:
        return "None (is a return statement missing?)"
    return f"a value of type {type(value).__name__}"


def _raised(error: BaseException, file: str, prompts: Sequence[str] = (), completions: Sequence[str] = ()) -> Unusable:
    """What the user's code raised, with its traceback from the first frame of the user's file on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != file:
        frames = frames.tb_next
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else None
    for frame in traceback.extract_tb(frames):
        line = frame.lineno if frame.filename == file else line
    summary = " ".join("".join(traceback.format_exception_only(error)).split())
    if isinstance(error, SyntaxError):  # the other lines quote the code
        summary = f"{type(error).__name__}: {error.msg}"
    if len(summary) > _LONGEST_SUMMARY:
        summary = summary[:_LONGEST_SUMMARY] + "…"
    shown = traceback.TracebackException(type(error), error, frames, compact=True)
    shown.stack = traceback.StackSummary.from_list([at for at in shown.stack if not at.filename.startswith(_PACKAGE)])
    full = "".join(shown.format()).rstrip()
    details = full if len(full) <= _LONGEST_TRACEBACK else "…" + full[-_LONGEST_TRACEBACK:]
    sample = _sample_at_hand(frames, prompts, completions)
    return Unusable(f"raised {_printable(summary)}", line=line, sample=sample, details=_printable(details))


def _printable(text: str) -> str:
    """The text without terminal codes and lone surrogates, which an exception may quote from a completion."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _sample_at_hand(frames: TracebackType | None, prompts: Sequence[str], completions: Sequence[str]) -> int | None:
    """The sample whose texts the local variables of the failing code hold: most likely the one that it failed on."""
    if len(completions) == 1:
        return 0
    texts: set[str] = set()
    while frames is not None:
        texts.update(value for value in list(frames.tb_frame.f_locals.values()) if type(value) is str)
        frames = frames.tb_next
    held = [index for index, completion in enumerate(completions) if completion in texts]
    return max(held, key=lambda index: (prompts[index] in texts, len(completions[index])), default=None)


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode("ascii") + b"\n"


def _receive(source: int, requests: SimpleQueue[bytes | None]) -> None:
    """Queue the requests; when the parent closes or dies, end the process even if the user's code never returns."""
    with open(source, "rb") as lines:
        for line in lines:
            requests.put(line)
    requests.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)
