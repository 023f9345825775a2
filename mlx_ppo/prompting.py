"""What a run is asked: its prompts from its files, and those of an iteration."""

from typing import Any, Protocol

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt, PromptSet, PromptStream, load_prompts, shared_prompts
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.stages.rollout import Asked
from mlx_ppo.tokenizers.load import load_tokenizer


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """The policy's tokenizer, before its weights are loaded.

    Raises:
        ModelError: the model folder is damaged.
    """
    return load_tokenizer(config.model.path, check_model_folder(config.model.path).config)


def asked_for(stream: PromptStream, cursor: int, count: int) -> tuple[list[Prompt], Asked]:
    """The prompts of the iteration that begins at a cursor."""
    prompts = [prompt for _, prompt in stream.take(cursor, count)]
    positions = range(cursor, cursor + len(prompts))
    return prompts, Asked([prompt.tokens for prompt in prompts], positions, [prompt.record for prompt in prompts])


class Messages(Protocol):
    """Where one line of information or warning goes."""

    def message(self, text: str) -> None:
        """One line."""


def load_data(config: TrainConfig, tokenizer: Tokenizer, reporter: Messages) -> tuple[PromptSet, tuple[Prompt, ...]]:
    """Training prompts, and the ones for evaluations."""
    section = config.data
    limits: dict[str, Any] = {
        "max_tokens": section.max_prompt_tokens,
        "overlong": section.overlong,
        "columns": section.columns,
    }
    data = load_prompts(section.prompts, tokenizer, **limits)
    held_out = data if section.eval_prompts is None else load_prompts(section.eval_prompts, tokenizer, **limits)
    for prompts, path in ((data, section.prompts), (held_out, section.eval_prompts)):
        if path is not None and prompts.said:
            reporter.message(prompts.said)
        if path is not None and (prompts.dropped or prompts.truncated):
            reporter.message(
                f"{path.name}: {prompts.dropped} overlong prompts dropped, {prompts.truncated} truncated "
                f"(max_prompt_tokens = {section.max_prompt_tokens})"
            )
    chosen = held_out.prompts[: section.eval_count]
    shared = shared_prompts(data.prompts, chosen) if section.eval_prompts is not None else 0
    if shared:
        reporter.message(f"warning: {shared} of the {len(chosen)} evaluation prompts are also training prompts")
    return data, chosen
