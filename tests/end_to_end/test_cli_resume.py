"""The same run twice, and the same run in two parts: every byte and every number the same."""

import shutil
from collections.abc import Mapping

import pytest
from thorough import mostly

from mlx_ppo import reward_training, sft, train
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.config.supervised import RewardConfig, SFTConfig
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import RESULTS, SAMPLES, Run, create_run
from mlx_ppo.runtime.signals import Interrupted, Interrupts

JOBS = {
    "train": (TrainConfig, train.train),
    "sft": (SFTConfig, sft.finetune),
    "reward": (RewardConfig, reward_training.train_reward_model),
}


class StopAfter:
    """A reporter through which a signal comes at a chosen place."""

    def __init__(self, interrupts: Interrupts, *, at: int, phase: str = "") -> None:
        self.interrupts, self.at, self.where = interrupts, at, phase

    def message(self, text: str) -> None: ...
    def tokens(self, count: int) -> None: ...

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        if (name, iteration) == (self.where, self.at):
            self.interrupts.received = 15

    def iteration(self, metrics: Mapping[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        if not self.where and metrics["step"] == self.at:
            self.interrupts.received = 15

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == self.at:
            self.interrupts.received = 15


def stop(project, job, config, name, *, at, phase=""):
    """Start a job in a run of its own and stop it."""
    kind, function = JOBS[job]
    settings = read_config(kind, config, [f"run.name={name}"])
    interrupts = Interrupts()
    with Run(create_run(settings, settings.run.folder, name)) as run, pytest.raises(Interrupted):
        function(settings, run, StopAfter(interrupts, at=at, phase=phase), interrupts)


def same(project, first, second):
    """Both runs have the same metrics and samples and, bit for bit, the same checkpoints."""
    assert project.metrics(first) == project.metrics(second)
    if (project.run(first) / SAMPLES).exists():  # supervised jobs have none
        assert project.samples(first) == project.samples(second)
    one, two = project.checkpoints(first), project.checkpoints(second)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


PINNED = {"budget_gb": 2.0}  # or what is free at each start would have a say
GROUPS = {"rollout": {"prompts": 2, "samples_per_prompt": 3}}
CASES = {
    "critic adapters": {},
    "critic head": {"critic": {"kind": "head"}},
    "critic model": {"critic": {"kind": "model"}, "ppo": {"micro_batch": 1}},
    "full, critic head": {"model": {"train": "full"}, "critic": {"kind": "head"}},
}
EVERYWHERE = {
    "gae": {"kl": {"controller": "adaptive", "coef": 0.2, "target": 0.1, "horizon": 30.0}},
    "gae, full": {
        "model": {"train": "full"},
        "critic": {"warmup_iterations": 1},
        "ppo": {"gradient_checkpointing": "on"},
        "optimizer": {"schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.1},
    },
    "grpo": {"ppo": {"advantage": "grpo"}, **GROUPS},
    "rloo": {"ppo": {"advantage": "rloo"}, **GROUPS},
    "dr_grpo, full": {"ppo": {"advantage": "dr_grpo", "aggregate": "constant"}, "model": {"train": "full"}, **GROUPS},
}


def config_of(project, changes):
    run = {"iterations": 4, "keep_last": 4, "evaluate_every": 3}
    return project.config(**{"run": run, "memory": PINNED, **changes})


def test_the_same_seed_gives_the_same_run_and_another_seed_another(project):
    config = config_of(project, {})
    for name in ("a", "b"):
        project.done("train", config, "--set", f"run.name={name}")
    same(project, "a", "b")
    project.done("train", config, "--set", "run.name=c", "--set", "run.seed=1")
    rows = zip(project.metrics("a"), project.metrics("c"), strict=True)
    assert all(row["entropy"] != other["entropy"] for row, other in rows)
    files = project.checkpoints("c")
    assert all(files[name] != data for name, data in project.checkpoints("a").items() if name.endswith("s.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_training_in_parts_is_training_at_once(project, case):
    config = config_of(project, CASES[case])
    project.done("train", config)
    stop(project, "train", config, "b", at=2)
    assert project.steps("b") == [1, 2]
    assert "resuming after iteration 2 of 4" in project.done("resume", "runs/b")
    same(project, "a", "b")


def results(project, name):
    """Finished folders and their report, byte for byte."""
    files = [file for file in project.run(name).rglob("*") if file.is_file()]
    own = [file for file in files if file.parent.name in RESULTS or file.name == "report.json"]
    return {str(file.relative_to(project.run(name))): file.read_bytes() for file in own}


def resumed_everywhere(project):
    """Go on from each checkpoint of a finished run, as after a kill: later rows and results are there, and wrong."""
    steps = project.steps()
    for at in (0, *steps):
        copy = project.run("b")
        shutil.copytree(project.run(), copy)
        for step in steps[at:]:
            shutil.rmtree(checkpoint.folder_of(copy, step))
        for result in (copy / name for name in RESULTS):
            shutil.rmtree(result, ignore_errors=True)
        project.done("resume", "runs/b")
        same(project, "a", "b")
        assert results(project, "a") == results(project, "b")
        shutil.rmtree(copy)


@pytest.mark.parametrize("case", mostly(EVERYWHERE, ("gae", "gae, full", "rloo")))
def test_going_on_from_every_iteration(project, case):
    run = {"iterations": 6, "keep_last": 6, "evaluate_every": 4}
    project.done("train", project.config(run=run, memory=PINNED, **EVERYWHERE[case]))
    assert project.steps() == [1, 2, 3, 4, 5, 6]
    assert len({row["entropy"] for row in project.metrics()}) == 6  # the policy moves
    resumed_everywhere(project)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("job", ["sft", "reward"])
def test_supervised_jobs_from_every_step(project, job, full):
    section, size = {"sft": ("sft", 2), "reward": ("reward_training", 5)}[job]
    config = project.config(
        job,
        run={"save_every": 1, "keep_last": 100},
        model={"train": "full" if full else "lora"},
        optimizer={"schedule": "linear"},
        **{section: {"epochs": 2, "batch_size": size, "token_dropout": 0.2, "dropout": 0.1}},
    )
    project.done(job, config)
    assert project.steps() == list(range(1, project.steps()[-1] + 1)) and len(project.steps()) >= 6
    assert len(results(project, "a")) >= 2
    resumed_everywhere(project)


@pytest.mark.parametrize(("phase", "at", "saved"), [("score", 1, 0), ("rollout", 3, 2), ("score", 3, 2)])
def test_an_iteration_stopped_in_the_middle_is_done_again(project, phase, at, saved):
    config = config_of(project, {"run": {"iterations": 4, "keep_last": 5, "save_every": 10}})
    project.done("train", config)
    stop(project, "train", config, "b", at=at, phase=phase)
    assert project.steps("b") == [saved]
    project.done("resume", "runs/b")
    assert project.metrics("a") == project.metrics("b")
    whole, parts = project.checkpoints("a"), project.checkpoints("b")
    assert whole.keys() < parts.keys() and all(parts[name] == data for name, data in whole.items())


def test_stopped_between_checkpoints_with_metrics_beyond_the_last(project):
    """As after a kill: the metrics after the last checkpoint are cut and written anew."""
    config = config_of(project, {"run": {"iterations": 4, "keep_last": 5, "save_every": 2}})
    project.done("train", config)
    stop(project, "train", config, "b", at=3)
    rows = (project.run("b") / "metrics.jsonl").read_text()
    (project.run("b") / "checkpoints/000003").rename(project.folder / "lost")
    with open(project.run("b") / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sco')
    assert len(rows.splitlines()) == 3
    project.done("resume", "runs/b")
    same(project, "a", "b")


def test_with_a_reward_model_and_a_critic_that_starts_from_it(project, reward_folders):
    for name, placement, kind in (("a", "adapters", "adapters"), ("c", "folder", "model")):
        reward = [{"kind": "model", "path": str(reward_folders[placement])}]
        config = config_of(project, {"reward": reward, "critic": {"kind": kind}})
        project.done("train", config, "--set", f"run.name={name}")
        stop(project, "train", config, f"{name}2", at=2)
        project.done("resume", f"runs/{name}2")
        same(project, name, f"{name}2")


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_supervised_jobs_in_parts(project, job):
    """Stopped by a signal, with held-out data."""
    held_out = project.jsonl("held.jsonl", [{"text": "a good film", "rating": 5}, {"text": "a bad film", "rating": 1}])
    config = project.config(job, run={"save_every": 2, "keep_last": 1000}, data={"validation": str(held_out)})
    project.done(job, config)
    for at in (1, 5):
        stop(project, job, config, f"at{at}", at=at)
        project.done("resume", f"runs/at{at}")
        assert project.metrics(f"at{at}") == project.metrics("a")
        files = project.checkpoints(f"at{at}")
        assert all(files[name] == data for name, data in project.checkpoints("a").items())
        assert results(project, f"at{at}") == results(project, "a")


def test_resuming_a_finished_run_changes_nothing(project):
    project.done("train", config_of(project, {}))
    before = project.metrics(), project.checkpoints()
    project.done("resume", "runs/a")
    assert (project.metrics(), project.checkpoints()) == before


def test_inputs_that_were_moved_are_found_by_set_and_recognised_by_what_they_hold(project, model_folder):
    config = project.config(run={"iterations": 1})
    (project.folder / "model").unlink()
    shutil.copytree(model_folder, project.folder / "model")
    project.done("train", config)
    text = (project.run() / "config.toml").read_text().replace("iterations = 1", "iterations = 2")
    for old, new in (("model", "m"), ("prompts.jsonl", "p.jsonl"), ("rule.py", "r.py")):
        (project.folder / old).rename(project.folder / new)
    places = [f"--set=model.path={'m'}", "--set=data.prompts=p.jsonl", "--set=reward.0.function=r.py:letters"]
    project.refused(4, "missing since the run was started", "resume", "runs/a", *places[1:2], left=True)
    (project.run() / "config.toml").write_text(text.replace("/prompts.jsonl", "/p.jsonl"))
    project.refused(4, "missing since the run was started", "resume", "runs/a", "--allow-config-change", left=True)
    project.done("resume", "runs/a", *places[:1], *places[2:], "--allow-config-change")
    assert project.steps() == [1, 2]
    assert project.done("verify", "runs/a").startswith("everything is as recorded")


MISTAKEN = {  # key: what is at the new place, and the words
    "model.path": ("other", "differs"),
    "data.prompts": ("texts.jsonl", "not what the run was started with"),
    "reward.0.function": ("other.py:letters", "not what the run was started with"),
    "run.iterations": ("9", "takes only the place of an input"),
    "optimizer.learning_rate": ("1.0", "takes only the place of an input"),
    "run.folder": ("elsewhere", "takes only the place of an input"),
    "lora.rank": ("2", "takes only the place of an input"),
}


def test_something_else_at_the_new_place_is_refused(project, model_folder):
    project.done("train", project.config(run={"iterations": 1}))
    shutil.copytree(model_folder, project.folder / "other")
    config = project.folder / "other/config.json"
    config.write_text(config.read_text() + " ")
    (project.folder / "other.py").write_text((project.folder / "rule.py").read_text() + "# other\n")
    for key, (value, words) in MISTAKEN.items():
        shown = project.refused(2, f"--set {key}: ", "resume", "runs/a", f"--set={key}={value}")
        assert words in shown and len(shown.splitlines()) == 1
    project.refused(2, "there is no such input", "resume", "runs/a", "--set=model.path=nowhere")
