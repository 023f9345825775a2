"""What the portable engine does with mixtures of experts, recurrent layers, quantised blocks and half precision."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute import probes
from mlx_ppo.compute.choose import using
from mlx_ppo.compute.portable import PortableEngine, read_rows
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

Models = Callable[..., Path]
MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
HYBRID: dict[str, Any] = {
    **MIXTURE,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}
PROMPTS, RESPONSES = [[5, 6, 7], [3, 4, 9, 2]], [[20, 21, 22], [23]]


@pytest.fixture(autouse=True)
def portable() -> Iterator[PortableEngine]:
    engine = PortableEngine()
    with using(engine):
        yield engine


def gradients_of(trunk: Trunk, weights: Weights) -> dict[str, mx.array]:
    sequences = make_sequences(PROMPTS, RESPONSES)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(weights.holding(arrays)):
            return mx.square(trunk.response_states(sequences, learning=True)).sum()

    found = mx.grad(loss)(dict(weights.arrays))
    mx.eval(found)
    return found


def test_experts_and_their_router_get_no_adapters_and_that_is_said(
    make_model: Models, make_adapters: Callable[..., Weights]
) -> None:
    trunk = load_trunk(make_model("qwen3_moe", **MIXTURE))
    assert {name.rpartition(".")[2] for name in trunk.adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("not on experts and their router" in remark for remark in trunk.remarks)
    assert any("q_proj" in remark for remark in trunk.remarks)
    gradients = gradients_of(trunk, make_adapters(trunk))
    assert all(np.isfinite(np.array(array)).all() and np.array(array).any() for array in gradients.values())
    assert not any("experts" in remark for remark in load_trunk(make_model()).remarks)


def test_a_recurrent_layer_learns_with_operations_that_have_a_gradient(
    make_model: Models, make_adapters: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal mlx-lm takes a kernel without one unless the model is in training, as it is for whole rows alone."""
    from mlx_lm.models import qwen3_next

    kernels: list[bool] = []
    real = qwen3_next.gated_delta_update

    def noted(*given: Any, use_kernel: bool, **named: Any) -> Any:
        kernels.append(use_kernel)
        return real(*given, use_kernel=use_kernel, **named)

    monkeypatch.setattr(qwen3_next, "gated_delta_update", noted)
    trunk = load_trunk(make_model("qwen3_next", **HYBRID))
    weights = make_adapters(trunk)
    tokens = mx.array([[1, 2, 3]])
    kernels.clear()
    trunk.hidden(tokens)
    assert kernels and all(kernels)
    kernels.clear()
    gradients = gradients_of(trunk, weights)
    assert kernels and not any(kernels) and not trunk.model.training
    with trunk.using(weights):
        trunk.response_states(make_sequences(PROMPTS, RESPONSES))
    assert not any(kernels)
    kernels.clear()
    with trunk.checkpointing():
        saved = gradients_of(trunk, weights)
    assert kernels and not any(kernels)
    size = max(mx.abs(array).max().item() for array in gradients.values())
    for name, array in gradients.items():
        np.testing.assert_allclose(np.array(saved[name]), np.array(array), atol=1e-4 * size, err_msg=name)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_block_without_adapters_can_be_checkpointed(
    make_model: Models, quantised: Callable[..., Path], make_adapters: Callable[..., Weights], layers: int, dtype: str
) -> None:
    trunk = load_trunk(quantised(make_model()), dtype=dtype)
    weights = make_adapters(trunk, layers=layers)
    wanted = gradients_of(trunk, weights)
    with trunk.checkpointing():
        found = gradients_of(trunk, weights)
    assert wanted.keys() == found.keys()
    size = max(mx.abs(array).max().item() for array in wanted.values())
    for name, array in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(array), atol=0.02 * size, err_msg=name)


