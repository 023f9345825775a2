"""`mlx-ppo data`, and the commands that train on the files of other tools."""

import json
import re
from contextlib import suppress
from pathlib import Path

from mlx_ppo import sft
from mlx_ppo.data.examples import load_examples
from mlx_ppo.data.inspection import Characters, inspect
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.tokenizers.load import load_tokenizer

LAYOUTS = Path(__file__).parents[1] / "data/layouts"


def test_it_counts_and_names_what_is_wrong(project):
    path = project.folder / "p.jsonl"
    pair = {"prompt": "it", "chosen": " was", "rejected": " is"}
    turned = {"prompt": "it", "chosen": " is", "rejected": " was"}
    rows = [pair, pair, turned, {"prompt": "it", "chosen": 3, "rejected": ""}, {"prompt": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    result = project.cli("data", path)
    assert result.exit_code == 0
    for words in ("plain: 3 pairs of texts", "3 rows can't be used", "duplicates: 1", "conflicts: 1 pairs",
                  "characters a row: 8 to 8", "chosen:   it was", "rejected: it is"):  # fmt: skip
        assert words in result.stdout, words
    named = [line for line in result.stderr.splitlines() if "p.jsonl:" in line]
    assert [re.search(r"p\.jsonl:(\d)", line)[1] for line in named] == ["4", "5", "6"]


def test_leaks_between_files(project):
    for name, texts in (("a", ["it was", "bad"]), ("b", ["bad", "the film", "it"])):
        (project.folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shown = project.done("data", project.folder / "a.jsonl", project.folder / "b.jsonl")
    assert "1 of the 3 rows of b.jsonl have a text that is in a.jsonl; 0 ask" in shown


def test_the_mask_shown_is_the_mask_trained(project, monkeypatch):
    """What sft makes its batch's targets of, decoded, is what stands in the brackets."""
    model = project.folder / "model"
    tokenizer = load_tokenizer(model, check_model_folder(model).config)
    file = project.folder / "e.jsonl"
    rows = [{"prompt": "it was", "completion": " bad"}, {"text": "the film was good"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = []

    class StopError(Exception):
        pass

    def caught(prompts, answers):
        trained.extend(zip(map(tuple, prompts), map(tuple, answers), strict=True))
        raise StopError

    monkeypatch.setattr(sft, "make_sequences", caught)
    examples = load_examples(file, tokenizer, max_tokens=99, overlong="error").examples
    with suppress(StopError):
        sft._summed_loss(None, None, examples)
    seen = inspect(file, tokenizer).seen
    assert [(one.texts[0][: one.start], one.texts[0][one.start :]) for one in seen] == trained and trained
    shown = project.done("data", file, "--model", model)
    for before, after in trained:
        ends = " EOS" if after[-1] in tokenizer.eos_ids else ""
        whole = tokenizer.decode((*before, *after))
        rest = whole.removeprefix(tokenizer.decode(before))
        assert f"[[{rest}{ends}]]  (loss on {len(after)} of {len(before) + len(after)} tokens)" in shown


def test_convert_writes_what_the_readers_take(project):
    for path in sorted(LAYOUTS.iterdir()):
        out = project.folder / f"{path.name}.out"
        result = project.cli("data", path, "--rows", 0, "--convert", out)
        if not out.exists():
            assert result.exit_code == 3 and "error: " in result.stderr, path
            continue
        first, again = inspect(path, Characters()), inspect(out, Characters())
        assert [one.texts for one in again.seen] == [one.texts for one in first.seen] and not again.found.bad
        assert again.found.layout == "plain" and again.found.kind == first.found.kind, path
    project.refused(
        2, "exists; name a new file", "data", LAYOUTS / "hh.jsonl", "--convert", out.with_name("hh.jsonl.out")
    )


def test_what_is_refused(project):
    project.refused(3, "no such file", "data", project.folder / "nothing.csv")
    project.refused(2, "--column: 'x' must be NAME=COLUMN", "data", LAYOUTS / "kto.csv", "--column", "x")
    project.refused(2, "takes one FILE", "data", LAYOUTS / "kto.csv", LAYOUTS / "hh.jsonl", "--convert", "o.jsonl")
    shown = project.done("data", LAYOUTS / "unknown.csv", "--column", "prompt=frage", "--as", "prompts")
    assert "unknown.csv: plain: 1 prompts of texts, from CSV separated by ','" in shown


def test_commands_train_on_them_and_say_what_they_read(project):
    csv = project.folder / "p.csv"
    csv.write_text("question,good,bad\nit was, good, bad\nthe film, was good, was bad\n")
    columns = ["prompt=question", "chosen=good", "rejected=bad"]
    data = {"train": "p.csv", "columns": columns}
    shown = project.done("reward", project.config("reward", data=data), "--dry-run")
    assert "p.csv: plain: 2 pairs of texts, from CSV separated by ','" in shown
    prompts = project.config("train", data={"prompts": "p.csv", "columns": ["prompt=question"]})
    assert "p.csv: plain: 2 prompts of texts" in project.done("train", prompts, "--dry-run")
    (project.folder / "k.json").write_text('[{"prompt": "it was", "completion": " good", "label": true}]')
    shown = project.done("sft", project.config("sft", data={"train": "k.json"}), "--dry-run")
    assert "k.json: kto: 1 texts to imitate, from a JSON list" in shown
