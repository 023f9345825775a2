"""Every key of the jobs beside PPO, `sft`, `reward` and `dpo`, and the table of all jobs."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mlx_ppo.config.fields import Columns, Count, CountOrZero, InputPath, Length, NonNegative, Section
from mlx_ppo.config.parallel import ParallelSection
from mlx_ppo.config.sections import Job, LoraSection, ModelSection, OptimizerSection, RunSection, TrainConfig

Epochs = Annotated[int, Field(ge=1, le=10_000)]


class TrainableModelSection(ModelSection):
    """The model section of `sft`, `reward` and `dpo`, which write a model folder at the end."""

    initialise: Literal["weights", "random"] = Field(
        "weights",
        description="start from the folder's weights, or (`sft`, train = full) from random ones for its config.json",
    )
    embeddings: InputPath | None = Field(
        None, description="with initialise = random: take the token embeddings from this model folder of the same width"
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of the weights in the finished folder; checkpoints keep float32"
    )


class ExampleDataSection(Section):
    """Examples for `sft`: JSONL with `text`, `prompt` and `completion`, or `messages`."""

    train: InputPath = Field(description="training examples")
    validation: InputPath | None = Field(
        None, description="held-out examples; the weights with the lowest loss on them are kept"
    )
    max_tokens: Length = Field(512, description="an example's bound")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "truncate", description="what happens to longer ones (counted and shown)"
    )
    columns: Columns = ()


class SFTSection(Section):
    """Supervised fine-tuning."""

    epochs: Epochs = Field(3, description="passes over the examples")
    batch_size: Count = Field(16, description="examples an optimizer step")
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of input tokens replaced by random ones while training (regularises small data)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout on the outputs of attention and feed-forward blocks while training"
    )
    patience: CountOrZero = Field(
        0, description="stop after this many epochs without a better validation loss; 0: never"
    )


class RetriesSection(Section):
    """The memory section of jobs whose memory isn't planned."""

    retries: CountOrZero = Field(
        0,
        description="how many times a run that the system kills, or one of whose processes is lost, goes on by itself "
        "from its last checkpoint",
    )


class SFTConfig(Job):
    """`mlx-ppo sft`."""

    command: ClassVar[str] = "sft"
    run: RunSection = RunSection(name="sft")
    model: TrainableModelSection
    lora: LoraSection = LoraSection()
    data: ExampleDataSection
    sft: SFTSection = SFTSection()
    optimizer: OptimizerSection = OptimizerSection()
    memory: RetriesSection = RetriesSection()
    parallel: ParallelSection = ParallelSection()


class FeedbackDataSection(Section):
    """Human feedback for `reward`: JSONL with `chosen` and `rejected`, or with `rating` or `ratings`."""

    train: InputPath = Field(description="training feedback")
    validation: InputPath | None = Field(
        None, description="held-out feedback; the weights with the lowest loss on it are kept"
    )
    test: InputPath | None = Field(None, description="feedback for the final figures only")
    max_tokens: Length = Field(512, description="a text's bound")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "truncate", description="what happens to longer ones (counted and shown)"
    )
    columns: Columns = ()


class RewardTrainingSection(Section):
    """Reward model training."""

    objective: Literal["pairs", "regression", "both"] = Field(
        "pairs", description="Bradley-Terry on pairs; squared error to the mean ratings; or their sum"
    )
    pooling: Literal["last", "mean", "sqrt"] = Field(
        "last",
        description="the head reads the last token's final state, the mean over the text, "
        "or the sum divided by the root of the length",
    )
    rankings: Literal["pairs", "all-pairs", "plackett-luce"] = Field(
        "pairs",
        description="several ranked answers to a prompt: each pair by itself; a prompt's pairs together, weighing as "
        "one (InstructGPT); or the likelihood of the ranking. The last two read each answer once a step",
    )
    members: Annotated[int, Field(ge=1, le=100)] = Field(
        1,
        description="models of an ensemble, which differ by their seeds: adapters (train = full: weights) and heads on "
        "one trunk, trained one after the other",
    )
    min_difference: NonNegative = Field(1.0, description="ratings make a pair where they differ by at least this much")
    pairs_per_item: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="pairs drawn for each rated text and epoch"
    )
    centering: NonNegative = Field(0.0, description="factor on (chosen + rejected)^2, which keeps scores near 0")
    epochs: Epochs = Field(5, description="passes over the feedback")
    batch_size: Count = Field(32, description="texts (or pairs, or rankings) an optimizer step")
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of input tokens replaced by random ones while training"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout on the outputs of attention and feed-forward blocks while training"
    )


class RewardConfig(Job):
    """`mlx-ppo reward`."""

    command: ClassVar[str] = "reward"
    run: RunSection = RunSection(name="reward")
    model: TrainableModelSection
    lora: LoraSection = LoraSection()
    data: FeedbackDataSection
    reward_training: RewardTrainingSection = RewardTrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    memory: RetriesSection = RetriesSection()
    parallel: ParallelSection = ParallelSection()


class PreferenceDataSection(Section):
    """Preferences for `dpo`: JSONL with `prompt`, `chosen` and `rejected`, or rankings; for KTO, ratings as well."""

    train: InputPath = Field(description="training pairs (kto: or ratings or labels)")
    validation: InputPath | None = Field(
        None, description="held-out ones; the weights with the lowest loss on them are kept"
    )
    max_tokens: Length = Field(512, description="a prompt with its answer's bound")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "truncate", description="what happens to longer ones (counted and shown)"
    )
    columns: Columns = ()


class DPOSection(Section):
    """Direct preference optimization, and what learns from judgements of single answers."""

    beta: Annotated[float, Field(gt=0, le=1e4)] = Field(
        0.1, description="what a nat of KL to the start costs; larger stays nearer to it"
    )
    loss: Literal["sigmoid", "ipo", "kto"] = Field(
        "sigmoid",
        description="DPO's; IPO's squared one, by nats a token, for pairs that nobody would order otherwise; or KTO's, "
        "of answers that are good or bad by themselves",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of pairs that are taken to be the wrong way round (sigmoid)"
    )
    good_above: float | None = Field(
        None,
        description="ratings above it are good, those below it bad, others are left out; without: halfway between the "
        "lowest and the highest rating of `data.train` (kto)",
    )
    bad_weight: Annotated[float, Field(ge=0, le=1e4)] = Field(
        0.0, description="weight of a bad answer, a good one's is 1; 0: both kinds weigh alike in sum (kto)"
    )
    epochs: Epochs = Field(1, description="passes over the pairs or answers")
    batch_size: Count = Field(16, description="pairs (kto: answers) an optimizer step")


class DPOConfig(Job):
    """`mlx-ppo dpo`."""

    command: ClassVar[str] = "dpo"
    run: RunSection = RunSection(name="dpo")
    model: TrainableModelSection
    lora: LoraSection = LoraSection()
    data: PreferenceDataSection
    dpo: DPOSection = DPOSection()
    optimizer: OptimizerSection = OptimizerSection()
    memory: RetriesSection = RetriesSection()
    parallel: ParallelSection = ParallelSection()


WRITERS = (SFTConfig, DPOConfig)  # jobs beside `train` whose result is a policy
AnyJob = TrainConfig | SFTConfig | RewardConfig | DPOConfig
JOBS: dict[str, type[Job]] = {job.command: job for job in (TrainConfig, SFTConfig, RewardConfig, DPOConfig)}
