import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.data.preferences import load_pairs, load_rated
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import (
    RewardFacts,
    RewardModel,
    apply_head,
    load_reward_model,
    new_head,
    pooled,
    read_reward_facts,
)
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_adapters
from mlx_ppo.reward_training import train_reward_model
from mlx_ppo.rewards.figures import pair_figures, rating_figures
from mlx_ppo.runs.folder import Run, create_run
from mlx_ppo.runtime.signals import Interrupts

Tokens = tuple[int, ...]
ROWS: list[Tokens] = [(1, 5, 9), (1, 40, 7, 200, 3), (8,), (1, 286, 288, 2)]


class Silent:
    def message(self, text: str) -> None: ...
    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None: ...


@pytest.mark.parametrize("pooling", ["last", "mean", "sqrt"])
def test_pooling_reads_each_text_alone(trunk: Trunk, pooling: str) -> None:
    sequences = make_sequences(ROWS, [()] * len(ROWS))
    junk = sequences._replace(tokens=mx.where(sequences.tokens == 0, 77, sequences.tokens))
    states = trunk.states(junk)
    inside = mx.arange(sequences.tokens.shape[1])[None, :] < sequences.lengths[:, None]
    dirty = mx.where(inside.reshape(-1, 1), states, mx.nan)
    for found in (pooled(states, sequences, pooling), pooled(dirty, sequences, pooling)):
        for row, tokens in enumerate(ROWS):
            alone = np.array(trunk.hidden(mx.array([tokens])))[0]
            total = alone.sum(axis=0)
            expected = {"last": alone[-1], "mean": total / len(alone), "sqrt": total / np.sqrt(len(alone))}[pooling]
            np.testing.assert_allclose(np.array(found[row]), expected, atol=2e-5)


def test_heads_are_zero_at_first_and_compute_in_float32() -> None:
    states = mx.random.normal((3, 4, 8), key=mx.random.key(0)).astype(mx.bfloat16)
    assert not np.array(apply_head(new_head(8), states)).any()
    head = {"head.weight": mx.arange(8) / 7, "head.bias": mx.array(-2.0)}
    values = apply_head(head, states)
    assert values.dtype == mx.float32
    expected = np.array(states.astype(mx.float32), np.float64) @ (np.arange(8) / 7) - 2
    np.testing.assert_allclose(np.array(values), expected, atol=1e-5)


WORDS = ["good", "bad", "the film", "a story", "it was", "very good", "not bad", "very bad", "is it good", "not good"]


def write_feedback(folder: Path, kind: str) -> tuple[Path, Path]:
    """Training and validation files."""
    generator = np.random.default_rng(0)
    files = []
    for name, count in (("train", 16), ("validation", 9)):
        rows: list[dict[str, Any]] = []
        for _ in range(count):
            first, second = (" ".join(generator.choice(WORDS, 2)) for _ in range(2))
            chosen, rejected = f"{first} good", f"{second} bad it"
            if kind == "ratings":
                rows.append({"text": first, "rating": 1.0 + 2 * first.count("good")})
            else:
                rows.append({"prompt": "the", "chosen": chosen, "rejected": rejected})
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files[0], files[1]


def texts_of(path: Path, kind: str, trunk: Trunk) -> tuple[list[Tokens], np.ndarray]:
    if kind == "ratings":
        rated = load_rated(path, trunk.tokenizer, max_tokens=64, overlong="truncate").rated
        return [item.tokens for item in rated], np.array([item.rating for item in rated], np.float32)
    pairs = load_pairs(path, trunk.tokenizer, max_tokens=64, overlong="truncate").pairs
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)], np.zeros(0)


def outputs(model: RewardModel, rows: list[Tokens]) -> np.ndarray:
    """Through the way PPO takes: prompts and responses."""
    sequences = make_sequences([row[:1] for row in rows], [row[1:] for row in rows])
    return np.array(model.raw(sequences))


