"""Which pair is asked about next once a reward model is there, and what the answers have taught."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_ppo.bundle import bundle_root
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.models.heads import load_reward_model, text_states
from mlx_ppo.models.load import load_trunk
from mlx_ppo.studio.order import Order
from mlx_ppo.studio.questions import AGAIN
from mlx_ppo.studio.sampling import sample
from mlx_ppo.studio.selection import (
    FIRST,
    Teacher,
    ensemble_disagreement,
    fit_head,
    learned,
    main_directions,
    packed,
)

WIDTH = 12


def taste(count: int, seed: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Differences [n, d], and which side a rater with a linear taste prefers."""
    draw = np.random.default_rng(seed)
    differences = draw.normal(size=(count, WIDTH))
    liked = differences @ np.linspace(-1, 1, WIDTH) + noise * draw.normal(size=count)
    return differences, (liked > 0).astype(float)


def test_the_head_is_the_most_probable_one() -> None:
    differences, outcomes = taste(80, 0)
    outcomes[:5] = 0.5
    head = fit_head(differences, outcomes)

    def loss(weights: np.ndarray) -> float:
        logits = differences @ weights
        return float(np.logaddexp(0, logits).sum() - outcomes @ logits + weights @ weights / 2)

    best = loss(head.weights)
    for direction in np.eye(WIDTH):
        assert min(loss(head.weights + 1e-3 * direction), loss(head.weights - 1e-3 * direction)) > best
    step = 1e-3 * np.linalg.cholesky(head.covariance)[:, 0]
    curvature = (loss(head.weights + step) + loss(head.weights - step) - 2 * best) / 1e-6
    assert curvature == pytest.approx(1, rel=0.01)  # the covariance is the inverse of the loss's curvature


def test_heads_disagree_where_nothing_was_asked() -> None:
    differences, outcomes = taste(60, 1)
    differences[:, -1] = 0.0
    head = fit_head(differences, outcomes)
    known, unknown = np.eye(WIDTH)[0], np.eye(WIDTH)[-1]
    assert head.disagreement(np.stack([known, unknown])).argmax() == 1


def test_what_was_learned() -> None:
    differences, outcomes = taste(1200, 2)
    assert learned(differences[:15], outcomes[:15], 0) is None
    some, many = learned(differences[:40], outcomes[:40], 0), learned(differences, outcomes, 0)
    assert some is not None and many is not None
    assert some.accuracy < many.accuracy and many.accuracy > 0.93 and many.low < many.accuracy < many.high
    assert not some.enough and many.enough and many.answers == 1200
    blind = np.random.default_rng(3).integers(0, 2, 1200).astype(float)
    guess = learned(differences, blind, 0)
    assert guess is not None and guess.low < 0.5 < guess.high


def rows_of(differences: np.ndarray, by: str = "reward") -> dict[str, dict]:
    draw = np.random.default_rng(9)
    found = {}
    for number, difference in enumerate(differences):
        base = draw.normal(size=WIDTH)
        states = {"a": packed(base + difference), "b": packed(base)}
        found[f"{number:06}"] = {
            "id": f"{number:06}", "a": f"a{number}", "b": f"b{number}", "states": states, "states_by": by
        }  # fmt: skip
    return found


def answers_of(pairs: dict[str, dict], outcomes: np.ndarray, swapped: bool) -> dict[str, dict]:
    found = {}
    for (number, pair), outcome in zip(pairs.items(), outcomes, strict=False):
        left, right = ("b", "a") if swapped else ("a", "b")
        liked = "a" if outcome else "b"
        row = {
            "kind": "pair",
            "left": pair[left],
            "right": pair[right],
            "verdict": "left" if left == liked else "right",
        }
        found[f"pair:round-1/{number}"] = row
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_is_chosen_by_what_the_answers_leave_open(swapped: bool) -> None:
    differences, outcomes = taste(200, 4)
    differences[:100, -1] *= 0.01  # nothing was asked in this direction
    pairs = rows_of(differences)
    standing = answers_of(pairs, outcomes[:100], swapped)
    free = list(pairs.values())[100:]
    chosen = Teacher().choose(free, pairs, standing)
    assert chosen is not None
    size = np.abs(differences[100:, -1])
    assert abs(differences[int(chosen["id"]), -1]) > np.quantile(size, 0.8)
    found = Teacher().measure(pairs, standing, 0)
    assert found is not None and found.accuracy > 0.75  # the taste is found whichever side was shown on the left


