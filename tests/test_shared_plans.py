"""What sharing a run would take: formulas against numbers worked by hand, and the command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ppo.bench.sharing import Exchanged, Line, Parts, exchanged, expected
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.starting import accountant_of


@pytest.fixture
def config(make_model: Callable[..., Path], tmp_path: Path) -> TrainConfig:
    (tmp_path / "rule.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    document = {
        "model": {"path": make_model()},
        "data": {"prompts": tmp_path / "prompts.jsonl"},
        "rollout": {"prompts": 6, "max_tokens": 10, "samples_per_prompt": 2},
        "ppo": {"epochs": 3, "minibatches": 2, "advantage": "rloo"},
        "reward": [{"kind": "function", "function": f"{tmp_path}/rule.py:one"}],
    }
    return TrainConfig.model_validate(document)


def test_what_is_sent_follows_from_the_shapes(config: TrainConfig) -> None:
    accountant = accountant_of(config, None, 5)
    trained = sum(array.size for array in accountant.policy.arrays.values())
    assert accountant.roles.trunk.split == 0 and exchanged(config, accountant, 5, 1).sent == 0
    # of 12 responses of 10 tokens, 6 or 4 of each process: 8 bytes a token, then 3 columns of 4 bytes; 6 steps that
    # sum gradients and two columns of 6 responses
    summed = 4 * (trained + 2 * 6 * 10)
    assert exchanged(config, accountant, 5, 2).sent == pytest.approx(6 * 10 * 8 + 6 * 10 * 3 * 4 + 6 * summed)
    more = exchanged(config, accountant, 5, 3)
    assert more.sent == pytest.approx(2 * (4 * 10 * 8 + 4 * 10 * 3 * 4) + 6 * 4 / 3 * summed)
    assert more.hops == 2 * (2 * 6 + 3 + 6)
    in_memory = exchanged(config, accountant, 5, 3, memory=True)  # each reads what the two others have
    assert in_memory.sent == pytest.approx(2 * (4 * 10 * 8 + 4 * 10 * 3 * 4) + 6 * 2 * summed)
    assert in_memory.hops == 2 * 2 * (6 + 3 + 6) and exchanged(config, accountant, 5, 1, memory=True).hops == 0


def test_an_iteration_is_what_is_divided_and_what_is_not_and_what_is_sent(config: TrainConfig) -> None:
    seconds = {"rollout prefill": 1.0, "rollout decode": 5.0, "update policy": 12.0, "update step": 2.0, "between": 1.0}
    measured = Parts(seconds, 5.0 / 6)  # decoding takes as long as it has prompts, of which there are 6
    line = Line(bandwidth=1e6, latency=0.01)
    alone = expected(config, measured, Exchanged(0.0, 0), line, 1, 1.0)
    assert alone.computing == pytest.approx(21.0) and alone.exchanging == 0
    two = expected(config, measured, Exchanged(3e6, 50), line, 2, 2.0)
    assert two.computing == pytest.approx(3.0 + 3.0 + 6.0) and two.exchanging == pytest.approx(3.5)
    four = expected(config, measured, Exchanged(3e6, 50), line, 4, 4.0)  # 2 of 6 prompts, 2 of 6 rows of a step
    assert four.computing == pytest.approx(3.0 + 2.0 + 4.0) and four.total == pytest.approx(9.0 + 3.5)
    crowded = expected(config, measured, Exchanged(0.0, 0), line, 4, 2.0)  # four processes on two cores
    assert crowded.computing == pytest.approx(3.0 + 2 * 6.0)
    bound = expected(config, measured._replace(one_prompt=4.0), Exchanged(0.0, 0), line, 4, 4.0)  # by reading weights
    assert bound.computing == pytest.approx(four.computing - 5.0 / 3 + 4.0 + 1.0 / 5)
