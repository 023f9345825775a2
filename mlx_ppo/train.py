"""PPO: the story around `stages.iteration`: plan, load, resume; iterate, log, evaluate, save."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt, PromptSet, PromptStream, load_prompts, shared_prompts
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.evaluate import Evaluation, evaluate
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.keeping import Keeper, is_tight, limits_of
from mlx_ppo.memory.plan import GIB
from mlx_ppo.memory.starting import plan_run, said
from mlx_ppo.memory.watchdog import watching
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import MEMORY, METRICS, RESPONSES, SAMPLES, Run
from mlx_ppo.runtime.phases import metering, phase
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages.iteration import iterate
from mlx_ppo.stages.measurements import response_columns
from mlx_ppo.stages.records import number
from mlx_ppo.stages.rollout import Asked
from mlx_ppo.stages.state import State, horizon_of, initial_state
from mlx_ppo.tokenizers.load import completion_text, load_tokenizer

Sample = tuple[str, str, float]  # prompt, completion, score


class Reporter(Protocol):
    """What a person sees of a run."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""

    def iteration(self, metrics: dict[str, float], iterations: int, sample: Sample) -> None:
        """An iteration is done; the sample is a prompt, its completion and its score."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves in memory; everything else is in its folder."""

    before: Evaluation
    after: Evaluation
    checkpoint: Path


def train(config: TrainConfig, run: Run, reporter: Reporter, interrupts: Interrupts) -> Result:
    """Train a policy with PPO or a critic-free estimator, from the start or from the run's last checkpoint.

    Raises:
        UserError: whatever is wrong with models or data, or went wrong; the last checkpoint stands.
        Interrupted: a signal came; the state is saved.
    """
    data, held_out = load_data(config, tokenizer_of(config), reporter)
    planned = plan_run(config, [len(p.tokens) for p in (*data.prompts, *held_out)], run.folder)
    plan, choices = planned.plan, planned.record.choices
    reporter.message(said(plan))
    measuring = metering(limits_of(plan.phases), clearing=is_tight(plan))
    with keeping_to(plan), watching(interrupts.stop), measuring as meter:
        with phase("load"):
            roles, policy, critic = load_roles(config, Loading(compact=choices.compact, evict=choices.evict))
        try:
            if (slow := slow_controller(config)) is not None:
                reporter.message(slow)
            roles.require_fields([prompt.record for prompt in (*data.prompts, *held_out)])
            longest = max(len(prompt.tokens) for prompt in (*data.prompts, *held_out)) + config.rollout.max_tokens
            for remark in (*roles.trunk.remarks, *roles.trunk.within(longest)):
                reporter.message(remark)
            state = initial_state(config, policy, critic)
            del policy, critic  # the first weights would stay in memory beside the trained ones
            keeper = Keeper(config, planned, run.folder, meter)
            training = _Training(config, run, roles, state, held_out, keeper, reporter, interrupts)
            return training.run_through(PromptStream(data.prompts, config.run.seed))
        finally:
            roles.close()


