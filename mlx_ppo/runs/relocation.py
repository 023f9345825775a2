"""Inputs of a run that were moved: found where somebody says that they are now, recognised by their SHA-256."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.folder import CONFIG, Run, replace_file
from mlx_ppo.runs.provenance import hashes
from mlx_ppo.runs.toml import to_toml

Key = tuple[str | int, ...]


def relocate(run: Run, overrides: Sequence[str]) -> None:
    """Put new places of inputs into a run's configuration and record.

    Args:
        run: whose lock is held.
        overrides: `section.key=path`, as for `--set`; relative paths count from the working folder.
    Raises:
        ConfigError: a key isn't an input's place, or something else is there; nothing was changed.
        RunError: an input or the run's record can't be read.
    """
    path, record = run.folder / CONFIG, run.record()
    job = JOBS[str(record.get("command"))]
    before, after = (dict(_leaves(read_config(job, path, given).model_dump())) for given in ((), overrides))
    inputs: dict[str, str] = dict(record.get("inputs", {}))
    for key, place in after.items():
        if place == before.get(key):
            continue
        name, old = ".".join(map(str, key)), _input(key, before.get(key))
        new = _input(key, place)
        if old is None or new is None:
            raise ConfigError(
                f"--set {name}: resume takes only the place of an input that was moved; to go on with something else, "
                f"change {CONFIG} and give --allow-config-change"
            )
        inputs = _renamed(inputs, name, old, new)
    as_recorded = hashlib.sha256(path.read_bytes()).hexdigest() == record.get("config")
    text = to_toml(read_config(job, path, overrides))
    replace_file(path, text)
    if as_recorded:
        run.note(config=hashlib.sha256(text.encode()).hexdigest(), configuration=text, inputs=inputs)
    else:  # edited by hand as well: compared with the record by `require_as_recorded`
        run.note(inputs=inputs)


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield key, value
        return
    for part, item in items:
        yield from _leaves(item, (*key, part))


def _input(key: Key, value: Any) -> Path | None:
    """The place of an input; None for another key's value."""
    if key[0] != "run" and isinstance(value, Path):
        return value
    return Path(value.rpartition(":")[0]) if key[-1] == "function" and isinstance(value, str) else None


def _renamed(inputs: Mapping[str, str], name: str, old: Path, new: Path) -> dict[str, str]:
    """The recorded inputs with those of one place under another; ConfigError unless the same files are there."""
    known = {file: digest for file, digest in inputs.items() if Path(file) == old or Path(file).parent == old}
    found = hashes([new]).get(new, {})
    if not found:
        raise ConfigError(f"--set {name}: {new}: there is no such input")
    wanted = {Path(file).name if Path(file) != old else new.name: digest for file, digest in known.items()}
    there = {Path(file).name: digest for file, digest in found.items()}
    differing = sorted(file for file in wanted.keys() | there.keys() if wanted.get(file) != there.get(file))
    if differing:
        raise ConfigError(
            f"--set {name}: {new}: not what the run was started with, by its SHA-256 ({differing[0]} "
            f"{'differs' if differing[0] in wanted and differing[0] in there else 'is in one of them only'})"
        )
    rest = {file: digest for file, digest in inputs.items() if file not in known}
    return {**rest, **found}
