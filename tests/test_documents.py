"""The documents say what the code does."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlx_ppo
from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.runtime.offline import OFFLINE_ENVIRONMENT

sys.path.insert(0, str(Path(__file__).parent))
from config_table import TABLES, written
from printed_commands import DOCUMENTS, ROOT, commands, parsed, printed
from test_imports import LAYERS

README = (ROOT / "README.md").read_text("utf-8")
NAMED = re.compile(r"(?<![\w/<-])((?:configs|models|tests|benchmarks|docs|mlx_ppo)/[\w./-]*\w)")


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_code(name: str) -> None:
    assert written(name) == TABLES[name][1](), "run python tests/config_table.py"


def test_every_command_is_mentioned_and_every_mentioned_command_exists() -> None:
    assert set(re.findall(r"mlx-ppo ([a-z]+(?:-[a-z]+)*)", README)) == set(commands())
    for file in DOCUMENTS:
        assert set(re.findall(r"mlx-ppo ([a-z]+(?:-[a-z]+)*)", file.read_text("utf-8"))) <= set(commands()), file


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_path_that_is_named_exists(file: Path) -> None:
    text = file.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []
    if file.name != "CHANGELOG.md":  # which may name what was
        assert [path for path in NAMED.findall(text) if not (ROOT / path).exists()] == []


def test_every_document_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", README))
    pages = {str(file.relative_to(ROOT)) for file in DOCUMENTS if "models" not in file.relative_to(ROOT).parts}
    assert pages - linked == {"README.md"}


@pytest.mark.parametrize(("where", "line"), printed())
def test_every_printed_command_is_one(where: str, line: str) -> None:
    assert parsed(line).command.name == line.split()[0], where


CONFIGURED = [line for _, line in printed() if line.split()[0] in JOBS]


@pytest.mark.parametrize("line", sorted(set(CONFIGURED)))
def test_configurations_and_keys_of_printed_commands_are_right(line: str) -> None:
    given = parsed(line).params
    path = ROOT / (given["config"] or "configs/reviews.toml")
    if not path.exists():
        assert path.name in {"CONFIG", "my-ppo.toml", "my-reward.toml", "my-dpo.toml"}
        return
    read_config(JOBS[line.split()[0]], path, given["overrides"])


def test_the_architecture_has_every_layer_in_its_order() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("| layer |")[1].split("\n\n")[0]
    assert re.findall(r"`mlx_ppo/(\w+)(?:\.py|/)`", table) == list(LAYERS)


SCRIPTS = sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("models/**/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_what_scripts_import_of_the_package_exists(script: Path) -> None:
    """They take minutes and other programs, so they aren't run here."""
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "mlx_ppo":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_the_readme_is_short_and_has_the_command_that_ci_runs() -> None:
    assert README.count("\n") <= 140
    found = re.search(r"<!-- test command -->\n```sh\n(.*)\n```", README)
    assert found is not None and found[1].endswith(".venv/bin/pytest -n auto --dist loadfile")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_version_has_its_heading_below_the_unreleased_changes() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", mlx_ppo.__version__]


def test_hooks_need_no_network_and_say_what_ci_says() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert re.findall(r"repo: (.*)", hooks) == ["local"] and set(re.findall(r"language: (.*)", hooks)) == {"system"}
    checks = {line for line in (ROOT / ".ci" / "run").read_text("utf-8").split("\n") if line.startswith(".venv/bin/")}
    checks = {line for line in checks if "pytest" not in line}
    wanted = {check.replace(" .", "").replace(" --check", "") for check in checks}
    assert {entry.replace(" --force-exclude", "") for entry in re.findall(r"entry: (.*)", hooks)} == wanted


def test_the_package_says_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "Typing :: Typed" in project["classifiers"] and (ROOT / "mlx_ppo" / "py.typed").exists()


def test_importing_the_package_is_light_and_changes_what_is_documented() -> None:
    code = """
import os, sys
before = dict(os.environ)
import mlx_ppo
after = {name for name in os.environ if os.environ[name] != before.get(name)}
text = open(sys.argv[1], encoding="utf-8").read()
assert not {"mlx", "numpy", "pydantic", "mlx_lm", "transformers", "click"} & set(sys.modules)
assert after and not {name for name in after if f"`{name}" not in text}, after
assert all(f"`{name}(" in text for name in mlx_ppo.__all__ if name.islower())
assert all(getattr(mlx_ppo, name) is not None for name in mlx_ppo.__all__) and "mlx" in sys.modules
from mlx_ppo.train import train
import types
assert isinstance(mlx_ppo.train, types.ModuleType) and mlx_ppo.train.train is train
"""
    document = ROOT / "docs" / "python-api.md"
    changed = {"TMPDIR", "OPENBLAS_NUM_THREADS", *OFFLINE_ENVIRONMENT}
    clean = {name: value for name, value in os.environ.items() if name not in changed}
    subprocess.run([sys.executable, "-c", code, str(document)], check=True, timeout=240, env=clean)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = mlx_ppo.nothing_of_this_name
