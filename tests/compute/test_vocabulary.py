import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.logprobs import entropy, token_logprobs
from mlx_ppo.compute.cpu import vocabulary
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics

N, V = 6, 11


@pytest.fixture(autouse=True, params=[4, 100])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_PIECE", request.param * V)


def case(kind: str) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(N, V)).astype(np.float32) * {"wide": 60.0, "flat": 0.0}.get(kind, 2.0)
    tokens = generator.integers(0, V, N).astype(np.int32)
    if kind == "excluded":
        logits[generator.random((N, V)) < 0.4] = -np.inf
        logits[np.arange(N), tokens] = 1.5
        logits[0] = -np.inf
        logits[0, tokens[0]] = 3.0
    if kind == "offset":
        logits += 1000.0
    return logits, tokens


def exact(logits: np.ndarray, tokens: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, entropies and the distribution, in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    masses = np.exp(scaled)
    log_p = scaled - np.log(masses.sum(axis=-1, keepdims=True))
    p = np.exp(log_p)
    return log_p[np.arange(N), tokens], -np.where(p > 0, p * np.where(p > 0, log_p, 0), 0).sum(axis=-1), p


KINDS = ["plain", "wide", "flat", "excluded", "offset"]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, temperature: float) -> None:
    logits, tokens = case(kind)
    logprobs, entropies = vocabulary_statistics(mx.array(logits), mx.array(tokens), temperature=temperature)
    assert logprobs.dtype == entropies.dtype == mx.float32
    expected = exact(logits, tokens, temperature)
    np.testing.assert_allclose(np.array(logprobs), expected[0], rtol=1e-5, atol=2e-4 if kind == "offset" else 2e-6)
    np.testing.assert_allclose(np.array(entropies), expected[1], rtol=1e-5, atol=2e-4 if kind == "offset" else 2e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, temperature: float, weights: tuple[float, float]) -> None:
    """Against float64 formulas, and against what mlx derives from the plain functions."""
    values, labels = case(kind)
    logits, tokens = mx.array(values), mx.array(labels)
    scale = mx.linspace(0.5, 2.0, N)

    def fast(logits: mx.array) -> mx.array:
        logprobs, entropies = vocabulary_statistics(logits, tokens, temperature=temperature)
        return (scale * (weights[0] * logprobs + weights[1] * entropies)).sum()

    def plain(logits: mx.array) -> mx.array:
        logprobs = token_logprobs(logits[None], tokens[None], temperature=temperature)[0]
        return (scale * (weights[0] * logprobs + weights[1] * entropy(logits[None], temperature=temperature)[0])).sum()

    gradient = np.array(mx.grad(fast)(logits))
    _, entropies, p = exact(values, labels, temperature)
    with np.errstate(divide="ignore"):
        surprise = np.where(p > 0, np.log(p), 0.0)
    by_entropy = -p * (surprise + entropies[:, None])
    expected = np.array(scale)[:, None] * (weights[0] * (np.eye(V)[labels] - p) + weights[1] * by_entropy) / temperature
    tolerance = 3e-4 if kind == "offset" else 3e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=tolerance)
    if kind != "excluded" or weights[1] == 0:
        np.testing.assert_allclose(gradient, np.array(mx.grad(plain)(logits)), rtol=1e-4, atol=tolerance)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_computed_in_float32(dtype: mx.Dtype) -> None:
    values, labels = case("plain")
    logits = mx.array(values).astype(dtype)
    logprobs, entropies = vocabulary_statistics(logits, mx.array(labels), temperature=1.0)
    expected = exact(np.array(logits.astype(mx.float32)), labels, 1.0)
    np.testing.assert_allclose(np.array(logprobs), expected[0], atol=2e-6)
    np.testing.assert_allclose(np.array(entropies), expected[1], atol=2e-6)
    gradient = mx.grad(lambda x: vocabulary_statistics(x, mx.array(labels), temperature=1.0)[0].sum())(logits)
    assert gradient.dtype == dtype


def test_nan_stays_in_its_row() -> None:
    values, labels = case("plain")
    values[2, 4] = np.nan
    logprobs, entropies = vocabulary_statistics(mx.array(values), mx.array(labels), temperature=1.0)
    assert np.isnan(np.array(logprobs)).tolist() == np.isnan(np.array(entropies)).tolist() == [i == 2 for i in range(N)]
