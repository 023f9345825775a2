"""Runs whose policy is known, without the training, and tokenizers of the kinds that GGUF files hold."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.models.adapters import Weights, adapter_config
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import Checkpoint
from mlx_ppo.runs.folder import create_run

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("the film is a good film and the story is good", "it was not a bad story, it's 1234", "very very good: a b c")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MakeRun = Callable[..., Path]


def byte_level(kind: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt-2":
        return plain
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    regex = Regex(WORDS % ("" if kind == "qwen2" else "{1,3}"))
    cut = pre_tokenizers.Split(regex, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_byte_level(folder: Path, kind: str, texts: Sequence[str], size: int) -> None:
    """A byte-level BPE as of SmolLM2, Qwen2, Llama 3 or GPT-2, with a chat template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = byte_level(kind)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), "utf-8")


def write_fallback(folder: Path, texts: Sequence[str], size: int) -> None:
    """A BPE with byte fallback as of Llama 2."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=size - 259, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    own = [token for token in learnt["vocab"] if token not in special]
    vocab = {token: index for index, token in enumerate([*special, *pieces, *own])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    document = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), "utf-8")


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model folder with another kind of tokenizer and changed keys of config.json."""

    def make(source: Path, kind: str, *, texts: Sequence[str] = TEXTS, size: int = 300, **changes: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        if kind == "fallback":
            write_fallback(folder, texts, size)
        elif kind != "unigram":
            write_byte_level(folder, kind, texts, size)
            changes = {"bos_token_id": 0, "eos_token_id": 2, **changes}
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make


def changed(trunk: Trunk, seed: int = 3) -> Weights:
    """All weights, a little off the trunk's."""
    keys = mx.random.split(mx.random.key(seed), len(trunk.base))
    noise = {n: 0.02 * mx.random.normal(a.shape, key=k) for (n, a), k in zip(trunk.base.items(), keys, strict=True)}
    return Weights({name: array + noise[name] for name, array in trunk.base.items()})


@pytest.fixture
def make_run(tmp_path: Path, make_adapters: Callable[..., Weights]) -> MakeRun:
    """A run folder of `train` as after two iterations of a model."""

    def make(model: Path, *, train: str = "lora", steps: Sequence[int] = (1, 2), dtype: str = "auto") -> Path:
        file = tmp_path / "run.toml"
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
        (tmp_path / "rule.py").write_text("def rule(prompts, completions):\n    return [0.0] * len(prompts)\n")
        file.write_text(
            f'[model]\npath = "{model}"\ntrain = "{train}"\ndtype = "{dtype}"\n[data]\nprompts = "prompts.jsonl"\n'
            '[rollout]\ntemperature = 0.7\n[[reward]]\nkind = "function"\nfunction = "rule.py:rule"\n'
        )
        run = create_run(read_config(TrainConfig, file), tmp_path / "runs", "a")
        trunk = load_trunk(model)
        for step in steps:
            weights = make_adapters(trunk, seed=step) if train == "lora" else changed(trunk, seed=step)
            documents = {"adapter_config.json": adapter_config(weights, trunk.blocks)}
            saved = Checkpoint(step, {"adapters": dict(tree_flatten(dict(weights.arrays)))}, {}, documents)
            checkpoint.save(run, saved, keep_last=5, best=None)
        return run

    return make
