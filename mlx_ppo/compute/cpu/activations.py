"""The gated activation of feed-forward blocks, by numpy.

mlx's elementwise functions run on one core and unvectorised on the CPU (silu times gate: 24 ns an element), so here
numpy computes the same, with its own gradient, in pieces that stay in the processor's cache.

Source: Shazeer 2020, arXiv:2002.05202, eq. 6 (SwiGLU).
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.needs import Work, outside, planned

_PIECE = 1 << 15  # elements at once: a handful of such arrays fits a core's cache
# mlx-lm's feed-forward parts that are down(silu(gate(x)) * up(x)) and nothing else; a test holds the list to mlx-lm.
_GATED = frozenset(
    [
        "Klear.KlearMLP",
        "afm7.MLP",
        "afmoe.MLP",
        "baichuan_m1.MLP",
        "bailing_hybrid.MLP",
        "bailing_moe.BailingMoeMLP",
        "bailing_moe_linear.MLP",
        "bailing_moe_v3.BailingMLP",
        "cohere.MLP",
        "cohere2.MLP",
        "deepseek.DeepseekMLP",
        "deepseek_v2.DeepseekV2MLP",
        "deepseek_v3.DeepseekV3MLP",
        "deepseek_v32.DeepseekV32MLP",
        "dots1.Dots1MLP",
        "ernie4_5.MLP",
        "ernie4_5_moe.Ernie4_5_MLP",
        "exaone4.MLP",
        "exaone_moe.MLP",
        "falcon_h1.FalconH1MLP",
        "glm4_moe.MLP",
        "glm4_moe_lite.Glm4MoeLiteMLP",
        "granite.MLP",
        "granitemoehybrid.GraniteMoeHybridMLP",
        "helium.HeliumMLP",
        "hunyuan.MLP",
        "hunyuan_v1_dense.MLP",
        "internlm3.MLP",
        "jamba.JambaMLP",
        "kimi_linear.KimiMLP",
        "laguna.MLP",
        "lfm2_moe.MLP",
        "llama.MLP",
        "llama4.MLP",
        "llama4_text.MLP",
        "longcat_flash.LongcatFlashMLP",
        "mimo.MLP",
        "mimo_v2_flash.MLP",
        "minicpm.MLP",
        "minicpm3.MLP",
        "ministral3.MLP",
        "nanbeige.MLP",
        "olmo2.MLP",
        "olmo3.Olmo3MLP",
        "plamo.MLP",
        "qwen2.MLP",
        "qwen2_moe.MLP",
        "qwen3.MLP",
        "qwen3_moe.MLP",
        "qwen3_next.Qwen3NextMLP",
        "seed_oss.MLP",
        "stablelm.MLP",
        "telechat3.Telechat3MLP",
        "youtu_llm.YoutuLLMMLP",
    ]
)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, elementwise, for arrays of one shape."""
    if gate.dtype != mx.float32 or up.dtype != mx.float32:
        product: mx.array = nn.silu(gate) * up
        return product
    found: mx.array = _swiglu(gate, up)
    return found


class GatedMLP(nn.Module):
    """A feed-forward block `down(silu(gate(x)) * up(x))`; takes the place of an architecture's own class."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] to [..., D]."""
        down: mx.array = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return down


def use_fast_gates(model: nn.Module) -> None:
    """Give every feed-forward block that is known to compute exactly this formula the class above."""
    for module in model.modules():
        if kind_of(module) in _GATED:
            module.__class__ = GatedMLP


def kind_of(module: nn.Module) -> str:
    """A module's type as `file.Class` of mlx-lm's models; empty for one that isn't theirs."""
    kind = type(module)
    package, _, file = kind.__module__.rpartition(".")
    return f"{file}.{kind.__name__}" if package == "mlx_lm.models" else ""


def swiglu_into(gate: Floats, up: Floats, out: Floats) -> None:
    """silu(gate) * up, elementwise, for contiguous arrays of one shape."""
    _by_pieces(_forward, gate, up, out)


def swiglu_back(gate: Floats, up: Floats, given: Floats, by_gate: Floats, by_up: Floats) -> None:
    """Fill in the gradients by gate and up for a gradient by silu(gate) * up; contiguous arrays of one shape."""
    _by_pieces(_backward, gate, up, given, by_gate, by_up)


def by_rows(function: Callable[..., None], *arrays: Floats) -> None:
    """Call a function that fills some of its arguments, with a few rows at a time of all of them."""
    count = len(arrays[0])
    size = max(1, _PIECE * count // max(1, arrays[0].size))
    for start in range(0, count, size):
        function(*(array[start : start + size] for array in arrays))


def _sigmoid(values: Floats) -> Floats:
    found = np.negative(values)
    np.exp(found, out=found)
    found += 1
    return np.reciprocal(found, out=found)


def _by_pieces(function: Callable[..., None], *arrays: Floats) -> None:
    """Call a function that fills some of its arguments, with flat pieces of all of them."""
    with np.errstate(over="ignore"):  # exp(-x) of a large negative x is infinite, its reciprocal rightly 0
        by_rows(function, *(array.reshape(-1) for array in arrays))


def _forward(gate: Floats, up: Floats, out: Floats) -> None:
    np.multiply(gate, _sigmoid(gate), out=out)
    out *= up


def _backward(gate: Floats, up: Floats, cotangent: Floats, by_gate: Floats, by_up: Floats) -> None:
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    np.multiply(cotangent, silu, out=by_up)
    np.subtract(1, sigmoid, out=by_gate)
    by_gate *= silu
    by_gate += sigmoid  # silu' = sigmoid + silu * (1 - sigmoid)
    by_gate *= up
    by_gate *= cotangent


@mx.custom_function
def _swiglu_numpy(gate: mx.array, up: mx.array) -> mx.array:
    values, factors = np.asarray(gate), np.asarray(up)
    out = np.empty_like(values, order="C")
    swiglu_into(np.ascontiguousarray(values), np.ascontiguousarray(factors), out)
    return mx.array(out)


@_swiglu_numpy.vjp
def _swiglu_numpy_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    given = [np.ascontiguousarray(np.asarray(array)) for array in (*primals, cotangent)]
    by_gate, by_up = np.empty_like(given[0]), np.empty_like(given[0])
    _by_pieces(_backward, *given, by_gate, by_up)
    return mx.array(by_gate), mx.array(by_up)


def _planned(gate: mx.array, up: mx.array) -> mx.array:
    """Selecting has gradients of the same shapes. Numpy holds what it returns as well."""
    anywhere = mx.broadcast_to(mx.array(True), gate.shape)
    return mx.where(outside(anywhere, [gate, up], Work(gate.nbytes, 2 * gate.nbytes)), gate, up)


_swiglu = planned(_swiglu_numpy, _planned)
