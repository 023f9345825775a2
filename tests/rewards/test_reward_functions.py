import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import mlx_ppo
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.rewards import functions as reward_functions
from mlx_ppo.rewards.functions import RewardFunction, parse_reference

LENGTHS = "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture
def build(tmp_path: Path):
    made = []

    def write(source: str, name: str = "score", timeout: float = 10.0) -> RewardFunction:
        file = tmp_path / "rewards.py"
        file.write_text(textwrap.dedent(source), encoding="utf-8")
        made.append(RewardFunction(file, name, timeout=timeout))
        return made[-1]

    yield write
    for function in made:
        function.close()


def scored(function: RewardFunction, completions: list[str], prompts: list[str] | None = None) -> list[float]:
    prompts = prompts or [f"prompt {i}" for i in range(len(completions))]
    return function.score(prompts, completions, [{"n": i} for i in range(len(completions))])


def returning(expression: str) -> str:
    return f"def score(prompts, completions):\n    return {expression}\n"


def failure(function: RewardFunction, completions: list[str]) -> str:
    with pytest.raises(RunError) as caught:
        scored(function, completions)
    return str(caught.value)


def load_failure(function: RewardFunction) -> str:
    with pytest.raises(ConfigError) as caught:
        function.start()
    assert function.pid is None
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


