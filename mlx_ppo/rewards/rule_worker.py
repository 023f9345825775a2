"""The child process of a rule: checks one completion at a time, answers in JSON lines.

`child_start.py` runs `serve` in a process of its own: the standard library only, no mlx. Its parent ends it where a
completion makes it slow or large; nothing here has to be patient with a hostile text.
"""

import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from queue import SimpleQueue
from typing import Any

GRACE_SECONDS = 1.0
_LONGEST_NUMBER = 400  # characters: of float64 the longest has 326, written out
_WHITE = " \t\n\r\f\v"
# Digits are ASCII's: others, nan, inf, 1.2.3 and 1e999999 are no numbers. Commas separate thousands.
_NUMBER = re.compile(
    r"(?<![\d.])[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+(?:[eE][-+]?[0-9]++)?+"
    r"(?:\s?/\s?[0-9]++)?+(?!\.?\d)"
)
_LARGEST_OUTPUT = 1 << 16  # bytes that a program may print
_SANDBOX = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "runtime", "sandbox.py")
_LARGEST_SCHEMA = 1 << 20  # bytes
Check = Callable[[str, list[Any], dict[str, Any]], bool]


class Unusable(Exception):
    """The rule can't be used here; the text says why."""


def serve(source: int, descriptor: int, arguments: list[str]) -> None:
    """Check completions until the requests end.

    Args:
        source: descriptor of the requests.
        descriptor: of the answers.
        arguments: the settings as JSON: `rule`, `memory` in bytes, and the keys that the rule reads.
    """
    settings = json.loads(arguments[0])
    _limit(settings["memory"])
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(source, requests), daemon=True).start()
    with open(descriptor, "wb", buffering=0) as answers:
        try:
            check = _prepared(settings)
        except Unusable as problem:
            answers.write(_line({"error": str(problem)}))
            return
        answers.write(_line({"ready": True}))
        while (request := requests.get()) is not None:
            answers.write(_line(_answer(check, json.loads(request), settings)))


