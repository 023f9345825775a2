"""How near runs of the bundled example come to the best policy that their penalty allows, by setting and seed.

    python benchmarks/optimum.py [--seeds 5] [--settings shipped LoRA ...] [--folder DIR] [--json FILE]

Each run is one of `mlx-ppo train`, then of `mlx-ppo frontier`; both are processes of their own. The table has a row for
each setting, with the mean over the seeds and the lowest and highest: gain in score, KL, gain - kl.coef KL, the share
of the optimum (see docs/frontier.md), distinct 2-grams of the completions of held-out prompts, and seconds of training
without the evaluations. Runs that are in DIR already aren't done again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_ppo.bundle import example_config, lora_example
from mlx_ppo.runs.folder import FRONTIER, METRICS, SAMPLES, Run

COMMAND = "from mlx_ppo.cli.main import main; main()"
SHIPPED, LORA = example_config(), lora_example()
SETTINGS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "shipped": (SHIPPED, ()),
    "LoRA": (LORA, ()),
    "lambda_policy 0.95": (SHIPPED, ("ppo.lambda_policy=0.95",)),
    "value_clip 0.2": (SHIPPED, ("ppo.value_clip=0.2",)),
    "critic on the policy's states": (SHIPPED, ("critic.kind=head",)),
    "critic from the policy": (SHIPPED, ("critic.initialise=policy",)),
    "LoRA, else as shipped": (SHIPPED, ("model.train=lora", "lora.rank=16", "optimizer.learning_rate=2e-3")),
}


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["shipped", "LoRA"])
    parser.add_argument("--samples", type=int, default=128, help="of `mlx-ppo frontier`")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        found = {
            name: [of_run(folder.resolve(), name, seed, given.samples) for seed in range(given.seeds)]
            for name in given.settings
        }
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    columns = list(next(iter(found.values()))[0])
    print(f"| setting | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, rows in found.items():
        print(f"| {name} | {' | '.join(_spread([row[column] for row in rows]) for column in columns)} |")


def of_run(folder: Path, setting: str, seed: int, samples: int) -> dict[str, float]:
    """Figures of one run, which is trained where it isn't there yet."""
    name = f"{setting.replace(' ', '-').replace(',', '').replace(chr(39), '')}-{seed}"
    run, (config, changes) = folder / name, SETTINGS[setting]
    if not (run / FRONTIER).is_file():
        options = [f"run.folder={folder}", f"run.name={name}", f"run.seed={seed}", *changes]
        _command("train", str(config), *(part for option in options for part in ("--set", option)))
        _command("frontier", str(run), "--samples", str(samples))
    document = json.loads((run / FRONTIER).read_text("utf-8"))
    last = [row for row in Run(run).rows(SAMPLES) if row.get("kind") == "summary"][-1]
    return figures(document, last, sum(row["seconds"] for row in Run(run).rows(METRICS)))


def figures(document: dict[str, Any], last: dict[str, Any], seconds: float) -> dict[str, float]:
    """Of what `frontier` found, the last evaluation, and the iterations' seconds."""
    policy = document["policy"]
    return {
        "gain": policy["gain"][0],
        "KL": policy["kl"][0],
        "gain - coef KL": policy["value"][0],
        "optimum, at least": document["optimum"]["value"][0],
        "share": document["share"][0],
        "distinct 2-grams": last["distinct_2"],
        "seconds": seconds,
    }


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
