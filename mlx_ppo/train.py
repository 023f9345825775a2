"""PPO: the story. Only this file knows every stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_ppo import checkpoint
from mlx_ppo.algo.advantages import gae, group_advantages, length_adaptive_lambda
from mlx_ppo.algo.kl import AdaptiveKL, FixedKL
from mlx_ppo.algo.masked import whiten
from mlx_ppo.algo.rewards import token_rewards
from mlx_ppo.checkpoint import Checkpoint
from mlx_ppo.config import TrainConfig
from mlx_ppo.data.prompts import Prompt, PromptSet, PromptStream, load_prompts, shared_prompts
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import RunError
from mlx_ppo.evaluate import Evaluation, evaluate
from mlx_ppo.measurements import iteration_metrics
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.meter import metering, phase
from mlx_ppo.memory.plan import GIB, applied
from mlx_ppo.memory.starting import PLAN, plan_run, said
from mlx_ppo.networks.adapters import Weights, adapter_config
from mlx_ppo.networks.roles import Roles, load_roles
from mlx_ppo.networks.tokenizer import completion_text
from mlx_ppo.optimization import Optimizer
from mlx_ppo.records import PPOBatch, Rollout, Scored, number
from mlx_ppo.rollout import generate
from mlx_ppo.runs import MEMORY, METRICS, SAMPLES, Run
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.scoring import score
from mlx_ppo.update import Learner, update


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


@dataclass
class State:
    """Everything that training changes; a checkpoint holds exactly this."""

    policy: Learner
    critic: Learner | None
    kl: AdaptiveKL | FixedKL
    iteration: int = 0
    cursor: int = 0  # prompts taken from the stream
    best: tuple[int, float] | None = None  # iteration and score of the best evaluation

    def as_checkpoint(self, blocks: int) -> Checkpoint:
        """The state as files; the policy's adapters in mlx-lm's own format."""
        arrays: dict[str, Any] = {
            "adapters": self.policy.weights.arrays,
            "optimizer_policy": self.policy.optimizer.state(),
        }
        steps = {"policy": self.policy.optimizer.steps}
        if self.critic is not None:
            arrays["critic"] = self.critic.weights.arrays
            arrays["optimizer_critic"] = self.critic.optimizer.state()
            steps["critic"] = self.critic.optimizer.steps
        return Checkpoint(
            self.iteration,
            {name: content for name, content in arrays.items() if content},
            {"cursor": self.cursor, "kl": self.kl.state(), "optimizer_steps": steps, "best": self.best},
            {"adapter_config.json": adapter_config(self.policy.weights, blocks)},
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint of the same configuration."""
        learners = {"policy": (self.policy, "adapters"), "critic": (self.critic, "critic")}
        for role, (learner, file) in learners.items():
            if learner is None:
                continue
            arrays = saved.arrays.get(file, {})
            if not checkpoint.alike(arrays, learner.weights.arrays):
                raise RunError(f"the checkpoint's {role} has other weights than this configuration; nothing was loaded")
            learner.weights = learner.weights.holding({name: arrays[name] for name in learner.weights.arrays})
            moments = saved.arrays.get(f"optimizer_{role}", {})
            learner.optimizer.load(dict(moments), saved.state["optimizer_steps"][role])
        if isinstance(self.kl, AdaptiveKL):  # a fixed coefficient is the configuration's
            self.kl.load(saved.state["kl"])
        self.iteration, self.cursor = saved.step, saved.state["cursor"]
        best = saved.state["best"]
        self.best = (best[0], best[1]) if best else None


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
    roles, policy, critic = load_roles(config)
    try:
        if roles.trunk.remark:
            reporter.message(roles.trunk.remark)
        data, held_out = load_data(config, roles.trunk.tokenizer, reporter)
        plan = plan_run(
            config, (roles, policy, critic), [len(p.tokens) for p in (*data.prompts, *held_out)], run.folder
        )
        run.note_files(run.folder / PLAN)
        reporter.message(said(plan))
        config = applied(config, plan)
        with keeping_to(plan), metering() as meter:
            stream = PromptStream(data.prompts, config.run.seed)
            state = initial_state(config, policy, critic)
            del policy, critic  # the first weights would stay in memory beside the trained ones
            before = _start(config, run, roles, state, held_out, reporter)
            while state.iteration < config.run.iterations:
                started = time.monotonic()
                try:
                    rows, sample = _iterate(config, roles, state, stream, reporter, interrupts)
                    metrics = {**rows, "seconds": time.monotonic() - started}
                    metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["seconds"]
                    metrics["memory"] = max(meter.peaks.values()) / GIB
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


