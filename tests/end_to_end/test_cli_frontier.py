"""`mlx-ppo frontier`: a run's share of the optimum, from the command to the report."""

import base64
import json

import pytest

from mlx_ppo.studio.frontier import kept


@pytest.fixture
def trained(project):
    project.done("train", project.config(kl={"coef": 0.1}))
    return project


def test_the_share_of_the_optimum_of_a_run(trained):
    shown = trained.done("frontier", "runs/a", "--samples", 8, "--prompts", 4, "--picture", "a.svg")
    assert "3 held-out prompts, 8 samples each of the reference" in shown and "\nbest of 8 " in shown
    assert "\npolicy  " in shown and "\noptimum, at least" in shown
    assert (trained.folder / "a.svg").read_text().startswith("<svg ")
    found = json.loads((trained.run() / "frontier.json").read_text())
    assert found["coef"] == 0.1 and found["step"] == trained.steps()[-1]
    assert found["optimum"]["value"][0] >= found["policy"]["value"][0] - 1e-6
    gains = [one["gain"] for one in found["best_of"]]
    assert gains == sorted(gains) and abs(gains[0]) < 1e-6
    assert found["evaluations"][0]["step"] == 0
    again = json.loads(trained.done("frontier", "runs/a", "--samples", 8, "--prompts", 4, "--json"))
    assert again == found  # the same draws, whenever it is asked
    trained.done("verify", "runs/a")
    trained.done("report", "runs/a", "--output", "a.html")
    assert (
        "best possible" in kept_text(trained.run()) and "data:image/svg+xml" in (trained.folder / "a.html").read_text()
    )


def kept_text(run):

    picture = kept(run)["picture"].partition(",")[2]
    return base64.b64decode(picture).decode()


def test_the_reference_itself_is_at_none_of_it(trained):
    """A policy that is the reference gains nothing at no KL."""
    first = trained.run() / "checkpoints"
    step = trained.steps()[0]
    found = json.loads(
        trained.done("frontier", first / f"{step:06d}", "--samples", 4, "--prompts", 4, "--coef", 0.5, "--json")
    )
    assert found["step"] == step and found["coef"] == 0.5


def test_what_cannot_be_asked(trained, reward_folders):
    trained.refused(2, "not a run folder", "frontier", "nothing")
    trained.refused(2, "a frontier is that of a run of `train`", "frontier", reward_folders["adapters"].parent)
    trained.refused(3, "no such checkpoint", "frontier", trained.run() / "checkpoints" / "000999")
    (trained.folder / "there.svg").write_text("mine")
    trained.refused(2, "there.svg: already there", "frontier", "runs/a", "--picture", "there.svg")
    assert (trained.folder / "there.svg").read_text() == "mine"
    trained.refused(2, "the folder none isn't there", "frontier", "runs/a", "--picture", "none/a.svg")
    for coef in (1e-300, 1e300):
        trained.refused(2, "tilts nothing that can be sampled", "frontier", "runs/a", "--coef", coef)
    trained.done("train", trained.config(kl={"coef": 0.0}, run={"name": "b"}))
    trained.refused(2, "trained without a penalty", "frontier", "runs/b", "--prompts", 2, "--samples", 2)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"best_of": 3}', '{"best_of": [], "tilted": []}', "\udcff"]
)
def test_a_file_that_is_no_result_is_left_out_of_the_report(trained, content):
    (trained.run() / "frontier.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    trained.done("report", "runs/a", "--output", "a.html")
    assert kept(trained.run()) is None
