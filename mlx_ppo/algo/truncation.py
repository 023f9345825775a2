"""Truncated sampling: at each token the policy that samples says which tokens may be drawn; that set then stays fixed.

    z = logits / temperature,   p = softmax(z)
    K = {v : z_v is at least the top_k-th largest}
    N = {v in K : all tokens of K above z_v have together less than top_p of the mass of K}
    S = {v in N : p_v >= min_p max p, p_v > 0}
    pi(a | S) = p_a / sum_{s in S} p_s

The order is that of transformers: temperature, top-k, top-p, min-p. Tokens of equal logits are in S together or not at
all, so that a set doesn't depend on how they are sorted; transformers leaves ties at top-p to its sorting.

S belongs to the policy that sampled. Whatever weights a log-probability of the rollout is taken under, it is that of
the distribution on S: the ratio to the old policy is 1 before anything is learned, and log pi - log pi_ref is an
estimate of the divergence on S. A set is kept as bits: bit v % 32 of word v // 32 is token v.

Source: Fan et al. 2018, arXiv:1805.04833, section 3.4 (top-k); Holtzman et al. 2020, arXiv:1904.09751, section 3.1
(top-p); Nguyen et al. 2024, arXiv:2407.01082, section 3 (min-p).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

WORD = 32  # bits
LOWEST = -3.4028235e38  # of float32: what is below has no mass
_BLOCK = 256  # entries of the vocabulary that are summed up by themselves, or float32 would not suffice


class Distribution(NamedTuple):
    """What tokens are drawn from, given logits."""

    temperature: float = 1.0  # 0: the most probable token, whatever the others say
    top_k: int = 0  # 0: no bound
    top_p: float = 1.0  # 1: no bound
    min_p: float = 0.0  # 0: no bound

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def changed(self, values: Mapping[str, float]) -> "Distribution":
        """With other values, by name.

        Raises:
            ValueError: one is out of range.
            TypeError: there is no such name.
        """
        for name in values:
            if name not in self._fields:
                raise TypeError(f"there is no {name!r}; choose from {', '.join(self._fields)}")
        given: dict[str, Any] = dict(values)
        found = self._replace(**given)
        if not (0 <= found.temperature < math.inf and isinstance(found.top_k, int) and found.top_k >= 0):
            raise ValueError(f"temperature ({found.temperature}) and top_k ({found.top_k}, whole) must be 0 or above")
        if not (0 < found.top_p <= 1 and 0 <= found.min_p < 1):
            raise ValueError(f"top_p ({found.top_p}) must be in (0, 1], min_p ({found.min_p}) in [0, 1)")
        return found

    @property
    def bounds(self) -> dict[str, float]:
        """Those that act, in their order."""
        found = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        off = Distribution()._asdict()
        return {name: value for name, value in found.items() if self.truncates and value != off[name]}

    @property
    def said(self) -> str:
        """For people."""
        bounds = (f", {name.replace('_', '-')} {value}" for name, value in self.bounds.items())
        return f"temperature {self.temperature:g}{''.join(bounds)}"


def words_of(vocabulary: int) -> int:
    """Words of 32 bits for a set of tokens."""
    return -(-vocabulary // WORD)


def support(scaled: mx.array, how: Distribution) -> mx.array:
    """The tokens that may be drawn.

    Args:
        scaled: [B, V] float32, logits / temperature, the largest 0.
        how: the bounds; its temperature is not read.
    Returns:
        [B, V] bool; at least one True in a row without NaN.
    """
    edge = mx.full((len(scaled), 1), max(LOWEST, math.log(how.min_p) if how.min_p > 0 else LOWEST))
    count = min(how.top_k or scaled.shape[-1], scaled.shape[-1])
    if count < scaled.shape[-1] or how.top_p < 1:
        falling = mx.sort(scaled, axis=-1)[:, ::-1][:, :count]
        among = mx.maximum(falling[:, -1:], LOWEST)
        if how.top_p < 1:
            total = mx.where(scaled >= among, mx.exp(scaled), 0.0)
            nucleus = _before(mx.exp(falling)) < how.top_p * _blocks(total).sum(axis=-1).sum(axis=-1, keepdims=True)
            among = mx.where(nucleus, falling, 0.0).min(axis=-1, keepdims=True)
        edge = mx.maximum(edge, among)
    return scaled >= edge


def packed(tokens: mx.array) -> mx.array:
    """Sets of tokens [..., V] bool as words [..., ceil(V / 32)] uint32."""
    words = words_of(tokens.shape[-1])
    padding = [(0, 0)] * (tokens.ndim - 1) + [(0, words * WORD - tokens.shape[-1])]
    bits = mx.pad(tokens, padding).reshape(*tokens.shape[:-1], words, WORD).astype(mx.uint32)
    return (bits << mx.arange(WORD, dtype=mx.uint32)).sum(axis=-1)


def unpacked(words: mx.array, vocabulary: int) -> mx.array:
    """Words [..., W] as sets of tokens [..., V] bool."""
    bits = (words[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & mx.array(1, mx.uint32)
    return bits.reshape(*words.shape[:-1], -1)[..., :vocabulary].astype(mx.bool_)


def limited(logits: mx.array, words: mx.array) -> mx.array:
    """Logits [..., V] in float32, minus infinity for tokens that are not in the set, whose words [..., W] are given."""
    return mx.where(unpacked(words, logits.shape[-1]), logits.astype(mx.float32), -mx.inf)


def _blocks(values: mx.array) -> mx.array:
    """[B, N] as [B, blocks, 256], with zeros behind."""
    return mx.pad(values, [(0, 0), (0, -values.shape[-1] % _BLOCK)]).reshape(len(values), -1, _BLOCK)


def _before(values: mx.array) -> mx.array:
    """Of each value [B, N] the sum of those before it in its row."""
    blocks = _blocks(values)
    earlier = mx.cumsum(blocks.sum(axis=-1), axis=-1, inclusive=False)
    sums = earlier[..., None] + mx.cumsum(blocks, axis=-1, inclusive=False)
    return sums.reshape(len(values), -1)[:, : values.shape[-1]]
