"""The work of a run: in this process, or as a child whose events a supervising process shows.

The top imports nothing heavy, so that the child answers to signals from its start.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import click

import mlx_ppo
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import DPOConfig, RewardConfig, SFTConfig
from mlx_ppo.errors import JudgeLost, ProcessLost, RunError, UnhealthyError, UserError
from mlx_ppo.rewards.judge_answers import ANSWERS
from mlx_ppo.runs.folder import METRICS, Run, open_config
from mlx_ppo.runs.provenance import device, engine
from mlx_ppo.runtime.device_errors import device_failure, needing_gradients
from mlx_ppo.runtime.offline import NetworkRefused, refuse_connections
from mlx_ppo.runtime.signals import STOPPING, Interrupted, Interrupts, catching_interrupts
from mlx_ppo.runtime.system import staying_awake

_TOKENS_EVERY = 0.25  # seconds


class Answers(NamedTuple):
    """An evaluation, as far as it is shown."""

    figures: Mapping[str, float]
    completions: list[tuple[str, str, float]]  # prompt, completion, score


class JobReporter(Protocol):
    """The reporters of all jobs in one, and the table at the end."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        """An iteration is done."""

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """An optimizer step of a supervised job is done."""

    def before_and_after(self, before: Answers, after: Answers, unhealthy: list[str]) -> None:
        """The same prompts before and after the run; first what is wrong with its policy."""

    def warn(self, text: str) -> None:
        """One line on standard error."""


class Order(NamedTuple):
    """What is to be done in a run's folder."""

    folder: str
    resumed: bool = False  # the run was begun by an earlier command
    allow_config_change: bool = False  # then: although its configuration or reward code was edited
    smaller: bool = False  # it was killed just now: make its plan one step smaller first
    supervisor: int | None = None  # the process that a user knows, where it isn't the one that works


def work(order: Order, reporter: JobReporter, interrupts: Interrupts) -> list[str]:
    """Do a job from the start or from its last checkpoint; the lines to print at its end.

    Raises:
        UserError: as the job's function; or the run can't go on, because its inputs have changed.
        Interrupted: a signal came; the state is saved.
    """
    folder = Path(order.folder)
    config = open_config(folder)
    with Run(folder, supervisor=order.supervisor) as run:
        if order.resumed:
            from mlx_ppo.runs.verification import require_as_recorded

            for line in require_as_recorded(config, run, allow_config_change=order.allow_config_change):
                reporter.warn(line)
        if order.smaller:
            _make_smaller(folder, reporter)
        else:
            reporter = _announcing(reporter, f"run folder: {short(folder)}")
        if mlx_ppo.BLAS.problem and device().startswith("CPU"):
            reporter.message(f"warning: {mlx_ppo.BLAS.problem}")
        if "device" not in run.record():
            run.note(device=device(), engine=engine())
        from mlx_ppo.runtime.allocator import keeping_buffers

        with keeping_buffers(), staying_awake(config.run.stay_awake) as said:
            if said:
                reporter.message(said)
            return _do(config, run, reporter, interrupts)


def _announcing(reporter: JobReporter, line: str) -> JobReporter:
    """Say a line before the first thing that is computed: until then the run may turn out not to be possible."""

    class Announcing:
        said = False

        def __getattr__(self, name: str) -> Any:
            if name in ("phase", "step") and not self.said:
                self.said = True
                reporter.message(line)
            return getattr(reporter, name)

    return cast(JobReporter, Announcing())


def _make_smaller(folder: Path, reporter: JobReporter) -> None:
    from mlx_ppo.memory.starting import smaller

    change = smaller(folder)
    if change is None:
        mend = f"Close other programs and go on with: mlx-ppo resume {short(folder)}"
        raise RunError(f"{short(folder)}: the plan can't be made smaller. {mend}")
    reporter.message(change)


def _do(config: Job, run: Run, reporter: JobReporter, interrupts: Interrupts) -> list[str]:
    if isinstance(config, SFTConfig):
        from mlx_ppo.sft import finetune

        folder = finetune(config, run, reporter, interrupts)
        return [f"finished: {short(folder)}"]
    if isinstance(config, DPOConfig):
        from mlx_ppo.dpo import optimize

        folder = optimize(config, run, reporter, interrupts)
        return [f"finished: {short(folder)}"]
    if isinstance(config, RewardConfig):
        from mlx_ppo.reward_training import train_reward_model

        folder = train_reward_model(config, run, reporter, interrupts)
        return [f'finished: {short(folder)}  (give it to train as [[reward]] kind = "model", path)']
    assert isinstance(config, TrainConfig)
    from mlx_ppo.runs.health import verdict
    from mlx_ppo.train import train

    try:
        result = train(config, run, reporter, interrupts)
    except JudgeLost as error:
        if not worth_keeping(run.folder):
            raise
        again = f"mlx-ppo resume {short(run.folder)}"
        raise JudgeLost(f"{error}. The run is saved; once the judge answers, go on with: {again}") from None
    before, after = (
        Answers(evaluation.figures(), [(c.prompt, c.text, c.score) for c in evaluation.completions])
        for evaluation in (result.before, result.after)
    )
    reporter.before_and_after(before, after, verdict(result.unhealthy))
    if result.stopped is not None:
        rule, sentence = result.stopped.rule, result.stopped.sentence
        raise UnhealthyError(
            f"stopped by health.{rule} after iteration {result.stopped.step}; saved in {short(result.checkpoint)}. "
            f"{sentence[0].upper()}{sentence[1:]}. With that: mlx-ppo resume {short(run.folder)} --allow-config-change"
        )
    from mlx_ppo.models.folder import check_model_folder
    from mlx_ppo.models.gate import misread
    from mlx_ppo.stages.rollout import distribution_of

    drawn = distribution_of(config.rollout).bounds
    bounds = "".join(f" --{name.replace('_', '-')} {value}" for name, value in drawn.items())
    lines = [f"policy: {short(result.checkpoint)}", f"try it: mlx-ppo sample {short(run.folder)}"]
    if misread(check_model_folder(config.model.path)):
        return [*lines, f"   or:  mlx-ppo export {short(run.folder)} DIR --format fused, for stock mlx-lm"]
    return [
        *lines,
        f"   or:  mlx_lm.generate --model {short(config.model.path)} --adapter-path {short(result.checkpoint)} "
        f"--temp {config.rollout.temperature:g}{bounds} --prompt '...'",
    ]


