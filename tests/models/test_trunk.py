from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

TOKENS = mx.array([[1, 286, 288, 40, 7], [1, 9, 200, 61, 299]])
Adapters = Callable[..., Weights]


def snapshot(trunk: Trunk) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(trunk.model.parameters())}


def assert_same(before: dict[str, np.ndarray], trunk: Trunk) -> None:
    now = snapshot(trunk)
    assert now.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(now[name], array, err_msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_split_logits_are_the_whole_models(make_model: Callable[..., object], kind: str) -> None:
    trunk = load_trunk(make_model(kind))
    whole = np.array(trunk.model(TOKENS))
    states = trunk.hidden(TOKENS)
    np.testing.assert_allclose(np.array(trunk.logits(states)), whole, atol=1e-5)
    flat = trunk.logits(states.reshape(-1, trunk.width))
    np.testing.assert_allclose(np.array(flat), whole.reshape(-1, whole.shape[-1]), atol=1e-5)
    np.testing.assert_array_equal(np.array(trunk.model(TOKENS)), whole, err_msg="the inner part was not put back")
    if kind == "gemma2":
        assert 1.5 < np.abs(whole).max() <= 2.0, "the soft cap must bite for this test to say anything"


def test_logits_put_the_inner_part_back_after_an_exception(trunk: Trunk) -> None:
    before = np.array(trunk.model(TOKENS))
    with pytest.raises(ValueError, match="matmul"):
        mx.eval(trunk.logits(mx.zeros((1, 2, 7))))
    np.testing.assert_array_equal(np.array(trunk.model(TOKENS)), before)


def role_of(trunk: Trunk, make_adapters: Adapters, kind: str) -> Weights:
    if kind == "lora":
        return make_adapters(trunk)
    return Weights({name: array + 0.01 for name, array in trunk.base.items()})


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("end", ["normal", "exception", "gradient", "exception in gradient"])
def test_using_leaves_nothing_behind(trunk: Trunk, make_adapters: Adapters, kind: str, end: str) -> None:
    weights, before, plain = role_of(trunk, make_adapters, kind), snapshot(trunk), np.array(trunk.model(TOKENS))
    within: list[np.ndarray] = []

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(weights.holding(arrays)):
            logits = trunk.logits(trunk.hidden(TOKENS))
            if "exception" in end:
                raise KeyError("in the middle")
            return mx.square(logits).sum()

    if "exception" in end:
        with pytest.raises(KeyError):
            (mx.value_and_grad(loss) if "gradient" in end else loss)(dict(weights.arrays))
    elif end == "gradient":
        gradients = mx.grad(loss)(dict(weights.arrays))
        assert gradients.keys() == weights.arrays.keys()
        assert all(mx.abs(gradient).max().item() > 0 for gradient in gradients.values())
    else:
        with trunk.using(weights):
            within.append(np.array(trunk.model(TOKENS)))
        assert np.abs(within[0] - plain).max() > 0.01
    assert_same(before, trunk)
    np.testing.assert_array_equal(np.array(trunk.model(TOKENS)), plain)
    with trunk.using(weights):
        pass


def test_roles_dont_nest(trunk: Trunk, make_adapters: Adapters) -> None:
    outer, inner = make_adapters(trunk, seed=1), make_adapters(trunk, seed=2)
    with trunk.using(outer):
        expected = np.array(trunk.model(TOKENS))
        with pytest.raises(RuntimeError, match="nest"), trunk.using(inner):
            pass
        np.testing.assert_array_equal(np.array(trunk.model(TOKENS)), expected, err_msg="the outer role must stay")
        with pytest.raises(RuntimeError, match="nest"), trunk.using(inner):
            pass
    with trunk.using(inner):
        assert np.abs(np.array(trunk.model(TOKENS)) - expected).max() > 1e-3


def test_unknown_weights_leave_nothing_behind(trunk: Trunk) -> None:
    some = dict(list(trunk.base.items())[:2])
    with pytest.raises(KeyError), trunk.using(Weights({**some, "no.such.weight": mx.zeros((2,))})):
        pass
    with trunk.using(Weights({})):
        pass


def test_noise_is_scoped_reproducible_and_off_at_zero(trunk: Trunk) -> None:
    plain = np.array(trunk.model(TOKENS))
    seen = []
    for share, seed in ((0.3, 1), (0.3, 1), (0.3, 2), (0.0, 1)):
        with trunk.using(Weights({})), trunk.noise(share, mx.random.key(seed)):
            seen.append(np.array(trunk.model(TOKENS)))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0] - seen[2]).max() > 0.01
    np.testing.assert_array_equal(seen[3], plain)
    np.testing.assert_array_equal(np.array(trunk.model(TOKENS)), plain)


