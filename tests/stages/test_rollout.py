import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchRotatingKVCache

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.cpu.sampling import sample
from mlx_ppo.compute.engine import Reader
from mlx_ppo.compute.portable import sampled
from mlx_ppo.data.random import philox
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.roles import Roles
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.decoding import Decoder, Request
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import policy_logprobs

Prompts = list[tuple[int, ...]]
PLAIN = Weights({})


def run(trunk: Trunk, prompts: Prompts, **changes: Any) -> Rollout:
    options: dict[str, Any] = {
        "weights": PLAIN,
        "samples_per_prompt": 1,
        "max_tokens": 12,
        "temperature": 1.0,
        "batch_size": 64,
        "seed_parts": (0, "rollout"),
        "positions": range(len(prompts)),
        "records": [{"id": row} for row in range(len(prompts))],
        **changes,
    }
    weights, asked = options.pop("weights"), Asked(prompts, options.pop("positions"), options.pop("records"))
    on_tokens = options.pop("on_tokens", lambda _: None)
    return generate(trunk, weights, asked, Sampling(**options), on_tokens)


def row_logits(trunk: Trunk, tokens: tuple[int, ...]) -> np.ndarray:
    """Logits [S, V] of one row by the whole model, without cache or padding."""
    return np.array(trunk.model(mx.array([tokens])))[0].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_batch_size_changes_nothing(make_model: Callable[..., Path], prompts: Prompts, kind: str) -> None:
    """One row at a time shares no prefill, drops no finished neighbours, joins none and pads nothing."""
    trunk = load_trunk(make_model(kind, eos_token_id=[2, *range(100, 140)]))
    assert trunk.capabilities.joins
    alone, *others = (run(trunk, prompts, samples_per_prompt=3, batch_size=size) for size in (1, 2, 3, 7, 64))
    lengths = {len(response) for response in alone.responses}
    assert len(lengths) > 3
    assert {1, 12} & lengths, "some rows end at once, or not at all"
    for other in others:
        assert other.responses == alone.responses
        np.testing.assert_allclose(np.array(other.logprobs), np.array(alone.logprobs), atol=1e-4)
        assert other.finished.tolist() == alone.finished.tolist()
    assert len(set(alone.responses[:3])) == 3, "samples of one prompt differ"