def test_without_a_reward_model_or_answers_the_order_stays_random() -> None:
    differences, outcomes = taste(60, 5)
    pairs = rows_of(differences)
    free = list(pairs.values())[30:]
    assert Teacher().choose(free, pairs, answers_of(pairs, outcomes[: FIRST - 1], False)) is None
    assert Teacher().choose(free, pairs, answers_of(pairs, outcomes[:FIRST], False)) is not None
    own = rows_of(differences, by="model")
    assert Teacher().choose(list(own.values())[30:], own, answers_of(own, outcomes[:30], False)) is None
    plain = {number: {key: row[key] for key in ("id", "a", "b")} for number, row in pairs.items()}
    assert Teacher().choose(list(plain.values()), plain, {}) is None and Teacher().measure(plain, {}, 0) is None


def test_the_members_of_an_ensemble_choose_before_there_are_answers_and_are_heard_later() -> None:
    differences, outcomes = taste(60, 5)
    pairs = rows_of(differences)
    for number, pair in enumerate(pairs.values()):
        pair["leads"] = [0.1, 0.1, 0.1] if number != 47 else [-3.0, 0.5, 2.0]
    free = list(pairs.values())[30:]
    for answers in (0, FIRST - 1, 30):
        chosen = Teacher().choose(free, pairs, answers_of(pairs, outcomes[:answers], False))
        assert chosen is not None and chosen["id"] == "000047"
    free[3] = {key: value for key, value in free[3].items() if key != "leads"}
    assert Teacher().choose(free, pairs, {}) is None, "without the members' numbers of every pair, at random"


@pytest.mark.parametrize("leads", [None, [], [1.0], [1.0, "2"], [1.0, float("nan")], [1.0, True], "ab", {"a": 1}])
def test_numbers_that_no_ensemble_wrote_are_not_read(leads: object) -> None:
    assert ensemble_disagreement([{"leads": leads}]) is None


def test_members_disagree_by_the_variance_of_their_logits() -> None:
    found = ensemble_disagreement([{"leads": [1.0, -1.0]}, {"leads": [9.0, 7.0]}, {"leads": [0.5, 0.5]}])
    assert found is not None
    sure = 1 / (1 + np.exp(-8))
    assert found == pytest.approx([0.25, sure * (1 - sure), 0.0])


def test_ties_and_repeats_are_no_sides() -> None:
    differences, outcomes = taste(60, 6)
    pairs = rows_of(differences)
    standing = answers_of(pairs, outcomes[:40], False)
    first = next(iter(standing))
    standing[first + AGAIN] = standing[first]
    standing["pair:round-1/000050"] = {"kind": "pair", "left": "a50", "right": "b50", "verdict": "tie"}
    standing["pair:round-1/000051"] = {"kind": "pair", "left": "a51", "right": "b51", "verdict": "skip"}
    found = Teacher().measure(pairs, standing, 0)
    assert found is not None and found.answers == 40


def test_directions_of_large_numbers_drown_no_other() -> None:
    differences, _ = taste(100, 7)
    differences[:, 0] *= 1e4
    found = main_directions(differences)
    assert np.square(found).sum(axis=1).mean() == pytest.approx(2.0)
    assert found.std(axis=0).max() < 3 * found.std(axis=0).min()


def test_pairs_are_sampled_with_the_reward_models_states(tmp_path: Path) -> None:
    model = bundle_root() / "models" / "reviews"
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the film", "a")))
    for name, reward in (("with", str(model / "reward")), ("without", "")):
        file = tmp_path / f"{name}.jsonl"
        sample(Order(str(file), (str(model),), str(tmp_path / "prompts.jsonl"), 2, 8, 1.0, 3, reward))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert {row["states_by"] for row in rows} == {"reward" if reward else "model"}
        trunk = load_trunk(model)
        judge = load_reward_model(Path(reward), trunk) if reward else None
        for row in rows:
            text = tuple(trunk.tokenizer.encode(row["prompt"] + row["a"], bos=True))
            text = text if row["cut"]["a"] else (*text, trunk.tokenizer.eos_id)
            sequences = make_sequences([text], [()])
            if judge is not None:
                with judge.trunk.using(judge.weights):
                    expected = np.array(text_states(judge.trunk, sequences, judge.facts.pooling))[0]
            else:
                expected = np.array(text_states(trunk, sequences, "mean"))[0]
            assert row["states"]["a"] == packed(expected.astype(np.float64)) or np.allclose(
                np.frombuffer(base64.b64decode(row["states"]["a"]), "<f2"), expected, atol=2e-3, rtol=2e-3
            )
