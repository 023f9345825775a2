"""Every health rule fires on what it is for, on rows made for it, and says nothing of rows of a healthy run."""

import json
import random

import pytest

from mlx_ppo.config.health import HealthSection
from mlx_ppo.runs.health import Monitor, collapsed, verdict
from mlx_ppo.runs.health_rules import FLAT, LONG, RECENT, RULES, Facts

HEALTHY = {
    "score": 0.2, "score_deviation": 0.7, "kl": 0.5, "kl_coef": 0.1, "entropy": 3.0, "length": 19.0, "finished": 0.95,
    "repetition": 0.01, "distinct_2": 0.7, "signal": 1.0, "clip_low": 0.03, "clip_high": 0.03, "kl_old": 0.01,
    "effective_samples": 0.97, "explained_variance": 0.2, "policy_norm": 0.3, "beyond/reward": 0.0,
    "score/other": 0.1, "deviation/other": 0.5,
}  # fmt: skip
SICK = {
    "entropy": {"entropy": 0.4},
    "kl": {"kl": 40.0},
    "length": {"length": 60.0},
    "unfinished": {"finished": 0.02},
    "repetition": {"repetition": 0.6},
    "diversity": {"distinct_2": 0.2},
    "beyond": {"beyond/reward": 0.4},
    "judge": {"score": 0.9, "score/other": -0.3},
    "critic": {"explained_variance": -0.1},
    "ratio": {"clip_low": 0.3, "clip_high": 0.2},
    "gradient": {"policy_norm": 15.0},
    "signal": {"signal": 0.0, "score_deviation": 0.0},
    "controller": {"kl": 15.0},
    "plateau": {"total_reward": 0.5},
}

LONGEST = 2 * FLAT + 4  # rows that the slowest rule needs


def facts(**changes):
    levels = changes.pop("section", {})
    return Facts(HealthSection(**levels), 1, 64, 1.0, None, ("other",))._replace(**changes)


def rows(count, change=None, *, since=3, seed=0):
    """A run, its noise a tenth of each figure; from `since` on with other figures."""
    generator = random.Random(seed)
    for step in range(1, count + 1):
        row = {**HEALTHY, **(change if change is not None and step >= since else {})}
        noisy = {key: value * generator.uniform(0.9, 1.1) for key, value in row.items()}
        yield {"step": step, "learning_rate": 5e-4, **noisy}


def followed(run, **given):
    monitor = Monitor(facts(**given))
    return [finding for row in run for finding in monitor.follow(row)], monitor


def test_there_is_a_rule_for_every_key_of_the_section():
    levels = {name for name, field in HealthSection.model_fields.items() if field.default == "warn"}
    assert levels == set(RULES) == set(SICK)


@pytest.mark.parametrize("rule", SICK)
def test_a_rule_speaks_once_of_what_it_is_for_and_no_other_does(rule):
    given = {"target": 6.0} if rule == "controller" else {}
    found, monitor = followed(rows(LONGEST, SICK[rule]), **given)
    assert [finding.rule for finding in found] == [rule] and list(monitor.current) == [rule]
    first = found[0]
    assert 3 + RECENT - 2 <= first.step <= 3 + (2 * FLAT if rule == "plateau" else LONG) and first.level == "warn"
    named = "[[reward]]" if first.key == "reward" else first.key
    assert named in first.sentence and "\n" not in first.sentence and len(first.sentence) < 320
    assert followed(rows(LONGEST, SICK[rule]), section={rule: "off"}, **given)[0] == []
    assert followed(rows(LONGEST, SICK[rule]), section={rule: "stop"}, **given)[0][0].level == "stop"


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_is_left_alone(seed):
    assert followed(rows(60, seed=seed))[0] == []


def test_one_bad_iteration_is_chance():
    run = [{**row, **(SICK["kl"] if row["step"] == 9 else {})} for row in rows(20)]
    assert followed(run)[0] == []


def test_it_is_said_again_when_it_is_much_worse_or_had_gone():
    worse = [{**row, "kl": 30.0 if row["step"] < 20 else 120.0} for row in rows(30)]
    assert [finding.step for finding in followed(worse)[0] if finding.rule == "kl"][1:] == [21]
    sick = {*range(5, 10), *range(20, 25)}
    gone = [{**row, **(SICK["entropy"] if row["step"] in sick else {})} for row in rows(30)]
    found, monitor = followed(gone)
    assert [finding.rule for finding in found] == ["entropy"] * 2 and monitor.current == {}


def test_a_negative_kl_is_another_matter_than_one_that_ran_away():
    found, _ = followed(rows(10, {"kl": -2.0}))
    assert [finding.key for finding in found] == ["rollout.kv_cache"] and "below 0" in found[0].sentence
    assert followed(rows(10, {"kl": -0.1}))[0] == []  # the estimate's chance
    once = [{**row, **({"kl": -20.0} if row["step"] % 4 == 0 else {})} for row in rows(20)]
    assert followed(once)[0] == []


