"""The page that follows runs: what it shows at first, and server-sent events with what comes."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from mlx_ppo.errors import ConfigError
from mlx_ppo.studio.runs import RunReader, names, page_document
from mlx_ppo.studio.server import Answer, serve
from mlx_ppo.studio.texts import completions

POLL_SECONDS = 0.5
BEAT_SECONDS = 15.0  # at most between two signs of life
_MOST = 6  # runs on a page

Find = Callable[[str], Path]


class Tail:
    """A run that is followed, once for all pages that show it, as long as there are any."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet.

        Raises:
            UserError: the folder isn't a run.
        """
        self.reader = RunReader(folder)
        self.lock = threading.Lock()
        self.changed = asyncio.Event()  # set once, at the next change; then another takes its place
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None

    def join(self) -> None:
        """A page listens."""
        self._listeners += 1
        if self._task is None:
            self._task = asyncio.create_task(self._follow())

    def leave(self) -> None:
        """A page doesn't listen any more."""
        self._listeners -= 1
        if not self._listeners and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _follow(self) -> None:
        seen: object = None
        while True:
            now = await run_in_threadpool(self._look)
            if now != seen:
                seen, changed, self.changed = now, self.changed, asyncio.Event()
                changed.set()
            await asyncio.sleep(POLL_SECONDS)

    def _look(self) -> object:
        with self.lock:
            self.reader.update()
            return self.reader.place, self.reader.state()["state"]

    def since(self, place: str) -> tuple[str, dict[str, Any] | None]:
        """The place now, and what has come, see `RunReader.since`."""
        with self.lock:
            return self.reader.place, self.reader.since(place)


class Watch:
    """Answers what the page asks."""

    def __init__(self, find: Find, tails: Sequence[Tail] = ()) -> None:
        """Where runs are: `find` gives the folder of a run by the name that the page has for it.

        `tails`: runs that were read before; then there is no project, and no other page.
        """
        self._alone = bool(tails)
        self._find = find
        self._tails: dict[Path, Tail] = {tail.reader.folder: tail for tail in tails}

    def routes(self) -> list[BaseRoute]:
        """Addresses under `/api/watch`."""
        return [
            Route("/api/watch", self._page),
            Route("/api/watch/events", self._events),
            Route("/api/watch/completions", self._completions),
        ]

    def _asked(self, request: Request) -> list[Tail]:
        asked = request.query_params.getlist("run")
        if not 0 < len(asked) <= _MOST:
            raise ConfigError(f"a page shows 1 to {_MOST} runs, not {len(asked)}")
        folders = [self._find(name) for name in asked]
        return [self._tails.get(folder) or self._tails.setdefault(folder, Tail(folder)) for folder in folders]

    async def _page(self, request: Request) -> Response:
        tails = self._asked(request)

        def read() -> dict[str, Any]:
            for tail in tails:
                tail.lock.acquire()
            try:
                for tail in tails:
                    tail.reader.update()
                page = page_document([tail.reader for tail in tails])
                return {"alone": self._alone, "place": ",".join(tail.reader.place for tail in tails), "page": page}
            finally:
                for tail in tails:
                    tail.lock.release()

        return Answer(await run_in_threadpool(read))

    async def _completions(self, request: Request) -> Response:
        tail, step = self._asked(request)[0], request.query_params.get("step", "")

        def read() -> list[dict[str, Any]]:
            with tail.lock:
                return completions(tail.reader.samples, int(step)) if step.isdecimal() and len(step) < 16 else []

        return Answer(await run_in_threadpool(read))

    async def _events(self, request: Request) -> Response:
        place = request.headers.get("last-event-id") or request.query_params.get("place", "")
        return StreamingResponse(_stream(self._asked(request), place), media_type="text/event-stream")


async def _stream(tails: Sequence[Tail], place: str) -> AsyncIterator[str]:
    """Events `new` with what came to each run (null: nothing), and `reset` where a page has to begin anew."""
    places = place.split(",")
    places += [""] * (len(tails) - len(places))
    for tail in tails:
        tail.join()
    try:
        yield "retry: 1000\n\n"
        states: list[object] = [None] * len(tails)
        while True:
            waiting = [tail.changed for tail in tails]
            found: list[dict[str, Any] | None] = []
            for number, tail in enumerate(tails):
                now, new = await run_in_threadpool(tail.since, places[number])
                if new is None:
                    yield "event: reset\ndata: {}\n\n"
                    return
                said = now, new["state"]
                found.append(new if said != states[number] else None)
                places[number], states[number] = now, said
            if any(found):
                yield f"id: {','.join(places)}\nevent: new\ndata: {json.dumps(found)}\n\n"
            if not await _any(waiting):
                yield ": still here\n\n"
    finally:
        for tail in tails:
            tail.leave()


async def _any(events: Sequence[asyncio.Event]) -> bool:
    """Wait until one of the events is set, but not longer than `BEAT_SECONDS`; whether one was."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(tasks, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for task in tasks:
            task.cancel()


def routes(folder: Path) -> list[BaseRoute]:
    """Addresses for the runs of a project, which are named by their path in its folder."""

    def find(name: str) -> Path:
        found = Path(os.path.realpath(folder / name.replace("\0", "?")))
        if not found.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(f"{name}: no run of this project")
        return found

    return Watch(find).routes()


def open_runs(runs: Sequence[Path], *, port: int, show: bool, say: Callable[[str], None]) -> None:
    """Serve the page of one or several runs until Ctrl-C.

    Args:
        runs: their folders.
        port: 0 for any that is free.
        show: open the page in a browser, if there is a screen.
        say: told the address.
    Raises:
        UserError: a folder isn't a run, or the port is taken.
    """
    if len(runs) > _MOST:
        raise ConfigError(f"a page shows at most {_MOST} runs, not {len(runs)}")
    tails = [Tail(run) for run in runs]
    for tail in tails:
        tail.reader.update()
    page_document([tail.reader for tail in tails])  # whatever is wrong is said here, not in the browser
    known = dict(zip(names(runs), runs, strict=False))

    def find(name: str) -> Path:
        if name not in known:
            raise ConfigError(f"{name}: isn't watched by this command")
        return known[name]

    first, *others = known
    query = {"over": "\n".join(others)} if others else None
    with suppress(KeyboardInterrupt):
        serve(Watch(find, tails).routes(), f"/watch/{quote(first)}", port=port, show=show, say=say, query=query)
