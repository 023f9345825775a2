"""A small project in a folder, and the command line to try on it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mlx_ppo.cli.main import main
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import METRICS, SAMPLES

PROMPTS = ("the film", "a very good story", "it was", "bad", "is it not in the story", "the story of a film")
RULE = """def letters(prompts, completions):
    return [sum(c.isascii() and c.isalpha() for c in text) / (1 + len(text)) for text in completions]
"""
ENGINE = "computed by the portable engine"  # a remark, no error
TIMES = ("time", "seconds", "tokens_per_second", "memory")
Sections = dict[str, Any]


def _train() -> Sections:
    return {
        "run": {"iterations": 3, "save_every": 1, "folder": "runs", "name": "a"},
        "model": {"path": "model"},
        "lora": {"rank": 4},
        "data": {"prompts": "prompts.jsonl", "eval_count": 3},
        "rollout": {"prompts": 4, "max_tokens": 6, "batch_size": 8},
        "reward": [{"kind": "function", "function": "rule.py:letters"}],
        "critic": {"learning_rate": 3e-3},
        "ppo": {"epochs": 2, "minibatches": 2},
        "optimizer": {"learning_rate": 3e-3},
    }


def _sft() -> Sections:
    return {
        "run": {"folder": "runs", "name": "a", "save_every": 2},
        "model": {"path": "model"},
        "lora": {"rank": 4},
        "data": {"train": "texts.jsonl"},
        "sft": {"epochs": 3, "batch_size": 2},
        "optimizer": {"learning_rate": 3e-3},
    }


def _reward() -> Sections:
    return {
        "run": {"folder": "runs", "name": "a", "save_every": 2},
        "model": {"path": "model"},
        "lora": {"rank": 4},
        "data": {"train": "ratings.jsonl"},
        "reward_training": {"epochs": 3, "batch_size": 3, "pairs_per_item": 2},
        "optimizer": {"learning_rate": 3e-3},
    }


def _dpo() -> Sections:
    return {
        "run": {"folder": "runs", "name": "a", "save_every": 2},
        "model": {"path": "model"},
        "lora": {"rank": 4},
        "data": {"train": "pairs.jsonl"},
        "dpo": {"epochs": 4, "batch_size": 3, "beta": 0.5},
        "optimizer": {"learning_rate": 3e-3},
    }


_BASES = {"train": _train, "sft": _sft, "reward": _reward, "dpo": _dpo}
RATINGS = tuple(
    {"text": text, "rating": rating}
    for text, rating in (
        ("a very good film", 5), ("the story was good", 4), ("it is a film", 3), ("not very good", 2),
        ("the film was bad", 1), ("a bad bad story", 1), ("good and good", 5), ("it was not bad", 3),
    )
)  # fmt: skip


def write_task(project: "Project") -> Path:
    """A folder with a task of lm-evaluation-harness: which of two words goes on, by a file of four lines."""
    folder = project.folder / "tasks"
    folder.mkdir()
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(PROMPTS[:4])]
    file = project.jsonl("tasks/kind.jsonl", rows)
    (folder / "kind.yaml").write_text(
        "task: kind\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: [bad, good]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


class Project:
    """A folder with a model, prompts, texts, ratings, reward code and configurations."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.tmp = folder.parent.parent / "tmp"  # one for the session: mlx compiles its kernels into it
        (folder / "model").symlink_to(model)
        (folder / "rule.py").write_text(RULE)
        self.jsonl("prompts.jsonl", [{"prompt": text} for text in PROMPTS])
        self.jsonl("texts.jsonl", [{"text": text} for text in PROMPTS])
        self.jsonl("ratings.jsonl", RATINGS)

    def jsonl(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def config(self, job: str = "train", **changes: Any) -> Path:
        """A configuration file: the small job's, with sections changed key by key (lists as a whole)."""
        sections = _BASES[job]()
        for name, change in changes.items():
            sections[name] = {**sections.get(name, {}), **change} if isinstance(change, dict) else change
        text = ""
        for name, value in sections.items():
            for row in value if isinstance(value, list) else [value]:
                text += f"[[{name}]]\n" if isinstance(value, list) else f"[{name}]\n"
                text += "".join(f"{key} = {json.dumps(item)}\n" for key, item in row.items())
        path = self.folder / f"{job}.toml"
        path.write_text(text)
        return path

    def run(self, name: str = "a") -> Path:
        return self.folder / "runs" / name

    def metrics(self, name: str = "a") -> list[dict[str, float]]:
        """The rows of `metrics.jsonl`, times left out."""
        lines = (self.run(name) / METRICS).read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if key.partition("/")[0] not in TIMES}
            for line in lines
        ]

    def samples(self, name: str = "a") -> list[dict[str, Any]]:
        lines = (self.run(name) / SAMPLES).read_text().split("\n")  # a text may have other separators of lines in it
        return [json.loads(line) for line in lines if line]

    def checkpoints(self, name: str = "a") -> dict[str, bytes]:
        """Every file of every checkpoint, byte for byte."""
        root = self.run(name) / "checkpoints"
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    def steps(self, name: str = "a") -> list[int]:
        return checkpoint.steps(self.run(name))

    def everything(self) -> dict[str, bytes | None]:
        """Every path of the project (the model's apart) and what is in it."""
        found: dict[str, bytes | None] = {}
        for item in sorted(self.folder.rglob("*")):
            found[str(item.relative_to(self.folder))] = item.read_bytes() if item.is_file() else None
        return found

    def cli(self, *arguments: object) -> Result:
        """Run a command in this process, from the project's folder."""
        before, mask = Path.cwd(), os.umask(0o022)
        os.chdir(self.folder)
        try:
            return CliRunner().invoke(main, [str(argument) for argument in arguments])
        finally:
            os.chdir(before)
            os.umask(mask)

    def done(self, *arguments: object) -> str:
        """Run a command that has to succeed; its output."""
        result = self.cli(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, code: int, words: str, *arguments: object, left: bool = False) -> str:
        """Run a command that has to fail in the promised way and leave nothing; its errors."""
        before = self.everything()
        result = self.cli(*arguments)
        shown = "".join(line for line in result.stderr.splitlines(True) if not line.startswith(ENGINE))
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        assert shown.startswith("error: "), shown
        assert words in shown.splitlines()[0], shown
        assert code == 4 or "Traceback" not in shown, shown
        assert left or self.everything() == before
        return shown

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """A command in a process of its own, with a temporary folder that only these processes use."""
        self.tmp.mkdir(exist_ok=True)
        code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.tmp), "PYTHONUNBUFFERED": "1"},
        )