def is_gone(pid: int, seconds: float = 2.0) -> bool:
    """A zombie counts as gone: where nothing adopts orphans, nothing collects them either."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rewards.py:score", ("rewards.py", "score")),
        ("/a/b c/rewards.py:f1", ("/a/b c/rewards.py", "f1")),
        ("odd:name.py:score", ("odd:name.py", "score")),
    ],
)
def test_references_are_split(text: str, parts: tuple[str, str]) -> None:
    assert parse_reference(text) == parts


@pytest.mark.parametrize("text", ["", "rewards.py", "rewards.py:", "rewards:score", "r.py:a.b", "r.py:1x", ":score"])
def test_other_references_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"path/to/file\.py:name"):
        parse_reference(text)


def test_scores_come_back_in_order_and_the_child_is_kept(build) -> None:
    with build(LENGTHS) as function:
        pid = function.pid
        assert scored(function, ["a", "", "abc"]) == [1.0, 0.0, 3.0]
        assert scored(function, ["é", "\ud800", "\u2028\n"]) == [1.0, 1.0, 2.0]
        assert scored(function, []) == []
        assert function.pid == pid
    assert is_gone(pid)


def test_the_digest_is_the_files(build) -> None:
    function = build("x = 1\n")
    assert function.sha256 == hashlib.sha256(b"x = 1\n").hexdigest()


@pytest.mark.parametrize(
    "parameters",
    ["prompts, completions, records", "prompts, completions, *, records=None", "prompts, completions, **kw"],
)
def test_records_are_passed_where_they_are_accepted(build, parameters: str) -> None:
    records = "kw['records']" if "kw" in parameters else "records"
    function = build(f"def score({parameters}):\n    return [r['n'] + 0.5 for r in {records}]\n")
    assert scored(function, ["a", "b"]) == [0.5, 1.5]


@pytest.mark.parametrize(
    "parameters",
    [
        "completions, prompts",
        "completions, prompts, **others",
        "completions, /, prompts",
        "prompts, completions, /",
        "completions, *, answer, **others",
        "completions, answer=None",
        "records, completions, answer",
        "completions",
    ],
)
def test_parameters_get_what_their_names_say(build, parameters: str) -> None:
    given = [name for name in ("prompts", "records", "answer") if name in parameters]
    body = "".join(f"    assert {name} == {{'prompts': ['p', 'q'], 'records': ROWS, 'answer': [1, 2]}}[{name!r}]\n"
                   for name in given)  # fmt: skip
    function = build(
        f"ROWS = [{{'answer': 1}}, {{'answer': 2}}]\ndef score({parameters}):\n{body}    return map_(completions)\n"
        "def map_(texts):\n    return [float(len(text)) for text in texts]\n"
    )
    assert function.score(["p", "q"], ["a", "bc"], [{"answer": 1}, {"answer": 2}]) == [1.0, 2.0]


def test_a_wrapper_without_names_calls_by_name(build) -> None:
    source = """
        def logged(function):
            return lambda *args, **keywords: function(*args, **keywords)
        @logged
        def score(completions, prompts, **others):
            return [float(text) for text in completions]
    """
    assert scored(build(source), ["4"], ["5"]) == [4.0]


@pytest.mark.parametrize("parameters", ["responses, prompts", "p, c", "texts, **others", "*args", "prompt, completion"])
def test_parameters_that_cannot_be_told_are_refused(build, parameters: str) -> None:
    message = load_failure(build(f"def score({parameters}):\n    return [1.0]\n"))
    assert f"'score({parameters.replace(' =', '=')})' doesn't say which parameter gets the completions" in message


def test_a_field_that_some_prompts_lack_is_refused_before_training(build) -> None:
    function = build("def score(completions, answer):\n    return [1.0 for _ in completions]\n")
    function.start()
    function.require_fields([{"prompt": "a", "answer": "b"}])
    with pytest.raises(ConfigError, match="a parameter 'answer', and prompts without a field of that name"):
        function.require_fields([{"prompt": "a", "answer": "b"}, {"prompt": "c"}])
    with pytest.raises(RunError, match="a parameter 'answer', which the records of these prompts lack"):
        function.score(["a"], ["b"], [{"prompt": "a"}])


@pytest.mark.parametrize(
    "expression",
    ["random.random()", "hash('text') % 1000", "list({'a', 'b', 'c', 'd'}).index('a')", "numpy.random.rand()"],
)
def test_the_same_batch_gets_the_same_scores_in_every_process(build, expression: str) -> None:
    source = "import random\n" + ("import numpy\n" if "numpy" in expression else "") + returning(f"[{expression}]")
    runs = []
    for _ in range(3):
        with build(source) as function:
            runs.append([scored(function, ["a"]), scored(function, ["b"]), scored(function, ["a"])])
    assert runs[0] == runs[1] == runs[2] and runs[0][0] == runs[0][2]
    assert "random" not in expression or runs[0][0] != runs[0][1]


@pytest.mark.parametrize(
    "source",
    [
        "def score(prompts, completions):\n    import numpy\n    return [numpy.random.rand()]\n",
        "def score(prompts, completions):\n    from numpy.random import normal\n    return [normal()]\n",
        "def score(prompts, completions):\n    import torch\n    return [torch.draw()]\n",
        "import importlib\ndef score(prompts, completions):\n"
        "    return [importlib.import_module('numpy').random.permutation(99)[0]]\n",
    ],
)
def test_generators_that_are_imported_in_a_batch_start_alike(build, tmp_path: Path, source: str) -> None:
    """The first batch, in which the module is imported, too; `torch` is a small one of that interface."""
    (tmp_path / "torch.py").write_text(
        "import os\nstate = int.from_bytes(os.urandom(4), 'big')\n"
        "def manual_seed(seed):\n    global state\n    state = seed\n"
        "def draw():\n    return float(state)\n"
    )
    runs = []
    for _ in range(2):
        with build(source) as function:
            runs.append([scored(function, [text])[0] for text in ("a", "b", "a")])
    assert runs[0] == runs[1] and runs[0][0] == runs[0][2]


def test_what_the_function_reads_is_told(build, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("words = open('/dev/null').read()\n")
    (tmp_path / "late.py").write_text("import json\n")
    (tmp_path / "words.txt").write_text("good\n")
    source = """
        import os, pathlib, textwrap
        import helper
        here = pathlib.Path(__file__).parent
        words = (here / "words.txt").read_text()
        def score(prompts, completions):
            import late
            (here / "log.txt").write_text("x")
            return [float(len((here / "log.txt").read_text()))]
    """
    with build(source) as function:
        assert {Path(name).name for name in function.files} == {"helper.py", "words.txt"}
        scored(function, ["a"])
        assert {Path(name).name for name in function.files} == {"helper.py", "words.txt", "late.py"}
        assert function.files[str(tmp_path / "words.txt")] == hashlib.sha256(b"good\n").hexdigest()


def test_prints_and_standard_input_leave_the_protocol_alone(build, capfd: pytest.CaptureFixture[str]) -> None:
    source = """
        import os, subprocess, sys
        print('{"sha256": "at import"}')
        def score(prompts, completions):
            print('{"scores": [9]}')
            os.write(1, b"raw\\n")
            subprocess.run(["echo", "from a command"])
            assert sys.stdin.read() == ""
            return [1.0]
    """
    assert scored(build(source), ["a"]) == [1.0]
    out, err = capfd.readouterr()
    assert out == ""
    for text in ("at import", '{"scores": [9]}', "raw", "from a command"):
        assert text in err


def test_the_child_has_neither_mlx_nor_the_network(build) -> None:
    source = """
        import os, sys
        def score(prompts, completions):
            assert not [m for m in sys.modules if m.partition(".")[0] in ("mlx", "mlx_lm", "numpy")]
            return [float(os.environ["HF_HUB_OFFLINE"])]
    """
    assert scored(build(source), ["a"]) == [1.0]


def test_a_neighbouring_module_and_dataclasses_work(build, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("WEIGHT = 2.5\n")
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        from neighbour import WEIGHT
        @dataclass
        class Judge:
            weight: float
            def __call__(self, prompts, completions):
                return [self.weight for _ in completions]
        score = Judge(WEIGHT)
    """
    assert scored(build(source), ["a", "b"]) == [2.5, 2.5]


