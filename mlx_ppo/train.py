"""PPO: the story. Only this file knows every stage."""

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
from mlx_ppo.memory.choices import applied
from mlx_ppo.memory.keeping import Keeper, is_tight, limits_of
from mlx_ppo.memory.plan import GIB
from mlx_ppo.memory.starting import plan_run, said
from mlx_ppo.memory.watchdog import watching
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.roles import Roles, load_roles
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import MEMORY, METRICS, SAMPLES, Run
from mlx_ppo.runtime.phases import metering, phase
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages.advantages import advantages
from mlx_ppo.stages.measurements import iteration_metrics
from mlx_ppo.stages.records import Rollout, Scored, number
from mlx_ppo.stages.rollout import generate, sampling
from mlx_ppo.stages.scoring import score
from mlx_ppo.stages.state import State, initial_state
from mlx_ppo.stages.update import update
from mlx_ppo.tokenizers.load import completion_text, load_tokenizer


class Reporter(Protocol):
    """What a person sees of a run."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
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
    plan = planned.plan
    reporter.message(said(plan))
    with (
        keeping_to(plan),
        watching(interrupts.stop),
        metering(limits_of(plan.phases), clearing=is_tight(plan)) as meter,
    ):
        keeper = Keeper(config, planned, run.folder, meter)
        config = applied(config, planned.record.choices)
        with phase("load"):
            roles, policy, critic = load_roles(config)
        try:
            for remark in roles.trunk.remarks:
                reporter.message(remark)
            stream = PromptStream(data.prompts, config.run.seed)
            state = initial_state(config, policy, critic)
            del policy, critic  # the first weights would stay in memory beside the trained ones
            before = _start(config, run, roles, state, held_out, reporter)
            meter.take()
            while state.iteration < config.run.iterations:
                started = time.monotonic()
                try:
                    config = keeper.begin(state.iteration + 1, state.moments)
                    rows, sample, lengths = _iterate(config, roles, state, stream, reporter, interrupts, keeper)
                    metrics = {**rows, "seconds": time.monotonic() - started}
                    metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["seconds"]
                    metrics["memory"] = max(meter.peaks.values()) / GIB
                    keeper.finish(lengths, state.moments)
                    for text in keeper.messages():
                        reporter.message(text)
                    run.log(MEMORY, [{"step": state.iteration, **meter.take()}])
                    run.log(METRICS, [metrics])
                    run.log(SAMPLES, [_sample_row(state.iteration, sample)])
                    reporter.iteration(metrics, config.run.iterations, sample)
                    if metrics["score_deviation"] == 0:
                        reporter.message(
                            f"warning: all scores of iteration {state.iteration} are equal: no signal to learn from"
                        )
                    _evaluate_and_save(config, run, roles, state, held_out)
                    interrupts.check()
                except Interrupted:
                    _save(config, run, roles, state)
                    raise
            reporter.phase("evaluate", state.iteration, config.run.iterations)
            after = evaluate(roles, state.policy.weights, held_out, config)
            if not run.has(SAMPLES, step=state.iteration, kind="summary"):  # a finished run that is resumed has it
                run.log(SAMPLES, _evaluation_rows(state.iteration, after))
            return Result(before, after, checkpoint.folder_of(run.folder, state.iteration))
        finally:
            roles.close()


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """The policy's tokenizer, before its weights are loaded.

    Raises:
        ModelError: the model folder is damaged.
    """
    return load_tokenizer(config.model.path, check_model_folder(config.model.path).config)


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


def _start(
    config: TrainConfig, run: Run, roles: Roles, state: State, held_out: Sequence[Prompt], reporter: Reporter
) -> Evaluation:
    """Resume from the last checkpoint if there is one; the evaluation before training is the same either way."""
    reporter.phase("evaluate", state.iteration, config.run.iterations)
    before = evaluate(roles, state.policy.weights, held_out, config)
    saved = checkpoint.newest(run.folder)
    if saved is not None:
        state.restore(saved)
        run.cut_logs(state.iteration)
        reporter.message(f"resuming after iteration {state.iteration} of {config.run.iterations}")
    else:
        run.cut_logs(-1)
        run.log(SAMPLES, _evaluation_rows(0, before))
    return before


def _iterate(
    config: TrainConfig,
    roles: Roles,
    state: State,
    stream: PromptStream,
    reporter: Reporter,
    interrupts: Interrupts,
    keeper: Keeper,
) -> tuple[dict[str, float], tuple[str, str, float], list[tuple[int, int]]]:
    """One iteration; the state moves on only when all of it is done. Metrics, a sample, and tokens of each row."""
    interrupts.check()
    number_, seed = state.iteration + 1, config.run.seed
    taken = stream.take(state.cursor, config.rollout.prompts)
    reporter.phase("rollout", number_, config.run.iterations)
    rollout = generate(
        roles.trunk,
        state.policy.weights,
        [prompt.tokens for _, prompt in taken],
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed_parts=(seed, "rollout"),
        positions=range(state.cursor, state.cursor + len(taken)),
        records=[prompt.record for _, prompt in taken],
        on_tokens=reporter.tokens,
        **sampling(config.rollout),
    )
    interrupts.check()
    reporter.phase("score", number_, config.run.iterations)
    scored, _ = score(
        roles,
        state.policy.weights,
        state.critic.weights if state.critic is not None else None,
        rollout,
        section=config.score,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
    )
    batch = advantages(config, rollout, scored, kl_coef=state.kl.coef)
    interrupts.check()
    reporter.phase("update", number_, config.run.iterations)
    rate = state.policy.optimizer.rate(state.policy.optimizer.steps)
    stats = update(
        roles,
        state.policy,
        state.critic,
        rollout,
        batch,
        section=config.ppo,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        seed_parts=(seed, "update", number_),
        train_policy=state.iteration >= config.critic.warmup_iterations,
        pass_size=keeper.pass_size,
    )
    metrics = iteration_metrics(number_, state.kl.coef, rollout, scored, batch, stats) | {"learning_rate": rate}
    state.kl.update(metrics["kl"], len(rollout.prompts))
    state.iteration = number_
    state.cursor += len(taken)
    return metrics, _median(roles, config, taken, rollout, scored), rollout.lengths


def _median(
    roles: Roles, config: TrainConfig, taken: Sequence[tuple[int, Prompt]], rollout: Rollout, scored: Scored
) -> tuple[str, str, float]:
    """The response with the median score: prompt, completion, score."""
    row = int(np.argsort(np.array(scored.scores))[len(rollout.prompts) // 2])
    text = completion_text(roles.trunk.tokenizer, rollout.prompts[row], rollout.responses[row])
    asked = taken[row // config.rollout.samples_per_prompt][1].text
    return asked, text, number(scored.scores[row])


def _evaluate_and_save(config: TrainConfig, run: Run, roles: Roles, state: State, held_out: Sequence[Prompt]) -> None:
    """What is due after an iteration. The log comes first, so that a checkpoint is never ahead of it."""
    done = state.iteration == config.run.iterations
    due = bool(config.run.evaluate_every) and state.iteration % config.run.evaluate_every == 0
    if due and not done:
        evaluation = evaluate(roles, state.policy.weights, held_out, config)
        run.log(SAMPLES, _evaluation_rows(state.iteration, evaluation))
        if state.best is None or evaluation.score > state.best[1]:
            state.best = (state.iteration, evaluation.score)
    if done or due or state.iteration % config.run.save_every == 0:
        _save(config, run, roles, state)


def _save(config: TrainConfig, run: Run, roles: Roles, state: State) -> None:
    best = state.best[0] if state.best is not None else None
    with phase("checkpoint"):
        run.secure()
        checkpoint.save(run.folder, state.as_checkpoint(roles.trunk.blocks), keep_last=config.run.keep_last, best=best)


def _sample_row(step: int, sample: tuple[str, str, float]) -> dict[str, Any]:
    return {"step": step, "kind": "rollout", "prompt": sample[0], "completion": sample[1], "score": sample[2]}


def _evaluation_rows(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = [
        {"step": step, "kind": "evaluation", "prompt": c.prompt, "completion": c.text, "score": c.score, **c.points}
        for c in evaluation.completions
    ]
    return [*rows, {"step": step, "kind": "summary", **evaluation.figures()}]
