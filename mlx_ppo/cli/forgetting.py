"""`forgetting`: perplexity of a text before and after training."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_ppo.data.passages import ENGLISH, Passages, load_passages
from mlx_ppo.errors import ConfigError, ModelError, printable
from mlx_ppo.forgetting import difference, losses, windows
from mlx_ppo.runs.targets import Target, load_target, start_of

_WINDOW = 1024  # tokens, where the model has as many positions
_FEW = 10  # parts below which an interval says little


def forgetting(
    model: Path, base: Path | None, *, text: Path | None, window: int | None, tokens: int, as_json: bool
) -> None:
    """Print nats a token and perplexity of both models, and their difference.

    Raises:
        ConfigError: there is nothing to compare with.
        ModelError: the two models read a text in different tokens, or have too few positions.
    """
    after = load_target(model)
    before = start_of(after) if base is None else load_target(base)
    read = load_passages(text or ENGLISH, after.trunk.tokenizer)
    if read.said:
        click.echo(printable(read.said), err=True)
    if load_passages(text or ENGLISH, before.trunk.tokenizer).passages != read.passages:
        raise ModelError(f"{before.trunk.name} and {after.trunk.name} read this text in different tokens")
    size = _window((before, after), window)
    parts = windows(read.passages, size, tokens, _bos(after))
    both = [losses(target.trunk, target.weights, parts, read) for target in (before, after)]
    found = difference(*both)
    counted, whole = int(both[0].tokens.sum()), sum(len(passage.tokens) for passage in read.passages)
    document: dict[str, Any] = {
        "model": str(model),
        "base": str(base) if base is not None else before.trunk.name,
        "text": str(text) if text is not None else "bundled English",
        read.noun: found.parts,
        "tokens": counted,
        "window": size,
        "left_out": max(0, whole - tokens),
        "before": {"nats": both[0].mean, "perplexity": _perplexity(both[0].mean)},
        "after": {"nats": both[1].mean, "perplexity": _perplexity(both[1].mean)},
        "difference": {"nats": found.mean, "low": _known(found.low), "high": _known(found.high)},
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document, read)


def _window(targets: tuple[Target, Target], wanted: int | None) -> int:
    bounds = [target.trunk.context.tokens for target in targets if target.trunk.context is not None]
    if wanted is not None and bounds and wanted > min(bounds):
        raise ConfigError(f"--window: {wanted} tokens, and the model has {min(bounds)} positions; give no more")
    return wanted or min([_WINDOW, *bounds])


def _bos(target: Target) -> int | None:
    """The token that begins a text, of a model that has one."""
    with_it, without = (target.trunk.tokenizer.encode("a", bos=bos) for bos in (True, False))
    return with_it[0] if len(with_it) > len(without) else None


def _perplexity(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(document: Mapping[str, Any], read: Passages) -> None:
    count = document[read.noun]
    said = f"{document['text']}: {count} {read.noun}, {document['tokens']} tokens in windows of {document['window']}"
    left = f"; the last {document['left_out']} are left out (--tokens)" if document["left_out"] else ""
    click.echo(printable(said + left))
    click.echo(f"{'':12}{'nats a token':>14}{'perplexity':>14}")
    for name in ("before", "after"):
        row = document[name]
        shown = "beyond 1e300" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        click.echo(f"{name:12}{row['nats']:14.4f}{shown:>14}")
    found = document["difference"]
    times = "" if abs(found["nats"]) > 700 else f"{'x ' + format(math.exp(found['nats']), '.3f'):>14}"
    click.echo(f"{'difference':12}{found['nats']:+14.4f}{times}")
    if found["low"] is None:
        click.echo(f"one of the {read.noun} alone has no interval")
        return
    verdict = "worse" if found["low"] > 0 else "better" if found["high"] < 0 else "no difference can be told"
    few = f"; {count} {read.noun} are few for an interval" if count < _FEW else ""
    shown = f"95 % interval of the difference {found['low']:+.4f} to {found['high']:+.4f}, by {read.noun}"
    click.echo(f"{shown}: {verdict}{few}")
