"""A project's folder: what can be chosen, the configurations that clicks write, and the rounds."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.errors import ConfigError, DataError, RunError
from mlx_ppo.runs import health
from mlx_ppo.studio.api import Studio, _choose
from mlx_ppo.studio.jobs import Job
from mlx_ppo.studio.project import Project
from mlx_ppo.studio.rounds import wins


class Faked:
    """Jobs that are noted and, told so, are done."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.jobs: list[Job] = []
        self.printed = ""

    def start(self, kind: str, arguments: list[str], *, module: str | None = None) -> str:
        name = f"{len(self.started):04}-{kind}"
        self.started.append(arguments)
        self.jobs.insert(0, Job(name, kind, "", "2026-01-01T00:00:00+00:00", "running", None, None))
        return name

    def all(self) -> list[Job]:
        return self.jobs

    def log(self, name: str) -> str:
        return self.printed

    def done(self, run: str) -> None:
        self.jobs[0] = self.jobs[0]._replace(state="finished", status=0, run=run)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    made = Studio(tmp_path)
    made.jobs = made.rounds._jobs = Faked()  # type: ignore[assignment]
    made.project.add_example()
    return made


def give(studio: Studio, number: int, count: int, **values: object) -> None:
    for at in range(count):
        row = {"question": f"pair:round-{number}/{at}", "kind": "pair", "set": f"round-{number}", "prompt": f"p{at}",
               "left": " a", "right": " b", "left_by": "m", "right_by": "m", "verdict": "left", "tab": "t"}  # fmt: skip
        studio.answers.add({**row, **values})


def test_the_example_is_complete_and_there_once(studio: Studio, tmp_path: Path) -> None:
    state = studio.overview()
    assert (state["model"], state["prompts"], state["small"]) == ("models/reviews", "reviews", True)
    assert state["prompt_sets"] == {"reviews": {"train": 1762, "held_out": 737}}
    seed = studio.project.choices()["seed"]
    studio.project.add_example()
    assert studio.project.choices()["seed"] == seed and list(studio.project.models()) == ["models/reviews"]
    assert Project(tmp_path / "other").choices()["model"] is None


def test_a_round_goes_from_labels_to_the_next_round(studio: Studio, tmp_path: Path) -> None:
    give(studio, 1, 40)
    for wrong in (studio.rounds.next, lambda: studio.rounds.train_policy(iterations=5, kl=0.1, rate=1e-3)):
        with pytest.raises(ConfigError, match="first"):
            wrong()
    studio.rounds.train_reward(kind="pairs", epochs=3, rate=1e-3)
    config = read_config(JOBS["reward"], tmp_path / "configs/reward-1.toml")
    assert studio.jobs.started == [["reward", "configs/reward-1.toml"]]
    learn, held = (len(path.read_text().splitlines()) for path in (config.data.train, config.data.validation))
    assert learn + held == 40 and 2 <= held <= 16 and config.run.folder == tmp_path / "runs"
    run = tmp_path / "runs/reward-1"
    shutil.copytree(tmp_path / "models/reviews/reward", run / "reward")
    (run / "report.json").write_text('{"validation": {"accuracy": 0.75}}')
    studio.jobs.done("runs/reward-1")
    accuracy = studio.rounds.all()[0]["accuracy"]
    assert (accuracy["share"], accuracy["count"]) == (0.75, held) and accuracy["low"] < 0.75 < accuracy["high"]
    studio.rounds.train_policy(iterations=5, kl=0.2, rate=1e-3)
    config = read_config(JOBS["train"], tmp_path / "configs/policy-1.toml")
    assert config.model.adapter is None and config.kl.coef == 0.2 and config.reward[0].path == run / "reward"
    assert config.data.eval_prompts == tmp_path / "prompts/reviews/held-out.jsonl"
    (tmp_path / "runs/policy-1/checkpoints/000005").mkdir(parents=True)
    studio.jobs.done("runs/policy-1")
    assert studio.compare() == {"set": "compare-policy-1", "run": "runs/policy-1"}
    order = studio._order("compare-policy-1", 0, studio.project.choices())
    assert order.models == ("models/reviews", "runs/policy-1") and order.prompts.endswith("held-out.jsonl")
    studio.rounds.next()
    assert studio._order("round-2", 0, studio.project.choices()).models == ("runs/policy-1",)
    give(studio, 2, 20)
    studio.rounds.train_reward(kind="pairs", epochs=3, rate=1e-3)
    config = read_config(JOBS["reward"], tmp_path / "configs/reward-2.toml")
    learn, held = (len(path.read_text().splitlines()) for path in (config.data.train, config.data.validation))
    assert learn + held == 60
    shutil.copytree(run / "reward", tmp_path / "runs/reward-2/reward")
    studio.jobs.done("runs/reward-2")
    studio.rounds.train_policy(iterations=5, kl=0.2, rate=1e-3)
    config = read_config(JOBS["train"], tmp_path / "configs/policy-2.toml")
    assert config.model.adapter == tmp_path / "runs/policy-1/checkpoints/000005"
    with pytest.raises(ConfigError, match="rounds were trained with the present model"):
        studio.project.choose_model("models/reviews")


