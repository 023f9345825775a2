"""The worker file of a process that follows: it does what the leader does, on its part of the rows."""

import json
import os
from contextlib import suppress
from typing import Any


def serve(requests: int, answers: int, arguments: list[str]) -> None:
    """Work until the leader ends.

    Args:
        requests: a line lets this process go on.
        answers: a line says that it has arrived where all meet, or what went wrong.
        arguments: the order, see `runtime.local_group`.
    """
    order = json.loads(arguments[0])
    try:
        _work(order, requests, answers)
    except BaseException as error:
        said = str(error) if _is_told(error) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(answers, json.dumps({"failed": said[:10_000]}).encode() + b"\n")
    os._exit(0)  # whatever threads still do


def _work(order: dict[str, Any], requests: int, answers: int) -> None:
    from pathlib import Path

    from mlx_ppo import writing
    from mlx_ppo.bench import sharing
    from mlx_ppo.following import follow
    from mlx_ppo.runs.folder import open_config
    from mlx_ppo.runtime.allocator import keeping_buffers
    from mlx_ppo.runtime.local_group import followed

    group = followed(order, requests, answers)
    with keeping_buffers():
        if "trial" in order:
            sharing.answer(group)
        elif "folder" in order:
            follow(open_config(Path(order["folder"])), group)
        else:
            writing.follow(group)


def _is_told(error: BaseException) -> bool:
    from mlx_ppo.errors import UserError

    return isinstance(error, UserError)
