"""Reward models of other families, classifiers as transformers exports them, and ensembles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.heads import RewardFacts, RewardModel, load_reward_model, new_head
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.parts import Context
from mlx_ppo.models.roles import Roles, Source
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import RawScores, combined_scores, raw_scores
from mlx_ppo.tokenizers.load import completion_text

MakeModel = Callable[..., Path]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def rollout(stopping_trunk: Trunk, texts: list[str]) -> Rollout:
    prompts = [tuple(stopping_trunk.tokenizer.encode(text, bos=True)) for text in texts]
    asked = Asked(prompts, range(len(texts)), [{"prompt": text} for text in texts])
    return generate(stopping_trunk, Weights({}), asked, Sampling((0,), 6))


def classifier(make_model: MakeModel, target: Path, labels: int = 1) -> Path:
    """A tiny llama without output layer and with the head of a sequence classifier."""
    shutil.copytree(make_model(seed=3), target)
    arrays = mx.load(str(target / "model.safetensors"))
    assert isinstance(arrays, dict)
    arrays.pop("lm_head.weight")
    arrays["score.weight"] = mx.random.normal((labels, 32), key=mx.random.key(1))
    mx.eval(arrays)
    (target / "model.safetensors").unlink()
    mx.save_safetensors(str(target / "model.safetensors"), arrays, metadata={"format": "pt"})
    return target


def test_a_classifier_scores_by_its_last_state(make_model: MakeModel, tmp_path: Path) -> None:
    folder = classifier(make_model, tmp_path / "classifier")
    model = load_reward_model(folder, None)
    rows = [(1, 260, 261, 2), (1, 265, 2)]
    raw = np.array(model.raw(make_sequences(rows, [(), ()])))
    whole = load_trunk(make_model(seed=3))  # the same weights, with the output layer that isn't read
    weight = mx.load(str(folder / "model.safetensors"))["score.weight"][0]  # type: ignore[index]
    for row, value in zip(rows, raw, strict=True):
        alone = (whole.hidden(mx.array([row]))[0, -1] @ weight).item()
        assert value == pytest.approx(alone, abs=1e-4)
    assert np.array(model.normalised(mx.array(raw))) == pytest.approx(raw)


def test_a_classifier_of_several_labels_or_with_missing_weights_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="one label"):
        load_reward_model(classifier(make_model, tmp_path / "two", labels=2), None)
    folder = classifier(make_model, tmp_path / "holes")
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    arrays.pop("model.layers.0.mlp.up_proj.weight")
    mx.eval(arrays)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load_reward_model(folder, None)


@pytest.fixture
def other_family(make_model: MakeModel, tmp_path: Path) -> RewardModel:
    """A model that reads bytes, with a chat template of its own."""
    folder = tmp_path / "bytes"
    shutil.copytree(make_model("qwen2", seed=5), folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), "utf-8")
    trunk = load_trunk(folder)
    head = {**new_head(trunk.width), f"{HEAD}weight": mx.random.normal((32,), key=mx.random.key(2))}
    facts = RewardFacts(placement="folder", pooling="last", mean=0.0, deviation=1.0)
    return RewardModel(trunk, Weights(head), facts)


def test_another_family_reads_the_text_in_its_own_tokens(
    stopping_trunk: Trunk, other_family: RewardModel, rollout: Rollout
) -> None:
    roles = Roles(stopping_trunk, Weights({}), None, [Source("other", 1.0, other_family, own_tokens=True)])
    found = np.array(raw_scores(roles, rollout, batch_size=3).normalised["other"])
    own = other_family.trunk.tokenizer
    for row, value in enumerate(found):
        prompt, response = rollout.prompts[row], rollout.responses[row]
        answer = completion_text(stopping_trunk.tokenizer, prompt, response)
        tokens = own.encode(stopping_trunk.tokenizer.decode(prompt) + answer, bos=True)
        tokens += [own.eos_id] if rollout.finished[row].item() else []
        assert value == pytest.approx(other_family.raw(make_sequences([tokens], [()]))[0].item(), abs=1e-4)


def test_another_family_reads_chats_in_its_own_template(
    stopping_trunk: Trunk, other_family: RewardModel, rollout: Rollout
) -> None:
    chats = tuple({"messages": [{"role": "user", "content": f"say {row}"}]} for row in range(len(rollout.prompts)))
    asked = rollout._replace(records=chats)
    roles = Roles(stopping_trunk, Weights({}), None, [Source("other", 1.0, other_family, own_tokens=True)])
    found = np.array(raw_scores(roles, asked, batch_size=8).normalised["other"])
    answer = completion_text(stopping_trunk.tokenizer, asked.prompts[1], asked.responses[1])
    tokens = other_family.trunk.tokenizer.encode(f"<user>say 1</s><assistant>{answer}</s>", bos=False)
    assert found[1] == pytest.approx(other_family.raw(make_sequences([tokens], [()]))[0].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("sum", [1.0 + 2 * 0.5, -1.0 + 2 * 2.0]),
        ("worst", [min(1.0, 1.0), min(-1.0, 4.0)]),
        ("cautious", [1.0 - 0.0, 1.5 - 0.5 * 2.5]),  # means 1 and 1.5, deviations 0 and 2.5
    ],
)
def test_an_ensemble(
    stopping_trunk: Trunk, other_family: RewardModel, rollout: Rollout, combine: str, expected: list[float]
) -> None:
    two = rollout._replace(prompts=rollout.prompts[:2], finished=mx.array([True, True]))
    roles = Roles(stopping_trunk, Weights({}), None, [Source("a", 1.0, other_family), Source("b", 2.0, other_family)])
    raw = RawScores({"a": mx.array([1.0, -1.0]), "b": mx.array([0.5, 2.0])}, {})
    section = ScoreSection(combine=combine, caution=0.5)  # type: ignore[arg-type]
    assert np.array(combined_scores(raw, roles, two, section, 6)) == pytest.approx(expected)


def test_a_reward_model_on_a_trunk_of_its_own_is_held_to_its_positions(
    stopping_trunk: Trunk, other_family: RewardModel, rollout: Rollout
) -> None:
    """Before the start as many as the policy's, and in its own tokens whenever it reads."""
    roles = Roles(stopping_trunk, Weights({}), None, [Source("other", 1.0, other_family, own_tokens=True)])
    trunk = other_family.trunk
    trunk.remarks, trunk.context = ["warning: a key", "slower"], Context(5, learned=False)
    said = roles.remarks(6)
    assert "warning: a key" in said and any("at most 5" in line for line in said) and "slower" not in said
    raw_scores(roles, rollout, batch_size=3)
    trunk.context = Context(5, learned=True)
    assert roles.remarks(5)
    with pytest.raises(ModelError, match="has 5 positions"):
        roles.remarks(6)
    with pytest.raises(ModelError, match="has 5 positions"):
        raw_scores(roles, rollout, batch_size=3)


@pytest.mark.parametrize("combine", ["sum", "worst", "cautious"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_where_a_gate_gives_0_the_others_count_nothing(
    stopping_trunk: Trunk, other_family: RewardModel, rollout: Rollout, combine: str, weight: float
) -> None:
    two = rollout._replace(prompts=rollout.prompts[:2], finished=mx.array([True, True]))
    sources = [Source("a", 1.0, other_family), Source("b", weight, None, gate=True)]
    raw = RawScores({"a": mx.array([3.0, 3.0]), "b": mx.array([0.0, 2.0])}, {})
    section = ScoreSection(combine=combine, caution=1.0)  # type: ignore[arg-type]
    closed, opened = np.array(
        combined_scores(raw, Roles(stopping_trunk, Weights({}), None, sources), two, section, 6)
    ).tolist()
    without = {"sum": 3 + 2 * weight, "worst": 2 * weight or 3, "cautious": 3 if not weight else 2 - 1}
    assert closed == 0 and opened == pytest.approx(without[combine])
    assert not any(source.judges for source in sources) and Source("c", 0.0, None).judges
