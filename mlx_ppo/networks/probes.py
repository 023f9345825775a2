"""Small passes through a trunk that show what its architecture can do; mlx-lm's classes don't say."""

import mlx.core as mx

from mlx_ppo.networks.trunk import Trunk
from mlx_ppo.records import make_sequences


def decodes_batches(trunk: Trunk) -> bool:
    """Whether rows of different length, decoded together, get the states that they get alone.

    Some architectures of mlx-lm broadcast a batch's padding mask along the wrong axis; some of those raise, others are
    silently wrong.
    """
    from mlx_lm.models.cache import make_prompt_cache

    rows = [[1, 2, 3], [3, 1, 2, 2, 1], [2, 2]]
    rows = [[token % trunk.tokenizer.vocab_size for token in row] for row in rows]
    alone = [trunk.hidden(mx.array([row]))[0, -1] for row in rows]
    for count in (2, 3):
        lengths = [len(row) - 1 for row in rows[:count]]
        padding = [max(lengths) - length for length in lengths]
        empty = [make_prompt_cache(trunk.model) for _ in lengths]
        try:
            cache = [layers[0].merge(list(layers)) for layers in zip(*empty, strict=True)]
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
            trunk.hidden(mx.array([row[:-1] + [0] * pad for row, pad in zip(rows, padding, strict=False)]), cache)
            for layer in cache:
                layer.finalize()
            states = trunk.hidden(mx.array([[row[-1]] for row in rows[:count]]), cache)[:, -1]
            if not _alike(states, mx.stack(alone[:count])):
                return False
        except (ValueError, AttributeError, TypeError):
            return False
    return True


def shares_prompts(trunk: Trunk, *, computing: bool = True) -> bool:
    """Whether responses read on top of prompts that they share get the states that they get in whole rows.

    Never where a layer keeps something else than plain keys and values: a window, a recurrent state. `computing`: the
    weights are there to try it.
    """
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    if not all(type(cache) is KVCache for cache in make_prompt_cache(trunk.model)):
        return False
    if not computing:
        return True
    size = trunk.tokenizer.vocab_size
    prompts = [[token % size for token in row] for row in ([1, 2, 3], [2, 1], [1, 2, 3], [2, 1], [1, 2, 3])]
    responses = [[row % size, 3 % size] for row in range(len(prompts))]
    try:
        whole, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
        assert shared.shared is not None
        return _alike(trunk.response_states(shared), trunk.response_states(whole))
    except (ValueError, AttributeError, TypeError):
        return False


def _alike(states: mx.array, wanted: mx.array) -> bool:
    return bool(mx.allclose(states.astype(mx.float32), wanted.astype(mx.float32), rtol=0.05, atol=0.05).item())
