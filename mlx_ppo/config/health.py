"""The keys of what watches a run: health rules, and where its numbers go."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_ppo.config.fields import Positive, Section

Level = Literal["off", "warn", "stop", "best"]


class HealthSection(Section):
    """What happens when a rule finds a run unhealthy: nothing, a line, the run stops, or it goes back to its best."""

    entropy: Level = Field("warn", description="the policy's entropy falls below a quarter of what it was at first")
    kl: Level = Field("warn", description="the KL to the reference exceeds `kl_limit`, or stays below 0")
    length: Level = Field("warn", description="responses become longer or shorter by `length_factor`")
    unfinished: Level = Field("warn", description="below 5 % of the responses end by themselves")
    repetition: Level = Field("warn", description="30 % more 4-grams than at first are repeated in their response")
    diversity: Level = Field("warn", description="the share of different pairs of tokens halves")
    beyond: Level = Field("warn", description="a quarter of the scores are above all of the reward model's training")
    judge: Level = Field("warn", description="the score rises while that of a [[reward]] with weight 0 falls")
    critic: Level = Field("warn", description="the critic explains below 1 % of the returns for 8 iterations")
    ratio: Level = Field("warn", description="an update moves too far from the policy that sampled")
    gradient: Level = Field("warn", description="a gradient is above ten times its bound for 8 iterations")
    signal: Level = Field("warn", description="scores that are compared are equal")
    controller: Level = Field("warn", description="the KL stays above 1.5 times `kl.target` (adaptive)")
    plateau: Level = Field("warn", description="score less KL penalty hasn't risen for 16 iterations")
    kl_limit: Positive = Field(1.0, description="nats a token from the reference at which the KL has run away")
    length_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="how many times longer or shorter than at first responses may become"
    )


class LogSection(Section):
    """Where a run's numbers go beside its own logs."""

    tensorboard: bool = Field(
        False, description="into `tensorboard` in the run's folder as well; TensorBoard has to be installed"
    )
