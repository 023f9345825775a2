"""Whether a long run needs more memory or time as it goes on: 200 iterations of the bundled example, made smaller.

    python benchmarks/no_growth.py [--json FILE] [--iterations N]

The real training loop with logs and checkpoints, 8 prompts, responses of at most 16 tokens. After every iteration:
seconds, the process's resident bytes, and bytes in mlx's arrays. The table has the medians of the first and the last
quarter. The policy learns, so lengths of responses change; seconds a token are given as well.
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import mlx.core as mx
import psutil

from mlx_ppo.bundle import example_config
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.runs.folder import Run, create_run
from mlx_ppo.runtime.allocator import keeping_buffers
from mlx_ppo.runtime.signals import catching_interrupts
from mlx_ppo.train import train

SMALLER = ("rollout.prompts=8", "rollout.max_tokens=16", "data.eval_count=8", "run.save_every=25")


class Watcher:
    """A reporter that looks at memory after every iteration."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._process = psutil.Process()

    def message(self, text: str) -> None:
        pass

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        pass

    def tokens(self, count: int) -> None:
        pass

    def iteration(self, metrics: Mapping[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        self.rows.append(
            {
                "seconds": metrics["seconds"],
                "seconds a 1000 tokens": 1000 / metrics["tokens_per_second"],
                "resident, MB": self._process.memory_info().rss / 1e6,
                "mlx's arrays, MB": mx.get_active_memory() / 1e6,
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--iterations", type=int, default=200)
    given = parser.parse_args()
    watcher = Watcher()
    with tempfile.TemporaryDirectory() as folder, keeping_buffers(), catching_interrupts() as interrupts:
        overrides = (f"run.folder={folder}", f"run.iterations={given.iterations}", *SMALLER)
        config = read_config(TrainConfig, example_config(), overrides)
        with Run(create_run(config, config.run.folder, config.run.name)) as run:
            train(config, run, watcher, interrupts)
    quarter = len(watcher.rows) // 4
    print(f"| {len(watcher.rows)} iterations, medians | first quarter | last quarter | ratio |\n|---|---|---|---|")
    for name in watcher.rows[0]:
        first, last = (median(row[name] for row in part) for part in (watcher.rows[:quarter], watcher.rows[-quarter:]))
        print(f"| {name} | {first:.3f} | {last:.3f} | {last / first:.3f} |")
    if given.json is not None:
        given.json.write_text(json.dumps(watcher.rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
