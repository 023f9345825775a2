"""Run by a Python that has torch and transformers: eight tokens of greedy decoding.

python torch_greedy.py FOLDER PROMPT
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, local_files_only=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
print(json.dumps(found[0, ids.shape[1] :].tolist()))
