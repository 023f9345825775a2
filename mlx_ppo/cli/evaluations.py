"""The commands that measure a run against what it began from, or against what needs no training."""

from pathlib import Path
from typing import Any

import click

from mlx_ppo.cli.options import MAX_TOKENS, Place, drawing


@click.command("best-of")
@click.argument("model", type=Place())
@click.option("--n", "samples", type=click.IntRange(2, 4096), default=16, show_default=True, help="Samples a prompt.")
@click.option("--prompt", "texts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=Place(), help="JSONL of prompts; by default those of a run's evaluations.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Prompts taken from a file.")
@click.option(
    "--reward",
    metavar="FOLDER|FILE.py:NAME|rule:NAME",
    help="What scores; by default all rewards of the run, as it combines them.",
)
@click.option(
    "--policy", "of_policy", is_flag=True, help="Of a run, sample the policy itself instead of what it began from."
)
@click.option("--output", type=Place(), metavar="OUT.jsonl", help="Write the best of each, as `sft` reads them.")
@click.option(
    "--pairs", is_flag=True, help="Write the best and the worst of each instead, as `dpo` and `reward` read them."
)
@click.option("--only-finished", is_flag=True, help="Write none that the bound on tokens cut.")
@MAX_TOKENS
@drawing
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def best_of_command(model: Path, **options: Any) -> None:
    """Sample, score, keep the best: what best-of-n reaches without training, beside what a run has reached.

    MODEL is a run, a checkpoint of one, or a model folder. Of a run of `train` the samples are those of the model that
    it began from, its reference; the score and KL of the run itself are printed beside.

    \b
    Examples:
      mlx-ppo best-of runs/reviews
      mlx-ppo best-of models/reviews --n 8 --prompt "The film is" --reward models/reviews/reward --output best.jsonl
    """
    from mlx_ppo.cli.best_of import best_of

    best_of(model, options)


@click.command("forgetting")
@click.argument("run", type=Place())
@click.option(
    "--text", type=Place(), help="Plain text, or rows as `sft` reads them; default: a bundled page of English."
)
@click.option("--base", type=Place(), help="Model to compare with; default: what the run began from.")
@click.option(
    "--window", type=click.IntRange(2, 1 << 20), help="Tokens read together; default: 1024, or all positions."
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=16384,
    show_default=True,
    help="Of the text, at most; the rest is left out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def forgetting_command(run: Path, base: Path | None, **options: Any) -> None:
    """Perplexity of a text before and after training: whether RUN unlearned what it wasn't trained on.

    \b
    Examples:
      mlx-ppo forgetting runs/reviews
      mlx-ppo forgetting runs/reviews --text models/reviews/data/test.jsonl
    """
    from mlx_ppo.cli.forgetting import forgetting

    forgetting(run, base, **options)


@click.command("evaluate")
@click.argument("model", type=Place())
@click.option("--tasks", required=True, metavar="NAME[,NAME...]", help="Tasks, groups or tags that lm_eval knows.")
@click.option("--include", type=Place(), metavar="FOLDER", help="Folder with tasks of your own, YAML files.")
@click.option("--limit", type=click.IntRange(1), help="Documents of a task, the first ones; default: all.")
@click.option("--shots", type=click.IntRange(0), help="Examples before a question; default: as the task has it.")
@click.option("--base", type=Place(), help="Model to compare with; default: what the run began from.")
@click.option("--plain", is_flag=True, help="Ask without the chat template that the model has.")
@click.option("--output", type=Place(), metavar="OUT.json", help="Write all figures into a new file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate_command(model: Path, **options: Any) -> None:
    """Benchmarks of lm-evaluation-harness (pip install lm_eval), before and after training, from data on this machine.

    MODEL is a run, a checkpoint of one, or a model folder, which is measured alone. Nothing is fetched: a task's data
    are in a file that it names, or in the cache of Hugging Face's datasets.

    \b
    Examples:
      mlx-ppo evaluate runs/reviews --tasks my_task --include my-tasks --output figures.json
      mlx-ppo evaluate runs/reviews --tasks arc_easy,hellaswag --limit 200
    """
    from mlx_ppo.cli.harness import evaluate

    evaluate(model, options)


COMMANDS = (best_of_command, forgetting_command, evaluate_command)