def test_noise_keeps_the_mean_of_the_embedding(trunk: Trunk) -> None:
    layer = trunk.model.model.embed_tokens
    tokens = mx.full((1, 4000), 286)
    with trunk.noise(0.25, mx.random.key(0)):
        noisy = np.array(layer(tokens))[0]
    assert abs((noisy == 0).mean() - 0.25) < 0.01
    np.testing.assert_allclose(noisy.mean(axis=0), np.array(layer(tokens))[0, 0], atol=0.03)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_through_using_are_those_of_finite_differences(
    trunk: Trunk, make_adapters: Adapters, kind: str
) -> None:
    weights = role_of(trunk, make_adapters, kind)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(weights.holding(arrays)):
            logits = trunk.logits(trunk.hidden(TOKENS))
        return (logits[..., 3] - mx.logsumexp(logits, axis=-1)).sum()

    gradients = mx.grad(loss)(dict(weights.arrays))
    keys = mx.random.split(mx.random.key(5), len(weights.arrays))
    direction = {
        name: mx.random.normal(array.shape, key=key)
        for (name, array), key in zip(weights.arrays.items(), keys, strict=True)
    }
    step = 1e-3
    ahead, behind = (
        loss({name: array + sign * step * direction[name] for name, array in weights.arrays.items()}).item()
        for sign in (1, -1)
    )
    slope = sum((gradients[name] * direction[name]).sum().item() for name in gradients)
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=0.02, abs=0.05)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_starting_from_kept_states_is_the_whole_pass(
    make_model: Callable[..., object], make_adapters: Adapters, kind: str
) -> None:
    trunk = load_trunk(make_model(kind, num_hidden_layers=4))
    upper, top = make_adapters(trunk, layers=2), make_adapters(trunk, layers=1, seed=1)
    with trunk.using(upper):
        whole = np.array(trunk.hidden(TOKENS))
    with trunk.using(top):
        whole_top = np.array(trunk.hidden(TOKENS))
    trunk.share_below([upper, Weights({}), top])
    assert trunk.split == 2
    kept = trunk.entering(TOKENS)
    blocks = list(trunk._layers)
    for weights, wanted in ((upper, whole), (top, whole_top)):
        with trunk.using(weights):
            np.testing.assert_allclose(np.array(trunk.hidden(TOKENS, kept=kept)), wanted, atol=1e-5)
            wrong = np.array(trunk.hidden(TOKENS, kept=kept + 0.1))
            assert np.abs(wrong - wanted).max() > 1e-3, "what was kept must be what is read"
    assert all(now is before for now, before in zip(trunk._layers, blocks, strict=True))
    with trunk.using(upper):
        np.testing.assert_array_equal(np.array(trunk.hidden(TOKENS)), whole, err_msg="something was left behind")


def test_weights_below_what_is_kept_are_refused(make_model: Callable[..., object], make_adapters: Adapters) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=4))
    trunk.share_below([make_adapters(trunk, layers=2)])
    with pytest.raises(RuntimeError, match="block 1"), trunk.using(make_adapters(trunk, layers=3)):
        pass
    with pytest.raises(RuntimeError, match="block 0"), trunk.using(Weights(dict(trunk.base))):
        pass
    with trunk.using(make_adapters(trunk, layers=1)):
        pass


def test_nothing_is_kept_where_a_role_changes_every_block(trunk: Trunk, make_adapters: Adapters) -> None:
    trunk.share_below([make_adapters(trunk, layers=1), make_adapters(trunk)])
    assert trunk.split == 0
    trunk.share_below([make_adapters(trunk, layers=1), Weights(dict(trunk.base))])
    assert trunk.split == 0
    trunk.share_below([Weights({})])
    assert trunk.split == 0


def test_kept_states_are_put_aside_where_an_architecture_cannot_start_from_them(
    make_model: Callable[..., object], make_adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=4))
    whole = trunk.hidden
    monkeypatch.setattr(trunk, "hidden", lambda tokens, cache=None, kept=None: whole(tokens) + (kept is not None))
    trunk.share_below([make_adapters(trunk, layers=2)])
    assert trunk.split == 0


def test_blocks_are_put_back_after_an_exception(make_model: Callable[..., object], make_adapters: Adapters) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=4))
    trunk.share_below([make_adapters(trunk, layers=2)])
    blocks = list(trunk._layers)
    with pytest.raises(ValueError):
        trunk.hidden(TOKENS, kept=mx.zeros((7, 5, 31)))
    assert all(now is before for now, before in zip(trunk._layers, blocks, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_gives_the_same_gradients(
    make_model: Callable[..., object], make_adapters: Adapters, kind: str, full: bool
) -> None:
    """The second computation comes after the weights have left the trunk, and leaves nothing on it."""
    trunk = load_trunk(make_model(kind, num_hidden_layers=4))
    weights = Weights({n: a + 0.01 for n, a in trunk.base.items()}) if full else make_adapters(trunk, layers=3)
    before = snapshot(trunk)

    def gradient(checkpointing: bool) -> tuple[mx.array, dict[str, mx.array]]:
        def loss(arrays: dict[str, mx.array]) -> mx.array:
            with trunk.using(weights.holding(arrays)):
                if checkpointing:
                    with trunk.checkpointing():
                        return mx.square(trunk.logits(trunk.hidden(TOKENS))).mean()
                return mx.square(trunk.logits(trunk.hidden(TOKENS))).mean()

        return mx.value_and_grad(loss)(dict(weights.arrays))

    (loss, wanted), (same, found) = gradient(False), gradient(True)
    assert loss.item() == pytest.approx(same.item())
    for name, array in wanted.items():
        size = np.abs(np.array(array)).max()
        np.testing.assert_allclose(np.array(found[name]), np.array(array), atol=1e-5 * size + 1e-8, err_msg=name)
    assert max(np.abs(np.array(array)).max() for array in wanted.values()) > 1e-4
    assert_same(before, trunk)
    assert all(layer.attached is None for layer in trunk.adapted.values())


def test_checkpointing_starts_from_kept_states(make_model: Callable[..., object], make_adapters: Adapters) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=4))
    weights = make_adapters(trunk, layers=2)
    trunk.share_below([weights])
    kept = trunk.entering(TOKENS)
    with trunk.using(weights):
        wanted = np.array(trunk.hidden(TOKENS))
        with trunk.checkpointing():
            found = np.array(trunk.hidden(TOKENS, kept=kept))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
