"""A project's folder: what was chosen, which models, prompts and rounds of feedback it has."""

import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_ppo.bundle import bundle_root
from mlx_ppo.errors import ConfigError, DataError, RunError
from mlx_ppo.files import parse_json, read_json, read_regular
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.studio.lines import Row

TRAIN, HELD_OUT = "train.jsonl", "held-out.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
_LARGEST = 1 << 24  # bytes of a file of prompts that somebody brings
_LARGEST_SET = 1 << 30  # bytes of one that is there
_MOST_HELD_OUT = 200
_MODELS = ("*", "models/*", "models/*/*")  # where model folders are looked for
_WRITTEN = (".studio", ".studio/jobs", "feedback", "configs", "prompts")  # in the project
BOUNDS: Row = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # of sampling, all off
_CHOICES: Row = {"model": None, "prompts": None, "max_tokens": 64, "temperature": 1.0, **BOUNDS, "rounds": []}


class Project:
    """A folder with `models/`, `prompts/`, `feedback/`, `configs/` and `runs/`; what was chosen is in `.studio/`."""

    def __init__(self, folder: Path) -> None:
        """An existing folder, of any content.

        Raises:
            RunError: what would be written into it would go elsewhere, by a symbolic link.
        """
        self.folder = folder
        self._file = folder / ".studio" / "project.json"
        for name in _WRITTEN:
            if not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder)):
                raise RunError(f"{folder / name}: leads out of the project's folder; put a folder in its place")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other click, of this server or another one, change the project in the meantime."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def choices(self) -> Row:
        """Model, prompts, lengths and rounds; paths are relative to the project's folder.

        Raises:
            RunError: the file isn't what this program wrote.
        """
        try:
            kept = {**_CHOICES, **read_json(self._file)}
            if not _are_choices(kept):
                raise ValueError("not what this program wrote")
            return kept
        except FileNotFoundError:
            return {**_CHOICES, "seed": 0}
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self._file}: cannot be read ({error}); move it away to choose anew") from None

    def choose(self, **values: Any) -> Row:
        """Change choices; the first time, a seed is drawn for everything random."""
        now = {"seed": secrets.randbelow(1 << 31)} if not self._file.exists() else {}
        changed = {**self.choices(), **now, **values}
        if changed["model"] is not None and not changed["rounds"]:
            changed["rounds"] = [{"policy": changed["model"]}]
        try:
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self._file.parent}: can't be made ({error.strerror})") from None
        replace_file(self._file, json.dumps(changed, indent=1))
        return changed

    def choose_model(self, model: str) -> Row:
        """Take one of the project's models; refused once there are labels of another."""
        if model not in self.models():
            raise ConfigError(f"{model}: no model folder of this project")
        rounds = self.choices()["rounds"]
        if len(rounds) > 1 or any(len(each) > 1 for each in rounds):
            raise ConfigError("rounds were trained with the present model; begin a new project's folder for another")
        return self.choose(model=model, rounds=[])

    def models(self) -> dict[str, Row]:
        """Model folders by their path, with their size in bytes and whether they have a chat template."""
        found: dict[str, Row] = {}
        for place in _MODELS:
            for config in sorted(self.folder.glob(f"{place}/config.json")):
                folder = config.parent
                name = str(folder.relative_to(self.folder))
                weights = [file for file in folder.glob("*.safetensors") if file.is_file()]
                if (
                    not weights
                    or not is_text(name)
                    or name.startswith("runs/")
                    or "/." in f"/{name}"
                    or (folder / "reward.json").exists()
                ):
                    continue
                found[name] = {"bytes": sum(file.stat().st_size for file in weights), "chat": _has_chat(folder)}
        return found

    def prompts(self) -> dict[str, tuple[int, int]]:
        """Sets of prompts by name: how many are for training, and how many held out."""
        files = [
            file
            for file in sorted(self.folder.glob(f"prompts/*/{TRAIN}"))
            if is_text(file.parent.name) and file.parent.name[0] != "."
        ]
        return {file.parent.name: (_lines(file), _lines(file.with_name(HELD_OUT))) for file in files}

    def prompt_file(self, *, held_out: bool) -> Path:
        """The chosen prompts; ConfigError where none are chosen."""
        return self.folder / "prompts" / self.chosen_prompts()[0] / (HELD_OUT if held_out else TRAIN)

    def chosen_prompts(self) -> tuple[str, int, int]:
        """The chosen prompts' name, and how many are for training and held out; ConfigError where none are there."""
        name, there = self.choices()["prompts"], self.prompts()
        if name is None:
            raise ConfigError("choose prompts first")
        if name not in there:
            raise ConfigError(f"prompts/{name}: not there any more; choose other prompts")
        return name, *there[name]

    def add_prompts(self, name: str, text: str, *, chat: bool) -> tuple[int, int]:
        """Make a set of prompts from lines, each a prompt's text or a JSON object; a part is held out.

        Args:
            name: of the set.
            text: the lines; the same twice counts once.
            chat: a line of text is what a user says, not the beginning of a text.
        Raises:
            ConfigError: the name is taken or none.
            DataError: a line isn't a prompt, or there are fewer than two.
        """
        folder = self.folder / "prompts" / named(name)
        if folder.exists():
            raise ConfigError(f"there are prompts called {name!r} already; choose another name")
        lines = dict.fromkeys(line.strip() for line in text.removeprefix("\ufeff").splitlines() if line.strip())
        rows = sorted((_prompt(line, number, chat) for number, line in enumerate(lines, 1)), key=_order)
        if len(rows) < 2:
            raise DataError("give at least two prompts, one a line")
        out = min(_MOST_HELD_OUT, max(1, len(rows) // 5))
        self._put_prompts(folder, "".join(rows[out:]), "".join(rows[:out]))
        return len(rows) - out, out

    def _put_prompts(self, folder: Path, train: str, held_out: str) -> None:
        temporary = folder.with_name(f".{folder.name}.new")  # a kill leaves all of it, or nothing that counts
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(mode=0o700, parents=True)
            replace_file(temporary / HELD_OUT, held_out)
            replace_file(temporary / TRAIN, train)
            temporary.rename(folder)
        except OSError as error:
            raise RunError(f"{folder}: can't be made ({error.strerror})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def add_example(self) -> None:
        """Copy the bundled model and its prompts, and choose them."""
        source, target = bundle_root() / "models" / "reviews", self.folder / "models" / "reviews"
        if not target.exists():
            temporary = target.with_name(".reviews.new")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("__pycache__", "*.py", "*.sh"))
                temporary.rename(target)
            except OSError as error:
                raise RunError(f"{target}: cannot be written ({error.strerror})") from None
        folder = self.folder / "prompts" / "reviews"
        if not folder.exists():
            train, held_out = (source / "data" / f"prompts-{part}.jsonl" for part in ("train", "test"))
            self._put_prompts(folder, train.read_text("utf-8"), held_out.read_text("utf-8"))
        self.choose_model("models/reviews")
        self.choose(prompts="reviews", max_tokens=40, temperature=0.8)

    def read_prompts(self, path: str) -> str:
        """The text of a file that somebody named; DataError where it can't be read."""
        try:
            return read_regular(self.folder / os.path.expanduser(path), _LARGEST).decode("utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(f"{path}: cannot be read ({why})") from None


def named(name: str) -> str:
    """A name for a file or folder; ConfigError where it isn't one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "a name has letters, digits, dots, dashes and underscores, and begins with one of the first two"
        )
    return name


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; names of files needn't be."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def are_bounds(given: Row) -> bool:
    """Whether top_k, top_p and min_p are such as a policy can learn with."""
    top_k, top_p, min_p = (given[name] for name in BOUNDS)
    numbers = type(top_k) is int and all(type(value) in (int, float) for value in (top_p, min_p))
    return numbers and (top_k == 0 or 2 <= top_k <= 10**9) and 0 < top_p <= 1 and 0 <= min_p < 1


def _are_choices(given: Row) -> bool:
    """Whether a file's values are such as the page can have written."""
    model, prompts, seed = given["model"], given["prompts"], given.get("seed")
    return (
        (model is None or (isinstance(model, str) and _is_inside(model)))
        and (prompts is None or (isinstance(prompts, str) and _is_inside(prompts)))
        and type(given["max_tokens"]) is int
        and isinstance(given["temperature"], int | float)
        and math.isfinite(given["temperature"])
        and are_bounds(given)
        and type(seed) is int
        and isinstance(given["rounds"], list)
        and all(isinstance(each, dict) and "policy" in each for each in given["rounds"])
        and all(isinstance(value, str) and _is_inside(value) for each in given["rounds"] for value in each.values())
    )


def _is_inside(path: str) -> bool:
    return is_text(path) and "\0" not in path and not Path(path).is_absolute() and ".." not in Path(path).parts


def _prompt(line: str, number: int, chat: bool) -> str:
    if line.startswith("{"):
        try:
            value = parse_json(line)
        except ValueError:
            raise DataError(f"line {number}: not a JSON object; write one, or a plain text") from None
        if not isinstance(value, Mapping) or not ({"prompt", "messages"} & value.keys()):
            raise DataError(f"line {number}: has neither 'prompt' nor 'messages'")
    else:
        value = {"prompt": [{"role": "user", "content": line}] if chat else line}
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        raise DataError(f"line {number}: has a number that is none, or is nested too deeply") from None
    if not is_text(text):
        raise DataError(f"line {number}: has half of a character in it; type it again")
    return text


def _order(line: str) -> bytes:
    return blake2b(line.encode(), digest_size=8).digest()


def _lines(path: Path) -> int:
    with suppress(OSError):
        return read_regular(path, _LARGEST_SET).count(b"\n")
    return 0


def _has_chat(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    with suppress(OSError, ValueError, TypeError):
        return "chat_template" in dict(read_json(folder / "tokenizer_config.json"))
    return False
