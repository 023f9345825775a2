# ruff: noqa: RUF001  the texts are in many scripts
"""SmolLM2 and tiny models against transformers, in another Python that has torch: MLX_PPO_TORCH_PYTHON names it.

That Python needs torch, transformers, gguf and accelerate.
"""

import json
import random
from pathlib import Path

import gguf_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from torch_python import by_torch, needs_torch

from mlx_ppo.importing.convert import import_model
from mlx_ppo.models.load import load_trunk

pytestmark = [pytest.mark.slow, needs_torch]
BASE = [
    "The film is a quiet masterpiece, and I don't say that lightly.",
    'def f(x: int) -> str:\n    return f"{x:>08.3f}"  # ok\n\n\tfor i in range(10):\n\t\tpass',
    "🙂🙃👩‍👩‍👧‍👦 🇫🇷 ok 👍🏽",
    "Наука и жизнь, 12345 рублей",
    "日本語のテキストと漢字、カタカナ。",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "שלום עולם",
    "ภาษาไทยไม่มีช่องว่าง",
    "한국어 문장입니다.",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "x = 3.14159e-10; y = 0xDEADBEEF",
    "   leading and   inner   spaces  ",
    "tab\tand\nnewline\r\nCRLF\n\n\n",
    "I'LL you've THEY'RE he's CAN'T",
    "café cafe\u0301 ﬁ ½ ² Ⅷ ①",
    "a\u200bb\u00a0c\u3000d\u2028e",
    "SELECT * FROM t WHERE a='b' AND c>=10;",
    "https://example.org/a?b=c&d=%20#frag",
    "∀x∈ℝ: ∑_{i=0}^{n} x² ≥ 0 → ±∞",
    "<|endoftext|>x<|im_end|>y",
    "$$$ ### *** !!! ??? --- ___",
    "",
    "\n",
]
RANGES = [(32, 0x24F), (0x370, 0x1FFF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF)]


def mixed_lines(count):
    choose = random.Random(0)
    lines, letters = list(BASE), "".join(BASE)
    words = [word for line in BASE for word in line.split(" ") if word]
    while len(lines) < count:
        kind, length = choose.random(), choose.randint(1, 60)
        if kind < 0.6:
            lines.append(choose.choice([" ", "  ", "\t"]).join(choose.choice(words) for _ in range(length // 5 + 1)))
        elif kind < 0.9:
            lines.append("".join(choose.choice(letters) for _ in range(length)))
        else:
            lines.append("".join(chr(choose.randint(*choose.choice(RANGES))) for _ in range(20)))
    return lines


def compared(folder, gguf, lines, place):
    """Largest difference of logits, and what else the reference says."""
    (place / "texts.json").write_text(json.dumps(lines))
    script = Path(__file__).with_name("torch_reference.py")
    by_torch(script, folder, gguf or "-", place / "texts.json", place / "o.npz")
    found, trunk, worst = np.load(place / "o.npz"), load_trunk(folder), 0.0
    names = [name for name in found if name.startswith("ids")]
    assert names
    for name in names:
        ours = np.array(trunk.model(mx.array(found[name])[None])[0])
        worst = max(worst, float(np.abs(ours - found[name.replace("ids", "logits")]).max()))
    return worst, found


@pytest.mark.parametrize(
    ("architecture", "by_gguf"), [("llama", True), ("qwen2", True), ("qwen3", False), ("gemma", False)]
)
def test_tiny_models(tmp_path, architecture, by_gguf):
    """transformers reads no gemma GGUF, and ignores the head size of qwen3: there it reads the imported folder."""
    tiny.write_model(tmp_path / "m.gguf", architecture)
    import_model(tmp_path / "m.gguf", tmp_path / "out")
    gguf = tmp_path / "m.gguf" if by_gguf else None
    lines = ["the in a", "hello world, 123", "x" * 50]
    if architecture == "gemma":  # mlx-lm alone computes the exact GELU where Hugging Face has the tanh form
        assert compared(tmp_path / "out", None, lines, tmp_path)[0] < 1e-4
        config = tiny.json_of(tmp_path / "out" / "config.json") | dict.fromkeys(
            ("hidden_act", "hidden_activation"), "gelu_python"
        )
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert compared(tmp_path / "out", gguf, lines, tmp_path)[0] < 1e-4


def test_smollm2(tmp_path, smollm2, pytestconfig):
    import_model(smollm2, tmp_path / "out", dtype="float32")
    lines = mixed_lines(1000 if pytestconfig.getoption("--thorough") else 300)
    worst, found = compared(tmp_path / "out", smollm2, lines, tmp_path)
    odd = [line for line, same in zip(lines, found["plain"], strict=True) if not same]
    assert worst < 1e-3 and found["digits"].sum() == len(lines) and found["template"]
    assert all(any(letter.isnumeric() for letter in line) for line in odd)
    print(f"logits within {worst:.1e}, ids equal {found['digits'].sum()} of {len(lines)}")
