"""What installs where: resolves the project's dependencies for each system and Python, and prints a table.

    python benchmarks/wheels.py [NAME ...]

Needs `uv` and the package registry. Nothing is built or installed: only wheels count, as on a machine without a
compiler. A cell says `mlx` and its version, or why nothing fits. With names, a line for each says which versions were
found. Exit code 1 where a combination doesn't resolve.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = {  # uv's platform, and the oldest macOS that a wheel may ask for
    "macOS 14 arm64": ("aarch64-apple-darwin", "14.0"),
    "macOS 15 arm64": ("aarch64-apple-darwin", "15.0"),
    "macOS 26 arm64": ("aarch64-apple-darwin", "26.0"),
    "Linux x86-64": ("x86_64-manylinux_2_35", ""),
    "Linux arm64": ("aarch64-manylinux_2_35", ""),
}
PROJECT = Path(__file__).parent.parent / "pyproject.toml"
COMMAND = ("uv", "pip", "compile", str(PROJECT), "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:")


def resolve(system: str, python: str) -> tuple[dict[str, str], str]:
    """Versions by package, and "" or the reason why there are none."""
    platform, macos = SYSTEMS[system]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*COMMAND, "--python-platform", platform, "--python-version", python, "-o", f"{folder}/found.txt"],
            capture_output=True,
            text=True,
            env={**os.environ, **({"MACOSX_DEPLOYMENT_TARGET": macos} if macos else {})},
        )
        if done.returncode:
            return {}, " ".join(done.stderr.split())
        lines = (Path(folder) / "found.txt").read_text("utf-8").splitlines()
    return {name: number for name, _, number in (line.partition("==") for line in lines) if number}, ""


def main(names: list[str]) -> int:
    """Print the table; 1 where something doesn't resolve."""
    if shutil.which("uv") is None:
        sys.exit("wheels.py: there is no `uv` here; `pip install uv` brings it")
    print("| | " + " | ".join(f"Python {python}" for python in PYTHONS) + " |")
    print("|---|" + "---|" * len(PYTHONS))
    problems, seen = [], []
    for system in SYSTEMS:
        cells = []
        for python in PYTHONS:
            found, why = resolve(system, python)
            cells.append("none" if why else f"{len(found)} wheels, mlx {found['mlx']}")
            if why:
                problems.append(f"{system}, Python {python}: {why}")
            seen += [f"{system}, Python {python}: {name} {found.get(name, 'none')}" for name in names]
        print(f"| {system} | " + " | ".join(cells) + " |", flush=True)
    print(*seen, *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
