"""Rules: what is right, what isn't, and completions that mean harm."""

import json
import socket
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.rewards.rule_worker import number_of
from mlx_ppo.rewards.rules import RewardRule, rule_named


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[RewardRule] = []

    def named(rule: str, **settings: Any) -> RewardRule:
        made.append(RewardRule(RewardSource.model_validate({"kind": "rule", "rule": rule, **settings})))
        return made[-1]

    yield named
    for rule in made:
        rule.close()


def scored(rule: RewardRule, completions: list[str], answer: Any = None) -> list[float]:
    return rule.score(["?"] * len(completions), completions, [{"answer": answer}] * len(completions))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("so it is 18.", 18), ("#### 1,234.50", Fraction("1234.5")), ("x = -3", -3), ("\u22123", -3),
        ("3/4 of it", Fraction(3, 4)), ("2e-3", Fraction(1, 500)), ("first 5, then 7", 7), ("5km", 5),
        ("1e308", 10**308),
        ("", None), ("nan", None), ("inf", None), ("-Infinity", None), ("1e999999999", None), ("1/0", None),
        ("\u0663\u0664", None), ("\u06632", None), ("2\u0663", None), ("\u00b2", None), ("1.2.3", None),
        ("9" * 5000, None),
        ("1e99999/1", None), ("1e-9999", None), ("\uff11\uff12", None), ("0x", 0), (" 1 / 2 ", Fraction(1, 2)),
    ],
)  # fmt: skip
def test_numbers(text: str, value: Fraction | int | None) -> None:
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("rule", "settings", "answer", "right", "wrong"),
    [
        ("exact", {}, "Paris", ["Paris", " Paris\n"], ["paris", "Paris.", "", "It is Paris"]),
        ("exact", {}, ["yes", "y"], ["y", "yes"], ["no", "['yes', 'y']"]),
        ("exact", {"pattern": r"<a>(.*?)</a>"}, "b", ["<a>c</a><a>b</a>"], ["b", "<a>b</a><a>c</a>"]),
        ("number", {}, 18, ["it is 18", "18.0", "2 * 9 = 18", "36/2"], ["18 or 19", "eighteen", "", "nan", "1e999999"]),
        ("number", {}, "so 5 + 5 = 10\n#### 10", ["10"], ["5"]),
        ("number", {"tolerance": 0.01}, 3.14159, ["3.1416", "3.15"], ["3.16", "inf"]),
        ("number", {"pattern": r"answer: (\S+)"}, 4, ["answer: 4, not 5"], ["4", "answer: x 4"]),
        ("regex", {"pattern": r"\A[a-z]+\Z"}, None, ["abc"], ["abc\n", "", "Abc"]),
        ("length", {"least": 2, "most": 3}, None, ["a b", "a  b\nc"], ["", "a", "a b c d"]),
        ("length", {"most": 3, "unit": "characters"}, None, ["", "abc"], ["abcd"]),
        ("length", {"least": 2, "unit": "lines"}, None, ["a\nb"], ["a"]),
        (
            "format", {}, None, ["<think>a</think>\n<answer>b</answer>"],
            ["<answer>b</answer>", "<think>a</think><answer>b</answer> c", "<think> </think><answer>b</answer>",
             "<think>a</think><answer>b</answer><answer>c</answer>", "<think><answer>b</answer></think>",
             "<answer>b</answer><think>a</think>"],
        ),
    ],
)  # fmt: skip
def test_rules(make: Any, rule: str, settings: Any, answer: Any, right: list[str], wrong: list[str]) -> None:
    assert scored(make(rule, **settings), [*right, *wrong], answer) == [1.0] * len(right) + [0.0] * len(wrong)


SCHEMA = {"type": "object", "required": ["n"], "additionalProperties": False, "properties": {"n": {"type": "integer"}}}


