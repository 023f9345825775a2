"""The roles of a run without their weights: shapes and types alone, for a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.compute.adapted import parameters_of
from mlx_ppo.compute.choose import chosen_engine
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.portable import DTYPES
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.memory.weightless import shapes_of_call, weightless
from mlx_ppo.models.adapters import Weights, new_adapters
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.heads import (
    RewardFacts,
    RewardModel,
    check_classifier,
    check_lies_on,
    is_classifier,
    load_members,
    new_head,
    read_reward_facts,
)
from mlx_ppo.models.load import compute_dtype, computing_with, empty_model, is_quantised, unquantised
from mlx_ppo.models.parts import placeholder
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.models.trunk import Trunk


class _NoTokenizer:
    """Stands for a tokenizer of some size."""

    eos_id = 0
    eos_ids = frozenset({0})
    has_chat_template = False

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Nothing: texts aren't read."""
        return []

    def decode(self, tokens: Sequence[int]) -> str:
        """Nothing."""
        return ""

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Nothing."""
        return []


def weightless_trunk(config: dict[str, Any], name: str, *, dtype: str, compact: bool = False) -> Trunk:
    """A trunk of a model's config.json whose weights take no memory.

    Args:
        config: the content of config.json.
        name: for messages.
        dtype: as in `load_trunk`.
        compact: as in `load_trunk`.
    Raises:
        ModelError: mlx-lm doesn't know the architecture, or the config is incomplete or can't be computed with.
    """
    engine = chosen_engine()
    model = empty_model(config, name)
    if is_quantised(config) and engine.unpacks(dtype) and not compact:
        model = empty_model(unquantised(config), name)
    elif is_quantised(config):
        model, _ = engine.unpacked(model, dtype, compact=True)
    stored = DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")), mx.float32)
    model.set_dtype(stored)
    model.set_dtype(compute_dtype(engine, dtype, parameters_of(model), model))
    with threads.choosing(threads.current()):  # nothing is computed with it
        engine.prepare(model)
    tokenizer: Tokenizer = _NoTokenizer(1000)
    with computing_with(name):
        trunk = Trunk(weightless(model), tokenizer, name, engine, checked=False)
        shapes_of_call(trunk.hidden, mx.zeros((1, 2), mx.int32))
    return trunk


def weightless_roles(
    config: TrainConfig, model_config: dict[str, Any] | None, *, compact: bool = False
) -> tuple[Roles, Weights, Weights | None]:
    """The roles of a configuration, in memory of next to nothing.

    Args:
        config: the run's.
        model_config: the content of another config.json for the policy, None for the one in its folder.
        compact: quantised models stay so on a CPU.
    Raises:
        ModelError: a folder is damaged or its reward.json is not understood.
    """

    def trunk(path: Path, *, dtype: str = "auto", **_: Any) -> Trunk:
        given = model_config if model_config is not None and path == config.model.path else config_of(path)
        return weightless_trunk(given, str(path), dtype=dtype, compact=compact)

    def reward(path: Path, shared: Trunk | None, *, dtype: str = "auto") -> RewardModel:
        assert shared is not None
        everywhere = config.lora.model_copy(update={"targets": ()})
        adapters = new_adapters(shared.adapted, everywhere, key="reward", seed=0)
        if not path.exists():  # not trained yet: what `mlx-ppo reward` makes with the same [lora]
            facts = RewardFacts("adapters", "last", 0.0, 1.0)
            return RewardModel(shared, adapters.holding({**adapters.arrays, **new_head(shared.width)}), facts)
        if is_classifier(path):
            check_classifier(path)
            facts = RewardFacts("folder", "last", 0.0, 1.0)
        else:
            facts = read_reward_facts(path)
        if facts.placement == "adapters":
            members = [adapters.holding({**adapters.arrays, **new_head(shared.width)})] * facts.members
            if model_config is None:
                check_lies_on(path, shared)
                members = load_members(path, shared, facts)
            return RewardModel(shared, members[0], facts, members[1:])
        own = trunk(path, dtype=dtype)
        head = new_head(own.width)
        others = [Weights({**own.base, **head})] * (facts.members - 1)  # whole models: only their sizes count
        return RewardModel(own, Weights(head), facts, others)

    def function(*_: object) -> None:
        return None

    roles, policy, critic = load_roles(config, Loading(trunk, reward, function))
    return roles, _empty(policy), None if critic is None else _empty(critic)


def _empty(weights: Weights) -> Weights:
    return weights.holding({name: placeholder(array) for name, array in weights.arrays.items()})


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of a model folder whose files are whole.

    Raises:
        ModelError: what is wrong with the folder.
    """
    return check_model_folder(path).config


def loading(trunk: Trunk) -> int:
    """What loading needs beyond the weights: a tensor as it is stored, cast, and looked at for NaN (three masks)."""
    there = most = 0
    for array in trunk.base.values():
        most = max(most, there + 2 * array.nbytes + 3 * array.size)
        there += array.nbytes
    return most - there


def reading(trunk: Trunk) -> int:
    """The largest tensor as it is stored and as it is cast."""
    return 2 * max(array.nbytes for array in trunk.base.values())