def load_data(config: TrainConfig, tokenizer: Tokenizer, reporter: Reporter) -> tuple[PromptSet, tuple[Prompt, ...]]:
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


def initial_state(config: TrainConfig, policy: Weights, critic: Weights | None) -> State:
    """Learners, KL controller and counters before the first iteration."""
    steps = config.ppo.epochs * config.ppo.minibatches
    iterations = {"policy": config.run.iterations - config.critic.warmup_iterations, "critic": config.run.iterations}
    rates = {"policy": config.optimizer.learning_rate, "critic": config.critic.learning_rate}
    make = {
        role: Optimizer(config.optimizer, learning_rate=rate, total_steps=iterations[role] * steps)
        for role, rate in rates.items()
    }
    kl: AdaptiveKL | FixedKL = FixedKL(config.kl.coef)
    if config.kl.controller == "adaptive":
        kl = AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)
    return State(Learner(policy, make["policy"]), Learner(critic, make["critic"]) if critic is not None else None, kl)


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
    config: TrainConfig, roles: Roles, state: State, stream: PromptStream, reporter: Reporter, interrupts: Interrupts
) -> tuple[dict[str, float], tuple[str, str, float]]:
    """One iteration; the state moves on only when all of it is done."""
    interrupts.check()
    number_ = state.iteration + 1
    seed = config.run.seed
    taken = stream.take(state.cursor, config.rollout.prompts)
    reporter.phase("rollout", number_, config.run.iterations)
    rollout = generate(
        roles.trunk,
        state.policy.weights,
        [prompt.tokens for _, prompt in taken],
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        batch_size=config.rollout.batch_size,
        seed_parts=(seed, "rollout"),
        positions=range(state.cursor, state.cursor + len(taken)),
        records=[prompt.record for _, prompt in taken],
        on_tokens=reporter.tokens,
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
    )
    metrics = iteration_metrics(number_, state.kl.coef, rollout, scored, batch, stats) | {"learning_rate": rate}
    state.kl.update(metrics["kl"], len(rollout.prompts))
    state.iteration = number_
    state.cursor += len(taken)
    row = int(np.argsort(np.array(scored.scores))[len(rollout.prompts) // 2])
    tokenizer = roles.trunk.tokenizer
    text = completion_text(tokenizer, rollout.prompts[row], rollout.responses[row])
    asked = taken[row // config.rollout.samples_per_prompt][1].text
    return metrics, (asked, text, number(scored.scores[row]))


def advantages(config: TrainConfig, rollout: Rollout, scored: Scored, *, kl_coef: float) -> PPOBatch:
    """Token rewards, then GAE twice (policy and critic have their own lambda), or the group's baseline."""
    ppo, mask = config.ppo, rollout.mask
    rewards = token_rewards(scored.scores, scored.old_logprobs, scored.ref_logprobs, mask, kl_coef=kl_coef)
    if scored.values is None:
        assert ppo.advantage != "gae"
        totals = mx.where(mask, rewards, 0.0).sum(axis=1)
        by_response = group_advantages(totals, rollout.group, kind=ppo.advantage)
        return PPOBatch(scored.old_logprobs, mx.where(mask, by_response[:, None], 0.0), None, None, None)
    lambda_policy: float | mx.array = ppo.lambda_policy
    if ppo.length_adaptive:
        lambda_policy = length_adaptive_lambda(mask.sum(axis=1), alpha=ppo.length_adaptive)
    estimates, _ = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=lambda_policy)
    _, returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=ppo.lambda_critic)
    _, full_returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=1.0)
    whitened = whiten(estimates, mask) if ppo.whiten else estimates
    return PPOBatch(scored.old_logprobs, whitened, scored.values, returns, full_returns)


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