def test_a_request_larger_than_a_pipe_goes_through(build) -> None:
    assert scored(build(LENGTHS), ["x" * 3_000_000]) == [3_000_000.0]


@pytest.mark.parametrize(
    ("expression", "scores"),
    [
        ("(1, 2)", [1.0, 2.0]),
        ("np.array([0.5, 1.5], dtype=np.float32)", [0.5, 1.5]),
        ("[np.float64(0.5), np.int8(3)]", [0.5, 3.0]),
        ("[np.array(0.5), np.array([[2.0]])]", [0.5, 2.0]),
        ("[Decimal('0.5'), Fraction(1, 4)]", [0.5, 0.25]),
    ],
)
def test_numbers_of_other_libraries_are_accepted(build, expression: str, scores: list[float]) -> None:
    imports = "from decimal import Decimal\nfrom fractions import Fraction\n"
    if "np." in expression:
        imports += "import numpy as np\n"
    assert scored(build(imports + returning(expression)), ["a", "b"]) == scores


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("[1.0]", "returned 1 scores for 2 completions"),
        ("[1.0] * 3", "returned 3 scores for 2 completions"),
        ("None", "returned None"),
        ("1.0", "returned a value of type float"),
        ("'ab'", "returned a value of type str"),
        ("{'a': 1, 'b': 2}", "returned a value of type dict"),
        ("{1.0, 2.0}", "returned a value of type set"),
        ("(x for x in [1.0, 2.0])", "returned a value of type generator, which has no length"),
        ("[1.0, True]", "returned a value of type bool where a float belongs (sample 2 of 2)"),
        ("['1.0', 1.0]", "returned a value of type str where a float belongs (sample 1 of 2)"),
        ("[1.0, None]", "returned None (is a return statement missing?) where a float belongs (sample 2 of 2)"),
        ("[[1.0], [2.0]]", "returned a value of type list where a float belongs (sample 1 of 2)"),
        ("[1.0, 1j]", "returned a value of type complex where a float belongs (sample 2 of 2)"),
        ("[1.0, float('nan')]", "returned nan; scores must be finite (sample 2 of 2)"),
        ("[float('-inf'), 1.0]", "returned -inf; scores must be finite (sample 1 of 2)"),
        ("[10 ** 400, 1.0]", "returned inf; scores must be finite (sample 1 of 2)"),
    ],
)
def test_anything_but_finite_floats_is_named(build, expression: str, words: str) -> None:
    function = build(returning(expression))
    message = failure(function, ["first", "second"])
    assert words in message
    assert f"{function.file}:score" in message
    assert "\n" not in message
    if "(sample 2" in words:
        assert "prompt: 'prompt 1'; completion: 'second'" in message
    assert function.pid is not None, "the child itself is well"


@pytest.mark.parametrize(
    "expression", ["[np.bool_(True)]", "[np.array([1.0, 2.0])]", "np.array(1.0)", "[np.str_('1')]"]
)
def test_numpy_values_that_are_no_number_are_refused(build, expression: str) -> None:
    assert "returned a value of type" in failure(build("import numpy as np\n" + returning(expression)), ["a"])


def test_a_long_sample_is_shown_cut_and_on_one_line(build) -> None:
    message = failure(build(returning("[float('nan')]")), ["line\n\x1b[31m" + "x" * 5000])
    assert r"completion: 'line\n\x1b[31mxxx" in message
    assert "…" in message
    assert len(message) < 600


