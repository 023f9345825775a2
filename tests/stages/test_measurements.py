"""What is counted of the responses' tokens, and of each source's scores."""

import mlx.core as mx
import pytest

from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardFacts, RewardModel
from mlx_ppo.models.roles import Source
from mlx_ppo.stages.measurements import distinct_pairs, repetition, source_metrics
from mlx_ppo.stages.records import Scored


def test_repetition_by_hand():
    assert repetition([(1, 2, 3, 4, 5, 6)]) == 0.0
    assert repetition([(7,) * 8]) == pytest.approx(4 / 5)  # five 4-grams, one of them new
    assert repetition([(1, 2, 1, 2, 1, 2, 1), (3, 4, 5, 6)]) == pytest.approx(2 / 5)  # of 4 + 1, two were there before
    assert repetition([(1, 2, 3, 4), (1, 2, 3, 4)]) == 0.0  # what another response has is no repetition
    assert repetition([(1, 2, 3), ()]) == 0.0


def test_distinct_pairs_by_hand():
    assert distinct_pairs([(1, 2, 3), (1, 2)]) == pytest.approx(2 / 3)
    assert distinct_pairs([(1, 1, 1, 1)]) == pytest.approx(1 / 3)
    assert distinct_pairs([(1,), ()]) == 0.0


def test_deviation_and_share_beyond_of_each_source(trunk):
    def model(highest):
        facts = RewardFacts("adapters", "last", mean=0.0, deviation=1.0, lowest=-1.0, highest=highest)
        return RewardModel(trunk, Weights({}), facts)

    sources = [Source("told", 1.0, model(2.0)), Source("untold", 1.0, model(None)), Source("rule", 1.0, None)]
    column = mx.array([0.0, 2.0, 2.5, 3.5])
    empty = mx.zeros((4, 1))
    scored = Scored(column, dict.fromkeys(("told", "untold", "rule"), column), empty, empty, empty, None)
    found = source_metrics(sources, scored)
    assert found.keys() == {"deviation/told", "deviation/untold", "deviation/rule", "beyond/told"}
    assert found["beyond/told"] == 0.5 and found["deviation/rule"] == pytest.approx(1.27475, abs=1e-4)
