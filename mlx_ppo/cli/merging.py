"""`merge`: adapters into a model folder of their own."""

from pathlib import Path

import click

from mlx_ppo.cli.options import Place


@click.command()
@click.argument("model", type=Place())
@click.argument("adapter", type=Place())
@click.argument("directory", type=Place())
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the weights; default: the model's own.",
)
def merge(model: Path, adapter: Path, directory: Path, dtype: str | None) -> None:
    """Make a model folder, DIRECTORY, of MODEL with ADAPTER merged into its weights; training then starts from it.

    ADAPTER is mlx-lm's or PEFT's: LoRA or DoRA, on linear layers, embeddings or experts. A run from DIRECTORY has new
    LoRA adapters, and the merged model as its reference.

    \b
    Example: mlx-ppo merge models/smollm2 my-dora models/smollm2-dora
    """
    from mlx_ppo.exporting.merge import merge as merge_adapters

    click.echo(merge_adapters(model, adapter, directory, dtype=dtype))
