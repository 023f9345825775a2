"""Conversations: lists of {"role", "content"} in an order that every chat template takes."""

from typing import Literal

from mlx_ppo.data.jsonl import Record, kind
from mlx_ppo.errors import DataError

Messages = list[dict[str, str]]


def conversation(record: Record, name: str, *, last: Literal["user", "assistant"]) -> Messages:
    """The field's messages: an optional system message, then user and assistant in turn, up to one by `last`.

    Keys of a message other than "role" and "content" are left out.

    Raises:
        DataError: something else than such a list, or a user message without text.
    """
    value, where = record.fields[name], f"{record.where}: '{name}'"
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of messages, not {kind(value)}; write [{{'role': …, 'content': …}}]")
    if not value:
        raise DataError(f"{where} has no messages; add one or remove the line")
    messages = [_message(item, f"{where} message {count}") for count, item in enumerate(value, start=1)]
    offset = 1 if messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[offset:]):
        _check_turn(message, ("user", "assistant")[index % 2], f"{where} message {offset + index + 1}")
    ends = messages[-1]["role"]
    if ends != last:
        mend = (
            "remove that answer: a prompt ends before it"
            if ends == "assistant"
            else f"add the {last}'s message or remove the line"
        )
        raise DataError(f"{where} ends with role '{ends}' where the last must be '{last}'; {mend}")
    return messages


def _message(item: object, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise DataError(f"{where} must be an object with 'role' and 'content', not {kind(item)}")
    for key in ("role", "content"):
        if key not in item:
            raise DataError(f"{where} has no '{key}'; give every message a 'role' and a 'content'")
        if not isinstance(item[key], str):
            raise DataError(
                f"{where} has {kind(item[key])} as its '{key}'; it must be a string"
                + (" (an answer that only calls a tool has none); remove the line" if item[key] is None else "")
            )
    return {"role": item["role"], "content": item["content"]}


def _check_turn(message: dict[str, str], expected: str, where: str) -> None:
    role = message["role"]
    if role != expected:
        raise DataError(
            f"{where} has role {role[:40]!r} where '{expected}' must come; "
            "the order is system (first only, optional), then user and assistant in turn"
        )
    if role == "user" and not message["content"].strip():
        raise DataError(f"{where} is empty; give the user's message a text or remove the line")
