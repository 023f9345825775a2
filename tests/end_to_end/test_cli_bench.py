"""`mlx-ppo bench`: what it measures, what it compares, what it refuses."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

SMALL = ("--set", "rollout.prompts=4", "--set", "rollout.max_tokens=6", "--iterations", "2", "--prompt-tokens", "5")
PRODUCTS = {
    "rollout prefill", "rollout decode", "score policy", "score critic", "score reward", "score reference",
    "update policy", "update critic", "iteration",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch):
    """The machine's own speed takes seconds to measure, and isn't what these tests look at."""
    from mlx_ppo.cli import bench

    monkeypatch.setattr(bench, "gigaflops", lambda side, dtype: {mx.float32: 100.0, mx.bfloat16: 200.0}[dtype])
    monkeypatch.setattr(bench, "gigabytes", lambda: 10.0)


@pytest.fixture
def kept(project):
    """A result of the tiny model's folder in `kept.json`, and its content."""
    shown = json.loads(project.done("bench", "model", *SMALL, "--output", "kept.json", "--json"))
    assert json.loads((project.folder / "kept.json").read_text()) == shown
    return shown


def test_the_peak_is_that_of_the_type_that_is_computed_in(project):
    for dtype, peak in (("float32", 100.0), ("bfloat16", 200.0)):
        result = json.loads(project.done("bench", "model", *SMALL, "--set", f"model.dtype={dtype}", "--json"))
        assert result["shapes"]["computed in"] == dtype and result["ceilings"]["gigaflops"] == peak
        row = result["phases"]["update policy"]
        assert row["share_of_peak"] == pytest.approx(row["gflops_per_second"] / peak)


def test_a_busy_machine_is_told(project, monkeypatch):
    from mlx_ppo.cli import bench

    for busy in (0.1, 1.6):
        monkeypatch.setattr(bench.Load, "others", busy * bench.cores())
        shown = project.done("bench", "model", *SMALL, "--output", f"{busy}.json")
        assert ("warning: other programs kept" in " ".join(shown.split())) == (busy > 1)
    shown = project.done("bench", "model", *SMALL, "--compare", "0.1.json")
    assert "processors that others kept busy" in shown


def test_every_phase_has_its_seconds_tokens_operations_and_bytes(project, kept):
    phases = kept["phases"]
    assert set(phases) == {*PRODUCTS, "update step", "between"}
    assert {name for name, row in phases.items() if "gflop" in row} == PRODUCTS
    tokens = {name: row["tokens"] for name, row in phases.items() if "tokens" in row}
    assert tokens["rollout prefill"] == 4 * 5 and tokens["rollout decode"] == 4 * 5 and tokens["iteration"] == 4 * 6
    assert tokens["score policy"] == 4 * 6 and tokens["update critic"] == 2 * 4 * 6
    for row in phases.values():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        if "gflop" in row:
            speed = row["gflop"] / row["seconds"]
            assert math.isclose(row["gflops_per_second"], speed) and math.isclose(row["share_of_peak"], speed / 100)
    decode = phases["rollout decode"]
    assert decode["share_of_bandwidth"] == decode["gb_per_second"] / 10 > 0
    parts = sum(row["seconds"] for name, row in phases.items() if name != "iteration")
    assert math.isclose(parts, phases["iteration"]["seconds"], rel_tol=0.3)
    assert kept["shapes"]["lora.layers"] == 8 and kept["versions"]["mlx"]
    assert kept["shapes"]["model"] == (project.folder / "model").resolve().name


def test_a_configuration_gives_its_own_shapes(project):
    config = project.config(critic={"kind": "head"}, ppo={"epochs": 3, "minibatches": 1})
    found = json.loads(project.done("bench", config, "--iterations", "1", "--json"))
    shapes = found["shapes"]
    assert (shapes["critic.kind"], shapes["ppo.epochs"], shapes["rollout.max_tokens"]) == ("head", 3, 6)
    assert shapes["prompt tokens"] == 7  # "is it not in the story", and BOS
    assert "score critic" not in found["phases"] and "score reward" not in found["phases"]
    assert not (project.folder / "runs").exists()


def test_the_table_says_it_for_people(project):
    shown = project.done("bench", "model", *SMALL)
    assert "4 responses, 5 + 6 tokens, 2 epochs" in shown and "rollout decode" in shown
    assert "peak: 100 GFLOP/s" in shown and "10 GB/s" in shown


