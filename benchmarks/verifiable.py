"""GRPO on sums that are checked: accuracy on held-out ones before and after, for several seeds.

    mlx-ppo import SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m
    python benchmarks/verifiable.py smollm2-135m [--seeds 3] [--iterations 30] [--folder DIR] [--json FILE]

Prompts are chats, "What is 7 + 5?", of two numbers up to 20 (--largest); a fifth of all pairs is held out, and no pair
is in both files, in either order. The reward is the rule "number" alone: 1 where the last number of the answer is the
sum. An iteration has 8 prompts with 8 samples each, of at most 24 tokens. Accuracy is taken before and after by the
rule, on all held-out sums, once greedily and once as the run samples; the interval is Wilson's, of the greedy answers.
With --folder, runs stay, and what was answered to the held-out sums lies beside them (seed-0-greedy.jsonl).
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.data.random import philox
from mlx_ppo.rewards.rules import RewardRule, rule_named
from mlx_ppo.rewards.verdicts import Rate
from mlx_ppo.runs.targets import Target, load_target
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers.load import completion_text

_TOKENS = 24  # of an answer at most
_CONFIG = """
[run]
folder = {runs}
name = "seed-{seed}"
seed = {seed}
iterations = {iterations}
save_every = {iterations}
keep_last = 1
evaluate_every = 0
[parallel]
processes = 1
[model]
path = {model}
[lora]
layers = 8
rank = 8
scale = 2.0
[data]
prompts = {train}
eval_prompts = {test}
eval_count = 1
[rollout]
prompts = 8
samples_per_prompt = 8
max_tokens = {tokens}
temperature = 1.0
[[reward]]
kind = "rule"
rule = "number"
[ppo]
advantage = "grpo"
epochs = 1
minibatches = 2
[kl]
coef = 0.0
[optimizer]
learning_rate = {rate}
"""


def main() -> None:
    """Write the sums, train each seed in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--largest", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        train, test = write_sums(folder, given.largest)
        before = accuracy(load_target(given.model), test, folder / "before")
        rows: list[dict[str, Any]] = []
        print(_line("", before), flush=True)
        for seed in range(given.seeds):
            rows.append({"seed": seed, "before": before, "after": one_seed(seed, given, folder, train, test)})
            print(_line(str(seed), rows[-1]["after"]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


def _line(seed: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"after, seed {seed}" if seed else "before"
    return f"{name:14} greedy {Rate(*found['greedy'])}, sampled {found['sampled']:.1%}"


def write_sums(folder: Path, largest: int) -> tuple[Path, Path]:
    """Training and held-out sums; the split is the same for every seed."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]
    order = philox("sums", 0).permutation(len(pairs)).tolist()
    held_out = {pairs[index] for index in order[: len(pairs) // 5]}
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, wanted in zip(files, (False, True), strict=True):
        chosen = [pair for pair in pairs if (pair in held_out) == wanted]
        both = [pair for a, b in chosen for pair in dict.fromkeys([(a, b), (b, a)])]
        file.write_text("".join(json.dumps(question(a, b)) + "\n" for a, b in both), "utf-8")
    return files


def question(a: int, b: int) -> dict[str, Any]:
    """A prompt, and what is right."""
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}


def one_seed(seed: int, given: argparse.Namespace, folder: Path, train: Path, test: Path) -> dict[str, Any]:
    """Train, and measure."""
    paths = {"runs": folder, "model": given.model.resolve(), "train": train, "test": test}
    quoted = {name: json.dumps(str(path)) for name, path in paths.items()}
    config = folder / f"seed-{seed}.toml"
    numbers = {"seed": seed, "iterations": given.iterations, "rate": given.rate, "tokens": _TOKENS}
    config.write_text(_CONFIG.format(**numbers, **quoted), "utf-8")
    code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, "train", str(config)], check=True)
    run = max(folder.glob(f"seed-{seed}*/run.json"), key=lambda file: file.stat().st_mtime).parent
    target = load_target(run)
    return accuracy(target, test, folder / f"seed-{seed}")


def accuracy(target: Target, file: Path, kept: Path) -> dict[str, Any]:
    """The share of right answers, greedy and as the runs sample; the answers go to files of the name."""
    trunk = target.trunk
    prompts = load_prompts(file, trunk.tokenizer, max_tokens=256, overlong="error").prompts
    asked = Asked([prompt.tokens for prompt in prompts], range(len(prompts)), [prompt.record for prompt in prompts])
    found: dict[str, Any] = {}
    with RewardRule(rule_named("number")) as rule:
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            how = Sampling((0, "accuracy"), _TOKENS, temperature, batch_size=64)
            rollout = generate(trunk, target.weights, asked, how)
            pairs = zip(rollout.prompts, rollout.responses, strict=True)
            texts = [completion_text(trunk.tokenizer, prompt, response) for prompt, response in pairs]
            scores = rule.score([prompt.text for prompt in prompts], texts, list(rollout.records))
            rate = Rate.of(scores)
            found[name] = tuple(rate) if name == "greedy" else rate.share
            rows = zip(rollout.records, texts, scores, strict=True)
            lines = [json.dumps({**record, "completion": text, "score": score}) + "\n" for record, text, score in rows]
            kept.with_name(f"{kept.name}-{name}.jsonl").write_text("".join(lines), "utf-8")
    return found


if __name__ == "__main__":
    main()
