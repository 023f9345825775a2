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

# Each package may import those above it and itself, nothing below: so no two packages need each other.
LAYERS = (
    "errors", "files", "bundle", "config", "data", "algo", "runtime", "compute", "tokenizers", "rewards", "models",
    "runs", "stages", "memory", "importing", "exporting", "bench", "parallel", "writing", "reporting", "evaluate",
    "supervised", "supervised_models", "answer_logprobs", "sft", "kto", "dpo", "reward_feedback", "reward_batches",
    "reward_training", "comparison", "best_of", "forgetting", "harness", "prompting", "frontier", "train",
    "following", "follow_worker", "api", "studio", "cli",
)  # fmt: skip
# Beside the standard library, and with the longest match: what else.
OUTSIDE = {
    "config": {"pydantic", "pydantic_core", "tomli"},
    "data": {"mlx", "numpy", "safetensors"},
    "data.containers": {"pyarrow"},
    "algo": {"mlx"},
    "runtime": {"mlx", "psutil"},
    "runtime.group": {"mlx", "numpy"},
    "runtime.ring": {"mlx", "numpy"},
    "runtime.shared_memory": {"mlx", "numpy"},
    "runtime.child_start": set(),
    "runtime.sandbox": set(),
    "compute": {"mlx", "mlx_lm", "numpy"},
    "compute.portable": {"mlx"},
    "compute.cpu.blas": set(),
    "tokenizers": {"mlx_lm", "sentencepiece", "transformers"},
    "tokenizers.template_worker": {"jinja2"},
    "rewards": {"numpy"},
    "rewards.worker": set(),
    "rewards.rule_worker": {"jsonschema", "math_verify", "referencing"},
    "models": {"mlx", "mlx_lm", "numpy"},
    "runs": {"mlx", "tomli"},
    "runs.metrics": set(),
    "runs.callbacks": {"tensorboard"},
    "stages": {"mlx", "numpy"},
    "memory": {"mlx", "mlx_lm", "numpy", "psutil"},
    "importing": {"mlx", "numpy", "gguf", "tokenizers", "safetensors"},
    "exporting": {"mlx", "mlx_lm", "numpy", "gguf"},
    "bench": {"mlx", "numpy"},
    "evaluate": {"mlx", "numpy"},
    "frontier": {"mlx", "numpy"},
    "supervised": {"mlx", "numpy"},
    "sft": {"mlx", "numpy"},
    "answer_logprobs": {"mlx", "numpy"},
    "kto": {"mlx", "numpy"},
    "dpo": {"mlx", "numpy"},
    "reward_feedback": {"numpy"},
    "reward_batches": {"mlx", "numpy"},
    "reward_training": {"mlx", "numpy"},
    "comparison": {"mlx", "numpy"},
    "best_of": {"mlx", "numpy"},
    "forgetting": {"mlx", "numpy"},
    "harness": {"lm_eval", "mlx", "numpy"},
    "parallel": {"numpy"},
    "train": {"numpy"},
    "following": {"mlx"},
    "studio": {"starlette", "psutil"},
    "studio.server": {"starlette", "uvicorn"},
    "studio.sampling": {"mlx", "numpy"},
    "studio.selection": {"numpy"},
    "cli": {"click", "rich", "mlx", "mlx_lm", "numpy", "psutil"},
}
# Nothing of this project, or little: what runs in a process of its own, and the pure maths.
INSIDE: dict[str, set[str]] = {
    "algo": {"algo"}, "runtime.child_start": set(), "runtime.sandbox": set(), "rewards.worker": set(),
    "rewards.rule_worker": set(), "tokenizers.template_worker": set(),
    "compute.cpu.blas": set(),
}  # fmt: skip
BEFORE_MLX = {"mlx_ppo.compute.cpu.blas", "mlx_ppo.runtime.offline", "mlx_ppo.runtime.private_tmp"}
PUBLIC = "mlx_ppo.api"  # imported when one of its names is first used
STAGES = {f"mlx_ppo.stages.{name}" for name in ("rollout", "scoring", "advantages", "update")}
HEAVY = {"mlx", "mlx_lm", "numpy", "pydantic", "rich", "safetensors", "sentencepiece", "tomli", "transformers"}
HEAVY |= {"starlette", "uvicorn"}
HEAVY |= {f"mlx_ppo.{name}" for name in ("config.sections", "config.file", "runs.folder", "stages", "train", "sft")}


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


def longest(module, table):
    """What a table says of the longest part of a module's name that it knows."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((table[name] for name in names if name in table), None)


def layer(module):
    name = module.split(".")[1] if "." in module else None
    return LAYERS.index(name) if name in LAYERS else None


def forbidden(module, source):
    """Imports of a module that the tables don't allow."""
    wrong = set()
    for name in imports(source):
        first = name.split(".")[0]
        if first == "mlx_ppo":
            wrong |= set() if may_import(module, name) else {name}
        elif first not in sys.stdlib_module_names and first not in (longest(module, OUTSIDE) or set()):
            wrong.add(name)
    return wrong


