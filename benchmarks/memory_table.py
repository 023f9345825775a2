"""Predicted against measured memory, phase by phase: the table of the README.

    python benchmarks/memory_table.py SMOLLM2_FOLDER [--json FILE]

SMOLLM2_FOLDER is SmolLM2-135M-Instruct imported by `mlx-ppo import`; the other two sizes have its architecture, with
random weights. Twelve configurations: three sizes, LoRA and full fine-tuning, with and without gradient checkpointing,
two shapes of batch. Each is planned from its config.json, then run for three iterations with responses of full length.
The first iteration calibrates; "after" compares the calibrated prediction with the third one.
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ppo.bench.dry_run import Measured, dry_run
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import shapes_of
from mlx_ppo.memory.plan import Plan, make_plan
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.models.load import empty_model

SIZES = {
    "6M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4},
    "35M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 12},
}
SHAPES = {"16 x (24+24)": (16, 24, 24, 2), "8 x (64+64)": (8, 64, 64, 2)}
RULE = "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


def shrunk(smollm2: Path, folder: Path, size: str) -> Path:
    """A random model of the same architecture and vocabulary, with its tokenizer."""
    config = json.loads((smollm2 / "config.json").read_text("utf-8"))
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    config |= SIZES[size] | {
        "head_dim": 64 if size == "35M" else 32,
        "num_attention_heads": SIZES[size]["hidden_size"] // 64,
    }
    config |= {"num_key_value_heads": 1, "torch_dtype": "float32"}
    target = folder / size
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((smollm2 / name).read_bytes())
    model: nn.Module = empty_model(config, size)
    arrays = {name: 0.02 * array if array.ndim > 1 else array for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    return target


def configurations(smollm2: Path, folder: Path) -> Iterator[tuple[str, TrainConfig, int]]:
    """Name, configuration, tokens of a prompt."""
    models = {size: shrunk(smollm2, folder, size) for size in SIZES} | {"135M": smollm2}
    rule, prompts = folder / "rule.py", folder / "prompts.jsonl"
    rule.write_text(RULE, "utf-8")
    prompts.write_text('{"prompt": "The film"}\n', "utf-8")
    for size, model in models.items():
        for train in ("lora", "full"):
            for checkpointing, shape in (("off", "16 x (24+24)"), ("on", "8 x (64+64)")):
                rows, prompt, response, minibatches = SHAPES[shape]
                document: dict[str, Any] = {
                    "model": {"path": model, "train": train},
                    "lora": {"layers": 0 if size != "135M" else 8},
                    "data": {"prompts": prompts, "eval_count": 1},
                    "rollout": {"prompts": rows, "max_tokens": response},
                    "reward": [{"kind": "function", "function": f"{rule}:length"}],
                    "critic": {"kind": "adapters" if train == "lora" else "head"},
                    "ppo": {"epochs": 1, "minibatches": minibatches, "gradient_checkpointing": checkpointing},
                    "optimizer": {"learning_rate": 1e-6},
                }
                name = f"{size} {train}, {shape}" + (", checkpointing" if checkpointing == "on" else "")
                yield name, TrainConfig.model_validate(document), prompt


def errors(plan: Plan, found: Measured, factors: Mapping[str, float]) -> dict[str, float]:
    """Predicted over measured, less 1, by phase, with the optimizer states that there were."""
    off = {}
    for phase in plan.phases:
        if phase.name in found.peaks:
            there = found.states[0 if not phase.name.startswith("update") else 1]
            expected = phase.peak - phase.resident.get("optimizer states", 0) + there
            off[phase.name] = factors.get(phase.name, 1.0) * expected / found.peaks[phase.name] - 1
    return off


def main(arguments: list[str]) -> None:
    smollm2 = Path(arguments[0]).resolve()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config, prompt in configurations(smollm2, Path(folder)):
            shapes = shapes_of(config, prompt)
            accountant = accountant_of(config, None, prompt)
            plan = make_plan(accountant, config, None)
            mx.clear_cache()
            before = mx.get_active_memory()
            found = dry_run(config, plan, shapes, iterations=3)
            assert before < 1 << 20, "something stayed in memory"
            first = errors(plan, found[0], {})
            factors = {phase: 1 / (1 + off) for phase, off in first.items()}
            later, after = errors(plan, found[2], {}), errors(plan, found[2], factors)
            peaks = {phase.name: phase.peak for phase in plan.phases}
            rows.append(
                {
                    "configuration": name,
                    "predicted": peaks,
                    "measured": found[2].peaks,
                    "error": first | later,
                    "error_after_calibration": after,
                }
            )
            worst = max(later, key=lambda phase: abs(later[phase]))
            worst_after = max(after, key=lambda phase: abs(after[phase]))
            largest = max(found[2].peaks, key=lambda phase: found[2].peaks[phase])
            cells = [
                name,
                f"{peaks[largest] / 1e6:.0f}",
                f"{found[2].peaks[largest] / 1e6:.0f}",
                f"{100 * min(later.values()):+.1f} ... {100 * max(later.values()):+.1f} % ({worst})",
                f"{100 * min(after.values()):+.1f} ... {100 * max(after.values()):+.1f} % ({worst_after})",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
    if "--json" in arguments:
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
