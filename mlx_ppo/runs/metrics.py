"""Every number that a PPO run logs, defined once, with the sentence that explains it to a person."""

from typing import NamedTuple


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
    Metric("reward", "total reward", "+.3f", "mean score minus the KL penalty: what the policy maximises"),
    Metric("kl", "KL", ".2f", "nats a sequence from the reference; the price paid for the score"),
    Metric("kl_token", "KL/token", ".4f", "nats a token from the reference (k3 estimate)"),
    Metric("kl_coef", "KL coef", ".4f", "factor on the KL inside the reward"),
    Metric("entropy", "entropy", ".2f", "nats a token of the policy's distribution; falling towards 0 means collapse"),
    Metric("length", "length", ".1f", "mean response tokens"),
    Metric("finished", "finished", ".0%", "share of responses that ended by themselves"),
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


def show(key: str, value: float) -> str:
    """A metric as `label value`."""
    metric = BY_KEY[key]
    return f"{metric.label} {value:{metric.form}}"
