"""Reductions and normalisation over the counted slots only."""

import mlx.core as mx


def require_same_shape(**arrays: mx.array) -> None:
    """Refuse arrays that would otherwise broadcast silently.

    Args:
        **arrays: the arrays under the names the caller knows them by.

    Raises:
        ValueError: two shapes differ.
    """
    if len({array.shape for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"shapes differ: {found}")


def masked_sum(x: mx.array, mask: mx.array) -> mx.array:
    """Sum over the counted slots.

        sum_{mask} x

    Args:
        x: any shape.
        mask: the same shape, True where a value counts.

    Returns:
        scalar float32; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x=x, mask=mask)
    return mx.where(mask, x.astype(mx.float32), 0.0).sum()


def masked_mean(x: mx.array, mask: mx.array) -> mx.array:
    """Mean over the counted slots.

        sum_{mask} x / |mask|

    Args:
        x: any shape.
        mask: the same shape, True where a value counts.

    Returns:
        scalar float32; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ.
    """
    return masked_sum(x, mask) / mx.maximum(_count(mask), 1.0)


def masked_variance(x: mx.array, mask: mx.array) -> mx.array:
    """Unbiased variance over the counted slots.

        sum_{mask} (x - mean)^2 / (|mask| - 1)

    Args:
        x: any shape.
        mask: the same shape, True where a value counts.

    Returns:
        scalar float32; exactly 0 for equal values and for fewer than two.

    Raises:
        ValueError: the shapes differ.
    """
    centred, _ = _centre(x, mask)
    return (centred * centred).sum() / mx.maximum(_count(mask) - 1.0, 1.0)


def whiten(x: mx.array, mask: mx.array) -> mx.array:
    """Zero mean and unit unbiased variance over all counted slots together.

        (x - mean) / sqrt(var + 1e-8)

    Args:
        x: any shape; for advantages the whole rollout, not one minibatch.
        mask: the same shape, True where a value counts.

    Returns:
        the shape of x, float32, 0 where masked. A single value becomes x - mean = 0.

    Raises:
        ValueError: the shapes differ.
    """
    centred, _ = _centre(x, mask)
    return centred * mx.rsqrt(masked_variance(x, mask) + 1e-8)


def rescale(x: mx.array, mask: mx.array) -> mx.array:
    """Unit unbiased variance over all counted slots together, around the mean they had.

        mean + (x - mean) / sqrt(var + 1e-8)

    Args:
        x: any shape.
        mask: the same shape, True where a value counts.

    Returns:
        the shape of x, float32, 0 where masked. A single value stays what it is.

    Raises:
        ValueError: the shapes differ.
    """
    centred, mean = _centre(x, mask)
    return mx.where(mask, mean + centred * mx.rsqrt(masked_variance(x, mask) + 1e-8), 0.0)


def _count(mask: mx.array) -> mx.array:
    return mx.where(mask, 1.0, 0.0).sum()


def _centre(x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Return x - mean, 0 where masked, and the mean."""
    require_same_shape(x=x, mask=mask)
    x = x.astype(mx.float32)
    # Measured from the smallest value, equal values centre to exactly 0 and a large offset costs no precision.
    smallest = mx.stop_gradient(mx.where(mask, x, mx.inf).min())
    above = mx.where(mask, mx.where(mask, x, 0.0) - smallest, 0.0)
    mean_above = above.sum() / mx.maximum(_count(mask), 1.0)
    return mx.where(mask, above - mean_above, 0.0), smallest + mean_above
