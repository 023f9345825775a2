"""What a reward model says of the pairs that a person compares blind, in a process of its own.

Its argument is an `Order` as JSON, whose set is filled first. The margins go into a file beside the set's.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_ppo.comparison import ByReward, Pair
from mlx_ppo.models.heads import load_reward_model
from mlx_ppo.runs.targets import load_target
from mlx_ppo.studio.feedback import write_rows
from mlx_ppo.studio.lines import Lines
from mlx_ppo.studio.order import Order, margins_of
from mlx_ppo.studio.sampling import obey, sample


def main(argument: str) -> int:
    """Judge every pair of the set; the exit code."""
    return obey(argument, lambda order: f"{judge(order)} pairs judged by {order.reward}")


def judge(order: Order) -> int:
    """Write the margin of each pair of the set, above 0 where its second completion is the better one.

    Returns:
        How many pairs there are.
    Raises:
        UserError: a model, the prompts or the reward model can't be read.
    """
    sample(order._replace(reward=""))
    kept = Lines(Path(order.file))
    rows = kept.read()
    model = load_reward_model(Path(order.reward), load_target(Path(order.models[0])).trunk)
    pairs = [Pair(row["shown"], {"prompt": row["prompt"]}, row["a"], row["b"]) for row in rows]
    margins: Sequence[float] = ByReward(model).margins(pairs).tolist() if pairs else []
    judged = [{"id": row["id"], "margin": margin} for row, margin in zip(rows, margins, strict=True)]
    write_rows(margins_of(Path(order.file)), judged)
    return len(judged)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