def test_what_the_function_raises_is_shown_with_the_sample_at_hand(build) -> None:
    source = """
        def share(text):
            return 1 / len(text)
        def score(prompts, completions):
            return [share(c) for p, c in zip(prompts, completions)]
    """
    function = build(source)
    first, *rest = failure(function, ["a", "", "ccc"]).splitlines()
    assert first == (
        f"reward function {function.file}:score raised ZeroDivisionError: division by zero "
        "(line 3, most likely at sample 2 of 3)"
    )
    assert rest[0] == "Traceback (most recent call last):"
    assert f'  File "{function.file}", line 5, in score' in rest
    assert f'  File "{function.file}", line 3, in share' in rest
    assert not any("rewards/worker" in line for line in rest)
    assert rest[-2:] == ["prompt: 'prompt 1'", "completion: ''"]
    assert scored(function, ["ab"]) == [0.5]


def test_the_sample_of_a_batch_of_one_is_certain(build) -> None:
    message = failure(build("def score(prompts, completions):\n    raise ValueError('a\\nb \\x1b[0m')\n"), ["x"])
    assert message.splitlines()[0].endswith(r"raised ValueError: a b \x1b[0m (line 2, sample 1 of 1)")
    assert "\x1b" not in message


def test_a_sample_that_cannot_be_told_is_not_invented(build) -> None:
    message = failure(build("def score(prompts, completions):\n    raise KeyError(completions[1])\n"), ["x", "y"])
    assert "KeyError: 'y' (line 2, in a batch of 2)" in message
    assert "completion:" not in message


@pytest.mark.parametrize("statement", ["raise SystemExit(3)", "raise KeyboardInterrupt", "score(prompts, completions)"])
def test_exits_and_endless_recursion_are_ordinary_errors(build, statement: str) -> None:
    message = failure(build(f"def score(prompts, completions):\n    {statement}\n"), ["x"])
    assert " raised " in message
    assert len(message) < 6000


def test_a_hang_is_killed_and_the_object_is_closed(build) -> None:
    function = build("def score(prompts, completions):\n    while True: pass\n", timeout=0.3)
    function.start()
    pid = function.pid
    began = time.monotonic()
    message = failure(function, ["x"])
    assert time.monotonic() - began < 1.5
    assert f"{function.file}:score gave no scores for a batch of 1 within 0.3 s and was killed" in message
    assert "'timeout'" in message
    assert function.pid is None
    assert is_gone(pid)
    assert "ended by a timeout" in failure(function, ["x"])


def test_a_hang_that_also_stops_reading_is_killed(build) -> None:
    source = """
        import os, signal
        def score(prompts, completions):
            os.kill(os.getpid(), signal.SIGSTOP)
    """
    function = build(source, timeout=0.4)
    function.start()
    pid = function.pid
    os.kill(pid, signal.SIGSTOP)
    assert "within 0.4 s" in failure(function, ["x" * 1_000_000])
    assert is_gone(pid)


def test_what_the_function_started_is_killed_too(build) -> None:
    source = """
        import subprocess, time
        sleeper = subprocess.Popen(["sleep", "60"])
        def score(prompts, completions):
            if completions == ["pid"]:
                return [sleeper.pid]
            time.sleep(60)
    """
    function = build(source, timeout=0.4)
    sleeper = int(scored(function, ["pid"])[0])
    failure(function, ["x"])
    assert is_gone(sleeper)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("os._exit(7)", "it exited with status 7"),
        ("os._exit(0)", "it exited with status 0"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("os.closerange(3, 100)\n    time.sleep(60)", "it closed its connection"),
    ],
)
def test_the_death_of_the_child_is_told(build, statement: str, words: str) -> None:
    function = build(f"import os, time\ndef score(prompts, completions):\n    {statement}\n")
    function.start()
    pid = function.pid
    assert words in failure(function, ["x"])
    assert is_gone(pid)
    assert "the death of its process" in failure(function, ["x"])


def test_a_death_is_noticed_though_a_fork_keeps_the_pipe_open(build) -> None:
    source = """
        import os, time
        def score(prompts, completions):
            if os.fork() == 0:
                time.sleep(60)
            os._exit(5)
    """
    assert "status 5" in failure(build(source), ["x"])


def test_a_garbled_answer_is_refused(build) -> None:
    source = """
        import os
        def score(prompts, completions):
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b'{"scores": [true]}\\n')
                except OSError:
                    pass
            return [1.0]
    """
    assert "garbled answer" in failure(build(source), ["x"])


