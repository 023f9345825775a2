"""PPO: the story around `stages.iteration`: plan, load, resume; iterate, log, evaluate, save."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_ppo.compute.cpu import threads
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt, PromptStream
from mlx_ppo.errors import JudgeLost, ProcessLost
from mlx_ppo.evaluate import Evaluation, evaluate, evaluation_rows
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.keeping import Keeper, is_tight, limits_of, opening
from mlx_ppo.memory.plan import GIB
from mlx_ppo.memory.starting import held, plan_run, said
from mlx_ppo.memory.watchdog import watching
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.parallel import sharing
from mlx_ppo.prompting import asked_for, load_data, tokenizer_of
from mlx_ppo.reporting import Reporter
from mlx_ppo.rewards.judge import Surroundings
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.callbacks import Callback, TensorBoard, require_tensorboard
from mlx_ppo.runs.folder import HEALTH, MEMORY, METRICS, RESPONSES, SAMPLES, Run
from mlx_ppo.runs.health import Finding, Monitor, facts_of
from mlx_ppo.runtime.phases import metering, phase
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages import orders
from mlx_ppo.stages.iteration import iterate
from mlx_ppo.stages.measurements import response_columns, sample_rows
from mlx_ppo.stages.state import State, initial_state, slow_controller

_SLOW = 3  # iterations


@dataclass(frozen=True)
class Result:
    """What a finished run leaves in memory; everything else is in its folder."""

    before: Evaluation
    after: Evaluation
    checkpoint: Path
    unhealthy: dict[str, Finding]  # by rule, what was wrong at the end
    stopped: Finding | None = None  # what ended the run before its last iteration


def train(
    config: TrainConfig, run: Run, reporter: Reporter, interrupts: Interrupts, callbacks: Sequence[Callback] = ()
) -> Result:
    """Train a policy with PPO or a critic-free estimator, from the start or from the run's last checkpoint.

    Raises:
        UserError: whatever is wrong with models or data, or went wrong; the last checkpoint stands.
        Interrupted: a signal came; the state is saved.
    """
    following = list(callbacks)
    if config.log.tensorboard:
        require_tensorboard()
    data, held_out = load_data(config, tokenizer_of(config), reporter)
    planned = plan_run(config, [len(p.tokens) for p in (*data.prompts, *held_out)], run.folder)
    plan, choices = planned.plan, planned.record.choices
    reporter.message(said(plan, planned.record.processes))
    measuring = metering(limits_of(plan.phases), clearing=is_tight(plan))
    together = sharing(config, planned.record.processes, run.folder)
    limited = threads.choosing(choices.threads)
    with keeping_to(plan), watching(interrupts.stop), limited, measuring as meter, together as group:
        group.told(opening(plan))
        with phase("load"):
            around = Surroundings(run.folder, check=interrupts.check)
            loading = Loading(compact=choices.compact, evict=choices.evict, surroundings=around)
            roles, policy, critic = load_roles(config, loading)
            roles.group = group
        try:
            if (slow := slow_controller(config)) is not None:
                reporter.message(slow)
            roles.require_fields([prompt.record for prompt in (*data.prompts, *held_out)])
            longest = max(len(prompt.tokens) for prompt in (*data.prompts, *held_out)) + config.rollout.max_tokens
            for remark in roles.remarks(longest):
                reporter.message(remark)
            state = initial_state(config, policy, critic)
            del policy, critic  # the first weights would stay in memory beside the trained ones
            keeper = Keeper(config, planned, run.folder, meter)
            monitor = Monitor(facts_of(config, [source.name for source in roles.sources if source.judges]))
            training = _Training(config, run, roles, state, held_out, keeper, monitor, reporter, interrupts, following)
            return training.run_through(PromptStream(data.prompts, config.run.seed))
        finally:
            roles.close()
            for callback in following:
                callback.ended()


@dataclass
class _Training:
    """A run whose models are loaded: what happens around its iterations."""

    config: TrainConfig
    run: Run
    roles: Roles
    state: State
    held_out: Sequence[Prompt]
    keeper: Keeper
    monitor: Monitor
    reporter: Reporter
    interrupts: Interrupts
    following: list[Callback]
    stopping: Finding | None = None  # of a rule that is to end the run
    learning: bool = False  # an update has begun, and isn't done
    before: checkpoint.Checkpoint | None = None  # the state as the iteration began, where processes may be lost
    slow: int = 0  # iterations in a row in which one process held the others up
    others: list[int] = field(default_factory=list)  # bytes at most in the last iteration, by process
    most: list[int] = field(default_factory=list)  # in all of them

    def run_through(self, stream: PromptStream) -> Result:
        """All iterations that are left, each one sampled, scored, learned from, logged and, where due, saved."""
        state, meter = self.state, self.keeper.meter
        before = self._start()
        meter.take()
        while state.iteration < self.config.run.iterations and self.stopping is None:
            try:
                self.keeper.begin(state.iteration + 1, state.moments)
                metrics, samples, lengths = self._iterate(stream)
                self.keeper.finish(lengths, state.moments)
                self._log(metrics, samples)
                self._evaluate_and_save()
                if self.stopping is None:
                    self.interrupts.check()
            except (Interrupted, JudgeLost):
                self._save()
                raise
            except ProcessLost:  # in an update, weights of this iteration and of the last one would be saved together
                if not self.learning:
                    self._save()
                elif self.before is not None:
                    self._save(self.before)
                raise
        if self.stopping is not None and self.stopping.level == "best":
            self._go_back()
        return self._finish(before)

    def _finish(self, before: Evaluation) -> Result:
        """The evaluation after training, and what the run leaves."""
        state = self.state
        self.reporter.phase("evaluate", state.iteration, self.config.run.iterations)
        after = self._evaluation()
        if state.iteration not in self._summaries():  # a finished run that is resumed has it
            self._log_evaluation(after)
        if self.stopping is not None:
            self.run.note(stopped=self.stopping.step)
        if len(self.most) > 1:
            self.reporter.message(held(self.most, self.keeper.record))
        saved = checkpoint.folder_of(self.run.folder, state.iteration)
        return Result(before, after, saved, dict(self.monitor.current), self.stopping)

    def stage(self, name: str) -> None:
        """A stage of an iteration begins; the last safe place to stop before it."""
        self.interrupts.check()
        self.learning = name == "update"
        self.keeper.stage(name)
        self.reporter.phase(name, self.state.iteration + 1, self.config.run.iterations)

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""
        self.keeper.tokens(count)
        self.reporter.tokens(count)

    def _start(self) -> Evaluation:
        """Resume from the last checkpoint if there is one; the evaluation before training is the same either way."""
        state, iterations = self.state, self.config.run.iterations
        self.reporter.phase("evaluate", state.iteration, iterations)
        before = self._evaluation()
        stopped = self.run.record().get("stopped")  # the step at which a rule has ended the run before
        if stopped is not None and (chosen := checkpoint.chosen(self.run.folder)) is not None:
            checkpoint.remove_after(self.run.folder, chosen)
            self.run.note(policy=None)
        saved = checkpoint.newest(self.run.folder)
        if saved is not None:
            self._restore(saved)
            self.run.cut_logs(state.iteration)
            for row in self.run.rows(METRICS):
                self.stopping = _stopping(self.monitor.follow(row))
            if self.stopping is not None and self.stopping.step == stopped:
                self.stopping = None
            self.reporter.message(f"resuming after iteration {state.iteration} of {iterations}")
            if self._due() and state.iteration not in self._summaries():  # it was broken off, such as by a lost judge
                self._evaluate_and_save()
        else:
            self.run.cut_logs(-1)
            self._log_evaluation(before)
        if self.config.log.tensorboard:
            self.following.append(TensorBoard(self.run))
        self._note_reward_files()
        return before

    def _note_reward_files(self) -> None:
        """What reward functions have read, as the first time."""
        found, known = self.roles.reward_files(), self.run.record().get("reward_files", {})
        if found.keys() - known.keys():
            self.run.note(reward_files={**found, **known})

    def _iterate(self, stream: PromptStream) -> tuple[dict[str, float], list[dict[str, Any]], list[tuple[int, int]]]:
        """One iteration, whose arrays are free again afterwards: its metrics, samples, and tokens of each row."""
        started, before = time.monotonic(), dict(self.keeper.meter.seconds)
        prompts, asked = asked_for(stream, self.state.cursor, self.config.rollout.prompts)
        waited = self.roles.group.waited
        self._order("iterate")
        if self.roles.group.size > 1 and self.config.model.train == "lora":
            self.before = self.state.kept(self.roles.trunk.blocks)
        done = iterate(self.config, self.roles, self.state, asked, self.keeper, self)
        self.learning = False
        if not done.signal:
            equal = "all scores" if self.config.ppo.advantage == "gae" else "the scores of each prompt's responses"
            step = self.state.iteration
            what = "only goes back towards the reference" if done.stepped else "stays as it is"
            said = f"warning: {equal} of iteration {step} are equal: no signal to learn from, the policy {what}"
            self.reporter.message(said)
        texts = [prompt.text for prompt in prompts]
        seed, step = self.config.run.seed, self.state.iteration
        samples = sample_rows(self.roles.trunk.tokenizer, texts, done.rollout, done.scored, (seed, step))
        metrics = {**done.metrics, "time": time.time(), "seconds": time.monotonic() - started}
        metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["seconds"]
        self._close(orders.closing(self.roles.group, self.keeper.meter))
        metrics["memory"] = max(self.keeper.meter.peaks.values()) / GIB
        spent = {name: took - before.get(name, 0.0) for name, took in self.keeper.meter.seconds.items()}
        if self.roles.group.size > 1:
            spent["wait"] = self.roles.group.waited - waited
        metrics |= {f"seconds/{name}": took for name, took in spent.items() if took > 0}
        self.run.log(RESPONSES, [{"step": self.state.iteration, **response_columns(done.rollout, done.scored)}])
        return metrics, samples, done.rollout.lengths

    def _log(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        step = self.state.iteration
        for text in (*self.keeper.messages(), *self.roles.news()):
            self.reporter.message(text)
        peaks: dict[str, Any] = {"step": step, **self.keeper.meter.take()}
        self.run.log(MEMORY, [{**peaks, "processes": self.others} if self.roles.group.size > 1 else peaks])
        self.run.log(METRICS, [metrics])
        self._judge(metrics)
        self.run.log(SAMPLES, samples)
        sample = samples[0]["prompt"], samples[0]["completion"], samples[0]["score"]
        self.reporter.iteration(metrics, self.config.run.iterations, sample)
        for callback in self.following:
            callback.iteration(metrics)

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        self.run.log(SAMPLES, evaluation_rows(self.state.iteration, evaluation))
        for callback in self.following:
            callback.evaluation(self.state.iteration, evaluation.figures())

    def _judge(self, metrics: dict[str, float]) -> None:
        """What the health rules say of an iteration; one may end the run."""
        found = self.monitor.follow(metrics)
        if found:
            self.run.log(HEALTH, [finding._asdict() for finding in found])
        for finding in found:
            self.reporter.message(f"health.{finding.rule}: {finding.sentence}")
            for callback in self.following:
                callback.health(finding)
        self.stopping = _stopping(found)

    def _go_back(self) -> None:
        """The policy is again that of the best evaluation; the log stays, until the run is resumed from there."""
        best = self.state.best
        if best is None:
            self.reporter.message("there was no evaluation yet to go back to (run.evaluate_every)")
        elif best[0] < self.state.iteration:
            self._restore(checkpoint.load(self.run.folder, best[0]))
            self.run.note(policy=best[0])
            self.reporter.message(f"back to the best evaluation, after iteration {best[0]}")

    def _order(self, what: str) -> None:
        """Tell the processes that follow what comes next, and compute it with the threads that the plan says."""
        choices = self.keeper.now()
        threads.use(choices.threads)
        if self.roles.group.size > 1:
            self.roles.group.told(orders.order(what, choices))

    def _close(self, spent: list[orders.Spent]) -> None:
        """Keep what the processes needed, and say it once where the others always wait for the same one."""
        self.others = [one.peak for one in spent]
        self.most = [max(both) for both in zip(self.others, self.most or self.others, strict=True)]
        late = orders.held_up(spent) if len(spent) > 1 else None
        self.slow = self.slow + 1 if late is not None else 0
        if self.slow == _SLOW and late is not None:
            who, took = self.roles.group.names[late], spent[late].seconds
            self.reporter.message(
                f"warning: the other processes wait for {who}, which computed {took:.1f} seconds of this iteration"
            )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.state.restore(saved)
        self.keeper.done = self.state.iteration
        self._order("restore")
        orders.shared(self.roles.group, saved)

    def _evaluation(self) -> Evaluation:
        self._order("evaluate")
        found = evaluate(self.roles, self.state.policy.weights, self.held_out, self.config, self.keeper.now())
        for text in self.roles.news():
            self.reporter.message(text)
        return found

    def _evaluate_and_save(self) -> None:
        """What is due after an iteration. The log comes first, so that a checkpoint is never ahead of it."""
        state, due = self.state, self._due()
        done = state.iteration == self.config.run.iterations or self.stopping is not None
        if due:
            evaluation = self._evaluation()
            self._log_evaluation(evaluation)
            if state.best is None or evaluation.score > state.best[1]:
                state.best = (state.iteration, evaluation.score)
        if done or due or state.iteration % self.config.run.save_every == 0:
            self._save()

    def _due(self) -> bool:
        """Whether the policy is evaluated after this iteration; after the last one it is in any case."""
        state, section = self.state, self.config.run
        done = state.iteration in (0, section.iterations) or self.stopping is not None
        return bool(section.evaluate_every) and state.iteration % section.evaluate_every == 0 and not done

    def _summaries(self) -> set[int]:
        """Steps whose evaluations are logged as a whole."""
        return {row["step"] for row in self.run.rows(SAMPLES) if row.get("kind") == "summary"}

    def _save(self, state: checkpoint.Checkpoint | None = None) -> None:
        """The state as it is, or as it was."""
        best, keep_last = self.state.best[0] if self.state.best is not None else None, self.config.run.keep_last
        with phase("checkpoint"):
            self.run.secure()
            self._note_reward_files()
            saved = state if state is not None else self.state.as_checkpoint(self.roles.trunk.blocks)
            folder = checkpoint.save(self.run.folder, saved, keep_last=keep_last, best=best)
        for callback in self.following:
            callback.saved(self.state.iteration, folder)


def _stopping(found: Sequence[Finding]) -> Finding | None:
    """The first of the findings that ends a run."""
    return next((finding for finding in found if finding.level in ("stop", "best")), None)
