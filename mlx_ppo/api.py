"""What programs may use: train a policy, load one, let it write, score texts. The other modules may change."""

import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_ppo
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import RolloutSection, TrainConfig
from mlx_ppo.data.chat import Messages
from mlx_ppo.data.jsonl import Record
from mlx_ppo.data.sequences import answered_tokens, prompt_field, prompt_tokens
from mlx_ppo.errors import UnhealthyError
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.heads import load_reward_model as _load_reward_model
from mlx_ppo.reporting import Reporter
from mlx_ppo.runs.callbacks import Callback
from mlx_ppo.runs.folder import Run, create_run
from mlx_ppo.runs.provenance import device, engine
from mlx_ppo.runs.targets import Target as Policy
from mlx_ppo.runs.targets import load_target
from mlx_ppo.runtime.allocator import keeping_buffers
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.rollout import Asked, Sampling, distribution_of
from mlx_ppo.stages.rollout import generate as _generate
from mlx_ppo.tokenizers.load import completion_text
from mlx_ppo.train import train

__all__ = [
    "Callback", "Policy", "RewardModel", "generate", "load_policy", "load_reward_model", "score", "train_policy",
]  # fmt: skip

_TOKENS = 64
_ROWS = 64  # decoded together


class _Messages:
    """A reporter that writes information and warnings to standard error, and nothing else."""

    def message(self, text: str) -> None:
        print(text, file=sys.stderr)

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        pass

    def tokens(self, count: int) -> None:
        pass

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        pass


def train_policy(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    reporter: Reporter | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train a policy in this process, as `mlx-ppo train` does in a child process.

    Signals are left alone: an interruption leaves the last checkpoint, from which `mlx-ppo resume` goes on.

    Args:
        config: a TOML file.
        overrides: `section.key=value`, as with `--set`.
        reporter: is told what a person would see; by default information and warnings go to standard error.
        callbacks: follow the run, see `Callback`.
    Returns:
        The new run's folder.
    Raises:
        ConfigError, DataError, ModelError, RunError: of `mlx_ppo.errors`; each says in a line what to change.
        UnhealthyError: a health rule ended the run; it is saved.
    """
    settings = read_config(TrainConfig, Path(config), overrides)
    folder = create_run(settings, settings.run.folder, settings.run.name)
    told = reporter or _Messages()
    if mlx_ppo.BLAS.problem:
        told.message(f"warning: {mlx_ppo.BLAS.problem}")
    with Run(folder) as run, keeping_buffers():
        run.note(device=device(), engine=engine())
        stopped = train(settings, run, told, Interrupts(), callbacks).stopped
    if stopped is not None:
        raise UnhealthyError(f"{folder}: stopped by health.{stopped.rule}, saved: {stopped.sentence}")
    return folder


def load_policy(path: str | Path) -> Policy:
    """Load a model that writes.

    Args:
        path: a model folder, a run (of `train`: its newest checkpoint), or one checkpoint of a run.
    Raises:
        ModelError, RunError: there is nothing to write with, or it is damaged.
    """
    return load_target(Path(path))


def generate(
    policy: Policy,
    prompts: Sequence[str | Messages],
    *,
    samples: int = 1,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    **bounds: float,
) -> list[list[str]]:
    """Sample completions.

    Args:
        policy: from `load_policy`.
        prompts: texts, or chats, `[{"role": "user", "content": "..."}]`, which the model's template renders.
        samples: completions of each prompt.
        max_tokens: bound on a completion; None: that of the policy's run, 64 without one.
        temperature: None: that of the policy's run, 1 without one; 0 takes the most probable token.
        seed: the same one gives the same completions.
        bounds: `top_k`, `top_p`, `min_p`, with the meaning and the range of the keys of `[rollout]`; those that aren't
            given are those of the policy's run.
    Returns:
        For each prompt its completions.
    Raises:
        DataError: a prompt can't be read; it is named by its number.
        ValueError: a bound is out of range.
        TypeError: there is no such bound.
    """
    rollout = policy.config.rollout if isinstance(policy.config, TrainConfig) else None
    drawn = distribution_of(rollout if rollout is not None else RolloutSection()).changed(
        bounds if temperature is None else {"temperature": temperature, **bounds}
    )
    if max_tokens is None:
        max_tokens = rollout.max_tokens if rollout is not None else _TOKENS
    tokenizer = policy.trunk.tokenizer
    records = [_record(number, prompt) for number, prompt in enumerate(prompts, start=1)]
    asked = Asked(
        [tuple(prompt_tokens(prompt_field(record, "prompt"), tokenizer, record.where)) for record in records],
        positions=range(len(records)),
        records=[record.fields for record in records],
    )
    how = Sampling((seed, "sample"), max_tokens, samples_per_prompt=samples, batch_size=_ROWS, supports=False)
    how = how._replace(**drawn._asdict())
    found = _generate(policy.trunk, policy.weights, asked, how)
    rows = zip(found.prompts, found.responses, strict=True)
    texts = [completion_text(tokenizer, prompt, response) for prompt, response in rows]
    return [texts[first : first + samples] for first in range(0, len(texts), samples)]


def load_reward_model(path: str | Path, policy: Policy | None = None) -> RewardModel:
    """Load a reward model.

    Args:
        path: a folder that `mlx-ppo reward` wrote, or a sequence classifier with one label.
        policy: the model whose weights a reward model of kind "adapters" lies on.
    Raises:
        ModelError: it is damaged, or lies on other weights.
    """
    return _load_reward_model(Path(path), policy.trunk if policy is not None else None)


def score(model: RewardModel, prompts: Sequence[str | Messages], completions: Sequence[str]) -> list[float]:
    """Normalised scores (mean 0, deviation 1 over the reward model's own training texts) of finished answers.

    Raises:
        DataError: a prompt can't be read; it is named by its number.
        ValueError: there aren't as many prompts as completions.
    """
    tokenizer, rows = model.trunk.tokenizer, []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        record = _record(number, prompt)
        asked = prompt_field(record, "prompt")
        prefix = prompt_tokens(asked, tokenizer, record.where)
        rows.append(tuple(answered_tokens(asked, prefix, completion, tokenizer, record.where)[0]))
    raw = model.of_texts(rows).mean(axis=0)
    return [float(value) for value in (raw - model.facts.mean) / model.facts.deviation]


def _record(number: int, prompt: str | Messages) -> Record:
    return Record(Path("prompts"), number, {"prompt": prompt})
