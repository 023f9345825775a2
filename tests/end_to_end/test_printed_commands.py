"""What the documents and the commands' help tell people to type, typed."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_ppo.bundle import copy_example
from mlx_ppo.cli.main import main
from mlx_ppo.runs import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from printed_commands import ROOT, parsed, printed, split

# What takes minutes or others' data, isn't about the example, or serves a page until Ctrl-C; each has its own tests.
_ELSEWHERE = {"bench", "doctor", "evaluate", "label", "studio", "watch"}
_HELD_OUT = 2
_JOBS = {"train", "sft", "reward", "dpo"}


def example() -> str:
    """The Python of the document."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the example in which the documented program has run, and what that program printed.

    It has few held-out prompts: `frontier --samples 512` would take a quarter of an hour with all of them.
    """
    folder = tmp_path_factory.mktemp("documents") / "my"
    copy_example(folder)
    prompts = folder / "models" / "reviews" / "data" / "prompts-test.jsonl"
    prompts.write_text("".join(prompts.read_text("utf-8").splitlines(keepends=True)[:_HELD_OUT]), "utf-8")
    here = ["-c", f"import os; os.chdir({str(folder)!r})\n{example()}"]
    done = subprocess.run([sys.executable, *here], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_documented_program_trains_and_writes(tried: tuple[Path, str]) -> None:
    folder, shown = tried
    assert checkpoint.steps(folder / "runs" / "reviews") == [3]
    assert re.fullmatch(r"([+-]\d+\.\d\d The film is.*\n)([+-]\d+\.\d\d A story of.*\n)", shown), shown


def there(line: str, folder: Path) -> bool:
    """Whether a command's inputs are in the project."""
    context = parsed(line)
    inputs = [p.name for p in context.command.params if isinstance(p, click.Argument) and p.name != "directory"]
    given = [context.params[name] for name in inputs if name and context.params[name] is not None]
    paths = [path for value in given for path in (value if isinstance(value, tuple) else (value,))]
    return all((folder / path).exists() for path in paths)


@pytest.mark.slow
def test_printed_commands_that_can_run_do(tried: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tried
    monkeypatch.chdir(folder)
    ran = []
    for line in sorted({line for _, line in printed() if split(line)[0] not in _ELSEWHERE}):
        if not there(line, folder) or "smollm2" in line:
            continue
        name, arguments = split(line)
        dry = ["--dry-run"] if name in _JOBS and "--dry-run" not in arguments else []
        result = CliRunner().invoke(main, [name, *arguments, *dry])
        assert result.exit_code == 0, (line, result.output)
        ran.append(name)
    written = {"init", "export", "report", "best-of", "forgetting", "frontier"}
    assert set(ran) == {"train", "sft", "reward", "data", "resume", "verify", "sample", "compare", "plan", *written}
