"""The keys of scores: where they come from, and what happens to them before they are rewards."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_ppo.config.fields import Count, CountOrZero, InputPath, NonNegative, Positive, Section, Share

RUBRIC = "How good is the completion: is it correct, helpful and well written?"
Rule = Literal["exact", "number", "regex", "length", "format", "json", "math", "code"]


class RewardSource(Section):
    """One source of scores; several are added by weight."""

    kind: Literal["model", "function", "rule", "judge"] = Field(
        description="a reward model's folder, a Python function, a rule, or a model that another program serves"
    )
    path: InputPath | None = Field(None, description="folder written by `mlx-ppo reward` (kind = model)")
    function: str | None = Field(
        None,
        description="`file.py:name` (kind = function), run in a process of its own; its parameters get lists by their "
        "names: `prompts`, `completions`, `records` (the prompts' JSON objects), or a field of these",
    )
    weight: float = Field(1.0, description="factor on the source's score; 0: it only judges, see `health.judge`")
    gate: bool = Field(
        False, description="where this function or rule gives 0, the score is 0 whatever the others give"
    )
    timeout: Positive = Field(60.0, description="seconds that a call of the function or a question to a judge may take")
    rule: Rule | None = Field(
        None, description="what is checked of a completion, 1 or 0 (kind = rule, as all down to `limit`)"
    )
    field: str = Field("answer", description="field of the prompts with what is right, or a list of it, for the rule")
    pattern: str | None = Field(None, description="regex: what is sought; others: read what its last match holds")
    tolerance: NonNegative = Field(0.0, description="number: how far from the right one counts as equal")
    unit: Literal["words", "characters", "lines"] = Field("words", description="length: what is counted")
    least: CountOrZero = Field(0, description="length: fewest")
    most: CountOrZero = Field(0, description="length: most; 0: no bound")
    tags: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        ("think", "answer"), description="format: `<think>...</think>`, then `<answer>...</answer>`, and nothing else"
    )
    json_schema: InputPath | None = Field(None, description="json: file of a JSON Schema; without: any JSON will do")
    limit: Positive = Field(2.0, description="seconds for a completion; one that takes longer scores 0 and is counted")
    address: str | None = Field(
        None,
        description="of a server on this machine that speaks OpenAI's protocol, such as `http://127.0.0.1:8080/v1` "
        "(kind = judge, as all below)",
    )
    model: str | None = Field(None, description="the judge's name, as its server knows it")
    key_env: str | None = Field(
        None,
        description="name of the environment variable with the key that the server asks for; the key itself is written "
        "nowhere",
    )
    mode: Literal["pointwise", "pairwise", "groupwise"] = Field(
        "pointwise",
        description="what the judge is asked: to grade each completion, which of two of a prompt's completions is "
        "better, for all pairs in both orders, or to rank all of them at once",
    )
    rubric: str = Field(RUBRIC, description="what is good, in words to the judge")
    scale: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.0, 10.0), description="pointwise: the worst and the best grade; they become scores of 0 and 1"
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="how often a question is asked again that got no usable answer"
    )
    answer_tokens: Count = Field(256, description="bound on the tokens of an answer")
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(4, description="questions asked at the same time")
    unusable: Share = Field(
        0.2, description="share of a rollout's questions without a usable answer above which the run saves and stops"
    )


class ScoreSection(Section):
    """What happens to a response's score before it becomes a reward."""

    combine: Literal["sum", "worst", "cautious"] = Field(
        "sum",
        description="of the weighted sources: their sum, the lowest, or the mean less `caution` deviations "
        "(an ensemble's disagreement)",
    )
    caution: NonNegative = Field(1.0, description="deviations subtracted with combine = cautious")
    clip: NonNegative = Field(0.0, description="bound on the absolute score; 0: none")
    truncated: Literal["none", "replace", "subtract"] = Field(
        "none", description="treatment of responses cut by max_tokens"
    )
    truncated_value: float = Field(1.0, description="the score put in place, or what is subtracted")
    overlong_buffer: CountOrZero = Field(
        0, description="last tokens before max_tokens over which a penalty grows to -1; 0: none"
    )
    batch_size: CountOrZero = Field(
        0, description="sequences scored together; 0: up to 32, as the memory budget allows. Changes speed and memory"
    )
