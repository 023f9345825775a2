"""Following a run from a program: what happens in it, as calls; TensorBoard's event files as one that follows."""

import importlib.util
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.folder import METRICS, SAMPLES, Run
from mlx_ppo.runs.health import Finding


class Callback:
    """Inherit from it and write the methods that you need. They are called in the process of the run, after the log.

    What they raise ends the run; its last checkpoint stands.
    """

    def iteration(self, row: Mapping[str, float]) -> None:
        """An iteration is done; its row of metrics.jsonl."""

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The held-out prompts were answered after so many iterations."""

    def health(self, finding: Finding) -> None:
        """A health rule has spoken."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint was written."""

    def ended(self) -> None:
        """The run is over, for whatever reason."""


TENSORBOARD = "tensorboard"  # the folder in a run's


def require_tensorboard() -> None:
    """Raise ConfigError where TensorBoard isn't installed: before anything is loaded or written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("log.tensorboard: TensorBoard isn't installed; pip install tensorboard, or set it to false")


class TensorBoard(Callback):
    """The numbers of metrics.jsonl and of the evaluations as TensorBoard reads them, in the run's folder."""

    def __init__(self, run: Run) -> None:
        """Write again what is logged already, so that a resumed run shows no row twice."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / TENSORBOARD
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = EventFileWriter(str(folder))
        self._when = time.time()
        for row in run.rows(METRICS):
            self.iteration(row)
        for row in run.rows(SAMPLES):
            if row.get("kind") == "summary":
                self.evaluation(row["step"], {key: row[key] for key in row.keys() - {"step", "kind"}})

    def iteration(self, row: Mapping[str, float]) -> None:
        """Every number of the row."""
        self._when = row["time"]
        self._write(int(row["step"]), row)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures, below `evaluation/`."""
        self._write(step, {f"evaluation/{name}": value for name, value in figures.items()})

    def ended(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in sorted(numbers.items())]
        self._writer.add_event(Event(wall_time=self._when, step=step, summary=Summary(value=values)))
        self._writer.flush()
