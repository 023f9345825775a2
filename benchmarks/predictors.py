"""The planner's simulator against a closed form: what each predicts, and what is measured.

    python benchmarks/predictors.py measure PART SMOLLM2_FOLDER WORK_FOLDER FILE
    python benchmarks/predictors.py compare PART SMOLLM2_FOLDER WORK_FOLDER FILE [--verbose]

`measure` runs two iterations of every configuration of a part with responses of full length, and writes mlx's peak of
every phase: the twelve of the memory table ("table") and the first twenty of the random budgets ("random") under this
machine's engine, twelve small ones of other kinds ("portable", with MLX_PPO_ENGINE=portable). `compare` predicts the
same by both, before the run and corrected by its first iteration.
"""

# ruff: noqa: E402
import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import mlx.core as mx
from closed_form import installed
from memory_table import RULE, configurations, shrunk
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model
from random_budgets import PROMPT, configuration
from tiny_models import COMMON, KINDS, write_weights, write_word_tokenizer

from mlx_ppo.bench.dry_run import dry_run
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import shapes_of
from mlx_ppo.memory.keeping import _HIGHEST, _LOWEST
from mlx_ppo.memory.plan import Plan, make_plan
from mlx_ppo.memory.starting import accountant_of

WIDE = {"hidden_size": 128, "vocab_size": 2048, "intermediate_size": 352, "num_hidden_layers": 4}
GPT2 = {"n_embd": 128, "n_head": 4, "n_layer": 4, "vocab_size": 2048}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
Case = tuple[str, TrainConfig, int]


def table(smollm2: Path, folder: Path) -> Iterator[Case]:
    """The memory table's."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*/*"):
        old.unlink()
    for old in folder.glob("[0-9]*"):
        old.rmdir()
    yield from configurations(smollm2, folder)


def drawn_budgets(smollm2: Path, folder: Path, count: int) -> Iterator[tuple[Case, random.Random]]:
    """Those of the random budgets, whose next number is the budget's share of what is wanted."""
    folder.mkdir(exist_ok=True)
    (folder / "rule.py").write_text(RULE, "utf-8")
    models = {
        size: folder / size if (folder / size).exists() else shrunk(smollm2, folder, size) for size in ("6M", "35M")
    }
    drawn = random.Random(0)
    for number in range(count):
        repeats = drawn.choice([1, 4])
        prompts = folder / f"prompts{repeats}.jsonl"
        prompts.write_text(json.dumps({"prompt": PROMPT * repeats}) + "\n", "utf-8")
        config = configuration(drawn, models, folder)
        config = config.model_copy(update={"data": config.data.model_copy(update={"prompts": prompts})})
        yield (f"random {number}", config, 19 * repeats), drawn


def random_ones(smollm2: Path, folder: Path, count: int = 20) -> Iterator[Case]:
    """Without their budgets."""
    for case, drawn in drawn_budgets(smollm2, folder, count):
        drawn.uniform(0, 1)
        yield case


def small_model(kind: str, folder: Path, **changes: Any) -> Path:
    """A random one, written once."""
    target = folder / f"{kind}-{changes['bits']}bit" if "bits" in changes else folder / kind
    if target.exists():
        return target
    if bits := changes.pop("bits", 0):
        model, config = load_model(small_model(kind, folder), trust_remote_code=False)
        model, config = quantize_model(model, config, bits=bits, group_size=32)
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config), "utf-8")
        mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    else:
        target.mkdir(parents=True)
        config = {"model_type": kind, **COMMON, **KINDS.get(kind, {}), **(GPT2 if kind == "gpt2" else WIDE), **changes}
        (target / "config.json").write_text(json.dumps(config), "utf-8")
        write_weights(target, config, 0, 0.02)
    write_word_tokenizer(target)
    return target


