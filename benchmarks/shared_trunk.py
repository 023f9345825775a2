"""Four roles on one trunk against four models side by side: SmolLM2-135M in float32, the peak of an iteration.

    python benchmarks/shared_trunk.py SMOLLM2_FOLDER

Shared: the policy, the critic and the reward model are LoRA adapters on one trunk, which is the reference itself.
Separate: policy and critic with all weights of their own, reward model and reference in folders of theirs; resident,
and evicted between phases. 16 prompts of 24 tokens, responses of 40, two minibatches; each planned without a bound, and
for the smallest budget that it fits.

The least possible for the shared trunk: its weights, and one response's activations with gradient checkpointing by the
formulas of Chen et al. 2016 (arXiv:1604.06174), section 4: what enters each block, and one block's own.
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.bench.dry_run import dry_run
from mlx_ppo.config.sections import LoraSection, TrainConfig
from mlx_ppo.memory.choices import shapes_of
from mlx_ppo.memory.plan import Plan, make_plan, plan_of, smallest
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.models.adapters import new_adapters
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, new_head
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.roles import Roles, load_roles
from mlx_ppo.models.write import write_adapters

PROMPT, RESPONSE, ROWS = 24, 40, 16


def reward_models(smollm2: Path, folder: Path) -> tuple[Path, Path]:
    """A reward model as adapters on the trunk, and one with a trunk of its own; neither has learned anything."""
    trunk = load_trunk(smollm2)
    adapters = new_adapters(trunk.adapted, LoraSection(layers=8), key="reward", seed=0)
    write_adapters(folder / "adapters", adapters, trunk.blocks)
    shutil.copytree(smollm2, folder / "own")
    for name, placement in (("adapters", "adapters"), ("own", "folder")):
        mx.save_safetensors(str(folder / name / HEAD_FILE), new_head(trunk.width))
        RewardFacts(placement, "last", 0.0, 1.0).write(folder / name)  # type: ignore[arg-type]
    return folder / "adapters", folder / "own"


def config(smollm2: Path, folder: Path, reward: Path, *, separate: bool, residency: str) -> TrainConfig:
    """The run."""
    document: dict[str, Any] = {
        "model": {"path": smollm2, "train": "full" if separate else "lora"},
        "lora": {"layers": 8, "rank": 8},
        "data": {"prompts": folder / "prompts.jsonl", "eval_count": 1},
        "rollout": {"prompts": ROWS, "max_tokens": RESPONSE},
        "reward": [{"kind": "model", "path": reward}],
        "critic": {"kind": "model" if separate else "adapters", "initialise": "policy"},
        "ppo": {"minibatches": 2, "epochs": 1},
        "optimizer": {"learning_rate": 1e-6},
        "memory": {"residency": residency},
    }
    return TrainConfig.model_validate(document)


def measured(name: str, asked: TrainConfig, plan: Plan, weights: int, least: int) -> None:
    """Run two iterations by a plan, and print a row."""
    found = dry_run(asked, plan, shapes_of(asked, PROMPT), iterations=2)
    names = {phase for one in found for phase in one.peaks}  # loading is in the first only
    phases = {phase: max(one.peaks.get(phase, 0) for one in found) for phase in names}
    largest = max(phases, key=lambda phase: phases[phase])
    peak, seconds = phases[largest], sum(found[-1].seconds.values())
    cells = [
        name,
        f"{peak / 1e6:.0f} ({largest})",
        f"{peak / weights:.2f}",
        f"{peak / least:.2f}",
    ]
    print("| " + " | ".join([*cells, f"{seconds:.1f}"]) + " |", flush=True)


def reloading(asked: TrainConfig) -> None:
    """What reading an evicted model again costs."""
    roles: Roles = load_roles(asked)[0]
    trunk = roles.evictable[0]
    times = []
    for _ in range(3):
        started = time.monotonic()
        roles.bring(trunk)
        times.append(time.monotonic() - started)
        roles.evict()
    size = sum(array.nbytes for array in trunk.base.values())
    print(f"reading {size / 1e6:.0f} MB again: {', '.join(f'{took:.2f}' for took in times)} s")


def main(smollm2: Path) -> None:
    stored = json.loads((smollm2 / "config.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text('{"prompt": "The film"}\n', "utf-8")
        adapters, own = reward_models(smollm2, folder)
        shared = config(smollm2, folder, adapters, separate=False, residency="auto")
        accountant = accountant_of(shared, None, PROMPT)
        weights = sum(array.nbytes for array in accountant.roles.trunk.base.values())
        tokens, width, hidden = PROMPT + RESPONSE, stored["hidden_size"], stored["intermediate_size"]
        queries = stored["num_attention_heads"] * 64 + 2 * stored["num_key_value_heads"] * 64
        scores = stored["num_attention_heads"] * tokens * tokens
        block = tokens * (5 * hidden + 4 * width + 2 * queries) + 3 * scores
        least = weights + 4 * ((8 + 2) * tokens * width + block)
        print(f"weights {weights / 1e6:.0f} MB; with the least activations of one response {least / 1e6:.0f} MB\n")
        print("| | peak, MB (phase) | of the weights | of the least | s an iteration |")
        print("|---|---|---|---|---|")
        measured("one shared trunk", shared, make_plan(accountant, shared, None), weights, least)
        tight = plan_of(accountant, smallest(shared, accountant.shapes, accountant.possible), None)
        measured("the same, smallest choices", shared, tight, weights, least)
        for residency in ("resident", "evict"):
            apart = config(smollm2, folder, own, separate=True, residency=residency)
            plan = make_plan(accountant_of(apart, None, PROMPT), apart, None)
            measured(f"four models, {residency}", apart, plan, weights, least)
        reloading(config(smollm2, folder, own, separate=False, residency="evict"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
