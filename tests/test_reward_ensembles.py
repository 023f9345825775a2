"""Ensembles of reward models: trained one by one on one trunk, kept in one folder, and what PPO makes of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.memory.model import weightless_roles
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardFacts, RewardModel, drawn_head, joined, load_reward_model
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.roles import Roles, Source
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.reward_training import train_reward_model
from mlx_ppo.runs.folder import METRICS, Run, create_run
from mlx_ppo.runs.verification import verify_run
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import RawScores, combined_scores, raw_scores

TEXTS = [(1, 5, 9), (1, 40, 7, 200, 3), (8,), (1, 286, 288, 2)]
RATED = [("a very good film", 5), ("the story was good", 4), ("it is a film", 3), ("not very good", 2),
         ("the film was bad", 1), ("a bad bad story", 1), ("good and good", 5), ("it was not bad", 3)]  # fmt: skip


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.steps.append((done, total))


class StopAt(Interrupts):
    """A signal that comes before some batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def check(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.received = 15
        super().check()


def configured(folder: Path, model: Path, members: int, train: str = "lora", **changes: Any) -> RewardConfig:
    data = folder / "ratings.jsonl"
    data.write_text("".join(json.dumps({"text": text, "rating": rating}) + "\n" for text, rating in RATED))
    return RewardConfig.model_validate(
        {
            "run": {"folder": str(folder), "save_every": 2},
            "model": {"path": str(model), "train": train, **changes},
            "lora": {"rank": 4},
            "data": {"train": str(data)},
            "reward_training": {"members": members, "epochs": 2, "batch_size": 3, "objective": "regression"},
            "optimizer": {"learning_rate": 1e-2},
        }
    )


def trained(config: RewardConfig, folder: Path, name: str, stop: int = 10**9) -> tuple[Path, Told]:
    told = Told()
    run_folder = folder / name if (folder / name).exists() else create_run(config, folder, name)
    with Run(run_folder) as run:
        train_reward_model(config, run, told, StopAt(stop))
    return run_folder, told


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_members_are_trained_by_seed_and_resumed_as_if_never_stopped(
    model_folder: Path, tmp_path: Path, train: str
) -> None:
    config = configured(tmp_path, model_folder, 3, train)
    whole, told = trained(config, tmp_path, "whole")
    expected = files(whole / "reward")
    each = [name for name in expected if name.startswith("member")]
    assert sorted(each) == ["member-1.safetensors", "member-2.safetensors", "member-3.safetensors"]
    assert len({expected[name] for name in each}) == 3, "members differ"
    assert told.steps[-1] == (18, 18)
    assert not verify_run(whole).problems
    rows = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows] == [(3 * n, n) for n in range(1, 7)]
    for stop in (1, 6, 8, 17):
        with pytest.raises(Interrupted):
            trained(config, tmp_path, f"stopped{stop}", stop)
        folder, _ = trained(config, tmp_path, f"stopped{stop}")
        assert files(folder / "reward") == expected
        assert (folder / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    fewer, _ = trained(configured(tmp_path, model_folder, 2, train), tmp_path, "fewer")
    assert all((fewer / "reward" / name).read_bytes() == expected[name] for name in sorted(each)[:2])


def test_fewer_members_than_are_finished_are_refused_and_nothing_is_lost(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(configured(tmp_path, model_folder, 3), tmp_path, "run", stop=15)
    with pytest.raises(RunError, match=r"2 members are finished .*members is 2 now; set it to 3 or more"):
        trained(configured(tmp_path, model_folder, 2), tmp_path, "run")
    folder, _ = trained(configured(tmp_path, model_folder, 3), tmp_path, "run")
    assert (folder / "reward" / "member-3.safetensors").is_file()


def test_random_members_start_from_weights_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    folder, _ = trained(configured(tmp_path, model_folder, 2, "full", initialise="random"), tmp_path, "random")
    model = load_reward_model(folder / "reward", None)
    first, second = model.trunk.base, model.members[1].arrays
    name = next(name for name in first if name.endswith("q_proj.weight"))
    alike = np.corrcoef(np.array(first[name]).ravel(), np.array(second[name]).ravel())[0, 1]
    assert abs(alike) < 0.5


def test_one_member_is_the_folder_that_it_was(model_folder: Path, tmp_path: Path) -> None:
    folder, told = trained(configured(tmp_path, model_folder, 1), tmp_path, "one")
    names = ["adapter_config.json", "adapters.safetensors", "head.safetensors", "reward.json"]
    assert sorted(files(folder / "reward")) == names
    assert "member_means" not in (folder / "reward" / "reward.json").read_text()
    assert not any("member" in line for line in told.lines)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_ensemble_scores_by_the_mean_of_its_members(model_folder: Path, tmp_path: Path, train: str) -> None:
    folder, told = trained(configured(tmp_path, model_folder, 3, train), tmp_path, "run")
    shared = load_trunk(model_folder) if train == "lora" else None
    model = load_reward_model(folder / "reward", shared)
    assert len(model.members) == 3
    sequences = make_sequences(TEXTS, [()] * len(TEXTS))
    each = [model.raw_of(member, sequences) for member in range(3)]
    np.testing.assert_allclose(np.array(model.raw(sequences)), np.mean(np.array(mx.stack(each)), axis=0), atol=1e-5)
    scores = np.array(mx.stack(model.member_scores(each)))
    np.testing.assert_allclose(scores.mean(axis=0), np.array(model.normalised(joined(each))), atol=1e-4)
    assert scores.std(axis=0).max() > 1e-3, "members disagree"
    tokenizer = model.trunk.tokenizer
    texts = [[*tokenizer.encode(text, bos=True), tokenizer.eos_id] for text, _ in RATED]
    normalised = (model.of_texts(texts).mean(axis=0) - model.facts.mean) / model.facts.deviation
    assert normalised.mean() == pytest.approx(0, abs=1e-3)
    assert normalised.std() == pytest.approx(1, abs=1e-3)
    report = json.loads((folder / "report.json").read_text())
    assert len(report["members"]) == 3
    assert any("member 2 of 3, epoch 1 of 2" in line for line in told.lines)
    assert (folder / "report.txt").read_text().splitlines()[0].startswith("training: loss")


def test_what_is_damaged_in_an_ensemble_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    folder, _ = trained(configured(tmp_path, model_folder, 2), tmp_path, "run")
    trunk, reward = load_trunk(model_folder), folder / "reward"
    good = files(reward)

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_reward_model(reward, trunk)
        for name, content in good.items():
            (reward / name).write_bytes(content)
        load_reward_model(reward, trunk)

    (reward / "member-2.safetensors").unlink()
    refused("member-2.safetensors")
    arrays = mx.load(str(reward / "member-2.safetensors"))
    mx.save_safetensors(str(reward / "member-2.safetensors"), {**arrays, "head.bias": mx.array(np.nan)})
    refused("member-2.safetensors: contains NaN")
    mx.save_safetensors(str(reward / "member-1.safetensors"), {n: a for n, a in arrays.items() if "head" not in n})
    refused("member-1.safetensors: not a scalar head")
    content = json.loads(good["reward.json"])
    for change in ({"member_means": [0.0]}, {"member_means": 3}, {"format": 1}, {"member_means": ["a", "b"]}):
        (reward / "reward.json").write_text(json.dumps({**content, **change}))
        refused("not a description this version understands")


@pytest.fixture(scope="module")
def rollout(stopping_trunk: Trunk) -> Rollout:
    prompts = [tuple(stopping_trunk.tokenizer.encode(text, bos=True)) for text in ("the film", "bad", "it was good")]
    return generate(stopping_trunk, Weights({}), Asked(prompts, range(3), [{}] * 3), Sampling((0,), 6))


@pytest.fixture
def ensemble(stopping_trunk: Trunk, make_adapters: Callable[..., Weights]) -> RewardModel:
    facts = RewardFacts("adapters", "last", 0.25, 0.5, format=2, member_means=(0.0, 0.5))
    both = []
    for seed in (2, 3):
        body = make_adapters(stopping_trunk, seed=seed)
        both.append(body.holding({**body.arrays, **drawn_head(stopping_trunk.width, mx.random.key(seed))}))
    return RewardModel(stopping_trunk, both[0], facts, both[1:])


def test_ppo_combines_members_and_sees_their_disagreement(
    ensemble: RewardModel, stopping_trunk: Trunk, rollout: Rollout
) -> None:
    roles = Roles(stopping_trunk, Weights({}), None, [Source("many", 2.0, ensemble)])
    raw = raw_scores(roles, rollout, batch_size=3)
    rows = [[*p, *r] for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    each = (ensemble.of_texts(rows) - np.array([[0.0], [0.5]])) / 0.5
    np.testing.assert_allclose(np.array(mx.stack(raw.members["many"])), each, atol=1e-4)
    np.testing.assert_allclose(np.array(raw.disagreement()["many"]), each.std(axis=0), atol=1e-4)
    expected = {
        "sum": 2 * each.mean(axis=0),
        "worst": (2 * each).min(axis=0),
        "cautious": 2 * each.mean(axis=0) - 0.5 * (2 * each).std(axis=0),
    }
    for combine, scores in expected.items():
        section = ScoreSection.model_validate({"combine": combine, "caution": 0.5})
        found = combined_scores(raw, roles, rollout, section, rollout.max_tokens)
        np.testing.assert_allclose(np.array(found), scores, atol=1e-4)


def test_members_stand_beside_other_sources(stopping_trunk: Trunk, rollout: Rollout) -> None:
    count = len(rollout.prompts)
    high, low, rule = (mx.full((count,), value) for value in (3.0, 1.0, -1.0))
    raw = RawScores({"many": (high + low) / 2, "rule": rule}, {}, {"many": [high, low]})
    roles = Roles(stopping_trunk, Weights({}), None, [Source("many", 1.0, None), Source("rule", 2.0, None)])
    for combine, expected in (("sum", 0.0), ("worst", -2.0), ("cautious", 2 / 3 - np.std([3, 1, -2]))):
        found = combined_scores(raw, roles, rollout, ScoreSection.model_validate({"combine": combine}), 10**6)
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_plan_counts_one_trunk_and_all_members(model_folder: Path, tmp_path: Path, train: str) -> None:
    folder, _ = trained(configured(tmp_path, model_folder, 3, train), tmp_path, "run")
    config = TrainConfig.model_validate(
        {
            "run": {"folder": str(tmp_path)},
            "model": {"path": str(model_folder)},
            "data": {"prompts": str(tmp_path / "prompts.jsonl")},
            "reward": [{"kind": "model", "path": str(folder / "reward")}],
        }
    )
    roles, _, _ = weightless_roles(config, None)
    planned = roles.sources[0].scorer
    model = load_reward_model(folder / "reward", load_trunk(model_folder))
    assert isinstance(planned, RewardModel)
    assert (planned.trunk is roles.trunk) == (train == "lora")
    sizes = [sum(array.nbytes for array in own.arrays.values()) for own in model.members]
    assert [sum(array.nbytes for array in own.arrays.values()) for own in planned.members] == sizes
