"""The configuration: every key, its type, its bounds, its one default, and the sentence that explains it.

One frozen model a section, one job a class. `mlx_ppo.config.file` reads TOML into them, `mlx_ppo.config.checks` knows
which keys don't go together.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_ppo.config.fields import (
    Columns,
    Count,
    CountOrZero,
    InputPath,
    Length,
    NonNegative,
    OutputPath,
    Positive,
    Section,
    Share,
)
from mlx_ppo.config.health import HealthSection, LogSection
from mlx_ppo.config.parallel import ParallelSection
from mlx_ppo.config.rewards import RewardSource, ScoreSection


class RunSection(Section):
    """Where a run is kept and how often it is saved."""

    folder: OutputPath = Field(Path("runs"), description="folder that holds the run folders")
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the run's folder is `folder/name`, or `name-2`, `name-3`, ... where that is taken",
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="every random choice derives from it")
    save_every: Count = Field(10, description="iterations (or optimizer steps) between checkpoints")
    keep_last: Count = Field(2, description="checkpoints kept besides the best")
    stay_awake: bool = Field(False, description="keep a Mac from sleeping while the run lasts (caffeinate)")


class PPORunSection(RunSection):
    """The run section of `train`."""

    name: str = Field(
        "ppo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description=RunSection.model_fields["name"].description
    )
    iterations: Count = Field(100, description="PPO iterations: sample, score, update")
    evaluate_every: CountOrZero = Field(
        25,
        description="iterations between evaluations (`data.eval_count` samples each); 0: only before and after",
    )


class ModelSection(Section):
    """The trunk: a folder in the format of mlx-lm / Hugging Face, with safetensors."""

    path: InputPath = Field(description="model folder")
    train: Literal["lora", "full"] = Field("lora", description="train LoRA adapters or all weights")
    adapter: InputPath | None = Field(None, description="folder of LoRA adapters to start from, mlx-lm's or PEFT's")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="compute type; auto: float32 on a CPU, and on a GPU below half a billion parameters, else bfloat16",
    )


class LoraSection(Section):
    """Low-rank adapters, in mlx-lm's terms."""

    rank: Annotated[int, Field(ge=1, le=10**9)] = Field(8, description="rank of each adapter")
    scale: Positive = Field(2.0, description="factor on the adapter's output (mlx-lm's scale: alpha / rank)")
    layers: CountOrZero = Field(0, description="adapt this many of the uppermost layers; 0: all")
    targets: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="names inside a layer such as `self_attn.q_proj`; empty: every linear layer"
    )


class OptimizerSection(Section):
    """AdamW with bias correction."""

    learning_rate: Positive = Field(1e-4, description="rate of the policy (or of the model, in `sft` and `reward`)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="decay to zero over the run, after warm-up"
    )
    warmup_steps: CountOrZero = Field(0, description="optimizer steps of linear warm-up")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the second moment")
    eps: Positive = Field(1e-5, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    gradient_clip: Positive = Field(1.0, description="bound on the gradient's global norm")


class PromptDataSection(Section):
    """Prompts for `train`: JSONL with `prompt` (text or messages) or `messages`."""

    prompts: InputPath = Field(description="training prompts")
    eval_prompts: InputPath | None = Field(
        None, description="held-out prompts for the evaluations; without: training prompts"
    )
    eval_count: Count = Field(64, description="how many of them are answered at an evaluation")
    max_prompt_tokens: Length = Field(256, description="a prompt's bound")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="what happens to longer ones (counted and shown)"
    )
    columns: Columns = ()


class RolloutSection(Section):
    """Sampling from the current policy."""

    prompts: Count = Field(32, description="prompts an iteration")
    samples_per_prompt: Count = Field(
        1, description="responses for each prompt (2 or more for the critic-free estimators)"
    )
    max_tokens: Count = Field(64, description="a response's bound in tokens")
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = Field(
        1.0, description="sampling temperature; every log-probability is of this distribution"
    )
    top_k: CountOrZero = Field(
        0,
        description="sample only from so many of the most probable tokens; 0: from all. With top_k, top_p or min_p "
        "every log-probability, KL and entropy is of the truncated distribution",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="then only from the most probable tokens that together have this probability; 1: from all"
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="then only from tokens at least this share as probable as the most probable one; 0: from all"
    )
    batch_size: CountOrZero = Field(
        0, description="sequences decoded together; 0: up to 64, as the memory budget allows. Changes speed and memory"
    )
    kv_cache: Literal["auto", "full", "8-bit"] = Field(
        "auto",
        description="how keys and values are kept while sampling; 8-bit: a quarter of the memory of float32, sampling "
        "from a slightly different distribution, which the recomputed log-probabilities account for; auto: full "
        "unless the memory budget asks for it",
    )


