"""PEFT's own adapters, in a Python with torch, transformers and peft, which takes seconds to start: many at a time.

    python torch_peft.py make MODELS ADAPTERS KIND/FORM...
    python torch_peft.py read MODELS ADAPTERS KIND...

The model of a kind is in its folder in MODELS. `make` writes random adapters; both write the logits of some tokens into
the adapters' folders, whose paths in ADAPTERS are the last words.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)  # the workers of the tests share the processors

TOKENS = [1, 5, 77, 1234, 9, 4021, 300, 7, 11, 4567, 12, 13]
FORMS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "embedding": {"r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
}


def main(order: str, models: str, adapters: str, *names: str) -> None:
    """Do the same for each."""
    for name in names:
        kind, _, form = name.partition("/")
        one(order, Path(models) / kind, Path(adapters) / name, form)


def one(order: str, model: Path, adapters: Path, form: str) -> None:
    """One of the two."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    if order == "make":
        torch.manual_seed(0)
        embedding = "wte" if base.config.model_type == "gpt2" else "embed_tokens"
        targets = [embedding] if form == "embedding" else "all-linear"
        found = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **FORMS[form]))
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        found.save_pretrained(str(adapters))
    else:
        found = PeftModel.from_pretrained(base, str(adapters))
    with torch.no_grad():
        changed = found.eval()(torch.tensor([TOKENS])).logits[0].numpy()
        with found.disable_adapter():
            plain = found(torch.tensor([TOKENS])).logits[0].numpy()
    np.save(adapters / "logits.npy", changed)
    np.save(adapters / "plain.npy", plain)


main(*sys.argv[1:])
