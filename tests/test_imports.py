"""Who may import what, and how long files and functions may be: the table in the design, kept true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_ppo

PACKAGE = Path(mlx_ppo.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = {
    name.removesuffix(".__init__"): path for name, path in MODULES.items() if "bundle" not in name.split(".")[1:-1]
}

# Longest match wins. Beside the standard library, which all may import.
TABLE = {
    "mlx_ppo": {"mlx_ppo.runtime"},
    "mlx_ppo.errors": set(),
    "mlx_ppo.files": set(),
    "mlx_ppo.config": {"pydantic"},
    "mlx_ppo.config_supervised": {"pydantic", "mlx_ppo.config"},
    "mlx_ppo.config_checks": {"mlx_ppo.config", "mlx_ppo.config_supervised"},
    "mlx_ppo.config_file": {
        "pydantic", "pydantic_core", "tomli", "mlx_ppo.config", "mlx_ppo.config_checks", "mlx_ppo.errors",
        "mlx_ppo.files",
    },
    "mlx_ppo.records": {"mlx", "numpy", "mlx_ppo.data"},
    "mlx_ppo.provenance": {"mlx", "tomli", "mlx_ppo.config", "mlx_ppo.errors"},
    "mlx_ppo.runs": {
        "mlx_ppo.config", "mlx_ppo.config_file", "mlx_ppo.config_supervised", "mlx_ppo.errors", "mlx_ppo.provenance",
    },
    "mlx_ppo.checkpoint": {
        "mlx", "mlx_ppo.errors", "mlx_ppo.networks.model_files", "mlx_ppo.provenance", "mlx_ppo.runs",
    },
    "mlx_ppo.verification": {
        "mlx_ppo.checkpoint", "mlx_ppo.config", "mlx_ppo.errors", "mlx_ppo.memory.choices", "mlx_ppo.provenance",
        "mlx_ppo.runs",
    },
    "mlx_ppo.decoding": {"mlx", "numpy", "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.networks"},
    "mlx_ppo.metrics": set(),
    "mlx_ppo.machine": {"mlx", "numpy", "mlx_ppo.networks.device"},
    "mlx_ppo.throughput": {"mlx_ppo.config", "mlx_ppo.errors", "mlx_ppo.files", "mlx_ppo.memory.products"},
    "mlx_ppo.algo": {"mlx", "mlx_ppo.algo"},
    "mlx_ppo.data": {"mlx", "numpy", "sentencepiece", "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.files"},
    "mlx_ppo.networks": {
        "mlx", "mlx_lm", "numpy", "safetensors", "sentencepiece",
        "mlx_ppo.algo", "mlx_ppo.config", "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.files", "mlx_ppo.networks",
        "mlx_ppo.records", "mlx_ppo.runtime.products",
    },
    "mlx_ppo.networks.child_start": set(),
    "mlx_ppo.networks.template_worker": {"jinja2"},
    "mlx_ppo.importing": {
        "mlx", "numpy", "gguf", "tokenizers", "safetensors",
        "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.importing", "mlx_ppo.networks", "mlx_ppo.runtime",
    },
    "mlx_ppo.memory": {
        "mlx", "mlx_lm", "numpy", "psutil",
        "mlx_ppo.config", "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.memory", "mlx_ppo.networks", "mlx_ppo.records",
        "mlx_ppo.runs", "mlx_ppo.runtime", "mlx_ppo.scoring", "mlx_ppo.update",
    },
    "mlx_ppo.memory.choices": {"mlx_ppo.config", "mlx_ppo.errors"},
    "mlx_ppo.runtime": {"mlx", "mlx_ppo.runtime"},
    "mlx_ppo.runtime.products": {"numpy", "mlx_ppo.runtime"},
    "mlx_ppo.exporting": {
        "gguf", "mlx", "mlx_lm", "numpy",
        "mlx_ppo.config", "mlx_ppo.data", "mlx_ppo.errors", "mlx_ppo.exporting", "mlx_ppo.networks", "mlx_ppo.targets",
    },
}  # fmt: skip
FREE = {"bundle", "cli", "dry_run", "estimation", "evaluate", "measurements", "optimization", "reward_figures"}
FREE |= {"reward_training", "rollout", "scoring", "sft", "supervised", "targets", "train", "training_state", "update"}
STAGES = {"mlx_ppo.rollout", "mlx_ppo.scoring", "mlx_ppo.update"}
STORIES = {"mlx_ppo.dry_run", "mlx_ppo.train", "mlx_ppo.sft", "mlx_ppo.reward_training"}
HEAVY = {"mlx", "mlx_lm", "numpy", "pydantic", "rich", "safetensors", "sentencepiece", "tomli", "transformers"}
HEAVY |= {"mlx_ppo.config", "mlx_ppo.config_file", "mlx_ppo.cli", "mlx_ppo.runs", *STAGES, *STORIES}


def imports(source, *, inside=True):
    """Full names of what a module imports; `from package import module` gives the module."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def within(name, allowed):
    return any(name == item or name.startswith(item + ".") for item in allowed)


