"""Writing reward models: one, or an ensemble, as a folder that `heads.load_reward_model` reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_ppo.compute.portable import DTYPES
from mlx_ppo.models.adapters import HEAD, Weights, adapter_config
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, member_file
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import fill_with_adapters, fill_with_model


def fill_with_reward(folder: Path, trunk: Trunk, members: Sequence[Weights], facts: RewardFacts, *, dtype: str) -> None:
    """The files of a reward model, into a folder that is there.

    One model is adapters or a model, with its head beside it. Of an ensemble each member has a file with its adapters,
    or with its own weights in place of the first member's, which are the folder's model.

    Args:
        folder: where.
        trunk: what the members lie on.
        members: their weights, with their heads.
        facts: what `reward.json` says.
        dtype: type of whole models' weights.
    """
    if facts.placement == "folder":
        fill_with_model(folder, Path(trunk.name), trunk, members[0], dtype=dtype)
    elif len(members) == 1:
        fill_with_adapters(folder, members[0], trunk.blocks)
    else:
        document = json.dumps(adapter_config(members[0], trunk.blocks), indent=2)
        (folder / "adapter_config.json").write_text(document + "\n", "utf-8")
    for number, member in enumerate(members, start=1):
        arrays = _own(trunk, member, facts, dtype) if number > 1 or facts.placement == "adapters" else {}
        head = {name: array for name, array in sorted(member.arrays.items()) if name.startswith(HEAD)}
        if len(members) == 1:
            mx.save_safetensors(str(folder / HEAD_FILE), head)
        else:
            mx.save_safetensors(str(folder / member_file(number)), {**arrays, **head})
    facts.write(folder)


def _own(trunk: Trunk, member: Weights, facts: RewardFacts, dtype: str) -> dict[str, mx.array]:
    """What a member lays on the trunk."""
    if facts.placement == "adapters":
        return {name: array for name, array in sorted(member.arrays.items()) if not name.startswith(HEAD)}
    return {name: member.arrays.get(name, array).astype(DTYPES[dtype]) for name, array in trunk.base.items()}
