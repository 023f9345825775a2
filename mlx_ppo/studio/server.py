"""The server of the page: one process on the loopback address, which computes nothing itself."""

import json
import secrets
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_ppo.errors import RunError, UserError, printable
from mlx_ppo.files import parse_json
from mlx_ppo.runtime.system import has_screen
from mlx_ppo.studio.labels import AnsweredError
from mlx_ppo.studio.security import LOOPBACK, Address, Guard

STATIC = Path(__file__).with_name("static")
PAGES = ("/", "/label", "/watch/{run:path}", "/compare")  # one file; its script looks at the address
_CLOSING_SECONDS = 2
_LARGEST = 1 << 24  # bytes that a request may bring


def application(address: Address, routes: Sequence[BaseRoute]) -> Starlette:
    """The pages, the files they need, and what these ask for.

    Args:
        address: where this will listen, and its token.
        routes: beside the pages; those under `/api` answer with JSON.
    """
    pages = [Route(path, _page) for path in PAGES]
    return Starlette(
        routes=[*pages, Mount("/static", StaticFiles(directory=STATIC)), *routes],
        middleware=[Middleware(Guard, address=address)],
        exception_handlers={UserError: _user_error, OSError: _system_error, HTTPException: _not_here},
    )


def _page(_: Request) -> Response:
    return FileResponse(STATIC / "page.html")


async def _user_error(_: Request, error: Exception) -> Response:
    answered = isinstance(error, AnsweredError)
    said = "\n".join(map(printable, str(error).split("\n")))
    return Answer({"error": said, "answered": answered}, 409 if answered else 400)


async def _system_error(_: Request, error: Exception) -> Response:
    """What the system refuses where nobody expected it, such as a name that is too long."""
    assert isinstance(error, OSError)
    place = "" if error.filename is None else f"{error.filename}: "
    return Answer({"error": printable(f"{place[:200]}{error.strerror or error}"), "answered": False}, 400)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/api/"):
        return Answer({"error": error.detail, "answered": False}, error.status_code, error.headers)
    return PlainTextResponse(error.detail, error.status_code, error.headers)


class Answer(JSONResponse):
    """JSON in ASCII: a text may have half of a character, which no other encoding takes."""

    def render(self, content: Any) -> bytes:
        """The bytes of a value."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


async def body(request: Request) -> dict[str, object]:
    """The JSON object that a request brings.

    Raises:
        RunError: it brings something else.
    """
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _LARGEST:
            raise RunError(f"that is more than {_LARGEST >> 20} MB; name a file on this machine instead")
    try:
        value = parse_json(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError("the page sent something that isn't a JSON object; reload it")
    return value


def listen(port: int) -> socket.socket:
    """A socket on the loopback address.

    Args:
        port: 0 for any that is free.
    Raises:
        RunError: the port is taken, or may not be used.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((LOOPBACK, port))
        made.listen(64)
    except OSError as error:
        made.close()
        raise RunError(f"port {port}: cannot be used ({error.strerror}); choose another with --port") from None
    return made


@contextmanager
def _on_interrupt(end: Callable[..., None]) -> Iterator[None]:
    """What Ctrl-C does, from before the address is told on; an exception could come where it is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(
    routes: Sequence[BaseRoute],
    path: str,
    *,
    port: int,
    show: bool,
    say: Callable[[str], None],
    query: dict[str, str] | None = None,
) -> None:
    """Serve until Ctrl-C.

    Args:
        routes: see `application`.
        path: the page that is opened.
        port: 0 for any that is free.
        show: open the page in a browser, if there is a screen.
        say: told the address.
        query: of the page that is opened.
    """
    held = listen(port)
    address = Address(held.getsockname()[1], secrets.token_urlsafe(32), secrets.token_urlsafe(32))
    rest = f"&{urlencode(query)}" if query else ""
    server = uvicorn.Server(
        uvicorn.Config(
            application(address, routes),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
    )

    def end(*_: object) -> None:
        server.should_exit = True

    with held, _on_interrupt(end):
        say(f"{address.url(path)}{rest}\nCtrl-C ends the page; jobs go on")
        if show and has_screen():
            webbrowser.open(address.url(path, once=True) + rest)
        server.run(sockets=[held])
