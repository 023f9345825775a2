"""A process that follows another one's run: the same steps in the same order, on its part of the rows."""

from typing import NamedTuple

import mlx.core as mx

from mlx_ppo import dpo, reward_training, sft
from mlx_ppo.compute.cpu import threads
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import AnyJob, DPOConfig, RewardConfig, SFTConfig
from mlx_ppo.data.prompts import PromptStream
from mlx_ppo.errors import ConfigError
from mlx_ppo.evaluate import evaluate
from mlx_ppo.models.roles import Loading, load_roles
from mlx_ppo.parallel import compared, meeting
from mlx_ppo.prompting import asked_for, load_data, tokenizer_of
from mlx_ppo.reporting import Silent
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.hosts import Place
from mlx_ppo.runtime.phases import Limit, metering
from mlx_ppo.stages import orders
from mlx_ppo.stages.iteration import iterate
from mlx_ppo.stages.state import initial_state


class _Told(NamedTuple):
    """The plan as the leader has told it for an iteration."""

    choices: Choices

    def now(self) -> Choices:
        """Those."""
        return self.choices

    def next_step(self) -> Choices:
        """Those."""
        return self.choices


def follow_far(config: AnyJob, place: Place) -> None:
    """Follow the machine that leads, having compared with it what both have.

    Raises:
        ProcessLost: it doesn't come, or is lost.
        ConfigError: it has other inputs.
        UserError: as `follow`.
    """
    ring = meeting(config, place)
    try:
        complaint = compared(ring, config)[place.rank]
        if complaint:
            raise ConfigError(f"{place.hosts[0][0]}, which leads, has another {complaint}; nothing was computed")
        follow(config, ring)
    finally:
        ring.close()


def follow(config: Job, group: Group) -> None:
    """Do what the leader does, until it ends.

    Raises:
        UserError: as the leader's; it has the same reason to stop.
    """
    if isinstance(config, TrainConfig):
        _follow_training(config, group)
        return
    with threads.choosing(group.told()["threads"]):
        if isinstance(config, SFTConfig):
            sft.follow(config, group)
        elif isinstance(config, DPOConfig):
            dpo.follow(config, group)
        elif isinstance(config, RewardConfig):
            reward_training.follow(config, group)
    group.told()  # the leader has ended


def _follow_training(config: TrainConfig, group: Group) -> None:
    silent = Silent()
    data, held_out = load_data(config, tokenizer_of(config), silent)
    told = group.told()
    mx.set_cache_limit(told["cache"])
    mx.set_memory_limit(told["memory"])
    limits = {name: Limit(*limit) for name, limit in told["limits"].items()}
    with threads.choosing(told["threads"]), metering(limits, clearing=told["clearing"]) as meter:
        loading = Loading(function=lambda *_: None, compact=told["compact"], evict=told["evict"])
        roles, policy, critic = load_roles(config, loading)
        roles.group = group
        state = initial_state(config, policy, critic)
        del policy, critic
        stream = PromptStream(data.prompts, config.run.seed)
        while (order := group.told()) is not None:
            choices = Choices(**order["choices"])
            threads.use(choices.threads)
            if order["do"] == "evaluate":
                evaluate(roles, state.policy.weights, held_out, config, choices)
            elif order["do"] == "restore":
                saved = orders.shared(group, None)
                assert saved is not None
                state.restore(saved)
            else:
                _, asked = asked_for(stream, state.cursor, config.rollout.prompts)
                iterate(config, roles, state, asked, _Told(choices), silent)
                orders.closing(group, meter)
                meter.take()
        roles.close()
