"""How many positions a model knows: by a table of them, by its window, or by the length that it was trained on."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from mlx_ppo.models.gate import kind_of_rope, source_of, translated
from mlx_ppo.models.keys import reads
from mlx_ppo.models.parts import Context

_TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_emb")


def context_of(inner: nn.Module, config: Mapping[str, Any], name: str) -> Context | None:
    """By the table of learned positions of a model's inner part, or by what its config.json says; None: unknown."""
    for table in _TABLES:
        found = inner.get(table)
        if isinstance(found, nn.Embedding):
            return Context(int(found.weight.shape[0]), learned=True)
    return positions_of({**config, **translated(config, name)})


def positions_of(config: Mapping[str, Any]) -> Context | None:
    """How far a model without a table of positions reaches, by its config.json, as translated."""
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    kind = str(section.get("model_type") or f"{config.get('model_type')}_text")
    rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
    bounds = [Context(window, learned=True) for window in _ignored_window(section, kind)]
    trained = section.get("max_position_embeddings")
    first = rope.get("original_max_position_embeddings") or section.get("original_max_position_embeddings")
    if kind_of_rope(rope) in ("longrope", "su") and isinstance(first, int):
        bounds.append(Context(first, learned=True))
    if isinstance(trained, int):
        stretched = first * rope["factor"] if isinstance(first, int) and rope.get("factor") else 0
        bounds.append(Context(int(max(trained, stretched)), learned=False))
    return min(bounds, key=lambda bound: (bound.tokens, not bound.learned), default=None)


def _ignored_window(section: Mapping[str, Any], kind: str) -> list[int]:
    """The window of attention, where transformers uses it and the class doesn't."""
    window, source = section.get("sliding_window"), source_of(kind)
    kinds = section.get("layer_types")
    off = section.get("use_sliding_window", not kind.startswith("qwen")) is False
    if not isinstance(window, int) or isinstance(window, bool) or off:
        return []
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return []
    known = reads(source, "sliding_window") and (isinstance(kinds, list) or "layer_types" not in source)
    return [] if known else [window]