def test_random_weights_for_a_quantised_folder(make_model: Models, quantised: Callable[..., Path]) -> None:
    trunk = load_trunk(quantised(make_model()), random_seed=1)
    assert {array.dtype for array in trunk.base.values()} == {mx.float32}
    assert np.isfinite(np.array(trunk.hidden(mx.array([[1, 2]])))).all()


def test_types_of_auto(make_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in float32, large ones in bfloat16, whatever half precision they are stored in; and it is said."""
    folder = make_model()
    assert load_trunk(folder).base["model.norm.weight"].dtype == mx.float32
    monkeypatch.setattr("mlx_ppo.compute.portable._SMALL", 0)
    trunk = load_trunk(folder)
    assert trunk.base["model.norm.weight"].dtype == mx.bfloat16
    assert any("computed in bfloat16, stored in float32" in remark for remark in trunk.remarks)
    assert load_trunk(folder, dtype="float16").base["model.norm.weight"].dtype == mx.float16


def test_a_gemma_is_never_computed_in_float16(make_model: Models) -> None:
    with pytest.raises(ModelError, match="leave float16's range"):
        load_trunk(make_model("gemma2"), dtype="float16")


def probing(trunk: Trunk) -> tuple[Callable[[], object], ...]:
    """All that is tried as a model is loaded."""
    return (
        lambda: probes.reads_batches(trunk),
        lambda: probes.joins(trunk),
        lambda: probes.shares_prompts(trunk, lambda rows: read_rows(trunk, rows)),
        lambda: probes.starts_from_kept(trunk),
    )


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ("reads_batches", "rollouts decode one row at a time"),
        ("joins", "places of responses that end stay empty"),
        ("shares_prompts", "prompts that several responses have are read once for each of them"),
    ],
)
def test_what_falls_back_says_so_in_a_line(
    make_model: Models, monkeypatch: pytest.MonkeyPatch, probe: str, said: str
) -> None:
    monkeypatch.setattr(f"mlx_ppo.compute.portable.{probe}", lambda *_: False)
    assert sum(remark.startswith(said) for remark in load_trunk(make_model()).remarks) == 1


@pytest.mark.parametrize(("dtype", "noise"), [(mx.float32, 0.005), (mx.float16, 0.02), (mx.bfloat16, 0.05)])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_states_are_alike_but_for_their_types_rounding(dtype: mx.Dtype, noise: float, size: float) -> None:
    """However large they are: an absolute bound took bfloat16's rounding (0.49 of states of 10) for another result."""
    wanted, other = (size * mx.random.normal((3, 64), key=mx.random.key(number)) for number in range(2))
    assert probes.alike((wanted + noise * other).astype(dtype), wanted.astype(dtype))
    assert not probes.alike(other.astype(dtype), wanted.astype(dtype))
    one_row = mx.where(mx.arange(3)[:, None] == 1, other, wanted)
    assert not probes.alike(one_row.astype(dtype), wanted.astype(dtype)), "one of several rows is enough"
    assert not probes.alike((wanted + 5 * noise * other).astype(dtype), wanted.astype(dtype))


def test_what_is_tried_are_tokens_from_all_over_the_vocabulary(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones are special in most models, which bfloat16 rounds so coarsely that batches seem impossible."""
    read: list[mx.array] = []
    hidden = type(trunk).hidden

    def reading(trunk: Trunk, tokens: mx.array, *given: Any, **named: Any) -> mx.array:
        read.append(tokens)
        return hidden(trunk, tokens, *given, **named)

    monkeypatch.setattr(type(trunk), "hidden", reading)
    for probe in probing(trunk):
        read.clear()
        assert probe()
        tokens = {int(token) for array in read for token in np.array(array).ravel()} - {0}  # 0: padding
        assert min(tokens) >= trunk.vocab_size // 6 and max(tokens) >= trunk.vocab_size // 2


def test_a_devices_error_is_no_answer_of_a_model(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    monkeypatch.setattr(type(trunk), "hidden", failing)
    for probe in probing(trunk):
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            probe()