def decoded(trunk: Trunk, prompts: Prompts, **changes: Any) -> tuple[Rollout, list[int]]:
    """A rollout, and how many rows each of its decoding steps had."""
    rows: list[int] = []
    advance = Decoder._advance

    def counting(decoder: Decoder, reader: Reader, tokens: Any, slots: Any) -> None:
        rows.append(len(tokens))
        advance(decoder, reader, tokens, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_advance", counting)
        return run(trunk, prompts, **changes), rows


def test_the_place_of_a_row_that_has_ended_goes_to_one_that_waits(
    make_model: Callable[..., Path], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = load_trunk(make_model(eos_token_id=[2, *range(100, 120)]))
    options: dict[str, Any] = {"samples_per_prompt": 8, "max_tokens": 30, "batch_size": 8}
    assert trunk.capabilities.joins
    filled, rows = decoded(trunk, prompts, **options)
    again, _ = decoded(trunk, prompts, **options)
    np.testing.assert_array_equal(np.array(again.logprobs), np.array(filled.logprobs), err_msg="bit for bit")
    trunk.capabilities = trunk.capabilities._replace(joins=False)
    apart, others = decoded(trunk, prompts, **options)
    assert filled.responses == apart.responses == again.responses
    read = sum(len(response) - 1 for response in filled.responses)
    if trunk.engine.name == "cpu":
        assert sum(rows) == sum(others) == read
    else:  # a last token is read along before it is known to be one
        assert all(read <= sum(one) <= read + len(filled.responses) for one in (rows, others))
    assert len(rows) < 0.75 * len(others)
    rises, others_rises = (sum(after > before for before, after in itertools.pairwise(one)) for one in (rows, others))
    assert max(rows) <= 8 and rises > 4 >= others_rises


def test_where_caches_dont_join_all_places_have_to_be_free(
    make_model: Callable[..., Path], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"samples_per_prompt": 4, "batch_size": 4}
    folder = make_model("gemma3_text", eos_token_id=[2, *range(100, 140)])
    filled, rows = decoded(load_trunk(folder), prompts, **options)
    for raises in (False, True):
        monkeypatch.setattr(BatchRotatingKVCache, "extend", None if raises else lambda *_: None)
        trunk = load_trunk(folder)
        assert trunk.capabilities.batches and not trunk.capabilities.joins
        apart, others = decoded(trunk, prompts, **options)
        assert apart.responses == filled.responses
        assert len(others) > len(rows)


@pytest.mark.parametrize("form", ["full", "8-bit"])
def test_caches_have_room_for_the_longest_row_and_no_more(
    make_model: Callable[..., Path], prompts: Prompts, form: str
) -> None:
    trunk = load_trunk(make_model(head_dim=32, eos_token_id=[2, *range(100, 110)]))
    requests = [Request(prompts[row % 5], philox(0, row).random(16, dtype=np.float32)) for row in range(30)]
    decoder = Decoder(trunk, requests, places=4, max_tokens=16, distribution=Distribution(), cache_form=form)
    rooms = set()

    def look(_: int) -> None:
        longest = max(len(requests[row].prompt) for row in decoder._live)
        for layer in decoder._cache:
            parts = [layer.keys, layer.values] if form == "full" else [*layer.keys, *layer.values]
            assert {part.shape[::2][:2] for part in parts} == {(len(decoder._live), longest + 16)}
        rooms.add(longest + 16)

    while decoder.unfinished:
        decoder.refill()
        decoder.decode(look)
    assert len(rooms) >= 4


def test_a_prompts_responses_dont_depend_on_the_other_prompts(stopping_trunk: Trunk, prompts: Prompts) -> None:
    whole = run(stopping_trunk, prompts, samples_per_prompt=2)
    for row, prompt in enumerate(prompts):
        alone = run(stopping_trunk, [prompt], samples_per_prompt=2, positions=[row], records=[{}])
        assert alone.responses == whole.responses[2 * row : 2 * row + 2]
    moved = run(stopping_trunk, prompts, samples_per_prompt=2, positions=range(1, 6))
    assert all(a != b for a, b in zip(moved.responses[::2], whole.responses[::2], strict=True))
    assert run(stopping_trunk, prompts, seed_parts=(1, "rollout")).responses != whole.responses[::2]
    longer = run(stopping_trunk, prompts, samples_per_prompt=2, max_tokens=20)
    assert tuple(response[:12] for response in longer.responses) == whole.responses


def test_end_of_sequence_is_kept_counted_and_ends_a_response(stopping_trunk: Trunk, prompts: Prompts) -> None:
    steps: list[int] = []
    rollout = run(stopping_trunk, prompts, samples_per_prompt=8, max_tokens=6, on_tokens=steps.append)
    eos = stopping_trunk.tokenizer.eos_ids
    seen = set()
    for row, response in enumerate(rollout.responses):
        finished = rollout.finished[row].item()
        assert finished == (response[-1] in eos)
        assert not eos & set(response[:-1])
        assert finished or len(response) == 6
        assert np.array(rollout.mask[row]).tolist() == [slot < len(response) for slot in range(6)]
        assert not np.array(rollout.logprobs[row])[len(response) :].any()
        seen.add((finished, len(response)))
    assert {(True, 1), (True, 6), (False, 6)} <= seen, "also ends in the first and in the very last slot"
    assert sum(steps) == sum(map(len, rollout.responses))
    assert rollout.group.tolist() == [row // 8 for row in range(40)]
    assert [record["id"] for record in rollout.records] == rollout.group.tolist()
    assert rollout.prompts == tuple(prompt for prompt in prompts for _ in range(8))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_sampled_logprobs_are_those_of_the_training_forward(
    stopping_trunk: Trunk, prompts: Prompts, make_adapters: Callable[..., Weights], temperature: float
) -> None:
    policy = make_adapters(stopping_trunk)
    rollout = run(stopping_trunk, prompts, weights=policy, samples_per_prompt=3, temperature=temperature)
    roles = Roles(stopping_trunk, PLAIN, None)
    trained = policy_logprobs(roles, policy, rollout, temperature=temperature, batch_size=4)
    np.testing.assert_allclose(np.array(rollout.logprobs), np.array(trained), atol=1e-4)
    plain = policy_logprobs(roles, PLAIN, rollout, temperature=temperature, batch_size=4)
    assert np.abs(np.array(plain - trained)).max() > 0.1, "the adapters must matter"
    with stopping_trunk.using(policy):
        for prompt, response, seen in zip(rollout.prompts, rollout.responses, rollout.logprobs, strict=True):
            exact = log_softmax(row_logits(stopping_trunk, prompt + response)[len(prompt) - 1 : -1] / temperature)
            expected = exact[np.arange(len(response)), response]
            np.testing.assert_allclose(np.array(seen)[: len(response)], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_come_as_often_as_their_probability(trunk: Trunk, prompts: Prompts, temperature: float) -> None:
    """Pearson's statistic over the tokens with at least ten expected, the rest taken together."""
    count = 3000
    rollout = run(trunk, prompts[:1], samples_per_prompt=count, max_tokens=1, temperature=temperature, batch_size=count)
    probabilities = np.exp(log_softmax(row_logits(trunk, prompts[0])[-1] / temperature))
    observed = np.bincount([response[0] for response in rollout.responses], minlength=len(probabilities))
    common = probabilities * count >= 10
    expected = np.append(probabilities[common], probabilities[~common].sum()) * count
    found = np.append(observed[common], observed[~common].sum())
    statistic, freedom = ((found - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_temperature_zero_takes_the_most_probable_token(stopping_trunk: Trunk, prompts: Prompts) -> None:
    rollout = run(stopping_trunk, prompts, temperature=0, seed_parts=(7,))
    for prompt, response, seen in zip(rollout.prompts, rollout.responses, rollout.logprobs, strict=True):
        logits = row_logits(stopping_trunk, prompt + response)[len(prompt) - 1 : -1]
        assert logits.argmax(axis=-1).tolist() == list(response)
        np.testing.assert_allclose(
            np.array(seen)[: len(response)], log_softmax(logits).max(axis=-1), atol=1e-4, err_msg="temperature 1"
        )


def test_one_token_and_nothing_but_end_of_sequence(make_model: Callable[..., Path], prompts: Prompts) -> None:
    rollout = run(load_trunk(make_model()), prompts, max_tokens=1)
    assert rollout.mask.tolist() == [[True]] * 5
    assert not rollout.finished.any().item()
    always = load_trunk(make_model(eos_token_id=list(range(304))))
    rollout = run(always, prompts, max_tokens=9)
    assert rollout.mask.shape == rollout.logprobs.shape == (5, 1)
    assert rollout.finished.all().item()
    roles = Roles(always, PLAIN, None)
    trained = policy_logprobs(roles, PLAIN, rollout, temperature=1.0, batch_size=2)
    np.testing.assert_allclose(np.array(rollout.logprobs), np.array(trained), atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_stop_the_run(trunk: Trunk, prompts: Prompts, value: float) -> None:
    head = mx.where(mx.arange(304)[:, None] == 7, value, trunk.base["lm_head.weight"])
    with pytest.raises(RunError, match="not finite"):
        run(trunk, prompts, weights=Weights({"lm_head.weight": head}))


def on_device(logits: np.ndarray, draws: np.ndarray, how: Distribution) -> tuple[np.ndarray, ...]:
    tokens, logprobs, _ = sampled(mx.array(logits), mx.array(draws), how)
    return np.array(tokens), np.array(logprobs)


@pytest.mark.parametrize("sample", [sample, on_device])
def test_sample_inverts_the_cumulative_distribution(sample: Callable[..., Any]) -> None:
    probabilities = np.array([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32) + 5
    draws = np.array([0.0, 0.099, 0.101, 0.299, 0.301, 1 - 2**-24], np.float32)
    rows = np.tile(logits, (len(draws), 1))
    tokens, logprobs, *_ = sample(rows, draws, Distribution(1.0))
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4], "never a token of probability 0"
    np.testing.assert_allclose(logprobs, np.log(probabilities[tokens]), rtol=1e-5)
    squared = probabilities**2 / (probabilities**2).sum()
    tokens, logprobs, *_ = sample(rows, draws, Distribution(0.5))
    assert tokens.tolist() == [np.searchsorted(np.cumsum(squared), draw, side="right") for draw in draws]
    np.testing.assert_allclose(logprobs, np.log(squared[tokens]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_kept_states_are_those_of_a_pass_over_the_whole_text(
    make_model: Callable[..., Path],
    make_adapters: Callable[..., Weights],
    prompts: Prompts,
    kind: str,
    batch_size: int,
) -> None:
    """At every token, a response's last one included, whatever was decoded together and whenever a row ended."""
    trunk = load_trunk(make_model(kind, num_hidden_layers=4, eos_token_id=[2, *range(100, 140)]))
    weights = make_adapters(trunk, layers=2)
    without = run(trunk, prompts, weights=weights, samples_per_prompt=3, batch_size=batch_size)
    assert without.kept is None
    trunk.share_below([weights])
    rollout = run(trunk, prompts, weights=weights, samples_per_prompt=3, batch_size=batch_size)
    assert rollout.responses == without.responses
    assert rollout.finished.any().item() and not rollout.finished.all().item()
    assert rollout.kept is not None
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        tokens = prompt + response
        wanted = np.array(trunk.entering(mx.array([tokens])))[0]
        np.testing.assert_allclose(np.array(rollout.kept[row, : len(tokens)]), wanted, atol=2e-4)
        assert not mx.any(rollout.kept[row, len(tokens) :]).item()
    sequences = rollout.sequences([4, 1])
    assert sequences.kept is not None and sequences.kept.shape[:2] == sequences.tokens.shape


def test_a_cache_of_eight_bits(
    make_model: Callable[..., Path], make_adapters: Callable[..., Weights], prompts: Prompts
) -> None:
    """Nearly the same distribution, whatever is decoded together; no states are kept: they wouldn't be exact."""
    trunk = load_trunk(make_model(head_dim=32, num_hidden_layers=3, deviation=0.15, eos_token_id=[2, *range(100, 140)]))
    weights = make_adapters(trunk, layers=1)
    trunk.share_below([weights])
    assert trunk.split
    options: dict[str, Any] = {"weights": weights, "samples_per_prompt": 3}
    full = run(trunk, prompts, **options)
    whole, few, alone = (run(trunk, prompts, cache_form="8-bit", batch_size=size, **options) for size in (64, 4, 1))
    assert full.kept is not None and whole.kept is None and whole.sequences().kept is None
    assert len({len(response) for response in whole.responses}) > 3
    for other in (full, few, alone):  # a batch's last digits may turn a rounding, and that a token
        same = [a == b for a, b in zip(whole.responses, other.responses, strict=True)]
        assert sum(same) >= 0.8 * len(same)
    roles = Roles(trunk, PLAIN, None)
    errors = {}
    for name, rollout in (("full", full), ("8-bit", whole)):
        trained = policy_logprobs(roles, weights, rollout, temperature=1.0, batch_size=4)
        errors[name] = np.abs(np.array(rollout.logprobs - trained)).max()
    assert errors["full"] < 1e-4 < errors["8-bit"] < 0.1
    forms = ("full", "8-bit")
    greedy = [run(trunk, prompts, cache_form=form, temperature=0, weights=weights).responses for form in forms]
    assert sum(a == b for a, b in zip(*greedy, strict=True)) >= 4