class CriticSection(Section):
    """The value function."""

    kind: Literal["adapters", "head", "model"] = Field(
        "adapters",
        description="own adapters and head on the shared trunk; a head on the policy's states; or a model of its own",
    )
    path: InputPath | None = Field(
        None, description="the critic's model folder (kind = model); without: the reward model's or the policy's"
    )
    initialise: Literal["reward", "policy"] = Field(
        "reward", description="start from the reward model where one fits, or from the trunk as it is"
    )
    learning_rate: Positive = Field(3e-4, description="the critic's rate")
    warmup_iterations: CountOrZero = Field(0, description="first iterations that train only the critic (gae)")


class PPOSection(Section):
    """The update."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo"] = Field(
        "gae", description="with a critic (gae), or critic-free within a prompt's group"
    )
    epochs: Count = Field(2, description="passes over each rollout")
    minibatches: Count = Field(4, description="optimizer steps a pass")
    micro_batch: CountOrZero = Field(
        0, description="responses a forward and backward pass; 0: as many of the minibatch as the memory budget allows"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute blocks again for the gradient; auto: where the memory budget asks for it"
    )
    clip_low: Share = Field(0.2, description="lower bound of the ratio is 1 - clip_low")
    clip_high: NonNegative = Field(0.28, description="upper bound of the ratio is 1 + clip_high")
    dual_clip: NonNegative = Field(
        3.0, description="bound on the loss where the advantage is negative; 0: none, else above 1"
    )
    value_clip: NonNegative = Field(0.2, description="how far a value may move from the old one; 0: no bound")
    discount: Share = Field(1.0, description="discount of later rewards")
    lambda_policy: Share = Field(0.95, description="GAE lambda of the advantages")
    lambda_critic: Share = Field(1.0, description="GAE lambda of the value targets")
    length_adaptive: NonNegative = Field(0.0, description="alpha of a lambda_policy of 1 - 1/(alpha * length); 0: off")
    whiten: bool = Field(True, description="whiten the advantages over the rollout (gae)")
    aggregate: Literal["token-mean", "sequence-mean", "constant"] = Field(
        "token-mean", description="denominator of the policy loss (constant: responses times max_tokens)"
    )
    entropy_coef: NonNegative = Field(0.0, description="entropy bonus")
    stop_at_kl: NonNegative = Field(
        0.0, description="end the passes when the approximate KL to the old policy exceeds it; 0: off"
    )


class KLSection(Section):
    """The penalty for leaving the reference, inside the reward."""

    coef: NonNegative = Field(0.05, description="factor on log pi - log pi_ref of each token")
    controller: Literal["fixed", "adaptive"] = Field("fixed", description="keep coef, or steer towards the target")
    target: Positive = Field(6.0, description="nats a sequence (adaptive)")
    horizon: NonNegative = Field(
        0.0, description="samples over which the controller acts (adaptive); 0: a tenth of those of the run"
    )


class Job(BaseModel):
    """A whole configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    command: ClassVar[str]
    run: RunSection


class MemorySection(Section):
    """What the run may use."""

    budget_gb: NonNegative = Field(
        0.0, le=1e6, description="bound on the process's memory in GiB; 0: three quarters of what is free at the start"
    )
    retries: CountOrZero = Field(
        0,
        description="how many times a run that the system kills, or one of whose processes is lost, goes on by itself; "
        "after a kill with a smaller plan",
    )
    residency: Literal["auto", "resident", "evict"] = Field(
        "auto",
        description="weights that only some phases read (reward models with a trunk of their own; the reference under "
        "full fine-tuning): kept in memory, or read anew from disk in every iteration; auto: where the budget asks "
        "for it",
    )
    compact: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on a CPU, keep a quantised model quantised in memory and dequantise each matrix at its use, "
        "which is slower; auto: where the budget asks for it",
    )
    positions: CountOrZero = Field(
        0,
        description="response positions whose logits are computed together; 0: as many as make 64 MB of logits, fewer "
        "where the budget asks for it",
    )


class TrainConfig(Job):
    """`mlx-ppo train`."""

    command: ClassVar[str] = "train"
    run: PPORunSection = PPORunSection()
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: PromptDataSection
    rollout: RolloutSection = RolloutSection()
    reward: Annotated[tuple[RewardSource, ...], Field(strict=False, min_length=1)]
    score: ScoreSection = ScoreSection()
    critic: CriticSection = CriticSection()
    ppo: PPOSection = PPOSection()
    kl: KLSection = KLSection()
    optimizer: OptimizerSection = OptimizerSection()
    health: HealthSection = HealthSection()
    log: LogSection = LogSection()
    memory: MemorySection = MemorySection()
    parallel: ParallelSection = ParallelSection()

    @property
    def critic_warmup(self) -> int:
        """First iterations that train only the critic; none where there is no critic."""
        return self.critic.warmup_iterations if self.ppo.advantage == "gae" else 0
