"""Every number that a PPO run logs, defined once, with the sentence that explains it to a person."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A column of metrics.jsonl."""

    key: str
    label: str
    form: str
    sentence: str


METRICS = (
    Metric("score", "score", "+.3f", "mean score of the responses, all sources weighted, before the KL penalty"),
    Metric("score_deviation", "score sd", ".3f", "standard deviation of the scores; near 0 there is no signal"),
    Metric("score_low", "score 10 %", "+.3f", "a tenth of the scores are below"),
    Metric("score_median", "score median", "+.3f", "half of the scores are below"),
    Metric("score_high", "score 90 %", "+.3f", "a tenth of the scores are above"),
    Metric("total_reward", "total reward", "+.3f", "mean score minus the KL penalty: what the policy maximises"),
    Metric("kl", "KL", ".2f", "nats a sequence from the reference; the price paid for the score"),
    Metric("kl_token", "KL/token", ".4f", "nats a token from the reference (k3 estimate)"),
    Metric("kl_coef", "KL coef", ".4f", "factor on the KL inside the reward"),
    Metric("entropy", "entropy", ".2f", "nats a token of the policy's distribution; falling towards 0 means collapse"),
    Metric("length", "length", ".1f", "mean response tokens"),
    Metric("finished", "finished", ".0%", "share of responses that ended by themselves"),
    Metric(
        "repetition",
        "repeated",
        ".0%",
        "share of 4-grams of tokens that their response had before; looping texts near 1",
    ),
    Metric("distinct_2", "distinct 2", ".0%", "share of different pairs of tokens among those of all responses"),
    Metric(
        "signal",
        "signal",
        ".0%",
        "share of prompts with different scores (critic-free), or 1 where any differ; 0: no step",
    ),
    Metric("clip_low", "clipped low", ".1%", "share of tokens whose ratio fell below 1 - clip_low"),
    Metric("clip_high", "clipped high", ".1%", "share of tokens whose ratio rose above 1 + clip_high"),
    Metric("kl_old", "KL to old", ".4f", "nats a token from the policy that sampled, at the end of the update"),
    Metric("effective_samples", "ESS", ".0%", "effective sample size of the ratios; low means the rollout is stale"),
    Metric("explained_variance", "critic EV", "+.2f", "share of the returns' variance that the critic predicts"),
    Metric("policy_loss", "policy loss", "+.4f", "clipped surrogate loss, mean over the update"),
    Metric("value_loss", "value loss", ".4f", "the critic's loss, mean over the update"),
    Metric("policy_norm", "policy grad", ".3f", "gradient norm before clipping, mean over the update"),
    Metric("critic_norm", "critic grad", ".3f", "the same of the critic"),
    Metric("ratio_error", "ratio error", ".1e", "largest |ratio - 1| in the first minibatch; must be rounding only"),
    Metric("logprob_error", "logprob error", ".1e", "mean |difference| of sampled and recomputed log-probabilities"),
    Metric("learning_rate", "rate", ".1e", "the policy's learning rate"),
    Metric("tokens_per_second", "tokens/s", ".0f", "sampled tokens over the whole iteration's time"),
    Metric("memory", "memory", ".2f", "GiB at mlx's peak in the iteration, freed buffers not counted"),
    Metric("time", "time", ".0f", "when the iteration was done, in seconds since 1970 (UTC)"),
    Metric("seconds", "seconds", ".2f", "time of the iteration"),
)

BY_KEY = {metric.key: metric for metric in METRICS}

