"""TRL's PPO on torch, an iteration a turn. Runs in TRL's environment.

As TRL's own script (examples/scripts/ppo/ppo.py) sets it up: a policy, a value and a reward model, each a whole model,
and a reference, which with LoRA is the policy without its adapters.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from turns import Turns

TURNS = Turns()
ORDER: dict[str, Any] = TURNS.order
PAD = 3  # a token of the vocabulary that no text has


class Alternating(TrainerCallback):
    """Waits for its turn before each iteration, and reports after it."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        TURNS.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.figures = {"score": logs["objective/scores"], "kl": logs["objective/kl"]}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        TURNS.done(**self.figures, tokens=GENERATED[-1])
        TURNS.wait()


GENERATED: list[int] = []


def mark_phases() -> None:
    """Note where sampling ends, and where the update begins: at the advantages."""
    sample, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def sampling(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        TURNS.phase("rollout")
        found = sample(model, queries, *rest)
        GENERATED.append(found[0].shape[0] * (found[0].shape[1] - queries.shape[1]))
        TURNS.phase("score")
        return found

    def whitening(*given: Any, **named: Any) -> Any:
        TURNS.phase("update")
        return whiten(*given, **named)

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = sampling, whitening


class RuleReward(torch.nn.Module):
    """A function of the text as a reward model: its backbone's last hidden state is the score, at every position."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rule: str, prompt: int) -> None:
        super().__init__()
        self.backbone = _Rule(tokenizer, rule, prompt)
        self.score = torch.nn.Identity()


class _Rule(torch.nn.Module):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, rule: str, prompt: int) -> None:
        super().__init__()
        file, _, name = rule.rpartition(":")
        spec = importlib.util.spec_from_file_location("rule", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.rule, self.tokenizer, self.prompt = getattr(module, name), tokenizer, prompt

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        scores = torch.tensor(self.rule([""] * len(texts), texts), dtype=torch.float32)
        states = scores[:, None, None].expand(-1, input_ids.shape[1], 1)
        return type("Output", (), {"hidden_states": (states,)})()


def rows(prompts: list[list[int]], count: int) -> Any:
    """As many rows as the run will read."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": (prompts * (count // len(prompts) + 1))[: max(count, len(prompts))]})


def the_arguments(output: str) -> PPOConfig:
    """As ordered; one minibatch of one micro-batch."""
    return PPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=ORDER["checkpointing"],
        learning_rate=ORDER["learning_rate"],
        lr_scheduler_type="constant",
        per_device_train_batch_size=ORDER["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=ORDER["epochs"],
        total_episodes=ORDER["batch"] * 100_000,
        response_length=ORDER["tokens"],
        temperature=1.0,
        kl_coef=ORDER["kl_coef"],
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=ORDER["seed"],
    )


def the_adapters() -> Any:
    """LoRA on every linear layer of the policy, where it is ordered."""
    if not ORDER["lora"]:
        return None
    from peft import LoraConfig

    rank, scale = ORDER["lora"]["rank"], ORDER["lora"]["scale"]
    return LoraConfig(r=rank, lora_alpha=rank * scale, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mark_phases()
    model, prompts = ORDER["model"], json.loads(Path(ORDER["prompts"]).read_text("utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{model}/tokenizer.json", eos_token="<|im_end|>", padding_side="left"
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=the_arguments(output),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            ref_model=None,
            reward_model=RuleReward(tokenizer, ORDER["rule"], len(prompts[0])) if ORDER["rule"] else classifier(),
            value_model=classifier(),
            train_dataset=rows(prompts, ORDER["batch"]),
            callbacks=[Alternating()],
            peft_config=the_adapters(),
        )
        trainer.train()


main()
