"""The health rules, one for each way in which PPO goes wrong, on the last rows of metrics.jsonl.

A rule compares the mean of the last rows with that of the rows before the policy's first step. It says how bad it is
as a number that reaches 1 where a person should know.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import variance
from typing import NamedTuple

from mlx_ppo.config.health import HealthSection

Row = Mapping[str, float]

RECENT, LONG = 4, 8  # iterations that a rule looks at: what may be chance of one, and what is slow
FLAT = 16  # iterations whose mean objective is compared with that of as many before them

ENTROPY_LEFT = 0.25  # of that at the start
NEGATIVE = 0.02  # nats a token below 0, in every one of the recent iterations
FINISHED = 0.05
REPEATED = 0.3  # more than at the start
DISTINCT_LEFT = 0.5  # of that at the start
BEYOND = 0.25
APART = 0.3  # deviations of the score up, of the judge down; more where few responses make chance larger
EXPLAINED = 0.01
CLIPPED, OLD, EFFECTIVE = 0.4, 0.2, 0.5  # clipped tokens, nats a token from the policy that sampled, effective samples
NORMS = 10.0  # times optimizer.gradient_clip
SIGNAL = 0.1
OFF_TARGET = 1.5  # times kl.target
RISING = 0.5  # standard errors: a run that still rises by one in as many iterations isn't called flat by chance
ENDING = 2 / 3  # of the learning rate of the FLAT iterations before: the schedule ends, and with it what a run gains


class Reading(NamedTuple):
    """What a rule sees: 1 and above is unhealthy."""

    severity: float
    key: str
    sentence: str


class Facts(NamedTuple):
    """What the rules need to know of a run."""

    section: HealthSection
    warmup: int  # first iterations without a step of the policy
    responses: int  # an iteration
    gradient_clip: float
    target: float | None  # of an adaptive KL controller
    judges: tuple[str, ...]  # sources that score without a weight


HEALTHY = Reading(0.0, "", "")


class View(NamedTuple):
    """What a rule looks at."""

    facts: Facts
    start: Row  # means before the policy's first step
    rows: tuple[Row, ...]  # the last 2 FLAT after it

    def now(self, key: str) -> float:
        """Mean of the recent rows."""
        return mean(self.rows[-RECENT:], key)

    def long(self, key: str) -> list[float] | None:
        """Each of the last LONG rows; None before there are so many."""
        return self._last(LONG, key)

    def flat(self, key: str) -> tuple[list[float], list[float]] | None:
        """Each of the last FLAT rows, and each of as many before them; None before there are so many."""
        both = self._last(2 * FLAT, key)
        return None if both is None else (both[FLAT:], both[:FLAT])

    def _last(self, count: int, key: str) -> list[float] | None:
        return [row[key] for row in self.rows[-count:]] if len(self.rows) >= count else None


def mean(rows: Iterable[Row], key: str) -> float:
    """Of a column."""
    values = [row[key] for row in rows]
    return math.fsum(values) / len(values)


def _entropy(view: View) -> Reading:
    was, now = view.start["entropy"], view.now("entropy")
    return Reading(
        ENTROPY_LEFT * was / max(now, 1e-3),
        "kl.coef",
        f"entropy fell from {was:.2f} to {now:.2f} nats a token: the policy writes nearly the same every time; raise "
        "kl.coef or ppo.entropy_coef, or lower optimizer.learning_rate",
    )


def _kl(view: View) -> Reading:
    kl, tokens = view.now("kl"), max(view.now("length"), 1.0)
    below = [row["kl"] / max(row["length"], 1.0) for row in view.rows[-RECENT:]]
    if max(below) < -NEGATIVE:
        return Reading(
            -kl / tokens / NEGATIVE,
            "rollout.kv_cache",
            f"KL is {kl:.2f} nats a sequence and stays below 0, which no distribution has: responses aren't sampled "
            "from the policy that is scored; set rollout.kv_cache = 'full' or model.dtype = 'float32'",
        )
    return Reading(
        kl / tokens / view.facts.section.kl_limit,
        "kl.coef",
        f"KL ran away to {kl:.1f} nats a sequence, {kl / tokens:.2f} a token: the policy has left the reference; raise "
        "kl.coef or lower optimizer.learning_rate",
    )


def _length(view: View) -> Reading:
    was, now = max(view.start["length"], 1.0), max(view.now("length"), 1.0)
    longer = now > was
    mend = "set score.overlong_buffer" if longer else "raise kl.coef"
    return Reading(
        (now / was if longer else was / now) / view.facts.section.length_factor,
        "score.overlong_buffer" if longer else "kl.coef",
        f"responses went from {was:.0f} to {now:.0f} tokens: the reward pays for length, not only for what is said; "
        f"if that isn't meant, {mend}, or change the reward",
    )


def _unfinished(view: View) -> Reading:
    was, now = view.start["finished"], view.now("finished")
    always = was < FINISHED
    mend = "raise rollout.max_tokens" if always else "set score.truncated = 'subtract', or raise kl.coef"
    return Reading(
        FINISHED / max(now, 1e-2) if now < FINISHED else 0.0,
        "rollout.max_tokens" if always else "score.truncated",
        f"{now:.0%} of the responses end by themselves" + ("" if always else f", {was:.0%} did at first") + f"; {mend}",
    )


def _repetition(view: View) -> Reading:
    was, now = view.start["repetition"], view.now("repetition")
    return Reading(
        (now - was) / REPEATED,
        "kl.coef",
        f"responses repeat themselves: {now:.0%} of their 4-grams were there before, {was:.0%} at first; raise kl.coef "
        "or lower optimizer.learning_rate, and look at the samples",
    )


def _diversity(view: View) -> Reading:
    was, now = view.start["distinct_2"], view.now("distinct_2")
    return Reading(
        DISTINCT_LEFT * was / max(now, 1e-4),
        "kl.coef",
        f"responses become alike: {now:.0%} of their pairs of tokens are different ones, {was:.0%} at first; raise "
        "kl.coef or ppo.entropy_coef",
    )


def _beyond(view: View) -> Reading:
    shares = {key.partition("/")[2]: view.now(key) for key in view.start if key.startswith("beyond/")}
    if not shares:
        return HEALTHY
    name = max(shares, key=lambda source: shares[source])
    return Reading(
        shares[name] / BEYOND,
        "kl.coef",
        f"{shares[name]:.0%} of the responses score above everything that {name} saw in its training, where it only "
        "guesses; raise kl.coef, or rate such responses and train it again",
    )


def _judge(view: View) -> Reading:
    worst = HEALTHY
    chance = 3 * math.sqrt(1 / view.facts.responses + 1 / (view.facts.responses * len(view.rows[-RECENT:])))
    apart = max(APART, chance)
    up = (view.now("score") - view.start["score"]) / max(view.start["score_deviation"], 1e-6) / apart
    for name in view.facts.judges:
        was, now = view.start[f"score/{name}"], view.now(f"score/{name}")
        down = (was - now) / max(view.start[f"deviation/{name}"], 1e-6) / apart
        if min(up, down) > worst.severity:
            worst = Reading(
                min(up, down),
                "kl.coef",
                f"the score rises while {name}, which isn't trained for, fell from {was:.2f} to {now:.2f}: the policy "
                "exploits the reward; raise kl.coef, or improve the reward",
            )
    return worst


def _critic(view: View) -> Reading:
    explained = view.long("explained_variance")
    if explained is None or view.now("signal") == 0:
        return HEALTHY
    return Reading(
        2.0 - max(explained) / EXPLAINED if max(explained) < EXPLAINED else 0.0,
        "critic.learning_rate",
        f"the critic explains nothing of the returns ({view.now('explained_variance'):+.2f}) for {LONG} iterations; "
        "change critic.learning_rate or raise critic.warmup_iterations",
    )


def _ratio(view: View) -> Reading:
    clipped, old, effective = (
        view.now("clip_low") + view.now("clip_high"),
        view.now("kl_old"),
        view.now("effective_samples"),
    )
    return Reading(
        max(clipped / CLIPPED, old / OLD, (1 - effective) / (1 - EFFECTIVE)),
        "optimizer.learning_rate",
        f"an update moves too far from the policy that sampled ({clipped:.0%} of the tokens clipped, {old:.2f} nats a "
        f"token, effective samples {effective:.0%}); lower optimizer.learning_rate or ppo.epochs",
    )


def _gradient(view: View) -> Reading:
    worst = HEALTHY
    for who in ("policy", "critic"):
        norms, clip = view.long(f"{who}_norm") if f"{who}_norm" in view.rows[-1] else None, view.facts.gradient_clip
        if norms is not None and min(norms) / (NORMS * clip) > worst.severity:
            worst = Reading(
                min(norms) / (NORMS * clip),
                "optimizer.gradient_clip",
                f"the gradient of the {who} is always clipped: its norm is {view.now(f'{who}_norm'):.3g}, "
                "optimizer.gradient_clip is " + f"{clip:g}; raise that, or make the scores smaller ([[reward]] weight)",
            )
    return worst


def _signal(view: View) -> Reading:
    return Reading(
        2.0 - view.now("signal") / SIGNAL if view.now("signal") < SIGNAL else 0.0,
        "reward",
        f"there is no signal: scores that are compared are equal (deviation {view.now('score_deviation'):.2g}); change "
        "the [[reward]], or take more and harder prompts (rollout.prompts, rollout.samples_per_prompt)",
    )


def _controller(view: View) -> Reading:
    target, kl = view.facts.target, view.long("kl")
    if target is None or kl is None:
        return HEALTHY
    falling = sum(kl[LONG // 2 :]) < 0.8 * sum(kl[: LONG // 2])
    return Reading(
        0.0 if falling else min(kl) / (OFF_TARGET * target),
        "kl.horizon",
        f"KL stays at {view.now('kl'):.1f} nats a sequence, above kl.target = {target:g}, and kl.coef, now "
        f"{view.rows[-1]['kl_coef']:.3g}, doesn't bring it back; lower kl.horizon or optimizer.learning_rate",
    )


def _plateau(view: View) -> Reading:
    both, rates = view.flat("total_reward"), view.flat("learning_rate")
    if (
        both is None or rates is None or view.facts.target is not None
    ):  # an adaptive penalty is another objective in every iteration
        return HEALTHY
    if math.fsum(rates[0]) < ENDING * math.fsum(rates[1]):
        return HEALTHY
    (now, spread), (was, before) = ((math.fsum(part) / FLAT, variance(part)) for part in both)
    error = math.sqrt((spread + before) / FLAT) + 1e-9
    return Reading(
        max(1.0, (was - now) / error / 2) if now - was < RISING * error else 0.0,
        "run.iterations",
        f"score less KL penalty, the run's aim, doesn't rise any more: {now:.3f} in the last {FLAT} iterations, "
        f"{was:.3f} in the {FLAT} before, where chance is {error:.3f}; lower run.iterations, or change "
        "optimizer.learning_rate, rollout.prompts or kl.coef (`mlx-ppo frontier` says what is left to gain)",
    )


RULES: Mapping[str, Callable[[View], Reading]] = {
    "entropy": _entropy,
    "kl": _kl,
    "length": _length,
    "unfinished": _unfinished,
    "repetition": _repetition,
    "diversity": _diversity,
    "beyond": _beyond,
    "judge": _judge,
    "critic": _critic,
    "ratio": _ratio,
    "gradient": _gradient,
    "signal": _signal,
    "controller": _controller,
    "plateau": _plateau,
}
