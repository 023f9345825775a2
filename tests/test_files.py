import os

import pytest

from mlx_ppo.errors import ConfigError, DataError, ModelError, printable
from mlx_ppo.files import open_regular, read_regular


def test_a_file_within_its_bound(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_regular(file, 5) == b"12345"
    (tmp_path / "link").symlink_to(file)
    assert read_regular(tmp_path / "link", 100) == b"12345"
    with pytest.raises(OSError, match="larger than 4e-06 MB, which no such file is"):
        read_regular(file, 4)


def test_a_bound_is_all_that_is_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 1 MB"):
        read_regular(tmp_path / "sparse", 1_000_000)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/full"])
def test_what_would_block_or_never_end(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    descriptors = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError, match="not a regular file") as caught:
        open_regular(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert len(os.listdir("/dev/fd")) == descriptors


def test_folders_missing_files_and_null_characters(tmp_path):
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "a")
    with pytest.raises(OSError, match="the path has a null character"):
        open_regular(tmp_path / "a\0b")


def test_errors_are_one_printable_line():
    text = "a\n\x1b[2J\u2028\u202e\ud83d\x7f"
    shown = r"a\n\x1b[2J\u2028\u202e\ud83d\x7f"
    assert printable(text) == shown and printable("naïve 日本 🙂") == "naïve 日本 🙂"
    assert str(DataError(text)) == str(ModelError(text)) == shown
    assert ConfigError(text).problems == (shown,)
    assert str(ConfigError([text, "b"])) == f"{shown}\nb"