@dataclass
class _Training:
    """A run whose models are loaded: what happens around its iterations."""

    config: TrainConfig
    run: Run
    roles: Roles
    state: State
    held_out: Sequence[Prompt]
    keeper: Keeper
    reporter: Reporter
    interrupts: Interrupts

    def run_through(self, stream: PromptStream) -> Result:
        """All iterations that are left, each one sampled, scored, learned from, logged and, where due, saved."""
        state, meter = self.state, self.keeper.meter
        before = self._start()
        meter.take()
        while state.iteration < self.config.run.iterations:
            try:
                self.keeper.begin(state.iteration + 1, state.moments)
                metrics, sample, lengths = self._iterate(stream)
                self.keeper.finish(lengths, state.moments)
                self._log(metrics, sample)
                self._evaluate_and_save()
                self.interrupts.check()
            except Interrupted:
                self._save()
                raise
        self.reporter.phase("evaluate", state.iteration, self.config.run.iterations)
        after = self._evaluation()
        if not self.run.has(SAMPLES, step=state.iteration, kind="summary"):  # a finished run that is resumed has it
            self.run.log(SAMPLES, _evaluation_rows(state.iteration, after))
        return Result(before, after, checkpoint.folder_of(self.run.folder, state.iteration))

    def stage(self, name: str) -> None:
        """A stage of an iteration begins; the last safe place to stop before it."""
        self.interrupts.check()
        self.reporter.phase(name, self.state.iteration + 1, self.config.run.iterations)

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""
        self.reporter.tokens(count)

    def _start(self) -> Evaluation:
        """Resume from the last checkpoint if there is one; the evaluation before training is the same either way."""
        state, iterations = self.state, self.config.run.iterations
        self.reporter.phase("evaluate", state.iteration, iterations)
        before = self._evaluation()
        saved = checkpoint.newest(self.run.folder)
        if saved is not None:
            state.restore(saved)
            self.run.cut_logs(state.iteration)
            self.reporter.message(f"resuming after iteration {state.iteration} of {iterations}")
        else:
            self.run.cut_logs(-1)
            self.run.log(SAMPLES, _evaluation_rows(0, before))
        self._note_reward_files()
        return before

    def _note_reward_files(self) -> None:
        """What reward functions have read, as the first time."""
        found, known = self.roles.reward_files(), self.run.record().get("reward_files", {})
        if found.keys() - known.keys():
            self.run.note(reward_files={**found, **known})

    def _iterate(self, stream: PromptStream) -> tuple[dict[str, float], Sample, list[tuple[int, int]]]:
        """One iteration, whose arrays are free again afterwards: its metrics, a sample, and tokens of each row."""
        started = time.monotonic()
        taken = stream.take(self.state.cursor, self.config.rollout.prompts)
        prompts = [prompt for _, prompt in taken]
        positions = range(self.state.cursor, self.state.cursor + len(taken))
        asked = Asked([prompt.tokens for prompt in prompts], positions, [prompt.record for prompt in prompts])
        done = iterate(self.config, self.roles, self.state, asked, self.keeper, self)
        if not done.signal:
            equal = "all scores" if self.config.ppo.advantage == "gae" else "the scores of each prompt's responses"
            step = self.state.iteration
            said = f"warning: {equal} of iteration {step} are equal: no signal to learn from, the policy stays as it is"
            self.reporter.message(said)
        row = int(np.argsort(np.array(done.scored.scores))[len(done.rollout.prompts) // 2])  # of the median score
        text = completion_text(self.roles.trunk.tokenizer, done.rollout.prompts[row], done.rollout.responses[row])
        of_prompt = prompts[row // self.config.rollout.samples_per_prompt].text
        metrics = {**done.metrics, "time": time.time(), "seconds": time.monotonic() - started}
        metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["seconds"]
        metrics["memory"] = max(self.keeper.meter.peaks.values()) / GIB
        self.run.log(RESPONSES, [{"step": self.state.iteration, **response_columns(done.rollout, done.scored)}])
        return metrics, (of_prompt, text, number(done.scored.scores[row])), done.rollout.lengths

    def _log(self, metrics: dict[str, float], sample: Sample) -> None:
        step = self.state.iteration
        for text in self.keeper.messages():
            self.reporter.message(text)
        self.run.log(MEMORY, [{"step": step, **self.keeper.meter.take()}])
        self.run.log(METRICS, [metrics])
        prompt, completion, score = sample
        row = {"step": step, "kind": "rollout", "prompt": prompt, "completion": completion, "score": score}
        self.run.log(SAMPLES, [row])
        self.reporter.iteration(metrics, self.config.run.iterations, sample)

    def _evaluation(self) -> Evaluation:
        return evaluate(self.roles, self.state.policy.weights, self.held_out, self.config, self.keeper.now())

    def _evaluate_and_save(self) -> None:
        """What is due after an iteration. The log comes first, so that a checkpoint is never ahead of it."""
        state, section = self.state, self.config.run
        done = state.iteration == section.iterations
        due = bool(section.evaluate_every) and state.iteration % section.evaluate_every == 0
        if due and not done:
            evaluation = self._evaluation()
            self.run.log(SAMPLES, _evaluation_rows(state.iteration, evaluation))
            if state.best is None or evaluation.score > state.best[1]:
                state.best = (state.iteration, evaluation.score)
        if done or due or state.iteration % section.save_every == 0:
            self._save()

    def _save(self) -> None:
        best, keep_last = self.state.best[0] if self.state.best is not None else None, self.config.run.keep_last
        with phase("checkpoint"):
            self.run.secure()
            self._note_reward_files()
            saved = self.state.as_checkpoint(self.roles.trunk.blocks)
            checkpoint.save(self.run.folder, saved, keep_last=keep_last, best=best)


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """The policy's tokenizer, before its weights are loaded.

    Raises:
        ModelError: the model folder is damaged.
    """
    return load_tokenizer(config.model.path, check_model_folder(config.model.path).config)


def slow_controller(config: TrainConfig) -> str | None:
    """A warning where the adaptive KL controller can't even double its coefficient in the whole run."""
    samples = config.run.iterations * config.rollout.prompts * config.rollout.samples_per_prompt
    factor = math.exp(min(0.2 * samples / horizon_of(config), 10.0))
    if config.kl.controller == "fixed" or not config.kl.horizon or factor >= 2:
        return None
    return (
        f"warning: kl.horizon = {config.kl.horizon:g} lets the run's {samples} samples change kl.coef by a factor of "
        f"at most {factor:.2f}, so kl.target may never be reached; leave the key out, or lower it"
    )


class Messages(Protocol):
    """Where one line of information or warning goes."""

    def message(self, text: str) -> None:
        """One line."""


def load_data(config: TrainConfig, tokenizer: Tokenizer, reporter: Messages) -> tuple[PromptSet, tuple[Prompt, ...]]:
    """Training prompts, and the ones for evaluations."""
    section = config.data
    limits: dict[str, Any] = {"max_tokens": section.max_prompt_tokens, "overlong": section.overlong}
    data = load_prompts(section.prompts, tokenizer, **limits)
    held_out = data if section.eval_prompts is None else load_prompts(section.eval_prompts, tokenizer, **limits)
    for prompts, path in ((data, section.prompts), (held_out, section.eval_prompts)):
        if path is not None and (prompts.dropped or prompts.truncated):
            reporter.message(
                f"{path.name}: {prompts.dropped} overlong prompts dropped, {prompts.truncated} truncated "
                f"(max_prompt_tokens = {section.max_prompt_tokens})"
            )
    chosen = held_out.prompts[: section.eval_count]
    shared = shared_prompts(data.prompts, chosen) if section.eval_prompts is not None else 0
    if shared:
        reporter.message(f"warning: {shared} of the {len(chosen)} evaluation prompts are also training prompts")
    return data, chosen


def _evaluation_rows(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = [
        {"step": step, "kind": "evaluation", "prompt": c.prompt, "completion": c.text, "score": c.score}
        | {f"points/{name}": value for name, value in c.points.items()}
        for c in evaluation.completions
    ]
    return [*rows, {"step": step, "kind": "summary", **evaluation.figures()}]