def test_length_both_ways_and_what_never_finished():
    assert "from 19 to 5 tokens" in followed(rows(10, {"length": 5.0}))[0][0].sentence
    found, monitor = followed(rows(10, {"finished": 0.0}, since=1))
    assert [finding.key for finding in found] == ["rollout.max_tokens"] and not collapsed(monitor.current)


def test_thresholds_are_those_of_the_section():
    assert followed(rows(10, {"kl": 40.0}), section={"kl_limit": 5.0})[0] == []
    assert followed(rows(10, {"length": 40.0}), section={"length_factor": 1.5})[0] != []


def test_the_judge_needs_more_where_few_responses_make_chance_larger():
    change = {"score": 0.7, "score/other": -0.25}
    assert [finding.rule for finding in followed(rows(10, change))[0]] == ["judge"]
    assert followed(rows(10, change), responses=4)[0] == []
    assert followed(rows(10, change), judges=())[0] == []
    assert followed(rows(10, {"score": 0.9, "score/other": 0.3}))[0] == []


def test_a_controller_that_brings_the_kl_back_is_left_alone():
    falling = [{**row, "kl": 300.0 * 0.85 ** row["step"]} for row in rows(20)]
    assert "controller" not in {finding.rule for finding in followed(falling, target=6.0)[0]}
    assert followed(rows(20, SICK["controller"]))[0] == []


def rising(per_iteration, count=80, seed=0):
    generator = random.Random(seed)
    return [{**row, "total_reward": per_iteration * row["step"] + generator.gauss(0, 0.06)} for row in rows(count)]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_still_learns_is_no_plateau(seed):
    """Noise of an iteration of 128 responses of a deviation of 0.7."""
    assert followed(rising(0.01, seed=seed))[0] == []
    found, _ = followed(
        [*rising(0.01, 40, seed), *({**row, "total_reward": 0.4} for row in rows(80) if row["step"] > 40)]
    )
    assert (
        [finding.rule for finding in found][:1] == ["plateau"]
        and len(found) < 3
        and 50 <= found[0].step <= 40 + 2 * FLAT
    )
    assert followed(rising(0.0, seed=seed), target=6.0)[0] == []  # another objective in every iteration


@pytest.mark.parametrize("seed", range(5))
def test_the_end_of_a_schedule_is_no_plateau(seed):
    """A rate that falls to 0 ends what a run gains; halfway down, what doesn't rise is still said."""
    flat = [{**row, "total_reward": 0.9} for row in rising(0.0, 110, seed)]
    falling = [{**row, "learning_rate": 5e-4 * (1 - row["step"] / 110)} for row in flat]
    assert [finding.rule for finding in followed(falling)[0]] == ["plateau"]
    late = [{**row, "total_reward": min(0.02 * row["step"], 1.3)} for row in falling]
    early = [{**row, "learning_rate": 5e-4} for row in late]
    assert followed(late)[0] == []
    assert [finding.rule for finding in followed(early)[0]] == ["plateau"]


def test_rows_without_a_column_are_passed_over():
    bare = [
        {key: row[key] for key in ("step", "score", "kl", "length", "entropy")} for row in rows(20, SICK["entropy"])
    ]
    assert [finding.rule for finding in followed(bare)[0]] == ["entropy"]


@pytest.mark.parametrize("cut", range(1, 20, 3))
def test_a_resumed_run_says_the_same(cut):
    """The monitor follows the rows that were logged; what it says afterwards is what it would have said."""
    run = list(rows(20, {**SICK["kl"], **SICK["diversity"], **SICK["critic"]}))
    whole = followed(run)[0]
    monitor = Monitor(facts())
    before = [finding for row in map(json.loads, map(json.dumps, run[:cut])) for finding in monitor.follow(row)]
    again = Monitor(facts())
    for row in run[:cut]:
        again.follow(row)
    assert before + [finding for row in run[cut:] for finding in again.follow(row)] == whole != []


def test_a_collapse_is_told_from_a_lesser_trouble():
    _, monitor = followed(rows(10, {**SICK["kl"], **SICK["unfinished"]}))
    assert collapsed(monitor.current) and verdict(monitor.current)[0].startswith("THE POLICY COLLAPSED")
    assert len(verdict(monitor.current)) == 3
    _, monitor = followed(rows(10, SICK["repetition"]))
    assert collapsed(monitor.current)
    _, monitor = followed(rows(20, {**SICK["kl"], **SICK["critic"]}))
    assert not collapsed(monitor.current) and [line[:10] for line in verdict(monitor.current)] == [
        "health.kl:",
        "health.cri",
    ]
    assert verdict({}) == []
