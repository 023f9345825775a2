"""`export`: load a run's policy, write it in the wanted form beside its place, check it, move it there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.choose import exactly
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError, ModelError
from mlx_ppo.exporting.check import Floats, policy_logits, within
from mlx_ppo.exporting.fuse import fused_arrays, stored_dtype, write_fused
from mlx_ppo.exporting.gguf_writer import gguf_content, read_back, write_gguf
from mlx_ppo.exporting.modelfile import modelfile
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import ModelFolder, check_model_folder
from mlx_ppo.models.gate import misread
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.peft import fill_with_peft, given_adapters
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import fill_with_adapters, new_parents, write_folder
from mlx_ppo.runs.targets import load_target
from mlx_ppo.stages.rollout import distribution_of

FUSED_DTYPES = ("float32", "float16", "bfloat16")
GGUF_DTYPES = ("f16", "q8_0")


@dataclass(frozen=True)
class Policy:
    """What is exported, and what it has to compute."""

    trunk: Trunk  # float32
    weights: Weights
    source: ModelFolder  # the trunk's
    drawn: Distribution  # what the run's samples are drawn from
    logits: list[Floats]  # of a few prompts


def export(run: Path, target: Path, *, form: str, dtype: str | None, bits: int | None) -> str:
    """Export a run, or one checkpoint of it, into a new folder.

    Args:
        run: a run of `train`, `sft` or `dpo`, or a folder in its `checkpoints`.
        target: the folder to make; it appears complete and checked, or not at all.
        form: "adapters", "peft", "fused" or "gguf".
        dtype: type to store, one of `FUSED_DTYPES` or `GGUF_DTYPES`; None: the source's own, or "f16".
        bits: quantise a fused model to 4 or 8 bits.
    Returns:
        One line: what was written, and how far it is from the policy.
    Raises:
        ConfigError: the options don't go together, or the target is already there.
        ModelError: the model can't be exported in this form.
        RunError: it cannot be written, or differs from the policy when read back.
    """
    _check_options(form, dtype, bits)
    if os.path.lexists(target):
        raise ConfigError(f"{target}: already there; name a new folder")
    with exactly(), new_parents(target):
        policy = _load(run)
        if form == "adapters":
            return _adapters(policy, target)
        if form == "peft":
            return _peft(policy, target)
        if form == "fused":
            return _fused(policy, target, dtype or stored_dtype(policy.source), bits)
        return _gguf(policy, target, dtype or "f16")


def _check_options(form: str, dtype: str | None, bits: int | None) -> None:
    known = {"adapters": (), "peft": (), "fused": FUSED_DTYPES, "gguf": GGUF_DTYPES}[form]
    if dtype is not None and dtype not in known:
        mend = f"choose from {', '.join(known)}" if known else "adapters keep float32; leave it out"
        raise ConfigError(f"--dtype: {form} has no type {dtype!r}; {mend}")
    if bits is not None and form != "fused":
        raise ConfigError("--quantize: only with --format fused" + ("; use --dtype q8_0" if form == "gguf" else ""))


def _load(run: Path) -> Policy:
    target = load_target(run)
    if target.config is None:
        raise ConfigError(f"{run}: not a run of `train`, `sft` or `dpo`, nor a checkpoint of one")
    trunk, weights = target.trunk, target.weights
    if any(array.dtype != mx.float32 for array in trunk.base.values()):
        trunk = load_trunk(Path(trunk.name), dtype="float32")
    drawn = distribution_of(target.config.rollout) if isinstance(target.config, TrainConfig) else Distribution()
    source = check_model_folder(Path(trunk.name))
    return Policy(trunk, weights, source, drawn, policy_logits(trunk, weights))


def _adapters(policy: Policy, target: Path) -> str:
    if names := misread(policy.source):
        raise ModelError(
            f"{policy.source.path}: stock mlx-lm misreads this folder ({', '.join(names)}), so adapters alone would "
            "give other numbers there; use --format fused"
        )

    return _low_rank(
        policy, target, "adapters", lambda folder: fill_with_adapters(folder, policy.weights, policy.trunk.blocks)
    )


def _peft(policy: Policy, target: Path) -> str:
    source = policy.source

    def fill(folder: Path) -> None:
        fill_with_peft(folder, policy.weights, source.tensors, base=source.path.name)

    return _low_rank(policy, target, "peft", fill)


def _low_rank(policy: Policy, target: Path, form: str, fill: Callable[[Path], None]) -> str:
    trunk = policy.trunk
    count = sum(name.endswith(".lora_a") for name in policy.weights.arrays)
    if not count:
        raise ConfigError(f"--format {form}: this run trained all weights, not adapters; use --format fused")

    def check(folder: Path) -> str:
        found = policy_logits(trunk, given_adapters(folder, trunk.adapted))
        return str(within(policy.logits, found, "float32"))

    measured = _checked(target, fill, check)
    return f"{target}: {count} adapters for {trunk.name}; {measured}"


def _fused(policy: Policy, target: Path, dtype: str, bits: int | None) -> str:
    arrays = fused_arrays(policy.trunk, policy.weights)

    def check(folder: Path) -> str:
        trunk = load_trunk(folder, dtype="float32")
        stored = dtype if bits is None else f"{bits} bits"
        return str(within(policy.logits, policy_logits(trunk, Weights({})), stored))

    def fill(folder: Path) -> None:
        write_fused(folder, policy.source, arrays, dtype=dtype, bits=bits)

    measured = _checked(target, fill, check)
    kind = dtype if bits is None else f"{bits} bits a weight, the rest {dtype}"
    return f"{target}: a fused model, {kind}, {_size(target)}; {measured}"


def _gguf(policy: Policy, target: Path, dtype: str) -> str:
    name = f"{target.name.removesuffix('.gguf')}.gguf"
    arrays = fused_arrays(policy.trunk, policy.weights)
    content = gguf_content(policy.source, policy.trunk.tokenizer, arrays, name=target.name, dtype=dtype)

    def fill(folder: Path) -> None:
        write_gguf(folder / name, content)
        how = policy.drawn._asdict()
        temperature = how.pop("temperature")
        bounds = how if policy.drawn.truncates else None
        text = modelfile(name, policy.trunk.tokenizer, temperature=temperature, bounds=bounds)
        (folder / "Modelfile").write_text(text, "utf-8")

    def check(folder: Path) -> str:
        found, error = read_back(folder / name, content)
        logits = policy_logits(policy.trunk, Weights(found))
        measured = within(policy.logits, logits, {"f16": "float16"}.get(dtype, dtype))
        return f"tensors differ by at most {error:.2g}, {measured}"

    measured = _checked(target, fill, check)
    return f"{target / name}: {len(content.tensors)} tensors, {dtype}, {_size(target)}; {measured}"


def _checked(target: Path, fill: Callable[[Path], object], check: Callable[[Path], str]) -> str:
    """Write, check, then rename; what the check says."""
    said = ""

    def both(folder: Path) -> None:
        nonlocal said
        fill(folder)
        said = check(folder)

    write_folder(target, both)
    return said


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"