def test_bounds_of_sampling_reach_pairs_and_runs(studio: Studio, tmp_path: Path) -> None:
    given = {"prompts": "reviews", "max_tokens": 9, "temperature": 1}
    studio.project.add_example()
    for wrong in ({"top_k": 1}, {"top_k": -2}, {"top_k": 10**10}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1}):
        with pytest.raises(ConfigError, match="top-k is 0"):
            _choose(studio.project, {**given, **wrong})
    with pytest.raises(ConfigError, match="'top_k' must be a number"):
        _choose(studio.project, {**given, "top_k": 2.5})
    give(studio, 1, 40)
    (tmp_path / "runs/reward-1").mkdir(parents=True)
    shutil.copytree(tmp_path / "models/reviews/reward", tmp_path / "runs/reward-1/reward")
    studio.rounds.train_reward(kind="pairs", epochs=3, rate=1e-3)
    studio.jobs.done("runs/reward-1")
    for bounds in ({"top_k": 30, "top_p": 0.9, "min_p": 0.05}, {}):
        _choose(studio.project, {**given, **bounds})
        wanted = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **bounds}
        assert wanted.items() <= studio.overview().items()
        order = studio._order("round-1", 0, studio.project.choices())._asdict()
        studio.rounds.train_policy(iterations=5, kl=0.2, rate=1e-3)
        section = read_config(JOBS["train"], tmp_path / "configs/policy-1.toml").rollout
        for name, value in wanted.items():
            assert order[name] == getattr(section, name) == value


def test_a_policy_that_collapsed_is_called_so(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "runs/policy-1/checkpoints/000005").mkdir(parents=True)
    studio.project.choose(rounds=[{"policy": "models/reviews", "train": studio.jobs.start("train", [])}])
    studio.jobs.done("runs/policy-1")
    assert studio.rounds.all()[0]["train"]["collapsed"] is False
    worst = [health.Finding(0, rule, "said", "kl.coef", "warn") for rule in ("entropy", "kl")]
    studio.jobs.printed = "\n".join(health.verdict({each.rule: each for each in worst}))
    assert studio.rounds.all()[0]["train"]["collapsed"] is True


def test_wins_have_their_interval(studio: Studio) -> None:
    give(studio, 1, 8, set="c", left_by="old", right_by="new", verdict="right")
    found = wins(studio.answers.standing(), "c", "new")
    # Wilson's interval for 8 of 8, worked by hand: centre (1 + 3.8416/16) / (1 + 3.8416/8)
    assert found["count"] == 8 and found["share"] == 1.0 and found["low"] == pytest.approx(0.6756, abs=1e-4)
    assert wins(studio.answers.standing(), "c", "old")["share"] == 0.0
    assert wins(studio.answers.standing(), "other", "new") is None


def test_hand_and_reward_model_agree_where_they_prefer_the_same_side(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "runs/policy-1/checkpoints/000005").mkdir(parents=True)
    studio.project.choose(rounds=[{"policy": "models/reviews", "train": studio.jobs.start("train", [])}])
    studio.jobs.done("runs/policy-1")
    name, by = "compare-policy-1", {"left_by": "models/reviews", "right_by": "runs/policy-1"}
    for at, verdict in enumerate(("right", "right", "left", "tie", "right")):
        give(studio, 1, 1, question=f"pair:{name}/{at}", set=name, verdict=verdict, **by)
    margins = [{"id": str(at), "margin": margin} for at, margin in enumerate((0.5, -0.5, -2.0, 1.0, 0.0, 3.0))]
    path = tmp_path / f"feedback/{name}.judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in margins))
    (found,) = studio.rounds.all()
    assert (found["wins"]["count"], found["wins"]["share"]) == (5, 0.7)
    assert (found["judged"]["count"], found["judged"]["share"]) == (6, 3.5 / 6)
    assert (found["agree"]["count"], found["agree"]["share"]) == (3, 2 / 3)


