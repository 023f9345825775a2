"""What the process that samples pairs is asked for."""

from pathlib import Path
from typing import NamedTuple

NO_MORE = "; these prompts give no more"  # at the end of what it prints


class Order(NamedTuple):
    """What is wanted."""

    file: str  # of the set
    models: tuple[str, ...]  # folders, runs or checkpoints: one that writes both sides, or one for each
    prompts: str
    total: int  # pairs in the file at the end
    max_tokens: int
    temperature: float
    seed: int
    reward: str = ""  # folder of a reward model on the first model's trunk, whose states tell what to ask next
    top_k: int = 0  # as the keys of [rollout], like those below
    top_p: float = 1.0
    min_p: float = 0.0


def margins_of(file: Path) -> Path:
    """Where a reward model's margins on the pairs of a set's file are."""
    return file.with_name(f"{file.stem}.judged.jsonl")
