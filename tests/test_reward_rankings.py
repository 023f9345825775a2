"""Rankings of several answers, read from other tools' layouts and learned from in each of the ways."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_ppo.cli.main import main
from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import FeedbackDataSection, RewardConfig
from mlx_ppo.data.feedback import load_feedback
from mlx_ppo.data.layouts import find
from mlx_ppo.data.preferences import load_rankings
from mlx_ppo.errors import ConfigError, DataError
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.reward_training import train_reward_model
from mlx_ppo.runs.folder import Run, create_run
from mlx_ppo.runtime.signals import Interrupts

LIMITS: dict[str, Any] = {"max_tokens": 64, "overlong": "truncate"}
LAYOUTS = Path(__file__).parent / "data" / "layouts"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(*answers: str, ranks: list[float], **more: Any) -> dict[str, Any]:
    return {"prompt": "the film", "completions": list(answers), "ranks": ranks, **more}


def test_rankings_with_ties_repeats_and_nothing_to_say(trunk: Trunk, tmp_path: Path) -> None:
    file = written(tmp_path / "r.jsonl", [
        row(" good", " bad", " story", ranks=[1, 3, 2], source="web"),
        row(" good", " bad", " story", " film", ranks=[2, 1, 2, 2]),
        row(" good", " bad", ranks=[1, 1]),
        row(" good", " bad", " good", ranks=[3, 2, 1]),
    ])  # fmt: skip
    found = load_rankings(file, trunk.tokenizer, **LIMITS)
    assert [ranking.goodness for ranking in found.rankings] == [(-1, -3, -2), (-2, -1, -2, -2), (-1, -2)]
    assert [ranking.source for ranking in found.rankings] == ["web", "", ""]
    assert found.said is not None
    assert "3 rankings of texts, 1 of 4 rows give none" in found.said
    feedback, said = load_feedback(file, trunk.tokenizer, FeedbackDataSection(train=file), rankings=True)
    assert said[-1] == (
        "r.jsonl: 3 rankings of 2 to 4 answers; 1 have ties, and answers that are equally good aren't compared"
    )
    assert feedback.pairs.tolist() == [[0, 1], [0, 2], [2, 1], [4, 3], [4, 5], [4, 6], [7, 8]]
    assert feedback.sources[:4] == ("web", "web", "web", "")


def test_an_overlong_answer_is_dropped_and_the_rest_of_its_ranking_kept(trunk: Trunk, tmp_path: Path) -> None:
    long = " good" * 30
    rows = [row(" good", " bad", long, ranks=[1, 2, 3]), row(" good", long, ranks=[1, 2])]
    file = written(tmp_path / "r.jsonl", rows)
    found = load_rankings(file, trunk.tokenizer, max_tokens=12, overlong="drop")
    assert [ranking.goodness for ranking in found.rankings] == [(-1, -2)]
    assert found.dropped == 3, "two long ones, and the one that was left alone"
    with pytest.raises(DataError, match=r"more than data\.max_tokens = 12"):
        load_rankings(file, trunk.tokenizer, max_tokens=12, overlong="error")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("nectar.jsonl", [3]), ("ranked-lists.jsonl", [3, 2]), ("rated-lists.jsonl", [2]), ("plain-pairs.jsonl", None)],
)
def test_layouts_give_rankings_and_a_pair_is_one_of_two(
    make_model: Any, tmp_path: Path, name: str, sizes: list[int] | None
) -> None:
    from mlx_ppo.data.inspection import Characters

    found = load_rankings(LAYOUTS / name, Characters(), max_tokens=10_000, overlong="error")
    read = [len(ranking.answers) for ranking in found.rankings]
    assert read == sizes if sizes else set(read) == {2}


def test_what_is_no_ranking_is_refused(trunk: Trunk, tmp_path: Path) -> None:
    section = FeedbackDataSection(train=tmp_path / "x")
    rated = written(tmp_path / "rated.jsonl", [{"text": "a film", "rating": 2}])
    with pytest.raises(ConfigError, match=r"reward_training.rankings: .*rated.jsonl has ratings"):
        load_feedback(rated, trunk.tokenizer, section, rankings=True)
    for answers in (["a", 3], "a b", None):
        bad = written(tmp_path / "bad.jsonl", [{"prompt": "x", "answers": answers, "goodness": [1, 2]}])
        with pytest.raises(DataError):
            load_feedback(bad, trunk.tokenizer, section, rankings=True)
    margin = written(tmp_path / "m.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b", "margin": 1}])
    with pytest.raises(DataError, match="'margin' is for pairs"):
        load_feedback(margin, trunk.tokenizer, section, rankings=True)


def test_a_ranking_loss_goes_with_no_other_objective(tmp_path: Path, model_folder: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        f'[model]\npath = "{model_folder}"\n[data]\ntrain = "x.jsonl"\n'
        '[reward_training]\nobjective = "both"\nrankings = "plackett-luce"\n'
    )
    with pytest.raises(ConfigError, match=r"reward_training\.rankings: 'plackett-luce' is for ranked answers"):
        read_config(RewardConfig, file, ())


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None: ...


@pytest.mark.parametrize("rankings", ["pairs", "all-pairs", "plackett-luce"])
def test_the_order_is_learned(model_folder: Path, tmp_path: Path, rankings: str) -> None:
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        order = draw.permutation(4)
        answers = [" bad" * (3 - at) + " good" * at for at in order]
        rows.append(row(*answers, ranks=[float(4 - at) for at in order], source="made"))
    rows.append(row(" good", " bad", " story", ranks=[1, 2, 2]))
    config = RewardConfig.model_validate(
        {
            "run": {"folder": str(tmp_path)},
            "model": {"path": str(model_folder)},
            "data": {"train": str(written(tmp_path / "r.jsonl", rows))},
            "reward_training": {"rankings": rankings, "epochs": 8, "batch_size": 4, "centering": 0.01},
            "optimizer": {"learning_rate": 2e-2},
        }
    )
    told = Told()
    with Run(create_run(config, tmp_path, "run")) as run:
        train_reward_model(config, run, told, Interrupts())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    figures = report["training"]
    assert figures["accuracy"] > 0.9
    assert ("best" in figures) == (rankings != "pairs")
    assert figures.get("best", 1.0) > 0.8
    assert report["breakdown"]["training"]["by_source"]["made"]["pairs"] == 72
    assert any("1 have ties" in line for line in told.lines) == (rankings != "pairs")


def test_rankings_are_shown_and_converted_to_rows_that_are_rankings_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["data", str(LAYOUTS / "nectar.jsonl"), "--as", "rankings", "--convert", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "nectar: 1 rankings of chats" in result.output
    assert "-1: " in result.output.split("line 1:")[1]
    again = find(out, "rankings", "pairs")
    assert (again.layout, again.kind) == ("answers in a list", "rankings")
    assert again.records[0].fields["scores"] == [-1.0, -2.0, -2.0]
    assert again.records[0].fields["source"] == ["lmsys"]
    assert [row.fields["rejected"] for row in find(out, "pairs").records] == ["Haiku are short.", "No."]
