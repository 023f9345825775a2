"""The bundled example: where it is, in a checkout and in an installed wheel, and a copy of it to edit."""

import os
import shutil
from pathlib import Path

from mlx_ppo.errors import ConfigError

EXAMPLE = "reviews.toml"


def bundle_root() -> Path:
    """The folder that holds `configs/` and `models/`: inside the wheel, or the checkout's top."""
    package = Path(__file__).resolve().parent
    for root in (package / "bundle", package.parent):
        if (root / "configs" / EXAMPLE).is_file():
            return root
    raise ConfigError("the bundled example is missing from this installation; reinstall mlx-ppo")


def example_config() -> Path:
    """The configuration that `mlx-ppo train` runs without an argument."""
    return bundle_root() / "configs" / EXAMPLE


def lora_example() -> Path:
    """The same with LoRA, as larger models need it."""
    return bundle_root() / "configs" / "reviews-lora.toml"


def copy_example(target: Path) -> Path:
    """Copy configs, model and data into a new folder; returns the copied example's configuration.

    Raises:
        ConfigError: the folder has content already, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: already there and not an empty folder; name a new one")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for part in ("configs", "models"):
            shutil.copytree(bundle_root() / part, temporary / part, ignore=shutil.ignore_patterns("__pycache__"))
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror  # of the first file of several
        raise ConfigError(f"{target}: cannot be written ({why})") from None
    return target / "configs" / EXAMPLE
