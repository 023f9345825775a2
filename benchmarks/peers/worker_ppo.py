"""`mlx_ppo.train.train`, an iteration a turn: everything a run does, its log and its metrics included."""

import tempfile
from pathlib import Path
from typing import Any

from turns import Turns

TURNS = Turns()

from mlx_ppo import train as story  # noqa: E402
from mlx_ppo.bench.dry_run import _Endless  # noqa: E402
from mlx_ppo.config.sections import TrainConfig  # noqa: E402
from mlx_ppo.runs.folder import Run, create_run  # noqa: E402
from mlx_ppo.runtime.signals import Interrupts  # noqa: E402


class Reporter:
    """Waits for its turn before each iteration, and reports after it."""

    def __init__(self) -> None:
        self.sampled = 0

    def message(self, text: str) -> None:
        TURNS.note(text)

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        if name == "rollout":
            TURNS.wait()
            self.sampled = 0
        TURNS.phase(name)

    def tokens(self, count: int) -> None:
        self.sampled += count

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        TURNS.done(score=metrics["score"], kl=metrics["kl"], tokens=self.sampled, plan_gib=metrics["memory"])


def without_end() -> None:
    """No response ends before its bound, as with the others."""
    load = story.load_roles

    def loading(*given: Any) -> Any:
        found = load(*given)
        found[0].trunk.tokenizer = _Endless(found[0].trunk.tokenizer)
        return found

    story.load_roles = loading


def main() -> None:
    without_end()
    with tempfile.TemporaryDirectory() as name:
        document = TURNS.order["config"]
        document["run"] = {"iterations": 1_000_000, "save_every": 1_000_000, "seed": TURNS.order["seed"]}
        document["data"] = {"prompts": Path(TURNS.order["prompts"]).with_suffix(".jsonl"), "eval_count": 1}
        document["model"]["path"] = Path(TURNS.order["model"])
        for source in document["reward"]:
            if "path" in source:
                source["path"] = Path(source["path"])
        config = TrainConfig.model_validate(document)
        with Run(create_run(config, Path(name), "benchmark")) as run:
            story.train(config, run, Reporter(), Interrupts())


main()
