"""What runs behind a wall of the system's for `doctor --offline-proof`: a look round, then a short training.

`python -m mlx_ppo.cli.proof RUNS` first prints what it sees as a line of JSON.
"""

import json
import sys

from mlx_ppo.runtime.surroundings import look_round

_SMALL = (
    "run.name=proof",
    "run.iterations=2",
    "critic.warmup_iterations=0",
    "data.eval_count=4",
    "rollout.prompts=8",
    "rollout.max_tokens=12",
    "ppo.epochs=1",
    "ppo.minibatches=2",
)


def main(runs: str) -> None:
    """Say what is round this process and, where that is a wall, train the bundled example a little."""
    seen = look_round()
    print(json.dumps(seen), flush=True)
    if seen.walled:
        from mlx_ppo.cli.main import main as command

        settings = [part for value in (f"run.folder={runs}", *_SMALL) for part in ("--set", value)]
        sys.argv = ["mlx-ppo", "train", *settings]
        command()


if __name__ == "__main__":
    main(sys.argv[1])
