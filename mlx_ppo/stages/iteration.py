"""One iteration of PPO: sample, score, estimate advantages, update. Training and its rehearsals share it."""

from typing import NamedTuple, Protocol

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.models.roles import Roles
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages.advantages import advantages, pulls_back, signal
from mlx_ppo.stages.measurements import iteration_metrics, source_metrics
from mlx_ppo.stages.records import Rollout, Scored
from mlx_ppo.stages.rollout import Asked, generate_together, sampling
from mlx_ppo.stages.scoring import score
from mlx_ppo.stages.state import State
from mlx_ppo.stages.update import Schedule, update


class Plan(Protocol):
    """What a run may have in memory together. It changes in mid-run, so it is asked wherever that is read."""

    def now(self) -> Choices:
        """The choices in effect."""

    def next_step(self) -> Choices:
        """Those of the optimizer step that begins."""


class Watcher(Protocol):
    """Who follows an iteration, and may end it by an exception between two stages."""

    def stage(self, name: str) -> None:
        """A stage begins: "rollout", "score" or "update"."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""


class Iteration(NamedTuple):
    """A finished iteration."""

    rollout: Rollout
    scored: Scored
    metrics: dict[str, float]  # by the keys of `mlx_ppo.runs.metrics`; times come from elsewhere
    signal: bool  # the scores differ
    stepped: bool  # else: the policy went back towards the reference, where the KL penalty says so


def iterate(config: TrainConfig, roles: Roles, state: State, asked: Asked, plan: Plan, watcher: Watcher) -> Iteration:
    """Answer prompts and learn from the scores; the state moves on only when all of it is done.

    Raises:
        RunError: a score, loss or gradient is not finite; nothing of the step in which that happens is applied.
    """
    number, seed = state.iteration + 1, config.run.seed
    watcher.stage("rollout")
    how = sampling(config.rollout, plan.now(), seed, "rollout")
    rollout = generate_together(roles, state.policy.weights, asked, how, watcher.tokens)
    watcher.stage("score")
    critic = state.critic.weights if state.critic is not None else None
    scored = score(roles, state.policy.weights, critic, rollout, config.score, plan.now())
    del critic  # or its weights would stay in memory beside the new ones
    batch = advantages(config, rollout, scored, kl_coef=state.kl.coef)
    watcher.stage("update")
    rate = state.policy.optimizer.rate(state.policy.optimizer.steps)
    warm, differing = state.iteration >= config.critic_warmup, signal(config, rollout, scored)
    learns = warm and (differing > 0 or pulls_back(rollout, scored, kl_coef=state.kl.coef))
    schedule = Schedule(config.ppo, (seed, "update", number), plan.next_step, train_policy=learns)
    stats = update(roles, state, rollout, batch, schedule)
    metrics = iteration_metrics(number, state.kl.coef, rollout, scored, batch, stats) | source_metrics(
        roles.sources, scored
    )
    metrics |= {"learning_rate": rate, "signal": differing}
    state.kl.update(metrics["kl"], len(rollout.prompts))
    state.iteration = number
    state.cursor += len(asked.prompts)
    return Iteration(rollout, scored, metrics, differing > 0, learns)
