import mlx.core as mx
import pytest

from mlx_ppo.runtime.allocator import keeping_buffers


def test_freed_buffers_are_kept_inside_and_the_limit_is_put_back() -> None:
    """Also after an exception."""
    before = mx.set_cache_limit(1 << 20)
    try:
        with pytest.raises(ValueError), keeping_buffers():
            large = mx.zeros((256, 1 << 16))  # 64 MiB, twice mlx's default limit
            mx.eval(large)
            del large
            assert mx.get_cache_memory() >= 64 << 20
            raise ValueError
        assert mx.get_cache_memory() == 0
        assert mx.set_cache_limit(1 << 20) == 1 << 20
    finally:
        mx.set_cache_limit(before)
