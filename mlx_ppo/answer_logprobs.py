"""What a policy gives to whole answers, with or without a gradient; what DPO and KTO learn from."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.data.judgements import Answer
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import token_statistics
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.runtime.group import Group


def summed_logprobs(trunk: Trunk, weights: Weights, answers: Sequence[Answer], *, learning: bool = False) -> mx.array:
    """Log-probabilities [n] of whole answers, in nats.

    Args:
        trunk: the shared model.
        weights: whose.
        answers: n of them.
        learning: a gradient will be taken.
    """
    sequences = make_sequences(
        [answer.tokens[: answer.start] for answer in answers], [answer.tokens[answer.start :] for answer in answers]
    )
    with trunk.using(weights):
        states = trunk.response_states(sequences, learning=learning)
        logprobs, _ = token_statistics(trunk, states, sequences, temperature=1.0, learning=learning)
    return mx.where(sequences.mask, logprobs, 0.0).sum(axis=1)


def measured(
    trunk: Trunk, weights: Weights, answers: Sequence[Answer], batches: Sequence[Sequence[int]], group: Group
) -> Floats:
    """The same [n], without a gradient, each batch of indices by one process of the group; all get all of them."""

    def work(at: int) -> Floats:
        return np.array(summed_logprobs(trunk, weights, [answers[row] for row in batches[at]]))

    found = group.divided([sum(len(answers[row].tokens) for row in batch) for batch in batches], work)
    whole = np.zeros(len(answers), np.float32)
    for batch, part in zip(batches, found, strict=True):
        whole[list(batch)] = part
    return whole
