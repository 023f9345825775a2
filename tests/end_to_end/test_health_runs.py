"""The bundled example trained for real: sick runs are recognised, healthy ones left alone."""

import json

import pytest
from click.testing import CliRunner
from thorough import mostly

from mlx_ppo.bundle import bundle_root, lora_example
from mlx_ppo.cli.main import main
from mlx_ppo.runs.folder import HEALTH

pytestmark = pytest.mark.slow

REWARDS = """
def constant(completions):
    return [1.0] * len(completions)

def shorter(completions):
    return [-len(text) / 20 for text in completions]

def unkind(completions):
    return [float(sum(text.count(word) for word in (" bad", " dull", " no", "n't", " too"))) for text in completions]
"""
STEADY = ["critic.warmup_iterations=0", "kl.coef=0.0", "score.truncated=none"]
SICK = {
    "rate": ([], ["optimizer.learning_rate=0.1"], {"entropy", "kl", "unfinished", "repetition", "diversity"}),
    "constant reward": (["constant"], ["score.truncated=none"], {"signal"}),
    "constant reward, no critic": (
        ["constant"],
        ["ppo.advantage=grpo", "rollout.samples_per_prompt=4", "score.truncated=none"],
        {"signal"},
    ),
    "reward for short texts": (["shorter"], [*STEADY, "optimizer.learning_rate=5e-3"], {"length"}),
    "a judge that disagrees": (["unkind", "judge"], [*STEADY, "optimizer.learning_rate=5e-3"], {"judge"}),
    "large scores": ([], ["critic.warmup_iterations=0", "reward.0.weight=1000"], {"gradient"}),
    "a critic that doesn't learn": ([], ["critic.warmup_iterations=0", "critic.learning_rate=1e-9"], {"critic"}),
    "no room": ([], ["rollout.max_tokens=4"], {"unfinished"}),
    "a controller without effect": (
        [],
        ["kl.controller=adaptive", "kl.target=0.1", "kl.horizon=1e6", "optimizer.learning_rate=5e-3"],
        {"controller"},
    ),
}


OFTEN = ("constant reward", "reward for short texts", "a judge that disagrees", "a critic that doesn't learn")


def train(folder, *overrides, rewards=()):
    """Train the example for 12 iterations of 32 responses; the output, and the rules that spoke."""
    (folder / "rewards.py").write_text(REWARDS)
    text = lora_example().read_text().replace("../models", f"{bundle_root()}/models")
    before, _, after = text.partition("[[reward]]")
    own = f'kind = "model"\npath = "{bundle_root()}/models/reviews/reward"\n'
    sources = {name: f'kind = "function"\nfunction = "rewards.py:{name}"\n' for name in rewards if name != "judge"}
    sources |= {"judge": f"{own}weight = 0.0\n"} if "judge" in rewards else {}
    blocks = "".join(f"[[reward]]\n{source}\n" for source in sources.values() or (own,))
    config = folder / "sick.toml"
    config.write_text(before + blocks + after[after.index("[score]") :])
    keys = ["run.iterations=12", "rollout.prompts=32", "run.evaluate_every=0", "data.eval_count=2", "run.name=a"]
    keys += [f"run.folder={folder}", *overrides]
    given = [part for key in keys for part in ("--set", key)]
    result = CliRunner().invoke(main, ["train", str(config), *given])
    assert result.exit_code == 0, result.output
    log = folder / "a" / HEALTH
    return result.stdout, {json.loads(line)["rule"] for line in log.read_text().splitlines()} if log.exists() else set()


@pytest.mark.parametrize("case", mostly(SICK, OFTEN))
def test_sick_runs_are_recognised(tmp_path, case):
    rewards, overrides, wanted = SICK[case]
    shown, found = train(tmp_path, *overrides, rewards=rewards)
    assert wanted <= found, (found, shown)
    assert all(f"health.{rule}: " in shown for rule in found)


def test_a_collapsed_policy_ends_with_that_word_and_no_proud_table(tmp_path):
    shown, _ = train(tmp_path, "optimizer.learning_rate=0.1", *STEADY)
    closing = shown.split("iteration 12/12")[1]
    assert closing.index("THE POLICY COLLAPSED") < closing.index("held-out prompts"), shown


@pytest.mark.parametrize("seed", mostly(range(10), (0,)))
def test_healthy_runs_are_left_alone(tmp_path, seed):
    shown, found = train(tmp_path, f"run.seed={seed}")
    assert found == set() and "health." not in shown


@pytest.mark.parametrize("advantage", mostly(["grpo", "dr_grpo", "rloo"], ("rloo",)))
def test_healthy_runs_without_a_critic_are_left_alone(tmp_path, advantage):
    keys = (f"ppo.advantage={advantage}", "rollout.prompts=8", "rollout.samples_per_prompt=4")
    assert train(tmp_path, *keys)[1] == set()
