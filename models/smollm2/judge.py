"""What became of the answers in finished runs of configs/smollm2-question.toml, by other means than the rule.

    python models/smollm2/judge.py runs/smollm2-question

Sentences are counted by their final marks before a space and a capital, not as rules.py does it; and an answer should
still be about what was asked: it names the thing, which the rule doesn't ask for.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from prepare import ASKS, THINGS


def thing_of(prompt: str) -> str:
    """What a question is about."""
    return next(thing for thing in THINGS for ask in ASKS if ask.format(thing) in prompt)


def names(text: str, thing: str) -> bool:
    """Whether a text has one of the thing's longer words, or its beginning."""
    words = [word.rstrip("s") for word in thing.lower().split() if len(word) > 3 or " " not in thing]
    return any(word in text.lower() for word in words)


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the answers."""
    texts = [row["completion"].strip() for row in rows]
    counts = [len(re.findall(r"[.!?](?=\s+[\"'A-Z0-9]|\s*$)", text)) for text in texts]
    return {
        "ends with a question": sum(text.endswith("?") for text in texts) / len(texts),
        "one or two sentences": sum(count in (1, 2) for count in counts) / len(texts),
        "sentences": sum(counts) / len(texts),
        "names the thing asked about": sum(
            names(text, thing_of(row["prompt"])) for text, row in zip(texts, rows, strict=True)
        )
        / len(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "different answers": len(set(texts)) / len(texts),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Answers before and after configs/smollm2-question.toml.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of `mlx-ppo train`")
    for run in parser.parse_args().runs:
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
        rows = [row for row in rows if row["kind"] == "evaluation"]
        steps = sorted({row["step"] for row in rows})
        before, after = (figures([row for row in rows if row["step"] == step]) for step in (steps[0], steps[-1]))
        print(f"{run.name}\n\n| | before | after |\n|---|---|---|")
        for name in before:
            print(f"| {name} | {before[name]:.2f} | {after[name]:.2f} |")


if __name__ == "__main__":
    main()