def short(path: Path) -> Path:
    """A path as seen from the working folder, where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def worth_keeping(folder: Path) -> bool:
    """Whether a run folder holds anything that was computed, or answered by a judge."""
    logged = (folder / METRICS).exists() or (folder / ANSWERS).exists()
    return logged or any((folder / "checkpoints").glob("[0-9]*"))


def stopped(why: str, exit_code: int, folder: Path) -> SystemExit:
    """Say what stopped a run that can go on; the exit to raise."""
    click.echo(f"stopped by {why}; saved. Go on with: mlx-ppo resume {short(folder)}", err=True)
    return SystemExit(exit_code)


class Sender:
    """A reporter that writes what it is told as JSON lines, `[name, argument, ...]`, to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        """Nothing is sent yet."""
        self._descriptor = descriptor
        self._tokens = 0
        self._sent = 0.0

    def send(self, name: str, *values: Any) -> None:
        """Write an event; nobody may be there to read it, and then the run is about to be stopped."""
        unsent = memoryview(json.dumps([name, *values]).encode("ascii") + b"\n")
        try:
            while unsent:
                unsent = unsent[os.write(self._descriptor, unsent) :]
        except BrokenPipeError:
            pass

    def message(self, text: str) -> None:
        """One line of information or warning."""
        self.send("message", text)

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""
        self._tokens = 0
        self.send("phase", name, iteration, iterations)

    def tokens(self, count: int) -> None:
        """Tokens have been sampled; told a few times a second."""
        self._tokens += count
        if time.monotonic() - self._sent > _TOKENS_EVERY:
            self.send("tokens", self._tokens)
            self._tokens, self._sent = 0, time.monotonic()

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        """An iteration is done."""
        self.send("iteration", metrics, iterations, sample)

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """An optimizer step of a supervised job is done."""
        self.send("step", done, total, dict(figures))

    def before_and_after(self, before: Answers, after: Answers, unhealthy: list[str]) -> None:
        """The same prompts before and after the run; first what is wrong with its policy."""
        self.send("before_and_after", before, after, unhealthy)

    def warn(self, text: str) -> None:
        """One line on standard error."""
        self.send("warn", text)


def main(arguments: list[str]) -> None:
    """The child process: given are the descriptor for events and, as a line on standard input, what to do.

    Standard input ends with the parent. The last event is `finished` with the lines to print, `stopped` with the
    reason and the exit code, `failed` with the error's class and text, `device` with what a GPU refused and what helps,
    `lost` with what became of another process of the group, or `crashed` with a traceback.
    """
    refuse_connections()
    descriptor = int(arguments[0])
    os.set_inheritable(descriptor, False)
    sender = Sender(descriptor)
    with catching_interrupts(supervised=True) as interrupts:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a terminal is closed; under nohup nothing happens
            signal.signal(signal.SIGHUP, interrupts.ask)
        try:
            with open(0, "rb", buffering=0, closefd=False) as requests:
                order = Order(**json.loads(requests.readline()))
                threading.Thread(target=_stop_with_parent, args=(requests, interrupts), daemon=True).start()
                with needing_gradients():
                    lines = work(order, sender, interrupts)
            sender.send("finished", lines)
        except Interrupted as stop:
            sender.send("stopped", str(stop), stop.exit_code)
        except ProcessLost as error:
            sender.send("lost", str(error), "")
        except UserError as error:
            known = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == UserError.__module__)
            sender.send("failed", next(known), str(error))
        except NetworkRefused as error:
            sender.send("failed", RunError.__name__, str(error))
        except MemoryError as error:
            said = f" ({error})" if str(error) else ""
            sender.send(
                "failed", RunError.__name__, f"there isn't enough memory for this{said}; lower sizes and lengths"
            )
        except BaseException as error:
            failure = device_failure(error)
            if failure is None:
                sender.send("crashed", traceback.format_exc())
            else:  # what a GPU refused: its process may not compute any further
                sender.send("device", *failure)


def _stop_with_parent(requests: FileIO, interrupts: Interrupts) -> None:
    requests.read(1)
    interrupts.ask(STOPPING[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
