"""`merge`: a folder from which a run starts, whose reference it is."""

import json

import numpy as np
import pytest

from mlx_ppo.runs.targets import load_target


def test_a_run_starts_from_merged_adapters(project):
    project.done("sft", project.config("sft", sft={"epochs": 8}, optimizer={"learning_rate": 2e-2}))
    shown = project.done("merge", "model", "runs/a/adapters", "merged")
    assert (
        shown.startswith("merged: adapters merged into 14 weights of ")
        and "read back, logits differ by at most" in shown
    )
    found = json.loads(project.done("forgetting", "merged", "--base", "runs/a", "--text", "texts.jsonl", "--json"))
    assert found["difference"]["nats"] == pytest.approx(0, abs=0.02) and found["before"]["nats"] < 5
    config = project.config(model={"path": "merged"}, run={"name": "b"}, optimizer={"learning_rate": 1e-9})
    project.done("train", config)
    first = project.metrics("b")[0]
    assert abs(first["kl"]) < 1e-3  # from the merged model
    sizes = {array.shape for name, array in load_target(project.run("b")).weights.arrays.items() if "lora_a" in name}
    assert {shape[1] for shape in sizes} == {4}  # new adapters of the run's own rank
    project.done("export", "runs/b", "adapters-of-b", "--format", "adapters")
    half = project.done("merge", "model", "runs/a/adapters", "half", "--dtype", "bfloat16")
    assert ", bfloat16; they move" in half


def test_a_quantised_model_is_dequantised_and_that_is_said(project, model_folder, quantised):
    project.done("sft", project.config("sft", model={"path": str(quantised(model_folder))}))
    shown = project.done("merge", quantised(model_folder), "runs/a/adapters", "merged")
    assert "the model was quantised, this isn't" in shown
    assert "quantization" not in json.loads((project.folder / "merged" / "config.json").read_text())
    first, second = load_target(project.folder / "merged"), load_target(project.run())
    assert not [name for name in first.trunk.base if name.endswith(".scales")]
    assert np.isfinite(np.array(second.trunk.base["model.norm.weight"])).all()


def test_what_cannot_be_merged(project, tmp_path):
    project.refused(3, "nothing: no such folder of adapters", "merge", "model", "nothing", "merged")
    project.refused(3, "nothing: no such folder", "merge", "nothing", "model", "merged")
    project.refused(2, "model: already there", "merge", "model", "model", "model")
    dora = project.folder / "dora"
    dora.mkdir()
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    config = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": parameters}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    project.refused(
        3,
        "fuse it into the model first (`mlx-ppo merge`)",
        "train",
        project.config(model={"adapter": "dora"}),
        left=True,
    )
