"""Folders that have only a SentencePiece `tokenizer.model`."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers.load import completion_text

REVIEWS = Path(__file__).resolve().parents[2] / "models/reviews"
TEXTS = ["The film is", "A  double space", "naïve café, 好 and 🙂", "x"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model without its tokenizer.json."""
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(REVIEWS / name, tmp_path / name)
    return tmp_path


def test_it_is_the_same_tokenizer_as_the_folders_tokenizer_json(folder: Path) -> None:
    pieces, whole = load_trunk(folder).tokenizer, load_trunk(REVIEWS).tokenizer
    assert (pieces.eos_ids, pieces.eos_id, pieces.vocab_size) == (whole.eos_ids, whole.eos_id, whole.vocab_size)
    for text in TEXTS:
        for bos in (True, False):
            assert pieces.encode(text, bos=bos) == whole.encode(text, bos=bos)
        tokens = pieces.encode(text, bos=True)
        assert pieces.decode([*tokens, pieces.eos_id]) == whole.decode(tokens) == text


def test_it_writes_the_same_text(folder: Path) -> None:
    written = []
    for trunk in (load_trunk(folder), load_trunk(REVIEWS)):
        prompt = tuple(trunk.tokenizer.encode(TEXTS[0], bos=True))
        rollout = generate(trunk, Weights({}), Asked([prompt], [0], [{}]), Sampling((0,), 8, temperature=0.0))
        written.append(completion_text(trunk.tokenizer, prompt, rollout.responses[0]))
        assert mx.isfinite(rollout.logprobs).all().item()
    assert written[0] == written[1] and written[0].startswith(" ")


def test_a_file_that_is_none_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_trunk(folder)
