"""Folders of runs as `train`, `sft` and `reward` leave them, without training."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></script>&lt;b&gt;",
    "before \u202egnitset\u202c after \u2067isolated",
    "null \0 bell \a escape \x1b[31m end",
    "شكرا 🙂 family 👩‍👩‍👧 z\u0334\u0335\u0336a",
    "long " + "x" * 1_000_000,
)
KINDS = ("rollout", "best", "worst", "chance")


def row(step: int, **values: Any) -> dict[str, Any]:
    """A row of metrics.jsonl, its values made of the step alone."""
    draw = random.Random(step)
    wave = math.sin(step / 50) + draw.random()
    columns = {
        "score": wave, "score_deviation": 0.8, "score_low": wave - 1, "score_median": wave, "score_high": wave + 1,
        "reward": wave - 0.1, "kl": 0.01 * step, "kl_token": 0.001 * step, "kl_coef": 0.1, "entropy": 3.0,
        "length": 18 + wave, "finished": 0.97, "clip_low": 0.02, "clip_high": 0.03, "kl_old": 0.01,
        "effective_samples": 0.98, "policy_loss": -0.03, "policy_norm": 0.25, "ratio_error": 1.5e-6,
        "logprob_error": 8e-7, "explained_variance": 0.4, "value_loss": 0.2, "critic_norm": 1.0, "score/reward": wave,
        "score/length": -wave, "points/reward": wave, "learning_rate": 0.002, "time": 1.79e9 + 2 * step, "seconds": 1.5,
        "seconds/rollout": 0.5, "seconds/update policy": 0.7, "tokens_per_second": 800.0 + step % 7, "memory": 0.05,
    }  # fmt: skip
    return {"step": step, **columns, **values}


def text_rows(step: int, kind: str, texts: tuple[str, ...] = (), prompts: int = 1) -> list[dict[str, Any]]:
    """Rows of samples.jsonl of one kind."""
    texts = texts or (f" {kind} words of iteration {step}, and a few more",)
    return [
        {"step": step, "kind": kind, "prompt": f"prompt {at}", "completion": texts[at % len(texts)], "score": 0.5}
        for at in range(prompts)
    ]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)


def write(folder: Path, config: str, command: str = "train", **logs: list[dict[str, Any]]) -> Path:
    """A run's folder with these logs, by their names without `.jsonl`."""
    folder.mkdir(parents=True)
    record = {"format": 1, "command": command, "versions": {"mlx-ppo": "0.2.0"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(config)
    (folder / "lock").touch()
    for name, rows in logs.items():
        (folder / f"{name}.jsonl").write_text(lines(rows), "utf-8")
    return folder


def make(folder: Path, steps: int, *, total: int | None = None, texts: tuple[str, ...] = ()) -> Path:
    """A run of `train` after so many iterations, an evaluation every 25."""
    samples = [*text_rows(0, "evaluation", texts, 4), {"step": 0, "kind": "summary", "score": 0.1}]
    for step in range(1, steps + 1):
        samples += [each for kind in KINDS for each in text_rows(step, kind, texts)]
        if step % 25 == 0:
            samples += [*text_rows(step, "evaluation", texts, 4), {"step": step, "kind": "summary", "score": 0.1}]
    phases = {"rollout": {"mlx_bytes": 100 << 20, "numpy_bytes": 0}, "load": {"mlx_bytes": 1 << 20, "numpy_bytes": 0}}
    write(
        folder,
        f"[run]\niterations = {total or steps}\n\n[health]\nkl = 'warn'\n",
        metrics=[row(step) for step in range(1, steps + 1)],
        memory=[{"step": step, "rollout": 50 << 20} for step in range(1, steps + 1)],
        samples=samples,
    )
    (folder / "plan.json").write_text(json.dumps({"phases": phases}))
    return folder


def append(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(lines(rows))


def cut(folder: Path, step: int) -> None:
    """What `resume` does to the logs."""
    for path in folder.glob("*.jsonl"):
        kept = [each for each in map(json.loads, path.read_text("utf-8").split("\n")[:-1]) if each["step"] <= step]
        other = path.with_suffix(".new")
        other.write_text(lines(kept), "utf-8")
        os.replace(other, path)
