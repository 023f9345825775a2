"""Operations counted in traces against the formulas of a transformer."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ppo.bench.operations import DECODE, PREFILL, decoding, flops, flops_of
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.memory.simulator import products
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.runs.plan_file import Choices

PROMPT, RESPONSE, ROWS = 5, 8, 6
D, F, V, DK, LAYERS = 32, 48, 304, 16, 2


@pytest.fixture
def account(model_folder: Path, tmp_path: Path):
    """An accountant of a run with all weights trained and a critic's head, which has no adapters to count."""

    def make(**changes: object) -> Accountant:
        rewards = tmp_path / "rewards.py"
        document = {
            "model": {"path": model_folder, "train": "full"},
            "data": {"prompts": tmp_path / "none.jsonl", "eval_count": 1},
            "rollout": {"prompts": ROWS, "max_tokens": RESPONSE},
            "reward": [{"kind": "function", "function": f"{rewards}:f"}],
            "critic": {"kind": "head"},
            "ppo": {"epochs": 2, "minibatches": 2},
            **changes,
        }
        return accountant_of(TrainConfig.model_validate(document), None, PROMPT)

    return make


def forward(tokens: int, seen: int, predicted: int) -> int:
    """Of a row: tokens that attend to `seen` positions each, and logits of some."""
    layer = 2 * D * D + 2 * D * DK + 3 * D * F
    return 2 * (LAYERS * (tokens * layer + 2 * tokens * seen * D) + predicted * D * V)


CHOICES = Choices(ROWS, ROWS, ROWS, checkpointing=True)


def test_phases_take_what_the_formulas_say(account, model_folder):
    import json

    config = json.loads((model_folder / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (D, F, LAYERS)
    found = flops_of(account(), CHOICES)
    whole = PROMPT + RESPONSE
    assert found[PREFILL] == ROWS * forward(PROMPT, PROMPT, 1)
    middle = PROMPT + RESPONSE // 2 + 1
    assert found[DECODE] == ROWS * (RESPONSE - 1) * forward(1, middle, 1)
    head = 2 * RESPONSE * D
    assert found["score reference"] == pytest.approx(ROWS * forward(whole, whole, RESPONSE), rel=0.1)
    assert found["score policy"] == found["score reference"] + ROWS * head
    assert found["update policy"] == pytest.approx(3 * 2 * found["score reference"], rel=0.12)
    assert set(found) == {PREFILL, DECODE, "score policy", "score reference", "update policy", "update critic"}


def test_adapters_need_no_gradients_of_the_weights(account):
    full = flops_of(account(), CHOICES)
    lora = flops_of(account(model={"path": account().config.model.path}, lora={"rank": 1}), CHOICES)
    assert lora["update policy"] < 0.8 * full["update policy"]
    assert lora["score policy"] == pytest.approx(full["score policy"], rel=0.15)


def test_operations_are_proportional_to_rows_and_choices_change_nothing(account):
    own = account()
    assert decoding(own, 6).flops == 6 * decoding(own, 1).flops
    assert decoding(own, 6).read < 6 * decoding(own, 1).read  # the weights are read once
    weights = 4 * (LAYERS * (2 * D * D + 2 * D * DK + 3 * D * F) + D * V)
    assert weights < decoding(own, 1).read < 1.2 * weights
    assert flops_of(own, CHOICES) == flops_of(own, Choices(1, 1, 1, checkpointing=False, positions=64))


def test_products_and_nothing_else_count():
    a, b = mx.zeros((3, 4, 5)), mx.zeros((3, 5, 6))
    assert flops(products(lambda a, b: mx.exp(a @ b) + 1, a, b)) == 2 * 3 * 4 * 5 * 6
    assert flops(products(lambda a, b: mx.addmm(mx.zeros((6,)), a, b), a, b)) == 2 * 3 * 4 * 5 * 6
    x, packed = mx.zeros((4, 64)), mx.quantize(mx.zeros((32, 64)), group_size=32, bits=4)
    multiplied = products(lambda x, *w: mx.quantized_matmul(x, *w, group_size=32, bits=4), x, *packed)
    assert flops(multiplied) == 2 * 4 * 64 * 32
    assert flops(products(lambda a: (a * a).sum(), a)) == 0
