"""The folder that mlx's compiler writes into belongs to this user alone."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from mlx_ppo.runtime.private_tmp import use_private_tmp


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def private(folder: Path) -> bool:
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077


def test_it_is_private_kept_and_leaves_other_temporary_files_alone(tmp_path: Path) -> None:
    first = use_private_tmp()
    assert first == tmp_path / "cache/mlx-ppo/tmp" and private(first)
    assert os.environ["TMPDIR"] == str(first) and tempfile.gettempdir() == str(tmp_path)
    assert use_private_tmp() == first and list(first.iterdir()) == []


@pytest.mark.parametrize("planted", ["open to others", "a link"])
def test_a_folder_that_others_could_write_is_not_used(tmp_path: Path, planted: str) -> None:
    place = tmp_path / "cache/mlx-ppo/tmp"
    place.parent.mkdir(parents=True)
    if planted == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    found = use_private_tmp()
    assert found is not None and found != place and private(found)
    assert os.environ["TMPDIR"] == str(found)