def test_close_ends_a_child_and_is_final(build) -> None:
    function = build(LENGTHS)
    assert function.pid is None
    scored(function, ["x"])
    pid = function.pid
    function.close()
    function.close()
    assert is_gone(pid)
    assert "close()" in failure(function, ["x"])


def test_close_does_not_wait_for_stubborn_code(build) -> None:
    source = """
        import signal, threading, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=time.sleep, args=(60,)).start()
        def score(prompts, completions):
            return [1.0]
    """
    function = build(source)
    function.start()
    pid = function.pid
    began = time.monotonic()
    function.close()
    assert time.monotonic() - began < 1.8
    assert is_gone(pid)


def test_an_interruption_while_waiting_leaves_no_child(build) -> None:
    function = build("import time\ndef score(prompts, completions):\n    time.sleep(60)\n")
    function.start()
    pid = function.pid
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel tests ignore it
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            scored(function, ["x"])
        timer.join()
        assert is_gone(pid)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("in_thread", [False, True])
def test_no_orphan_is_left_when_the_parent_is_killed(build, tmp_path: Path, in_thread: bool) -> None:
    hang = "while True: pass"
    if sys.platform == "linux" and not in_thread:  # C code that lets no other thread of the child run
        hang = "__import__('re').match('(a+)+$', 'a' * 60 + 'b')"
    function = build(f"def score(prompts, completions):\n    {hang}\n")
    parent = f"""
        import sys, threading
        from pathlib import Path
        from mlx_ppo.rewards.functions import RewardFunction
        function = RewardFunction(Path({str(function.file)!r}), "score", timeout=60)
        if {in_thread}:
            thread = threading.Thread(target=function.start)
            thread.start()
            thread.join()
        function.start()
        print(function.pid, flush=True)
        function.score(["p"], ["c"], [{{}}])
    """
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_ppo.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.1)
        assert not is_gone(pid, 0.1)
        process.kill()
    assert is_gone(pid)


def test_a_missing_file_names_its_neighbour(build, tmp_path: Path) -> None:
    build(LENGTHS)
    with pytest.raises(ConfigError, match=r"reward\.py: no such file .* Did you mean '.*rewards\.py'\?"):
        RewardFunction(tmp_path / "reward.py", "score", timeout=1)
    with pytest.raises(ConfigError, match="not a file"):
        RewardFunction(tmp_path, "score", timeout=1)
    with pytest.raises(ConfigError, match="no such file"):
        RewardFunction(tmp_path / "nowhere" / "reward.py", "score", timeout=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_told(build) -> None:
    file = build(LENGTHS).file
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        RewardFunction(file, "score", timeout=1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def scores(p, c): return []\n", "no function 'score' in this file. Did you mean 'scores'?"),
        ("x = 1\n", "no function 'score' in this file."),
        ("score = 1.5\n", "'score' is of type float, not a function"),
        ("def score(text): return 1.0\n", "'score(text)' doesn't say which parameter gets the completions"),
        ("x = 1\nimport no_such_package\n", ":2: the reward function can't be loaded: raised ModuleNotFoundError"),
        ("x = 1\ndef score(:\n", ":2: the reward function can't be loaded: raised SyntaxError"),
        ("raise SystemExit\n", ":1: the reward function can't be loaded: raised SystemExit"),
        ("import os\nos._exit(4)\n", "ended while the file was loading: it exited with status 4"),
    ],
)
def test_what_is_wrong_with_the_file_is_found_at_the_start(build, source: str, words: str) -> None:
    function = build(source)
    message = load_failure(function)
    assert words in message
    assert message.startswith(str(function.file))


def test_a_file_that_hangs_while_loading_is_killed(build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_functions, "LOAD_SECONDS", 0.3)
    assert "longer than 0.3 s to load" in load_failure(build("while True: pass\n", timeout=0.2))


def test_a_file_changed_after_it_was_hashed_is_refused(build) -> None:
    function = build(LENGTHS)
    function.file.write_text(LENGTHS + "# changed\n")
    assert "changed after its SHA-256 was taken" in load_failure(function)


def test_programming_mistakes_are_value_errors(build) -> None:
    with pytest.raises(ValueError, match="positive"):
        build(LENGTHS, timeout=0)
    with pytest.raises(ValueError, match="2 prompts, 1 completions"):
        build(LENGTHS).score(["a", "b"], ["c"], [{}])
