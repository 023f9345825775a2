"""From the rated snippets to the files that the project's own commands train on.

    python models/reviews/prepare.py

writes, beside itself: `data/{train,validation,test,judge}.jsonl` (a split by snippet), `data/prompts-*.jsonl` (the
first words of snippets that neither the language model nor the reward model has seen), the SentencePiece
tokenizer and its `tokenizer.json`, and the model's `config.json`. See `rebuild.sh` for what follows.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"

# Shares of the snippets in percent. The judge's snippets give the training prompts, the test snippets the held-out
# ones; only `train` is ever shown to the language model and the reward model.
SHARES = (("train", 70), ("judge", 17), ("validation", 3), ("test", 10))
VOCABULARY = 8000
PROMPT_WORDS = (2, 3, 4)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
REWARD_MODEL = {**MODEL, "num_hidden_layers": 1, "intermediate_size": 256}


def part_of(text: str) -> str:
    """The part that a snippet belongs to: by its own text, so that copies stay together and order doesn't matter."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    place = int.from_bytes(digest[:4], "big") % 100
    for name, share in SHARES:
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares make 100")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first words of each snippet that is long enough to be cut; 2, 3 or 4 words by its number."""
    found = []
    for row in rows:
        words = row["text"].split()
        count = PROMPT_WORDS[row["id"] % len(PROMPT_WORDS)]
        if len(words) >= count + 4:
            found.append({"prompt": " ".join(words[:count]), "id": row["id"]})
    return found


def train_tokenizer(texts: list[str]) -> None:
    """A unigram SentencePiece model on the training texts, and the same as `tokenizer.json` for stock tools."""
    written = io.BytesIO()  # not by name: SentencePiece would write this machine's path into the file
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=VOCABULARY,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (HERE / "tokenizer.model").write_bytes(written.getvalue())
    pieces = spm.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(HERE / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    different = [text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids != pieces.encode(text)]
    if different:
        raise SystemExit(f"tokenizer.json and tokenizer.model disagree on {len(different)} texts: {different[:3]}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON for people and programs."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    """Write everything."""
    lines = (DATA / "rated_snippets.jsonl").read_text("utf-8").splitlines()
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in SHARES}
    for row in map(json.loads, lines):
        parts[part_of(row["text"])].append(row)
    for name, rows in parts.items():
        write_lines(DATA / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} snippets")
    write_lines(DATA / "prompts-train.jsonl", prompts(parts["judge"] + parts["validation"]))
    known = {row["prompt"] for row in prompts(parts["judge"] + parts["validation"])}
    write_lines(DATA / "prompts-test.jsonl", [row for row in prompts(parts["test"]) if row["prompt"] not in known])
    train_tokenizer([row["text"] for row in parts["train"]])
    write_json(HERE / "config.json", MODEL)
    reward = HERE / "reward"
    reward.mkdir(exist_ok=True)
    write_json(reward / "config.json", REWARD_MODEL)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / name, reward / name)


if __name__ == "__main__":
    main()