# What a healthy run shows; where it depends on the task alone, nothing is said.
NORMAL = {
    "score": "rises, fastest at first, and flattens; a sudden jump is often an exploit: read the completions",
    "score_deviation": "stays well above 0; it may fall as the policy learns what pays",
    "total_reward": "rises with the score; where it falls while the score rises, the KL costs more than it earns",
    "kl": "rises from 0 and levels off, at 0.1 to 0.4 nats for each token; never lastingly below 0",
    "kl_token": "levels off at 0.1 to 0.4; above 1 the texts have little to do with the reference's",
    "kl_coef": "constant, or slowly moving where the controller is adaptive",
    "entropy": "falls slowly, by less than half",
    "length": "within a third of where it was, unless that is what the reward asks for",
    "finished": "where it was at first, or above",
    "repetition": "below 5 %",
    "distinct_2": "falls by less than a third",
    "signal": "all",
    "clip_low": "a few in a hundred",
    "clip_high": "a few in a hundred",
    "kl_old": "below 0.05",
    "effective_samples": "above 90 %; below a half the update goes too far on one rollout",
    "explained_variance": "above 0 after a few iterations, 0.1 to 0.5 later; one that stays at 0 is no help",
    "policy_loss": "small, around 0, without a trend; it says little",
    "value_loss": "falls at first",
    "policy_norm": "below optimizer.gradient_clip, or a few times that",
    "critic_norm": "falls at first, then steady",
    "ratio_error": "rounding: below 1e-3 in float32, larger in half precision",
    "logprob_error": "rounding: below 1e-3 in float32, larger in half precision",
    "tokens_per_second": "steady; slower where responses become shorter",
    "memory": "steady, below what was planned",
    "seconds": "steady",
}

# What `sft`, `reward` and `dpo` log, an epoch a row.
SUPERVISED = (
    Metric("loss", "training loss", ".4f", "mean loss over the epoch's batches, as the weights were at each"),
    Metric("validation_loss", "validation loss", ".4f", "loss on held-out data after the epoch; the lowest is kept"),
    Metric("validation_perplexity", "perplexity", ".2f", "exp of the validation loss: tokens that seem equally likely"),
    Metric(
        "validation_accuracy",
        "accuracy",
        ".1%",
        "share of clear held-out pairs that the model orders as people do; with KTO, of good answers that have gained "
        "more, and bad ones that have gained less, than the policy has moved",
    ),
    Metric("validation_accuracy_all", "accuracy, all pairs", ".1%", "the same over all pairs of different rating"),
    Metric("validation_correlation", "correlation", "+.3f", "Pearson's, of the model's outputs with the ratings"),
    Metric(
        "validation_slope", "slope", ".3f", "of the rating regressed on the output; 1 where a regression is calibrated"
    ),
    Metric("validation_best", "best answer", ".1%", "how often the highest score is that of a ranking's best answer"),
    Metric(
        "validation_margin",
        "margin",
        "+.3f",
        "`dpo`: mean lead of chosen (good) over rejected (bad) answers, beta times nats",
    ),
    Metric(
        "validation_chosen", "chosen answers", "+.2f", "`dpo`: what chosen or good answers have gained, nats an answer"
    ),
    Metric("validation_calibration_error", "calibration error", ".3f", "mean |confidence - accuracy| over pairs"),
)
NORMAL_SUPERVISED = {
    "loss": "falls; far below the validation loss it learns by heart",
    "validation_loss": "falls, then rises again where training is too long",
    "validation_perplexity": "falls with the loss",
    "validation_accuracy": "clearly above 50 %, which is chance; with KTO above the share of the commoner kind",
    "validation_accuracy_all": "above 50 %, below that of the clear pairs",
    "validation_correlation": "rises from 0 towards 1",
    "validation_slope": "near 1 with the regression objective",
    "validation_best": "clearly above one in as many as there are answers, which is chance",
    "validation_margin": "rises from 0",
    "validation_chosen": "falls less than that of the others; far below 0, answers become others altogether",
    "validation_calibration_error": "below 0.1",
}


def show(key: str, value: float) -> str:
    """A metric as `label value`."""
    metric = BY_KEY[key]
    return f"{metric.label} {value:{metric.form}}"


def by_present_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl, one of an earlier version too, by the keys of this one."""
    return {_EARLIER.get(key, key): value for key, value in row.items()}


_EARLIER = {"reward": "total_reward"}  # until 0.2.0