@pytest.mark.parametrize(
    ("text", "chat", "first"),
    [
        ("one\n\n two \none\nthree", False, "one"),
        ('{"prompt": "one", "id": 3}\n{"prompt": "two"}\n{"messages": []}', False, "one"),
        ("\ufeffone\r\ntwo\r\nthree", True, [{"role": "user", "content": "one"}]),
    ],
)
def test_prompts_from_lines(studio: Studio, tmp_path: Path, text: str, chat: bool, first: object) -> None:
    assert studio.project.add_prompts("mine", text, chat=chat) == (2, 1)
    rows = [json.loads(line) for name in ("train", "held-out")
            for line in (tmp_path / f"prompts/mine/{name}.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
    assert first in [row.get("prompt") for row in rows] and len(rows) == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("../x", "a\nb", "a name has"), ("reviews", "a\nb", "already"), ("x", "a", "at least two"),
        ("x", "a\n{b", "line 2: not a JSON"), ("x", 'a\n{"text": 1}', "line 2: has neither"),
    ],
)  # fmt: skip
def test_what_are_no_prompts_is_one_line_and_leaves_nothing(studio: Studio, tmp_path: Path, name, text, words) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        studio.project.add_prompts(name, text, chat=False)
    assert [each.name for each in (tmp_path / "prompts").iterdir()] == ["reviews"]


def test_a_file_of_choices_that_is_broken_is_named(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / ".studio/project.json").write_text("{")
    with pytest.raises(RunError, match=r"project.json: cannot be read"):
        studio.overview()


def test_wrong_numbers_never_reach_a_job(studio: Studio, tmp_path: Path) -> None:
    give(studio, 1, 4)
    for values in ({"epochs": 0, "rate": 1e-3}, {"epochs": 1, "rate": float("nan")}, {"epochs": 1, "rate": -1.0}):
        with pytest.raises(ConfigError, match=r"reward-1.toml"):
            studio.rounds.train_reward(kind="pairs", **values)
    with pytest.raises(ConfigError, match="0 labels"):
        studio.rounds.train_reward(kind="ratings", epochs=1, rate=1e-3)
    assert studio.jobs.started == []


def test_what_a_page_sends_is_looked_at(serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    headers = {**served.headers, "Content-Type": "application/json"}
    wrong = [
        ("/api/model", "[]"), ("/api/model", "{"), ("/api/model", '{"model": 3}'), ("/api/model", '{"model": "/etc"}'),
        ("/api/import", '{"path": "", "name": "x"}'), ("/api/import", '{"path": "/x", "name": "../x"}'),
        ("/api/choose", '{"prompts": "x", "max_tokens": true, "temperature": 1}'),
        ("/api/prompts", '{"name": "x", "path": "/dev/zero"}'), ("/api/prompts", '{"name": "x", "path": "/none"}'),
        ("/api/label/answer", '{"question": "pair:../../x/1", "tab": "t", "verdict": "left"}'),
        ("/api/label/answer", '{"question": "pair:round-1/1", "tab": "t", "verdict": "left"}'),
        ("/api/jobs/..%2f..%2fx/stop", "{}"), ("/api/reward", '{"kind": "pairs", "epochs": 1.5, "rate": 1}'),
        ("/api/model", '"' + "x" * (1 << 24) + '"'),
    ]  # fmt: skip
    for path, body in wrong:
        answer = served.ask(path, headers, "POST", body)
        assert answer.status in (400, 404), (path, body[:80], answer.status)
        if answer.status == 400:
            said = json.loads(answer.body)["error"]
            assert "../../x" not in path + body or "a name has" in said
            assert len(body) < 1 << 24 or "more than 16 MB" in said
            assert said and "\n" not in said and "Traceback" not in said
    assert served.ask("/api/project", headers).status == 200