def _answer(check: Check, request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    given = request["answer"]
    wanted = [one if isinstance(one, dict) else str(one) for one in (given if isinstance(given, list) else [given])]
    try:
        return {"score": float(check(request["completion"], wanted, {**settings, "pattern": request["pattern"]}))}
    except Unusable as problem:
        return {"error": str(problem)}
    except (MemoryError, RecursionError) as error:
        return {"error": f"it met a {type(error).__name__}"}


def exact(completion: str, wanted: list[str], settings: dict[str, Any]) -> bool:
    """Whether the completion, or what the pattern finds of it, is one of the answers, white space around apart."""
    said = extracted(completion, settings["pattern"])
    return said is not None and said.strip(_WHITE) in {one.strip(_WHITE) for one in wanted}


def number(completion: str, wanted: list[str], settings: dict[str, Any]) -> bool:
    """Whether the last number of the completion, or of what the pattern finds of it, is one of the answers."""
    said = extracted(completion, settings["pattern"])
    found = None if said is None else number_of(said)
    right = [number_of(one) for one in wanted]
    tolerance = Fraction(settings["tolerance"])
    return found is not None and any(one is not None and abs(found - one) <= tolerance for one in right)


def regex(completion: str, _: list[str], settings: dict[str, Any]) -> bool:
    """Whether the pattern is found anywhere in the completion."""
    return re.search(settings["pattern"], completion) is not None


def length(completion: str, _: list[str], settings: dict[str, Any]) -> bool:
    """Whether the completion has so many words, characters or lines."""
    unit = settings["unit"]
    words, lines = unit == "words", unit == "lines"
    count = len(completion.split() if words else completion.splitlines() if lines else completion)
    return bool(settings["least"] <= count and (not settings["most"] or count <= settings["most"]))


def tagged(completion: str, answers: list[str], settings: dict[str, Any]) -> bool:
    """Whether the completion is these sections, each once, in this order, and white space between."""
    rest = completion.strip(_WHITE)
    for tag in settings["tags"]:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if rest.count(opening) != 1 or rest.count(closing) != 1 or not rest.startswith(opening):
            return False
        inside, _, rest = rest[len(opening) :].partition(closing)
        if not inside.strip(_WHITE) or any(f"<{other}>" in inside for other in settings["tags"]):
            return False
        rest = rest.strip(_WHITE)
    return not rest


def extracted(completion: str, pattern: str | None) -> str | None:
    """What the pattern's last match, or the first group of it, holds; None without a match, all without a pattern."""
    if pattern is None:
        return completion
    found = None
    for match in re.finditer(pattern, completion):
        found = match
    return None if found is None else found[1] if found.re.groups else found[0]


def number_of(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.5, -3, 2e-3, 3/4; None where there is none."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    if found is None or len(found[0]) > _LONGEST_NUMBER:
        return None
    above, _, below = found[0].replace(",", "").replace("\u2212", "-").partition("/")
    exponent = re.search(r"[eE]([-+]?[0-9]+)$", above.strip())
    if exponent is not None and (len(exponent[1]) > 4 or abs(int(exponent[1])) > 999):
        return None
    if not below:
        return Fraction(above.strip())
    return Fraction(above.strip()) / int(below) if int(below) else None


CHECKS: dict[str, Check] = {
    "exact": exact,
    "number": number,
    "regex": regex,
    "length": length,
    "format": tagged,
}


def _prepared(settings: dict[str, Any]) -> Check:
    """The rule's check, with what it needs loaded; Unusable where it can't be."""
    made = {"json": json_check, "math": math_check, "code": code_check}.get(settings["rule"])
    return CHECKS[settings["rule"]] if made is None else made(settings)


def json_check(settings: dict[str, Any]) -> Check:
    """Whether the completion, or what the pattern finds of it, is JSON, and valid by the schema where there is one.

    JSON is RFC 8259's: no NaN and no number beyond float64; and no key twice, which readers take differently.
    """
    valid = _schema(settings["json_schema"]) if settings["json_schema"] is not None else lambda document: True

    def check(completion: str, _: list[str], settings: dict[str, Any]) -> bool:
        said = extracted(completion, settings["pattern"])
        try:
            document = json.loads(
                said or "", parse_constant=_refused, parse_float=_finite, object_pairs_hook=_without_doubles
            )
        except ValueError:
            return False
        return valid(document)

    return check


def _schema(file: str) -> Callable[[Any], bool]:
    """A JSON Schema by the draft that it names, else 2020-12; it refers to nothing outside of itself."""
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise Unusable("a schema needs the package jsonschema: pip install 'mlx-ppo[rules]'") from None
    try:
        with open(file, "rb") as source:
            schema = json.loads(source.read(_LARGEST_SCHEMA + 1)[:_LARGEST_SCHEMA])
        made = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        made.check_schema(schema)
    except (OSError, ValueError, RecursionError, jsonschema.SchemaError) as error:
        raise Unusable(f"{file}: no JSON Schema: {getattr(error, 'message', None) or error}"[:300]) from None
    validator = made(schema, registry=referencing.Registry())

    def valid(document: Any) -> bool:
        try:
            return bool(validator.is_valid(document))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a reference that leads nowhere, a pattern that isn't Python's
            raise Unusable(f"the schema can't be applied: {str(error)[:200]}") from None

    return valid


def _refused(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    if abs(float(text)) == float("inf"):
        _refused(text)
    return float(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def math_check(_: dict[str, Any]) -> Check:
    r"""Whether what is in the completion's \boxed{}, else its last expression, is an answer, by math-verify."""
    try:
        import math_verify
    except ImportError:
        raise Unusable("it needs the package math-verify: pip install 'mlx-ppo[rules]'") from None
    logging.disable(logging.CRITICAL)  # it warns that nobody times it out; the parent does

    def read(text: str) -> list[Any]:
        return list(math_verify.parse(text, fallback_mode="no_fallback", parsing_timeout=None))

    def check(completion: str, wanted: list[str], settings: dict[str, Any]) -> bool:
        said = extracted(completion, settings["pattern"])
        found = [] if said is None else read(said)
        right = (read(boxed(one)) for one in wanted)
        return bool(found) and any(math_verify.verify(one, found, timeout_seconds=None) for one in right if one)

    check("$x^2 + 0.5$", [r"\frac12 + x^2"], {"pattern": None})  # loads what is loaded late
    return check


def boxed(answer: str) -> str:
    """An answer as mathematics, so that all of it is read."""
    return answer if "$" in answer or r"\boxed" in answer else rf"\boxed{{{answer}}}"


def code_check(settings: dict[str, Any]) -> Check:
    """Whether a Python program passes every test: what it prints is compared out here, where it can't look.

    A test has `output`, and `input` for standard input, or `call`, an expression of whose value `repr` is printed last.
    """
    probe = "try:\n import os\n os.fork()\nexcept OSError:\n print(os.path.exists('/proc'), input())"
    printed, said = _sandboxed(probe, "walls", settings)
    if printed is None or printed.strip() != "False walls":
        why = said.strip() or "a probe of it came through"
        raise Unusable(f"it needs a sandbox (Linux, user namespaces), which can't be had here: {why[:200]}")

    def check(completion: str, tests: list[dict[str, str]], settings: dict[str, Any]) -> bool:
        program = extracted(completion, settings["pattern"])
        return program is not None and all(_passes(program, test, settings) for test in tests)

    return check


def _passes(program: str, test: dict[str, str], settings: dict[str, Any]) -> bool:
    call = test.get("call")
    whole = program if call is None else f"{program}\nprint(repr({call}))\n"
    printed, _ = _sandboxed(whole, test.get("input", ""), settings)
    if printed is None:
        return False
    found = printed.strip() if call is None else (printed.splitlines() or [""])[-1].strip()
    return found == test["output"].strip()


def _sandboxed(program: str, given: str, settings: dict[str, Any]) -> tuple[str | None, str]:
    """What a program prints, None where it fails or prints too much; and what the sandbox says if it can't be built."""
    request = {"program": program, "input": given, "memory": settings["memory"] // 2, "seconds": settings["limit"]}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-I", "-S", _SANDBOX], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode("ascii"))
            process.stdin.close()
        printed = process.stdout.read(_LARGEST_OUTPUT + 1)
        if len(printed) > _LARGEST_OUTPUT:
            process.kill()
            return None, ""
        said = process.stderr.read(_LARGEST_OUTPUT).decode("utf-8", "replace")
    return (printed.decode("utf-8", "replace") if process.returncode == 0 else None), said


def _limit(memory: int) -> None:
    for kind, size in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # macOS refuses the first; the parent watches, too
            resource.setrlimit(kind, (size, size))


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode("ascii") + b"\n"


def _receive(source: int, requests: SimpleQueue[bytes | None]) -> None:
    """Queue the requests; when the parent closes or dies, end the process even within a check."""
    with open(source, "rb") as lines:
        for line in lines:
            requests.put(line)
    requests.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)
