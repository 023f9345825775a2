"""Conversations as other tools write them, as messages with "role" and "content"."""

import re
from collections.abc import Mapping
from typing import Any

from mlx_ppo.data.chat import Messages

Row = dict[str, Any]
_HH = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


class UnusableError(ValueError):
    """A row isn't as its layout has it; the message has no place, which the reader adds."""


def is_turns(value: object) -> bool:
    """Whether a value is a list of messages, by "role" and "content" or by ShareGPT's "from" and "value"."""
    return isinstance(value, list) and bool(value) and all(_is_turn(item) for item in value)


def _is_turn(item: object) -> bool:
    return isinstance(item, dict) and ("role" in item or "from" in item)


def turns(value: Any, name: str) -> Messages:
    """Messages of either form.

    Raises:
        UnusableError: it is no such list, or a message has an unknown role or no text.
    """
    if not is_turns(value):
        raise UnusableError(f"'{name}' must be a list of messages with 'role' and 'content' (or 'from' and 'value')")
    return [turn(item, f"'{name}' message {count}") for count, item in enumerate(value, start=1)]


def turn(item: Mapping[str, Any], where: str) -> dict[str, str]:
    """One message."""
    role, text = item.get("role", item.get("from")), item.get("content", item.get("value"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise UnusableError(f"{where} has the role {str(role)[:40]!r}, which no chat template takes; remove the row")
    if not isinstance(text, str):
        raise UnusableError(f"{where} has no text; remove the row")
    return {"role": known, "content": text}


def is_hh(text: object) -> bool:
    """Whether a text is a dialogue as Anthropic's HH writes it."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def hh_turns(text: str) -> Messages:
    """The messages of such a dialogue, without the spaces around each."""
    parts = _HH.split(text)[1:]
    return [
        {"role": _ROLES[role.lower()], "content": said.strip()}
        for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def pair_of_chats(chosen: Messages, rejected: Messages) -> Row:
    """A pair from two conversations that are the same but for their last answers.

    Raises:
        UnusableError: they part earlier, end otherwise, or don't differ.
    """
    if chosen == rejected:
        raise UnusableError("'chosen' and 'rejected' are the same; remove the row")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("'chosen' and 'rejected' part before their last message; only that may differ")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise UnusableError("'chosen' and 'rejected' must end with an assistant's message")
    if len(chosen) < 2:
        raise UnusableError("there is no prompt before the answers; add it")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def asked(*messages: tuple[str, Any]) -> Messages:
    """A prompt of messages (role, text), without those that have no text."""
    return [{"role": role, "content": text} for role, text in messages if isinstance(text, str) and text.strip()]


def text(row: Row, name: str) -> str:
    """A field's string, or UnusableError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UnusableError(f"'{name}' must be a text")
    return value


def strings(row: Row, *names: str) -> bool:
    """Whether the row has a text under each of the names."""
    return all(isinstance(row.get(name), str) for name in names)


def without_answer(messages: Messages) -> Messages:
    """A conversation up to its last answer, if it ends with one."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
