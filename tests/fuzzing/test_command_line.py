"""Every option and argument of every command with hostile values: an exit code from 0 to 4, a line, no hang.

Each with a third of the values; with `--thorough`, with all.
"""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ppo.bundle import bundle_root
from mlx_ppo.cli.main import main

SECONDS = 20
VALUES = (
    "", " ", "nan", "-nan", "inf", "-inf", "1e400", "1e-400", "-0", "-1", "0", "0.5", "9" * 40, "0x7f", "1_0", "٣",
    "\0", "a\0b", "x" * 300, "x" * 100_000, "../" * 60, "\ud800", "\udcff", "\u202e\u2028é日本", "\x1b[2J\x07", "💥",
    "--", "-h", "=", "a=b", "a.b=", "=x", "~nobody/x", "/nonexistent/a/b", "https://a.b/c", "a/b", "None", "[]", "{}",
    "folder", "fifo", "empty", "bytes", "loop", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/",
)  # fmt: skip
KEYS = (
    "run.seed", "run.name", "run.folder", "run.iterations", "model.path", "model.dtype", "lora.rank", "data.prompts",
    "data.train", "reward.0.path", "reward.0.function", "reward.9.weight", "rollout.prompts", "rollout.max_tokens",
    "kl.coef", "ppo.advantage", "ppo", "memory.budget_gb", "optimizer.learning_rate", "a.b.c", "sft.batch_size",
)  # fmt: skip
BEFORE: dict[str, list[str]] = {  # what makes the rest of a command line sound, and cheap
    "train": ["--dry-run"], "sft": ["--dry-run"], "reward": ["--dry-run"], "export": ["--format", "fused"],
    "plan": ["--set", "rollout.prompts=4", "--set", "rollout.max_tokens=4"],  # some values have it measured
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with what isn't a file of the right kind."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for module in ("open", "watch"):  # what serves a page would go on until Ctrl-C
        monkeypatch.setattr(f"mlx_ppo.studio.{module}.serve", lambda *_, **__: None)
    before = os.umask(0o077)
    yield tmp_path
    os.umask(before)


def tried(arguments: list[str]) -> None:
    """Run a command line in this process; AssertionError where it doesn't end as promised."""

    def hangs(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library's, about what a file holds
            result = CliRunner().invoke(main, arguments)
    finally:
        signal.alarm(0)
    shown = [argument[:80] for argument in arguments]
    assert time.monotonic() - started < SECONDS, shown
    assert result.exception is None or isinstance(result.exception, SystemExit), (shown, repr(result.exception))
    assert result.exit_code in (0, 1, 2, 3, 4), (shown, result.output)
    errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert result.exit_code == 0 or errors, (shown, result.output)
    assert "Traceback" not in result.stderr, shown
    assert not any(c in result.stderr for c in "\x1b\x07\u202e"), shown


def configuration(command: str) -> str:
    name = {"sft": "reviews-sft", "reward": "reviews-reward"}.get(command, "reviews")
    return str(bundle_root() / "configs" / f"{name}.toml")


def lines(command: str, parameter: click.Parameter, value: str) -> list[str]:
    """The command line in which one parameter has a value."""
    of_command = main.commands[command].params
    arguments = [p for p in of_command if isinstance(p, click.Argument)]
    others = [value if p is parameter else "folder" for p in arguments]
    if isinstance(parameter, click.Argument):
        return [command, *BEFORE.get(command, []), "--", *others]
    if command in ("train", "plan", "sft", "reward"):
        others = [configuration(command)]
    elif command == "sample":
        others = [str(bundle_root() / "models/reviews")]
    return [command, *BEFORE.get(command, []), f"{parameter.opts[0]}={value}", *others]


PARAMETERS = [
    (name, parameter)
    for name, command in sorted(main.commands.items())
    for parameter in command.params
    if isinstance(parameter, click.Argument)
    or (not getattr(parameter, "is_flag", False) and parameter.opts != ["--help"])
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "parameter"), PARAMETERS, ids=[f"{name} {p.name}" for name, p in PARAMETERS])
def test_hostile_values(place: Path, command: str, parameter: click.Parameter, pytestconfig: pytest.Config) -> None:
    values = [*VALUES, *(f"{key}={value}" for key in KEYS for value in VALUES[:: len(KEYS)])] if (
        parameter.name == "overrides"
    ) else VALUES  # fmt: skip
    every = 1 if pytestconfig.getoption("--thorough") else 3  # of its neighbours each parameter gets the others
    for value in values[PARAMETERS.index((command, parameter)) % every :: every]:
        tried(lines(command, parameter, value))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["init", "verify", "resume", "export", "import", "plan", "sample", "compare"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(words=st.lists(st.sampled_from(VALUES) | st.text(max_size=6), max_size=4), data=st.data())
def test_any_words_in_any_order(place: Path, command: str, words: list[str], data: st.DataObject) -> None:
    names = [option for p in main.commands[command].params for option in p.opts if option.startswith("-")]
    for _ in range(data.draw(st.integers(0, 2))):
        words.insert(data.draw(st.integers(0, len(words))), data.draw(st.sampled_from(names or ["--x"])))
    tried([command, *words])


@pytest.mark.parametrize("words", [
    ["plan", "a", "\u202e\x1b[2J"], ["plan", "--\x1b[2J"], ["\x1b[2J"], ["--\u202e"], ["sample", "a", "--count=\x07"],
])  # fmt: skip
def test_what_click_says_holds_nothing_that_acts_on_a_terminal(place: Path, words: list[str]) -> None:
    tried(words)