@pytest.mark.parametrize(
    ("train", "kind", "objective", "pooling", "dtype"),
    [
        ("lora", "pairs", "pairs", "last", "float32"),
        ("lora", "ratings", "both", "mean", "float32"),
        ("full", "ratings", "regression", "last", "float32"),
        ("full", "pairs", "pairs", "mean", "float16"),
    ],
)
def test_a_reward_model_scores_after_reload_as_it_was_trained(
    model_folder: Path, tmp_path: Path, train: str, kind: str, objective: str, pooling: str, dtype: str
) -> None:
    files = write_feedback(tmp_path, kind)
    config = RewardConfig.model_validate(
        {
            "run": {"folder": str(tmp_path)},
            "model": {"path": str(model_folder), "train": train, "save_dtype": dtype},
            "data": {"train": str(files[0]), "validation": str(files[1])},
            "reward_training": {"objective": objective, "pooling": pooling, "epochs": 8, "batch_size": 5},
            "optimizer": {"learning_rate": 1e-2},
        }
    )
    with Run(create_run(config, tmp_path, "run")) as run:
        folder = train_reward_model(config, run, Silent(), Interrupts())
    report = json.loads((tmp_path / "run" / "report.json").read_text())["validation"]

    shared = load_trunk(model_folder)
    model = load_reward_model(folder, shared if train == "lora" else None)
    assert (model.trunk is shared) == (train == "lora")
    assert model.facts.placement == {"lora": "adapters", "full": "folder"}[train]
    texts, ratings = texts_of(files[0], kind, shared)
    normalised = np.array(model.normalised(mx.array(outputs(model, texts))))
    assert normalised.mean() == pytest.approx(0, abs=1e-4)
    assert normalised.std() == pytest.approx(1, abs=1e-4)
    held_out, ratings = texts_of(files[1], kind, shared)
    raw = outputs(model, held_out)
    assert raw.std() > 0.05, "trained"
    if kind == "pairs":
        assert pair_figures(raw[::2], raw[1::2]) == pytest.approx(report, abs=1e-4)
        assert model.points(mx.array(raw)) is None
    else:
        figures = rating_figures(raw, ratings, min_difference=1.0, paired=False)
        assert figures == pytest.approx(report, abs=1e-4)
        slope, intercept = np.polyfit(raw, ratings, 1)
        points = np.array(model.points(mx.array(raw)))
        np.testing.assert_allclose(points, slope * raw + intercept, atol=1e-3)


FACTS = RewardFacts("adapters", "last", 0.5, 2.0)


@pytest.fixture
def reward_folder(trunk: Trunk, make_adapters: Callable[..., Weights], tmp_path: Path) -> Path:
    folder = write_adapters(tmp_path / "reward", make_adapters(trunk), trunk.blocks)
    mx.save_safetensors(str(folder / "head.safetensors"), new_head(32))
    FACTS.write(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "not a reward model"),
        ({"format": 2}, "this version"),
        ({"deviation": 0.0}, "this version"),
        ({"deviation": None}, "this version"),
        ({"deviation": float("nan")}, "this version"),
        ({"mean": float("inf")}, "this version"),
        ({"slope": "1"}, "this version"),
        ({"placement": "elsewhere"}, "this version"),
        ({"pooling": "first"}, "this version"),
        ({"unknown": 1}, "this version"),
    ],
)
def test_broken_facts_are_refused(reward_folder: Path, change: dict[str, Any] | None, message: str) -> None:
    assert read_reward_facts(reward_folder) == FACTS
    content = json.loads((reward_folder / "reward.json").read_text())
    (reward_folder / "reward.json").unlink()
    if change is not None:
        (reward_folder / "reward.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ModelError, match=message):
        read_reward_facts(reward_folder)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "missing"),
        (new_head(31), "size 32"),
        ({"head.weight": mx.zeros((32,))}, "size 32"),
        ({**new_head(32), "head.bias": mx.array(np.nan)}, "NaN"),
    ],
)
def test_broken_heads_are_refused(
    reward_folder: Path, trunk: Trunk, head: dict[str, mx.array] | None, message: str
) -> None:
    assert load_reward_model(reward_folder, trunk).facts == FACTS
    with pytest.raises(ModelError, match="give the trunk's folder"):
        load_reward_model(reward_folder, None)
    (reward_folder / "head.safetensors").unlink()
    if head is not None:
        mx.save_safetensors(str(reward_folder / "head.safetensors"), head)
    with pytest.raises(ModelError, match=message):
        load_reward_model(reward_folder, trunk)
