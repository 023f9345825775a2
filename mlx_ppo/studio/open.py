"""What the commands that open a page have in common."""

import os
from collections.abc import Callable
from pathlib import Path

from starlette.routing import BaseRoute

from mlx_ppo.errors import RunError
from mlx_ppo.studio import api, watch
from mlx_ppo.studio.api import Studio
from mlx_ppo.studio.server import serve


def open_page(folder: Path, path: str, *, port: int, show: bool, say: Callable[[str], None]) -> None:
    """Serve a project's pages until Ctrl-C, and open one of them.

    Args:
        folder: the project's; made where it is missing.
        path: the page's, such as `/label`.
        port: 0 for any that is free.
        show: open it in a browser, if there is a screen.
        say: told the address.
    Raises:
        RunError: the folder can't be made, or the port is taken.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: can't be made ({error.strerror}); name another folder") from None
    serve(_routes(Path(os.path.realpath(folder))), path, port=port, show=show, say=say)


def _routes(folder: Path) -> list[BaseRoute]:
    """What every part of the page asks for; each part has a function `routes(folder)`."""
    return [*api.routes(Studio(folder)), *watch.routes(folder)]
