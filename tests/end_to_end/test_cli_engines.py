"""The two engines on a CPU: the same run up to rounding, and a clear line for a name that none has."""

import json

import pytest
from thorough import mostly

from mlx_ppo.bundle import copy_example
from mlx_ppo.compute.choose import SWITCH
from mlx_ppo.runs.folder import METRICS, SAMPLES

SHORT = {
    "run.iterations": 2,
    "run.evaluate_every": 1,
    "rollout.prompts": 16,
    "data.eval_count": 16,
    "critic.warmup_iterations": 0,
}
TIMES = ("seconds", "tokens_per_second", "memory")
ERRORS = ("ratio_error", "logprob_error")  # nothing but rounding: small with both engines
KINDS = ("evaluation", "rollout")
REMARK = "computed by the portable engine"


@pytest.mark.slow
@pytest.mark.parametrize("config", mostly(["reviews", "reviews-lora"], ("reviews-lora",)))
def test_the_engines_train_alike(project, monkeypatch, config):
    """The bundled example's first two iterations: figures that differ by rounding, and the same completions.

    A few may differ from a token on whose draw lies on the bound between two tokens, after sixteen steps of AdamW.
    """
    copy_example(project.folder / "new")
    found = []
    for engine in ("cpu", "portable"):
        monkeypatch.setenv(SWITCH, engine)
        settings = {**SHORT, "run.name": engine}
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        result = project.cli("train", f"new/configs/{config}.toml", *changes)
        assert result.exit_code == 0, result.output
        assert (REMARK in result.output) == (engine == "portable")
        folder = project.folder / "new/runs" / engine
        found.append([rows(folder / name) for name in (METRICS, SAMPLES)])
    (metrics, samples), (others, more) = found
    completions, other_completions = map(completions_of, (samples, more))
    assert completions.keys() == other_completions.keys() and len(completions) == 50
    alike = {key for key, text in completions.items() if text == other_completions[key]}
    assert alike >= {key for key in completions if key[0] == 0}, "nothing is trained yet"
    assert len(alike) >= 0.9 * len(completions)
    assert len(metrics) == len(others) == 2
    for row, other, rounding in zip(metrics, others, (1e-4, 1e-2), strict=True):
        wanted = {key: value for key, value in row.items() if key.partition("/")[0] not in TIMES + ERRORS}
        assert {key: other[key] for key in wanted} == pytest.approx(wanted, rel=rounding, abs=1e-5)
        assert all(0 <= each[key] < 1e-4 for key in ERRORS for each in (row, other))


def completions_of(samples):
    """By step, kind and prompt."""
    return {(row["step"], row["kind"], row["prompt"]): row["completion"] for row in samples if row["kind"] in KINDS}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("job", ["train", "sft", "reward"])
def test_an_unknown_engine_is_refused(project, monkeypatch, job):
    config = project.config(job)
    monkeypatch.setenv(SWITCH, "cuda")
    shown = project.refused(2, "MLX_PPO_ENGINE: no engine is called 'cuda'; choose cpu or portable", job, config)
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [("doctor",), ("plan", "train.toml"), ("bench", "train.toml"), ("sample", "model", "--prompt", "the film")],
)
def test_other_commands_refuse_an_unknown_engine(project, monkeypatch, command):
    project.config()
    monkeypatch.setenv(SWITCH, "cuda")
    shown = project.refused(2, "MLX_PPO_ENGINE: no engine is called 'cuda'; choose cpu or portable", *command)
    assert len(shown.splitlines()) == 1