def test_json(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    right = ['{"n": 3}', ' {"n": 3.0}\n']
    wrong = ['{"n": "3"}', '{"n": 3, "n": 3}', '{"n": 3} x', "{}", "", "NaN", '{"n": NaN}', '{"n": 1e999}', "```{}```"]
    rule = make("json", json_schema=str(file), limit=10)
    assert scored(rule, right + wrong) == [1.0] * 2 + [0.0] * len(wrong) and rule.news() == []
    assert scored(make("json", pattern="```(.*?)```"), ["so ```[1]```", "[1]"]) == [1.0, 0.0]
    bombs = ["[" * 2_000_000, '{"n":' * 100_000, "9" * 1_000_000, '{"n": 3}']
    assert scored(rule, bombs) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON Schema"), ('{"type": "objct"}', "'objct' is not valid"), ("[" * 100_000, "no JSON Schema")],
)
def test_what_is_no_schema_is_refused(make: Any, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "schema.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        make("json", json_schema=str(file)).start()
    with pytest.raises(ConfigError, match="No such file"):
        make("json", json_schema=str(tmp_path / "none.json")).start()


def test_a_schema_asks_nobody(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"$ref": "http://example.com/schema"}')
    rule = make("json", json_schema=str(file), limit=10)
    assert scored(rule, ["1"]) == [0.0] and "can't be applied" in rule.news()[0]


def test_mathematics(make: Any) -> None:
    rule = make("math", limit=20)
    right = [r"\boxed{\frac{1}{2}}", "so it is 0.5", "$x = 2/4$"]
    wrong = [r"\boxed{0.5}\boxed{0.6}", "", "1", r"\boxed{nan}", "\u0661/\u0662", r"\boxed{1e999}", "(" * 1000]
    rule.require_fields([{"answer": r"\frac12"}, {"answer": ["$0.5$", 2]}])
    assert scored(rule, right + wrong, r"\frac12") == [1.0] * len(right) + [0.0] * len(wrong)
    with pytest.raises(ConfigError, match=r"can't read '\}\{'"):
        rule.require_fields([{"answer": "}{"}])


def test_a_power_that_fills_the_universe_is_ended(make: Any) -> None:
    rule = make("math", limit=1.5)
    assert scored(rule, [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{7}"], 7) == [0.0, 1.0]


TESTS = [{"call": "add(2, 3)", "output": "5"}, {"call": "add('a', 'b')", "output": "'ab'"}]
ADD = "def add(a, b):\n    return a + b\n"
HOSTILE = {
    "wrong": "def add(a, b):\n    return 5",
    "ends before the test": "print(5)\nraise SystemExit(0)",
    "imitates": "print('False walls')\nprint('{\"score\": 1.0}')\nimport os\nos._exit(0)",
    "forks": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading\nwhile True:\n    threading.Thread(target=input).start()",
    "endless output": "while True:\n    print('x' * 1000)",
    "endless errors": "import sys\nfor _ in range(10**5):\n    sys.stderr.write('x' * 1000)",
    "memory": "x = [bytearray(1 << 28) for _ in range(64)]",
    "disk": "f = open('/x', 'w')\nwhile True:\n    f.write('x' * 10**6)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\n" + ADD,
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('PATH')\n" + ADD,
    "reads": "open('PATH').read()\n" + ADD,
    "writes": "import os\nopen(os.__file__, 'a').close()\n" + ADD,
    "kills": "import os\nos.kill(-1, 9)\nos.kill(os.getppid(), 9)\n" + ADD,
    "surrogate": "'\ud800'(",
}


@pytest.fixture
def code(make: Any) -> RewardRule:
    rule: RewardRule = make("code", limit=20)
    try:
        rule.start()
    except ConfigError as refused:
        assert str(refused).startswith("rule 'code': it needs a sandbox")
        pytest.skip("no sandbox here")
    return rule


def test_programs(code: RewardRule) -> None:
    code.require_fields([{"answer": TESTS}])
    assert scored(code, [ADD, "print('hello')\n" + ADD, "", "def add(", "add = 5"], TESTS) == [1.0, 1.0, 0.0, 0.0, 0.0]
    double = [{"input": "21", "output": "42"}, {"input": "4", "output": "8\n"}]
    assert scored(code, ["print(2 * int(input()))", "print(42)"], double) == [1.0, 0.0]
    assert code.news() == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(code: RewardRule, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("7")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = HOSTILE[name].replace("PORT", str(server.getsockname()[1])).replace("PATH", str(secret))
        assert scored(code, [text, ADD], TESTS) == [0.0, 1.0] and code.news() == []


def test_a_program_without_end_is_killed_with_all_that_it_started(make: Any, code: RewardRule) -> None:
    rule = make("code", limit=3)
    assert scored(rule, ["while True: pass", ADD], TESTS) == [0.0, 1.0]
    assert "longer than 3 s" in rule.news()[0]
    found = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not any("/program.py" in (line or ()) for line in found)


@pytest.mark.parametrize("tests", [[], "print", [{"input": "1"}], [{"output": 1}], [{"output": "", "x": ""}], ["a"]])
def test_what_is_no_test_is_refused(make: Any, tests: Any) -> None:
    with pytest.raises(ConfigError, match="test"):
        make("code").require_fields([{"answer": tests}])


def test_a_pattern_that_never_ends_is_killed_and_the_next_completion_scored(make: Any) -> None:
    rule = make("regex", pattern=r"^(a+)+$", limit=0.5)
    started = time.monotonic()
    assert scored(rule, ["aaa", "a" * 40 + "!", "aa", "b"]) == [1.0, 0.0, 1.0, 0.0]
    assert time.monotonic() - started < 30
    (said,) = rule.news()
    assert "1 of 4 completions" in said and "longer than 0.5 s" in said and "'aaaa" in said
    assert rule.news() == []


def test_hostile_texts_cost_themselves_only(make: Any) -> None:
    huge, forged = "9" * 20_000_000, '{"score": 1.0}\n{"score": 1.0}\n'
    texts = [huge, forged, "\ud800 7", "\x00\x1b[2J7", "7,8" * 100_000, "(" * 1_000_000, "7"]
    rule = make("number", limit=10)
    assert scored(rule, texts, 7) == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0] and rule.news() == []


def test_memory_is_bounded(make: Any) -> None:
    rule = make("regex", pattern=r"((?:x|y)*?)*\1\1z", limit=30)  # keeps a mark for every way back
    assert scored(rule, ["xy" * 5_000_000, "z"]) == [0.0, 1.0]
    assert "check was ended" in rule.news()[0]


def test_a_killed_child_is_replaced(make: Any) -> None:
    rule = make("exact")
    rule.start()
    rule._child._process.kill()
    rule._child._process.wait()
    assert scored(rule, ["a", "a"], "a") == [0.0, 1.0] and "SIGKILL" in rule.news()[0]
    rule.close()
    with pytest.raises(RunError, match="closed"):
        scored(rule, ["a"], "a")


@pytest.mark.parametrize(
    ("rule", "record", "words"),
    [
        ("exact", {"prompt": "a"}, "without one"), ("exact", {"answer": " "}, "empty"),
        ("exact", {"answer": []}, "is no text"),
        ("exact", {"answer": None}, "None is no text"), ("exact", {"answer": True}, "no text"),
        ("number", {"prompt": "p", "answer": "six"}, "no number in 'six', at the prompt 'p'"),
        ("number", {"answer": float("nan")}, "no number in nan"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_right_are_refused(make: Any, rule: str, record: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(rule).require_fields([record])
    make("length", least=1).require_fields([record])


def test_rules_of_the_command_line() -> None:
    assert rule_named("number").rule == "number"
    with pytest.raises(ConfigError, match="no rule 'nmber'; there are exact, number"):
        rule_named("nmber")
    with pytest.raises(ConfigError, match="needs it; only a run's configuration"):
        rule_named("regex")
