import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu

from mlx_ppo.compute.cpu import activations
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.compute.needs import Work, is_traced, outside, tracing
from mlx_ppo.memory.simulator.graph import Graph
from mlx_ppo.memory.simulator.replay import replay
from mlx_ppo.memory.simulator.trace import trace
from mlx_ppo.memory.weightless import weightless

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def names(graph: Graph) -> list[str]:
    return [operation.name for operation in graph.operations]


def test_shapes_types_and_links() -> None:
    graph = trace(lambda a, b: (a @ b).astype(mx.bfloat16), mx.zeros((3, 5)), mx.zeros((5, 7)))
    product, cast = graph.operations
    assert (product.name, cast.name) == ("Matmul", "AsType")
    assert product.inputs == graph.inputs and cast.inputs == product.outputs and graph.outputs == cast.outputs
    assert [tensor.shape for tensor in (*graph.inputs, *graph.outputs)] == [(3, 5), (5, 7), (3, 7)]
    assert graph.outputs[0].dtype == mx.bfloat16 and graph.outputs[0].nbytes == 42
    assert product.outputs[0].operation is product


def test_nested_arguments_and_results_keep_dotted_names() -> None:
    weights = {"block.0.a": mx.zeros(3), "block.0.b": [mx.zeros(4), mx.zeros(4)]}

    def function(x: mx.array, given: dict[str, Any]) -> dict[str, Any]:
        assert given.keys() == weights.keys()
        first, second = given["block.0.b"]
        return {"sum.x": x + given["block.0.a"], "rest": [first * second]}

    graph = trace(function, mx.zeros(3), weights)
    assert [[tensor.shape for tensor in argument] for argument in graph.arguments] == [[(3,)], [(3,), (4,), (4,)]]
    assert sorted(tensor.shape for tensor in graph.outputs) == [(3,), (4,)]


def test_evaluated_captures_are_constants() -> None:
    captured = mx.ones((2, 3))
    mx.eval(captured)
    assert [tensor.shape for tensor in trace(lambda x: x * captured, mx.zeros((2, 3))).constants] == [(2, 3)]


def test_nothing_is_computed() -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    graph = trace(lambda a: mx.exp(a @ a.T), mx.zeros((1 << 20, 4096)))
    assert graph.outputs[0].nbytes == 1 << 42
    assert mx.get_active_memory() - before < 64 and mx.get_peak_memory() - before < 4096


def test_an_8b_model_takes_no_memory_and_little_time() -> None:
    before = mx.get_active_memory()
    model = weightless(llama.Model(llama.ModelArgs.from_dict(LLAMA_8B)))
    started = time.perf_counter()
    graph = trace(model, mx.zeros((4, 1024), mx.int32))
    peak = replay(graph)
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine
    assert mx.get_active_memory() - before < 1 << 16
    assert sum(tensor.nbytes for tensor in graph.constants) == pytest.approx(4 * 8.03e9, rel=0.01)
    assert peak.output == 4 * 4096 * 128256 and peak.transient >= peak.output


@pytest.mark.parametrize("function", [swiglu, nn.silu, nn.gelu_approx, nn.gelu])
def test_compiled_activations_are_one_operation(function: Any) -> None:
    count = 2 if function is swiglu else 1
    arrays = [mx.zeros((4, 6))] * count
    assert names(trace(lambda *x: function(*(mx.sin(v) for v in x)), *arrays)) == ["Sin"] * count + ["Compiled"]


def test_in_a_gradient_what_lies_between_is_kept() -> None:
    found = names(trace(mx.grad(lambda a, b: swiglu(mx.sin(a), b).sum()), mx.zeros((4, 6)), mx.zeros((4, 6))))
    assert "Compiled" not in found and "Sigmoid" in found


def test_compiling_is_left_as_it_was() -> None:
    def runs_twice() -> bool:
        runs: list[int] = []
        compiled = mx.compile(lambda x: (runs.append(1), x + 1)[1])
        compiled(mx.zeros(2)), compiled(mx.zeros(2))
        return len(runs) == 2

    trace(nn.silu, mx.zeros(3))
    assert not runs_twice()
    mx.disable_compile()
    try:
        trace(nn.silu, mx.zeros(3))
        assert runs_twice()
    finally:
        mx.enable_compile()


def test_reading_values_is_refused_and_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="eval an array"):
        trace(lambda a: a + float(np.asarray(a).sum()), mx.zeros(3))
    assert not is_traced()
    with pytest.raises(RuntimeError, match="tracing"):
        outside(mx.zeros(2), [], Work(0, 0))


def test_vocabulary_statistics_pause_where_numpy_works() -> None:
    tokens = mx.array([1, 2, 3])
    mx.eval(tokens)

    def loss(logits: mx.array) -> mx.array:
        logprobs, entropies = vocabulary_statistics(logits, tokens, temperature=0.5)
        return (logprobs * logprobs - entropies).sum()

    (pause,) = trace(loss, mx.zeros((3, 50))).pauses
    assert [tensor.shape for tensor in pause.reads] == [(3, 50), (3,), ()]
    assert pause.gradients == () and pause.work == (3 * 600, 4 * 600)
    (pause,) = trace(mx.value_and_grad(loss), mx.zeros((3, 50))).pauses
    assert [operation.outputs[0].shape for operation in pause.gradients] == [(3, 50)]


def test_stand_ins_have_the_shapes_of_the_real_functions() -> None:
    logits, tokens = mx.zeros((3, 50)), mx.zeros(3, mx.int32)

    def shapes() -> list[tuple[tuple[int, ...], mx.Dtype]]:
        found = (*vocabulary_statistics(logits, tokens, temperature=0.5), activations.swiglu(logits, logits))
        return [(array.shape, array.dtype) for array in found]

    real = shapes()
    with tracing() as marks:
        assert shapes() == real and len(marks) == 2
