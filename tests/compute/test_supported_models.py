"""The lists of mlx-lm's parts that numpy computes, held to mlx-lm's code as it is installed."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from tiny_models import COMMON, KINDS

from mlx_ppo.compute.choose import using
from mlx_ppo.compute.cpu.activations import _GATED, GatedMLP, use_fast_gates
from mlx_ppo.compute.cpu.common_blocks import _SUPPORTED
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.models.load import load_trunk

# What the code of each part reads, by name.
OF_GATED = {"down_proj", "swiglu", "gate_proj", "up_proj"}
OF_BLOCK = {"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"}
OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "n_heads", "n_kv_heads", "scale", "rope", "offset", "reshape"}
OF_ATTENTION |= {"scaled_dot_product_attention", "shape", "transpose", "update_and_fetch"}
HEAD_NORMS = {"q_norm", "k_norm"}

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
HEADS: dict[str, Any] = {"head_dim": 8, "tie_word_embeddings": False}
NEEDED: dict[str, dict[str, Any]] = {  # beside what all tiny models have
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"routed_scaling_factor": 1.0},
    "ernie4_5": {**HEADS, "use_bias": False},
    "ernie4_5_moe": {"use_bias": False, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
    | {"moe_layer_start_index": 1, "tie_word_embeddings": True},
    "gemma": HEADS,
    "helium": {**HEADS, "attention_bias": False, "mlp_bias": False},
    "mellum": {**EXPERTS, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
    | {"rope_parameters": {kind: {"rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}},
    "mimo": {"num_nextn_predict_layers": 0},
    "nanbeige": HEADS,
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "seed_oss": {**HEADS, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "starcoder2": {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
}


@cache
def names_by_part() -> dict[str, set[str]]:
    """What the code of each of mlx-lm's modules reads, by `file.Class`."""
    found: dict[str, set[str]] = {}
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            file = importlib.import_module(f"mlx_lm.models.{info.name}")
        except (ImportError, SystemExit):  # one that needs another package, and ends the process where it isn't there
            continue
        for kind in vars(file).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == file.__name__:
                code = getattr(kind.__call__, "__code__", None)
                found[f"{info.name}.{kind.__name__}"] = set(code.co_names) if code else set()
    assert len(found) > 200, "mlx-lm's modules weren't found"
    return found


def part(name: str) -> Any:
    file, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"mlx_lm.models.{file}"), kind)


def test_gated_parts_are_all_that_mlx_lm_has() -> None:
    assert {name for name, read in names_by_part().items() if read == OF_GATED} == _GATED


@pytest.mark.parametrize("name", sorted(_GATED))
def test_a_gated_part_computes_the_formula(name: str) -> None:
    draw = np.random.default_rng(0)
    gate, up, down = (draw.normal(size=shape) for shape in ((6, 4), (6, 4), (4, 6)))
    x = draw.normal(size=(2, 3, 4))
    projections = {f"{what}_proj": by(matrix) for what, matrix in (("gate", gate), ("up", up), ("down", down))}
    found = part(name).__call__(SimpleNamespace(**projections), mx.array(x, mx.float32))
    inside = x @ gate.T
    wanted = (inside / (1 + np.exp(-inside)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-4, atol=1e-5)


def by(matrix: np.ndarray) -> Callable[[mx.array], mx.array]:
    return lambda x: x @ mx.array(matrix, mx.float32).T


def candidates() -> Iterator[str]:
    """Files of mlx-lm that have a block and an attention which read just what Llama's do."""
    read = names_by_part()
    files = {name.partition(".")[0] for name in read}
    for file in sorted(files):
        own = [names for name, names in read.items() if name.startswith(f"{file}.")]
        if OF_BLOCK in own and any(names - HEAD_NORMS == OF_ATTENTION for names in own):
            yield file


def is_common(block: Any) -> bool:
    """Whether a block is gated, has RMS norms, and rotates the halves of a head and not its neighbours."""
    attention = block.self_attn
    norms = [block.input_layernorm, block.post_attention_layernorm, attention.get("q_norm"), attention.get("k_norm")]
    return (
        type(block.mlp) is GatedMLP
        and all(norm is None or type(norm) is nn.RMSNorm for norm in norms)
        and not getattr(attention.rope, "traditional", False)
    )


def test_supported_blocks_are_all_that_mlx_lm_has() -> None:
    found = set()
    for file in candidates():
        module = importlib.import_module(f"mlx_lm.models.{file}")
        config = {"model_type": file, **COMMON, **KINDS.get(file, {}), **NEEDED.get(file, {})}
        model = module.Model(module.ModelArgs.from_dict(config))
        use_fast_gates(model)
        if all(map(is_common, model.layers)):
            kinds = [(type(block), type(block.self_attn)) for block in model.layers]
            found |= {tuple(f"{file}.{kind.__name__}" for kind in pair) for pair in kinds}
    assert found == set(_SUPPORTED.items())


@pytest.mark.parametrize("block", sorted(_SUPPORTED))
def test_supported_models_are_computed_by_the_kernels(block: str, make_model: Callable[..., Path]) -> None:
    """Which are tried against the model's own numbers as it is loaded."""
    file = block.partition(".")[0]
    with using(CpuEngine()):
        trunk = load_trunk(make_model(file, **NEEDED.get(file, {})))
    assert (trunk.capabilities.rows, trunk.capabilities.steps, trunk.capabilities.remarks) == (True, True, ())