def portable_ones(_: Path, folder: Path) -> Iterator[Case]:
    """Other kinds, small; and SmolLM2 as it is stored, in 4 bits."""
    folder.mkdir(exist_ok=True)
    (folder / "rule.py").write_text(RULE, "utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "The film"}\n', "utf-8")
    kinds: list[tuple[str, dict[str, Any], str, str, bool]] = [
        ("llama", {}, "lora", "adapters", False),
        ("llama", {}, "full", "head", False),
        ("llama", {"bits": 4}, "lora", "adapters", False),
        ("llama", {"bits": 4}, "lora", "head", True),
        ("qwen3", {"head_dim": 32}, "lora", "head", False),
        ("qwen3", {"head_dim": 32}, "full", "head", True),
        ("gemma2", {"head_dim": 32}, "lora", "adapters", False),
        ("gemma2", {"head_dim": 32}, "lora", "adapters", True),
        ("gemma3_text", {"head_dim": 32}, "full", "head", False),
        ("gpt2", {}, "lora", "adapters", False),
        ("gpt2", {}, "full", "head", False),
        ("qwen3_moe", MIXTURE, "lora", "adapters", False),
    ]
    for kind, changes, train, critic, saving in kinds:
        document: dict[str, Any] = {
            "model": {"path": small_model(kind, folder, **changes), "train": train},
            "lora": {"rank": 8},
            "data": {"prompts": folder / "prompts.jsonl", "eval_count": 1},
            "rollout": {"prompts": 8, "max_tokens": 48},
            "reward": [{"kind": "function", "function": f"{folder / 'rule.py'}:length"}],
            "critic": {"kind": critic},
            "ppo": {"epochs": 1, "minibatches": 2, "gradient_checkpointing": "on" if saving else "off"},
            "optimizer": {"learning_rate": 1e-6},
        }
        bits = f" {changes['bits']}-bit" if "bits" in changes else ""
        name = f"portable {kind}{bits} {train}" + (", checkpointing" if saving else "")
        yield name, TrainConfig.model_validate(document), 32


PARTS = {"table": table, "random": random_ones, "portable": portable_ones}


def cases(part: str, smollm2: Path, work: Path) -> Iterator[Case]:
    yield from PARTS[part](smollm2, work / part)


def measure(part: str, smollm2: Path, work: Path, file: Path) -> None:
    """Add what is measured to a file."""
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name, config, prompt in cases(part, smollm2, work):
        if name in found:
            continue
        started = time.monotonic()
        plan = make_plan(accountant_of(config, None, prompt), config, None)
        mx.clear_cache()
        try:
            ran = dry_run(config, plan, shapes_of(config, prompt), iterations=2)
        except Exception as error:
            print(f"{name}: {error!r}"[:300], flush=True)
            continue
        found[name] = [{"peaks": one.peaks, "states": one.states} for one in ran]
        file.write_text(json.dumps(found, indent=1), "utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def off(plan: Plan, iteration: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, float]:
    """Predicted over measured, less 1, by phase, with the optimizer states that there were."""
    errors = {}
    for phase in plan.phases:
        if phase.name in iteration["peaks"]:
            there = iteration["states"][phase.name.startswith("update")]
            expected = phase.peak - phase.resident.get("optimizer states", 0) + there
            errors[phase.name] = factors.get(phase.name, 1.0) * expected / iteration["peaks"][phase.name] - 1
    return errors


def corrected(errors: Mapping[str, float]) -> dict[str, float]:
    """Factors after the first iteration, within the bounds that a run has."""
    return {name: min(_HIGHEST, max(_LOWEST, 1 / (1 + error))) for name, error in errors.items()}


def compare(part: str, smollm2: Path, work: Path, file: Path, *, verbose: bool) -> None:
    """Both predictors' errors over all phases, and at the largest phase of each configuration."""
    found = json.loads(file.read_text("utf-8"))
    everything: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {"simulator": 0.0, "closed form": 0.0}
    for name, config, prompt in cases(part, smollm2, work):
        if name not in found:
            continue
        first, second = found[name]
        largest = max(second["peaks"], key=lambda phase: second["peaks"][phase])
        for which in seconds:
            accountant = accountant_of(config, None, prompt)
            if which == "closed form":
                with installed():
                    accountant = accountant_of(config, None, prompt)
            started = time.monotonic()
            plan = make_plan(accountant, config, None)
            seconds[which] += time.monotonic() - started
            before = off(plan, second, {})
            after = off(plan, second, corrected(off(plan, first, {})))
            rows = everything.setdefault(which, [[], [], [], []])
            for row, errors in zip(
                rows, (before.values(), [before[largest]], after.values(), [after[largest]]), strict=True
            ):
                row.extend(errors)
            if verbose:
                told = ", ".join(f"{phase} {100 * error:+.0f}" for phase, error in before.items())
                print(f"  {name} [{which}] {told} | largest {largest} {second['peaks'][largest] / 1e6:.1f} MB")
    for which, rows in everything.items():
        for what, row in zip(
            ("before, phases", "before, largest", "after, phases", "after, largest"), rows, strict=True
        ):
            sizes = sorted(abs(error) for error in row)
            print(
                f"{part} | {which} | {what} | {len(row)} | median {100 * sizes[len(sizes) // 2]:.1f} % | "
                f"worst {100 * sizes[-1]:.1f} % | least {100 * min(row):+.1f} % | "
                f"beyond 10 %: {sum(s > 0.1 for s in sizes)}"
            )
        print(f"{part} | {which} | planning {seconds[which]:.2f} s")


def main(arguments: list[str]) -> None:
    what, part, smollm2, work, file = arguments[0], arguments[1], *map(Path, arguments[2:5])
    work.mkdir(parents=True, exist_ok=True)
    if what == "measure":
        measure(part, smollm2.resolve(), work, file)
    else:
        compare(part, smollm2.resolve(), work, file, verbose="--verbose" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