def rule_of(module):
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 1 if len(parts) > 1 else 0, -1)]
    return next((TABLE[prefix] for prefix in prefixes if prefix in TABLE), None)


def forbidden(module, source):
    """Imports of a module that the table doesn't allow."""
    found = {name for name in imports(source) if name.split(".")[0] not in sys.stdlib_module_names}
    wrong = {name for name in found if within(name, {"mlx_ppo.cli"}) and not within(module, {"mlx_ppo.cli"})}
    if module in STAGES:
        wrong |= {name for name in found if name in STAGES | STORIES}
    if not within(module, {"mlx_ppo.cli"}):
        wrong |= {name for name in found if name in STORIES}
    rule = rule_of(module)
    return wrong if rule is None else wrong | {name for name in found if not within(name, rule) or name == "mlx_ppo"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_what_the_table_allows(module):
    assert forbidden(module, MODULES[module].read_text("utf-8")) == set()
    assert rule_of(module) is not None or module.split(".")[1] in FREE, "a new module: put it in the table"
    assert MODULES[module].stem not in {"utils", "util", "helpers", "common", "misc"}


def test_help_is_quick_because_nothing_heavy_is_imported_at_the_top():
    found = set(imports(MODULES["mlx_ppo.cli.main"].read_text("utf-8"), inside=False))
    assert "click" in found and not {name for name in found if within(name, HEAVY)}
    code = "import sys, mlx_ppo.cli.main; print(*sorted(set(sys.modules) & set(sys.argv[1].split())))"
    names = " ".join(name for name in HEAVY if name != "mlx_ppo.cli")
    shown = subprocess.run([sys.executable, "-c", code, names], capture_output=True, text=True, check=True).stdout
    assert shown.split() == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("mlx_ppo.algo.kl", "import numpy as np", {"numpy"}),
        ("mlx_ppo.algo.kl", "from mlx_ppo.records import Rollout", {"mlx_ppo.records"}),
        ("mlx_ppo.algo.kl", "import math\nimport mlx.core as mx\nfrom mlx_ppo.algo.masked import x", set()),
        ("mlx_ppo.algo.kl", "import mlx_lm", {"mlx_lm"}),
        ("mlx_ppo.errors", "def f():\n    import click", {"click"}),
        ("mlx_ppo.config", "from mlx_ppo.config_file import nearest", {"mlx_ppo.config_file"}),
        ("mlx_ppo.rollout", "from mlx_ppo import scoring", {"mlx_ppo.scoring"}),
        ("mlx_ppo.update", "from mlx_ppo.train import train", {"mlx_ppo.train"}),
        ("mlx_ppo.evaluate", "from mlx_ppo.cli.display import Display", {"mlx_ppo.cli.display"}),
        ("mlx_ppo.networks.roles", "from mlx_ppo.train import train", {"mlx_ppo.train"}),
        ("mlx_ppo.runtime.blas", "import mlx_ppo", {"mlx_ppo"}),
        ("mlx_ppo.data.jsonl", "if True:\n    from mlx_ppo import networks", {"mlx_ppo.networks"}),
    ],
)
def test_the_walk_itself(module, source, wrong):
    assert forbidden(module, source) == wrong
    with pytest.raises(AssertionError, match="relative"):
        forbidden(module, "from . import x")


# Lines. A file may be listed here while it waits to be split; the number may only fall.
FILE_LIMIT, FUNCTION_LIMIT = 350, 60
LONG = {"mlx_ppo.networks.folder": 380}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module):
    source = MODULES[module].read_text("utf-8")
    assert source.count("\n") <= LONG.get(module, FILE_LIMIT)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LIMIT
    }
    assert long == {}
