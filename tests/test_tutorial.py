"""The SmolLM2 tutorial's files: its rule, its data, its configurations."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import RewardConfig

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "models" / "smollm2"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TUTORIAL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Bread is baked from dough. Have you ever tried it?", 2.0),
        ("Do you like to bake your own bread at home?", 2.0),
        ("Bread is baked from dough in a hot oven.", -1.0),
        ("What is bread? It is baked from dough here", 1.5),
        ("One two three. Four. Five. Would you like some more of it?", 1.0),
        ("A b. C d? E f. G h. I j. K l. M n. O p.", -0.5),
        ("A b. C d. E f. G h. I j. K l. M n. O p?", 0.0),
        ('She asked you again: "Would you like to have some?"', 2.0),
        ("Why not?", -1.0),
        ("", -1.0),
        (" \n", -1.0),
    ],
)
def test_the_rule(text: str, score: float) -> None:
    assert script("rules").short_and_asking(["Tell me about bread."], [text]) == [score]


def test_data_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = script("prepare")
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.main()
    made = {file.name: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    assert made == {file.name: file.read_bytes() for file in (TUTORIAL / "data").iterdir()}
    rated = [{json.loads(line)["id"] for line in made[f"ratings-{part}.jsonl"].splitlines()} for part in prepare.SIZES]
    assert [len(ids) for ids in rated] == list(prepare.SIZES.values())
    assert not (rated[0] & rated[1] or rated[0] & rated[2] or rated[1] & rated[2])
    assert not set(made["prompts-train.jsonl"].splitlines()) & set(made["prompts-test.jsonl"].splitlines())


@pytest.mark.parametrize(
    ("name", "job"), [("reward", RewardConfig), ("reviews", TrainConfig), ("question", TrainConfig)]
)
def test_configurations_ask_for_the_import_first(name: str, job: type[Job], tmp_path: Path) -> None:
    """They name the import, and can be read before it: the keys are right."""
    text = (ROOT / "configs" / f"smollm2-{name}.toml").read_text("utf-8")
    assert "mlx-ppo import SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m" in text
    for folder in ("smollm2", "reviews"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / folder).symlink_to(ROOT / "models" / folder)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / f"smollm2-{name}.toml"
    file.write_text(text, "utf-8")
    config = read_config(job, file, [])
    assert config.model.path.name == "smollm2-135m"  # type: ignore[attr-defined]
