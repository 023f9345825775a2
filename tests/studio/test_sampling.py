"""Pairs that are sampled ahead: different sides, named writers, going on where a kill ended it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.bundle import bundle_root
from mlx_ppo.errors import DataError
from mlx_ppo.studio.judging import judge
from mlx_ppo.studio.order import NO_MORE, Order, margins_of
from mlx_ppo.studio.sampling import sample


@pytest.fixture
def order(tmp_path: Path, model_folder: Path) -> Order:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"the film {word}"}) + "\n" for word in ("a", "was", "good", "bad"))
    )
    return Order(str(tmp_path / "set.jsonl"), (str(model_folder),), str(prompts), 6, 5, 1.0, 3)


def rows(order: Order) -> list[dict]:
    return [json.loads(line) for line in Path(order.file).read_text().splitlines()]


def test_a_set_is_filled_and_goes_on_after_a_kill(order: Order, tmp_path: Path) -> None:
    assert sample(order) == 6
    whole = rows(order)
    assert len({row["id"] for row in whole}) == 6 and all(row["a"] != row["b"] for row in whole)
    assert all(row["shown"] == row["prompt"] for row in whole)
    assert sample(order) == 6 and rows(order) == whole
    content = Path(order.file).read_bytes()
    Path(order.file).write_bytes(content[: content.rfind(b"\n", 0, -1) + 20])  # in the middle of the last line
    assert sample(order) == 6
    lines = Path(order.file).read_text().splitlines()
    again = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    assert again == whole and len(lines) == 7  # with the torn one


def test_two_processes_fill_a_set_once(order: Order) -> None:
    words = [sys.executable, "-P", "-m", "mlx_ppo.studio.sampling", json.dumps(order._asdict())]
    for process in [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(2)]:
        assert process.wait() == 0
    assert len({row["id"] for row in rows(order)}) == len(rows(order)) == 6


def test_each_side_is_written_by_the_model_that_is_named(order: Order, make_model) -> None:
    other = str(make_model(seed=1))
    both = order._replace(models=(order.models[0], other), temperature=0.0)
    assert sample(both) == 6
    alone = [sample(order._replace(models=(model,) * 2, file=order.file + str(n), temperature=0.0)) for n, model in
             enumerate(both.models)]  # fmt: skip
    assert alone == [0, 0]  # a model writes the most probable tokens twice
    for row in rows(both):
        assert row["by"] == {"a": order.models[0], "b": other}


def test_chats_stay_messages_in_the_pair(order: Order, make_model, tmp_path: Path) -> None:
    model = tmp_path / "chatty"
    shutil.copytree(order.models[0], model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    message = [{"role": "user", "content": "the film"}]
    Path(order.prompts).write_text(json.dumps({"messages": message}) + "\n")
    assert sample(order._replace(models=(str(model),), total=1)) == 1
    assert rows(order)[0]["prompt"] == message and "the film" in rows(order)[0]["shown"]


def test_prompts_that_give_no_more_end_it_with_a_word(order: Order) -> None:
    def said(changed: Order) -> tuple[int, str, str]:
        words = [sys.executable, "-P", "-m", "mlx_ppo.studio.sampling", json.dumps(changed._asdict())]
        done = subprocess.run(words, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert said(order._replace(temperature=0.0)) == (0, f"0 pairs in set.jsonl{NO_MORE}\n", "")
    status, out, wrong = said(order._replace(prompts="none.jsonl"))
    assert (status, out) == (3, "") and wrong.startswith("error: none.jsonl: ") and wrong.count("\n") == 1


def test_prompts_that_are_too_long_for_anything_are_named(order: Order) -> None:
    Path(order.prompts).write_text(json.dumps({"prompt": "the film " * 5000}) + "\n")
    with pytest.raises(DataError, match=r"prompts.jsonl:1: "):
        sample(order)


def test_a_reward_model_judges_the_pairs_of_a_comparison(tmp_path: Path) -> None:
    """Its margins are those of its scores, and the figures count them for the second model's side."""
    reviews = bundle_root() / "models" / "reviews"
    file = tmp_path / "compare-x.jsonl"
    texts = (" is awful and boring.", " is wonderful and moving.")
    base = {"shown": "The film", "prompt": "The film", "cut": {"a": False, "b": False}, "by": {"a": "old", "b": "new"}}
    pairs = [
        {**base, "id": "000000", "a": texts[0], "b": texts[1]},
        {**base, "id": "000001", "a": texts[1], "b": texts[0]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The film"}\n')
    assert (
        judge(Order(str(file), (str(reviews), str(reviews)), str(prompts), 2, 5, 1.0, 3, str(reviews / "reward"))) == 2
    )
    first, second = (json.loads(line)["margin"] for line in margins_of(file).read_text().splitlines())
    assert first > 1 and second == pytest.approx(-first, abs=1e-4)
