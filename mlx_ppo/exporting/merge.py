"""`merge`: adapters into the weights of their model, as a folder from which everything else can start."""

import os
from pathlib import Path

import mlx.core as mx

from mlx_ppo.compute.choose import exactly
from mlx_ppo.errors import ConfigError
from mlx_ppo.exporting.check import difference, policy_logits, within
from mlx_ppo.exporting.fuse import stored_dtype, write_fused
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import is_quantised, load_trunk
from mlx_ppo.models.merging import merged_arrays
from mlx_ppo.models.write import new_parents, write_folder


def merge(model: Path, adapter: Path, target: Path, *, dtype: str | None) -> str:
    """Write a model folder with adapters merged into its weights.

    Args:
        model: the folder that they were trained on; quantised layers are dequantised, and stay so.
        adapter: mlx-lm's or PEFT's, LoRA or DoRA, on linear layers, embeddings or experts; or whole weights.
        target: the folder to make; it appears complete and checked, or not at all.
        dtype: type to store; None: the model's own.
    Returns:
        One line: what was written, and how far the adapters moved the logits.
    Raises:
        ConfigError: the target is already there.
        ModelError: the adapters can't be merged exactly into this model.
        RunError: it cannot be written, or differs from what was merged when read back.
    """
    if os.path.lexists(target):
        raise ConfigError(f"{target}: already there; name a new folder")
    adapter = Path(os.path.realpath(adapter))
    with exactly(), new_parents(target):
        source = check_model_folder(Path(os.path.realpath(model)))
        stored = dtype or stored_dtype(source)
        trunk = load_trunk(source.path, dtype="float32")
        arrays = merged_arrays(adapter, trunk)
        mx.eval(arrays)
        before, wanted = policy_logits(trunk, Weights({})), policy_logits(trunk, Weights(arrays))
        said = ""

        def both(folder: Path) -> None:
            nonlocal said
            write_fused(folder, source, arrays, dtype=stored, bits=None)
            said = str(within(wanted, policy_logits(load_trunk(folder, dtype="float32"), Weights({})), stored))

        write_folder(target, both)
    moved = difference(before, wanted)
    changed = sum(array is not trunk.base[name] for name, array in arrays.items())
    note = "; the model was quantised, this isn't" if is_quantised(source.config) else ""
    return (
        f"{target}: {adapter.name} merged into {changed} weights of {source.path.name}, {stored}{note}; they move "
        f"the logits by up to {moved.largest:.2g} ({moved.relative:.2%} of their deviation); read back, {said}"
    )
