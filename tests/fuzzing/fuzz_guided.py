"""`python fuzz_guided.py READER FOLDER [libFuzzer's options]`: the same inputs, led by coverage; needs atheris.

For example `python tests/fuzzing/fuzz_guided.py gguf /tmp/gguf -max_total_time=600`.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlx_ppo"]):
    import mlx_ppo  # noqa: F401  before mlx

    # isort: split
    from fuzz_worker import try_one  # lets the next be found

    # isort: split
    from fuzz_targets import TARGETS

from hypothesis import given, settings

if __name__ == "__main__":
    reader, folder, *options = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    target = TARGETS[reader](Path(folder))

    @settings(database=None, deadline=None)
    @given(target.inputs)
    def fuzz(content: bytes) -> None:
        try_one(target.read, content)

    atheris.Setup([sys.argv[0], *options], fuzz.hypothesis.fuzz_one_input)
    atheris.Fuzz()
