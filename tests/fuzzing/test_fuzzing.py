"""Every reader against hostile inputs: only errors meant for people, no signal, no hang, no large allocation.

Each reader runs in a process of its own (`fuzz_worker.py`), with a few hundred inputs that are the same every time.
`MLX_PPO_FUZZ=37 pytest tests/fuzzing` tries 37 times as many, 100,000 in all, others for each MLX_PPO_FUZZ_SEED.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.bundle import bundle_root
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError, ModelError
from mlx_ppo.tokenizers.load import load_tokenizer

COUNTS = {
    "config": 400,
    "jsonl": 600,
    "safetensors": 800,
    "gguf": 600,
    "model_config": 60,
    "tokenizer_json": 200,
    "tokenizer_model": 60,
}
TIMES = int(os.environ.get("MLX_PPO_FUZZ", "1"))
SEED = os.environ.get("MLX_PPO_FUZZ_SEED", "0")


@pytest.mark.parametrize("reader", COUNTS)
def test_only_errors_for_people(tmp_path, reader):
    count = COUNTS[reader] * TIMES
    worker = Path(__file__).with_name("fuzz_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), reader, str(count), SEED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120 + 60 * TIMES,
    )
    last = tmp_path / "last"
    assert done.returncode == 0, f"status {done.returncode}, by {last}:\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert found["tried"] >= 0.9 * count and 0 < found["taken"] < found["tried"], found


# What fuzzing found.


def test_a_piece_that_is_not_utf_8(tmp_path):
    source = bundle_root() / "models/reviews/tokenizer.model"
    shutil.copy(source.with_name("tokenizer_config.json"), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes().replace(b"<unk>", b"\xbcunk>", 1))
    with pytest.raises(ModelError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path, {})


def test_a_model_of_pieces_without_an_unknown_one(tmp_path):
    source = bundle_root() / "models/reviews/tokenizer.model"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<none>"}')
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes().replace(b"\x18\x02", b"\x18\x01", 1))
    tokenizer = load_tokenizer(tmp_path, {})
    assert tokenizer.eos_id == 2 and tokenizer.decode(tokenizer.encode("a film", bos=True)) == "a film"


def test_a_name_as_long_as_the_file(tmp_path):
    file = tmp_path / "a.toml"
    for text in (f"[ppo]\n{'x' * 5000} = 1\n", f"[{'x' * 5000}]\n", f"[ppo]\n{'x' * 5000} = 1\n{'x' * 5000} = 1\n"):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_config(TrainConfig, file, [f"{'y' * 5000}.a=1", "z" * 5000])
        assert all(len(line) < 500 + len(str(file)) for line in caught.value.problems)
