import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ppo.compute.cpu.rotary import SharedRoPE, share_angles


class Two(nn.Module):
    def __init__(self, **others):
        super().__init__()
        self.parts = [
            nn.RoPE(8, base=1000.0),
            nn.RoPE(8, base=1000.0),
            nn.RoPE(8, base=10.0),
            nn.RoPE(8, traditional=True),
        ]


@pytest.fixture
def parts():
    model = Two()
    share_angles(model)
    return model.parts


def drawn(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("offset", [0, 3, mx.array([0, 7, 2])])
def test_rotating_is_what_mlx_makes_of_it_to_the_bit(parts, length, offset):
    x, weights = drawn(3, length, 2, 8).transpose(0, 2, 1, 3), drawn(3, 2, length, 8, seed=1)
    plain = nn.RoPE(8, base=1000.0)
    for rope in parts[:2]:
        assert mx.array_equal(rope(x, offset=offset), plain(x, offset=offset))
        gradient = mx.grad(lambda x, rope=rope: (rope(x, offset=offset) * weights).sum())(x)
        assert mx.allclose(gradient, mx.grad(lambda x: (plain(x, offset=offset) * weights).sum())(x), atol=1e-6)


def test_factors_are_shared_by_what_rotates_alike_and_made_anew_for_other_positions(parts):
    first, second, other, traditional = parts
    assert first.shared is second.shared is not other.shared
    assert type(traditional) is nn.RoPE
    x = drawn(1, 1, 4, 8)
    offset = mx.array([2])
    found = first.shared.at(first, offset, 4)
    assert second.shared.at(second, offset, 4) is found
    assert first.shared.at(first, offset, 3) is not found
    for at in (0, 5, mx.array([2]), mx.array([4])):
        assert mx.array_equal(first(x, offset=at), nn.RoPE(8, base=1000.0)(x, offset=at))


@pytest.mark.parametrize("x", [drawn(1, 1, 4, 12), drawn(2, 4, 8), drawn(1, 1, 4, 8).astype(mx.bfloat16)])
def test_what_is_not_its_kind_goes_the_plain_way(parts, x):
    assert isinstance(parts[0], SharedRoPE)
    assert mx.array_equal(parts[0](x, offset=1), nn.RoPE(8, base=1000.0)(x, offset=1))