def may_import(module, name):
    if name == "mlx_ppo":
        return module.split(".")[1] in ("cli", "runs", "bench", "api")  # its version, its BLAS
    inside = longest(module, INSIDE)
    if inside is not None:
        return within(name, {f"mlx_ppo.{item}" for item in inside})
    if module == "mlx_ppo":
        return name in BEFORE_MLX or name == PUBLIC
    same_stage = module.startswith("mlx_ppo.stages.") and name in STAGES and module in STAGES
    return layer(name) is not None and layer(name) <= layer(module) and not (same_stage and name != module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_what_the_tables_allow(module):
    assert module == "mlx_ppo" or layer(module) is not None, "a new package: put it in LAYERS"
    assert forbidden(module, MODULES[module].read_text("utf-8")) == set()
    assert MODULES[module].stem not in {"utils", "util", "helpers", "common", "misc"}


def test_no_module_needs_itself_through_others():
    """Imports inside functions and for types alone count."""
    needs = {module: {name for name in imports(path.read_text("utf-8")) if name in MODULES and name != "mlx_ppo"}
             for module, path in MODULES.items()}  # fmt: skip
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    assert sorted(needs) == []


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
        ("mlx_ppo.algo.kl", "from mlx_ppo.stages.records import Rollout", {"mlx_ppo.stages.records"}),
        ("mlx_ppo.algo.kl", "import math\nimport mlx.core as mx\nfrom mlx_ppo.algo.masked import x", set()),
        ("mlx_ppo.algo.kl", "import mlx_lm", {"mlx_lm"}),
        ("mlx_ppo.errors", "def f():\n    import click", {"click"}),
        ("mlx_ppo.stages.rollout", "from mlx_ppo.stages import scoring", {"mlx_ppo.stages.scoring"}),
        ("mlx_ppo.stages.update", "from mlx_ppo.train import train", {"mlx_ppo.train"}),
        ("mlx_ppo.evaluate", "from mlx_ppo.cli.display import Display", {"mlx_ppo.cli.display"}),
        ("mlx_ppo.models.roles", "from mlx_ppo.train import train", {"mlx_ppo.train"}),
        (
            "mlx_ppo.compute.cpu.steps",
            "if TYPE_CHECKING:\n    from mlx_ppo.models.trunk import Trunk",
            {"mlx_ppo.models.trunk"},
        ),
        ("mlx_ppo.compute.cpu.blas", "import mlx_ppo", {"mlx_ppo"}),
        ("mlx_ppo.data.jsonl", "if True:\n    from mlx_ppo import models", {"mlx_ppo.models"}),
    ],
)
def test_the_walk_itself(module, source, wrong):
    assert forbidden(module, source) == wrong
    with pytest.raises(AssertionError, match="relative"):
        forbidden(module, "from . import x")


# Lines. A file may be listed here while it waits to be split; the number may only fall.
FILE_LIMIT, FUNCTION_LIMIT = 350, 60
LONG = {"mlx_ppo.models.folder": 380}


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


# Parameters. What has more takes a record; a command of click has one for every option.
PARAMETER_LIMIT = 6
MANY = {
    "mlx_ppo.cli.bench.bench", "mlx_ppo.cli.look.sample", "mlx_ppo.cli.look.compare", "mlx_ppo.cli.plan.show",
    "mlx_ppo.compute.cpu.products.prepare",
}  # fmt: skip


def many(module, source):
    """Functions of a module with more parameters than are allowed, `self` and `cls` not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            if len(set(names) - {"self", "cls"}) > PARAMETER_LIMIT:
                yield f"{module}.{node.name}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"mlx_ppo.cli.main"}))
def test_functions_have_few_parameters(module):
    assert set(many(module, MODULES[module].read_text("utf-8"))) <= MANY


# Which device or system this is decides something in these places only.
ASKING = {"mlx_ppo.compute", "mlx_ppo.runtime", "mlx_ppo.cli.doctor"}
QUESTIONS = {"sys.platform", "mx.default_device", "mx.device_info", "mx.metal", "mx.cuda", "platform.system", "on_cpu"}
QUESTIONS |= {"platform.machine", "platform.platform", "os.uname", "is_available", "set_default_device"}


def asked(source):
    """Questions for the device or the system in a module's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            yield from (question for question in QUESTIONS if name == question or name.endswith(f".{question}"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_engines_and_the_runtime_ask_what_machine_this_is(module):
    assert within(module, ASKING) or set(asked(MODULES[module].read_text("utf-8"))) == set()


def test_questions_are_recognised():
    source = "import sys\nif sys.platform == 'darwin' or mx.metal.is_available() or on_cpu(): pass"
    assert set(asked(source)) == {"sys.platform", "mx.metal", "is_available", "on_cpu"}
    assert set(asked("import mlx.core as mx\nmx.eval(mx.device_info())")) == {"mx.device_info"}
