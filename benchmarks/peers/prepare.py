"""What every side reads: prompts as token ids and as text, and our reward models. Runs in the project's environment.

The prompts are beginnings of film reviews, of exactly as many tokens as asked for, in the model's own tokenizer.
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlx_ppo.config.sections import LoraSection
from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.models.adapters import new_adapters
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, new_head
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.write import write_adapters
from mlx_ppo.tokenizers.load import load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "models" / "smollm2" / "data"


def beginnings(model: Path, target: Path, lengths: list[int]) -> None:
    """One prompt for each length, each from another review."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    texts = _reviews()
    prompts: list[dict[str, str]] = []
    for length in lengths:
        while True:
            text = " ".join(next(texts) for _ in range(4))
            ids = tokenizer.encode(text, add_special_tokens=False)[:length]
            short = tokenizer.decode(ids)
            if len(ids) == length and tokenizer.encode(short, add_special_tokens=False) == ids:
                prompts.append({"prompt": short})
                break
    file = target / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), "utf-8")
    ours = load_tokenizer(model, check_model_folder(model).config)
    read = load_prompts(file, ours, max_tokens=512, overlong="error").prompts
    ids = [list(prompt.tokens) for prompt in read]
    assert [len(row) for row in ids] == lengths, [len(row) for row in ids]
    (target / "prompts.json").write_text(json.dumps(ids), "utf-8")


def _reviews() -> Iterator[str]:
    for line in (DATA / "ratings-train.jsonl").read_text("utf-8").splitlines():
        yield json.loads(line)["completion"].strip()


def chats(model: Path, target: Path, count: int) -> None:
    """Questions in the model's chat template, as token ids."""
    ours = load_tokenizer(model, check_model_folder(model).config)
    read = load_prompts(DATA / "questions-train.jsonl", ours, max_tokens=512, overlong="error").prompts
    (target / "chats.json").write_text(json.dumps([list(prompt.tokens) for prompt in read[:count]]), "utf-8")


def reward_models(model: Path, target: Path) -> None:
    """One as adapters on the policy's trunk, one in a folder of its own; neither has learned anything."""
    trunk = load_trunk(model)
    adapters = new_adapters(trunk.adapted, LoraSection(layers=8), key="reward", seed=0)
    write_adapters(target / "reward-adapters", adapters, trunk.blocks)
    shutil.copytree(model, target / "reward-folder")
    key = mx.random.key(0)
    head = {name: mx.random.normal(array.shape, key=key) * 0.02 for name, array in new_head(trunk.width).items()}
    for placement in ("adapters", "folder"):
        folder = target / f"reward-{placement}"
        mx.save_safetensors(str(folder / HEAD_FILE), head)
        RewardFacts(placement, "last", 0.0, 1.0).write(folder)  # type: ignore[arg-type]


def main() -> None:
    order = json.loads(sys.argv[1])
    model, target = Path(order["model"]), Path(order["target"])
    for left in target.glob("reward-*"):
        shutil.rmtree(left)
    if order.get("rewards"):
        reward_models(model, target)
    if order.get("chats"):
        chats(model, target, order["chats"])
    beginnings(model, target, order["lengths"])


if __name__ == "__main__":
    main()
