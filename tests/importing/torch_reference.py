"""Run by a Python that has torch and transformers: logits of a folder, and what transformers makes of the GGUF file.

    python torch_reference.py FOLDER GGUF|- TEXTS.json OUT.npz

Without a GGUF file the model is that of FOLDER.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)  # the workers of the tests share the processors

folder, gguf, texts, out = sys.argv[1:5]
lines = json.loads(Path(texts).read_text("utf-8"))
place = {"pretrained_model_name_or_path": folder}
if gguf != "-":
    directory, name = os.path.split(gguf)
    place = {"pretrained_model_name_or_path": directory, "gguf_file": name}
model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
found = {}
with torch.no_grad():
    for number, text in enumerate(lines[:20]):
        ids = tokenizer(text)["input_ids"]
        if ids:
            found[f"ids{number}"] = np.array(ids)
            found[f"logits{number}"] = model(torch.tensor([ids])).logits[0].numpy()
if gguf != "-":
    theirs = AutoTokenizer.from_pretrained(**place)
    # transformers ignores tokenizer.ggml.pre; SmolLM2's published tokenizer.json splits digits first.
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = theirs.backend_tokenizer.pre_tokenizer
    found["plain"] = np.array([theirs(line)["input_ids"] == tokenizer(line)["input_ids"] for line in lines])
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    found["digits"] = np.array([theirs(line)["input_ids"] == tokenizer(line)["input_ids"] for line in lines])
    chat = [{"role": role, "content": f"{role} \n says"} for role in ("user", "assistant", "user")]
    chats = [chat, [{"role": "system", "content": "Be brief."}, *chat], chat[:1]]
    rendered = [
        [t.apply_chat_template(c, tokenize=False, add_generation_prompt=g) for c in chats for g in (True, False)]
        for t in (tokenizer, theirs)
    ]
    found["template"] = np.array(rendered[0] == rendered[1] and all(rendered[0]))
np.savez(out, **found)
