"""Random configurations under random budgets: does a run that the plan admits stay within, is a refusal right?

    python benchmarks/random_budgets.py SMOLLM2_FOLDER [COUNT] [--seed N] [--json FILE]

Every run is a process of its own, `mlx-ppo train`, with two iterations; its memory is the largest resident set that the
system reports. A refused configuration is run nevertheless, with the smallest choices and no bound: it must need more
than the budget less 15 %.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from memory_table import RULE, shrunk

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.plan import GIB, make_plan, smallest
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.runs.folder import to_toml
from mlx_ppo.runs.plan_file import Choices

# A new process's largest resident set begins with that of the process that starts it: so one that is small does.
LAUNCH = """
import os, subprocess, sys
with open(sys.argv[1], "w") as errors:
    process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL, stderr=errors)
    _, status, used = os.wait4(process.pid, 0)
print([os.waitstatus_to_exitcode(status), used.ru_maxrss])
"""
PROMPT = "The film is about a man who reads a great many long books and forgets what they said, "


def configuration(drawn: random.Random, models: dict[str, Path], folder: Path) -> TrainConfig:
    """A configuration of chance; prompts and responses have the lengths that the plan expects."""
    train = drawn.choice(["lora", "lora", "full"])
    advantage = drawn.choice(["gae", "gae", "rloo"])
    kind = drawn.choice(["adapters", "head", "model"])
    rows = drawn.choice([8, 16, 32])
    document: dict[str, Any] = {
        "run": {"folder": folder / "runs", "iterations": 2, "save_every": 2},
        "model": {"path": drawn.choice(list(models.values())), "train": train},
        "lora": {"rank": drawn.choice([4, 16]), "layers": drawn.choice([0, 2])},
        "data": {"prompts": folder / "prompts.jsonl", "eval_count": 1, "max_prompt_tokens": 512},
        "rollout": {"prompts": rows, "max_tokens": drawn.choice([16, 48, 96])},
        "reward": [{"kind": "function", "function": f"{folder / 'rule.py'}:length"}],
        "critic": {"kind": kind},
        "ppo": {"advantage": advantage, "epochs": 1, "minibatches": drawn.choice([1, 2, 4])},
        "optimizer": {"learning_rate": 1e-6},
    }
    if advantage == "rloo":
        document["rollout"] |= {"prompts": rows // 2, "samples_per_prompt": 2}
    return TrainConfig.model_validate(document)


def pinned(config: TrainConfig, choices: Choices) -> TrainConfig:
    """The configuration with choices in place of what is open."""
    keys: dict[str, dict[str, Any]] = {
        "rollout": {"batch_size": choices.rollout_batch, "kv_cache": choices.kv_cache},
        "score": {"batch_size": choices.score_batch},
        "ppo": {
            "micro_batch": choices.micro_batch,
            "gradient_checkpointing": "on" if choices.checkpointing else "off",
        },
        "memory": {
            "residency": "evict" if choices.evict else "resident",
            "compact": "on" if choices.compact else "off",
            "positions": choices.positions,
        },
    }
    return config.model_copy(update={name: getattr(config, name).model_copy(update=keys[name]) for name in keys})


def run(config: TrainConfig, folder: Path) -> tuple[int, int, str]:
    """Exit code, largest resident bytes of any of its processes, and what it said last on standard error."""
    file = folder / "job.toml"
    file.write_text(to_toml(config), "utf-8")
    command = [sys.executable, "-c", "from mlx_ppo.cli.main import main; main()", "train", str(file)]
    measured = [sys.executable, "-S", "-c", LAUNCH, str(folder / "errors"), *command]
    code, used = json.loads(subprocess.run(measured, capture_output=True, check=True).stdout)
    said = (folder / "errors").read_text("utf-8").strip().split("\n")[-1]
    # The command's own process waits for a child that trains: the kernel reports the larger of both.
    return code, used * (1 if sys.platform == "darwin" else 1024), said


def main(arguments: list[str]) -> None:
    smollm2 = Path(arguments[0]).resolve()
    count = int(arguments[1]) if len(arguments) > 1 and arguments[1].isdigit() else 60
    drawn = random.Random(int(arguments[arguments.index("--seed") + 1]) if "--seed" in arguments else 0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rule.py").write_text(RULE, "utf-8")
        models = {size: shrunk(smollm2, folder, size) for size in ("6M", "35M")}
        for number in range(count):
            repeats = drawn.choice([1, 4])
            (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT * repeats}) + "\n", "utf-8")
            config = configuration(drawn, models, folder)
            accountant = accountant_of(config, None, 19 * repeats)
            wants = make_plan(accountant, config, None).process
            budget = round(drawn.uniform(0.45, 1.15) * wants / GIB, 3)
            memory = config.memory.model_copy(update={"budget_gb": budget})
            code, used, said = run(config.model_copy(update={"memory": memory}), folder)
            row = {"number": number, "budget_gib": budget, "unbounded_gib": round(wants / GIB, 3), "exit": code}
            if code == 0:
                row |= {"used_gib": round(used / GIB, 3), "right": used <= budget * GIB}
            elif code == 2:
                least = pinned(config, smallest(config, accountant.shapes, accountant.possible))
                again, needs, _ = run(least, folder)
                row |= {"refused": said, "needs_gib": round(needs / GIB, 3), "again": again}
                row["right"] = again == 0 and needs >= 0.85 * budget * GIB
            else:
                row |= {"said": said, "right": False}
            rows.append(row)
            print(json.dumps(row), flush=True)
    admitted = [row for row in rows if row["exit"] == 0]
    refused = [row for row in rows if row["exit"] == 2]
    print(
        f"{count} configurations: "
        f"{len(admitted)} admitted, {sum(row['right'] for row in admitted)} within their budget; "
        f"{len(refused)} refused, {sum(row['right'] for row in refused)} rightly; "
        f"{len(rows) - len(admitted) - len(refused)} failed"
    )
    if "--json" in arguments:
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    sys.exit(0 if all(row["right"] for row in rows) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
