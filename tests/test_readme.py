"""The README says what the code does."""

import re
import sys
from pathlib import Path

from click import Group

from mlx_ppo.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from config_table import README, table, written


def test_the_table_of_keys_is_that_of_the_schema() -> None:
    assert written() == table(), "run python tests/config_table.py"


def test_every_command_is_mentioned_and_every_mentioned_command_exists() -> None:
    assert isinstance(main, Group)
    text = README.read_text("utf-8")
    mentioned = set(re.findall(r"mlx-ppo ([a-z]+)", text))
    assert mentioned == set(main.commands)


def test_every_path_named_in_the_readme_exists() -> None:
    root = README.parent
    named = re.findall(r"\b((?:configs|models|tests|benchmarks)/[\w./-]+\w)", README.read_text("utf-8"))
    assert named
    assert [path for path in named if not (root / path).exists()] == []