def test_what_changed_since_an_earlier_result_is_shown(project, kept):
    earlier = json.loads(json.dumps(kept))
    for name in ("seconds", "fastest", "slowest"):
        earlier["phases"]["update policy"][name] *= 1000
    earlier["phases"]["score nothing"] = earlier["phases"].pop("score critic")
    earlier["versions"]["mlx"] = "0.1"
    earlier["shapes"]["rollout.prompts"] = 2
    earlier["device"] = "CPU: another\x1b[2J"
    (project.folder / "earlier.json").write_text(json.dumps(earlier))
    arguments = ("bench", "model", *SMALL, "--compare", "earlier.json")
    found = json.loads(project.done(*arguments, "--json"))["compared"]
    assert found["differs"] == [
        f"mlx: 0.1 -> {kept['versions']['mlx']}",
        f"device: CPU: another\x1b[2J -> {kept['device']}",
        "rollout.prompts: 2 -> 4",
    ]
    change = found["phases"]["update policy"]
    assert change["beyond"] and change["ratio"] < 0.1 and change["ratio"] == change["after"] / change["before"]
    assert found["phases"]["score nothing"]["after"] is None and found["phases"]["score critic"]["before"] is None
    shown = project.done(*arguments)
    assert "differs: rollout.prompts: 2 -> 4" in shown and "\x1b" not in shown
    row = next(line for line in shown.splitlines() if "update policy" in line and "*" in line)
    assert "0.0" in row


def test_nothing_differs_from_itself(kept):
    from mlx_ppo.bench.throughput import changes, differences

    assert differences(kept, kept) == []
    assert all(one.ratio == 1 and not one.beyond for one in changes(kept, kept).values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON; name a file that mlx-ppo bench --output wrote"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a result of this version's mlx-ppo bench --output, or damaged"),
        ({"format": 2}, "not a result"),
        ({"phases": {}}, "not a result"),
        ({"phases": {"iteration": 3}}, "not a result"),
        ({"phases": {"iteration": {"seconds": 1, "fastest": 1, "slowest": "2"}}}, "not a result"),
        ({"phases": {"iteration": {"seconds": math.nan, "fastest": 1, "slowest": 2}}}, "not a result"),
        ({"ceilings": {"gigaflops": 1}}, "not a result"),
        ({"versions": []}, "not a result"),
        ({"busy": "much"}, "not a result"),
    ],
)
def test_damaged_results_are_refused_before_anything_is_measured(project, content, words):
    row = {"seconds": 1.0, "fastest": 1.0, "slowest": 1.0}
    good = {"format": 1, "python": "3", "machine": "x", "device": "CPU", "processors": 1, "versions": {}, "shapes": {}}
    good |= {"phases": {"iteration": row}, "ceilings": {"gigaflops": 1.0, "gigabytes": 1.0}}
    text = content if isinstance(content, str) else json.dumps(good | content)
    (project.folder / "old.json").write_text(text)
    for option in ("--compare", "--output"):
        shown = project.refused(3, f"old.json: {words}", "bench", "model", option, "old.json")
        assert len(shown.splitlines()) == 1


def test_what_is_no_model_and_no_place_is_refused_in_one_line(project):
    (project.folder / "empty").mkdir()
    for code, words, *arguments in (
        (3, "empty: no config.json in this folder", "empty"),
        (3, "nothing is ever downloaded", "org/model-7b"),
        (2, "none.toml: no such configuration file", "none.toml"),
        (3, "none.json: cannot be read (No such file or directory)", "model", "--compare", "none.json"),
        (2, "there is no folder none", "model", "--output", "none/a.json"),
        (3, "empty: cannot be read (Is a directory)", "model", "--output", "empty"),
        (2, "--set ppo.minibatches=99: ppo.minibatches: more than the 16 responses", "model", "--set",
         "ppo.minibatches=99"),
        (2, "memory.budget_gb: the run needs", "model", "--set", "memory.budget_gb=0.1"),
    ):  # fmt: skip
        shown = project.refused(code, words, "bench", *arguments)
        assert len(shown.splitlines()) == 1


def test_a_damaged_model_is_refused_and_nothing_kept(project, model_folder, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    project.refused(3, "truncated", "bench", Path(own), *SMALL, "--output", "kept.json")
