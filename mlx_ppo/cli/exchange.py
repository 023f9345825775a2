"""`import`, `merge` and `export`: models and adapters from other programs, and policies for them."""

from pathlib import Path

import click

from mlx_ppo.cli.options import Place

_FILE = Place()


@click.command()
@click.argument("run", type=_FILE)
@click.argument("directory", type=_FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["adapters", "peft", "fused", "gguf"]),
    required=True,
    help="Adapters for mlx-lm or PEFT, a folder for mlx-lm and transformers, or one file for llama.cpp and Ollama.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "f16", "q8_0"]),
    help="fused: float32, float16 or bfloat16, by default the model's own; gguf: f16 (default) or q8_0.",
)
@click.option("--quantize", "bits", type=click.Choice(["4", "8"]), help="fused: quantise to so many bits a weight.")
def export(run: Path, directory: Path, form: str, dtype: str | None, bits: str | None) -> None:
    """Write the policy of RUN (a run, or one checkpoint of it) into a new folder for other programs.

    \b
    Examples:
      mlx-ppo export runs/reviews reviews-ppo --format fused
      mlx-ppo export runs/reviews reviews-4bit --format fused --quantize 4
      mlx-ppo export runs/reviews reviews-gguf --format gguf --dtype q8_0
    """
    from mlx_ppo.exporting.export import export as export_policy

    click.echo(export_policy(run, directory, form=form, dtype=dtype, bits=int(bits) if bits else None))


@click.command("import")
@click.argument("file", type=_FILE)
@click.argument("directory", type=_FILE)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Type of the weights; auto keeps what is stored, quantised blocks too where mlx can hold them.",
)
def import_(file: Path, directory: Path, dtype: str) -> None:
    """Make a model folder, DIRECTORY, from FILE: a GGUF file or a Hugging Face folder.

    \b
    Examples:
      mlx-ppo import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
      mlx-ppo import ~/Downloads/Qwen3-0.6B models/qwen3 --dtype float16
    """
    from mlx_ppo.importing.convert import import_model

    click.echo(import_model(file, directory, dtype=dtype))


@click.command()
@click.argument("model", type=_FILE)
@click.argument("adapter", type=_FILE)
@click.argument("directory", type=_FILE)
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
