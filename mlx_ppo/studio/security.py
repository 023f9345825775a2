"""Who may talk to the page's server: this machine's browser that was given the token, and no page of another site."""

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
# Nothing but the files of the package; no inline script or style, no other address, no frame.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Address(NamedTuple):
    """Where the server listens, and the secrets that open it."""

    port: int
    token: str
    once: str = ""  # opens it a single time: a browser's command line is seen by everybody on this machine

    @property
    def hosts(self) -> tuple[str, str]:
        """What a Host header may say."""
        return f"{LOOPBACK}:{self.port}", f"localhost:{self.port}"

    @property
    def cookie(self) -> str:
        """The cookie's name; browsers keep those of all ports of a host together."""
        return f"mlx-ppo-{self.port}"

    def url(self, path: str = "/", *, once: bool = False) -> str:
        """What a person opens, or, a single time, a browser that is started."""
        return f"http://{LOOPBACK}:{self.port}{path}?{urlencode({'token': self.once if once else self.token})}"


class Guard:
    """Lets only requests through that name this server, come from its own pages, and carry the token.

    The token comes in the URL at first; the answer puts it into a cookie and takes it out of the URL. Whatever else
    comes is answered with 403, and every answer gets `HEADERS`.
    """

    def __init__(self, app: ASGIApp, address: Address) -> None:
        """Stand before an application."""
        self._app = app
        self._address = address
        self._once = address.once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._refusal(scope)
        await (self._app if answer is None else answer)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that isn't handed on."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._address.hosts:
            return PlainTextResponse("this server answers to its own name only", 403)
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in headers.getlist("origin")):
            return PlainTextResponse("this server answers to its own pages only", 403)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", None)
        if given is None and _is_foreign(headers, scope["path"]):
            return PlainTextResponse("this server answers to its own pages only", 403)
        if given is None:
            return None if self._opens(_cookie(headers, self._address.cookie)) else _closed()
        if scope["method"] != "GET" or not (self._opens(given[0]) or self._opens_once(given[0])):
            return _closed()
        # one slash: what begins with two would be an address elsewhere
        path = "/" + str(scope["path"]).lstrip("/\\")
        answer = RedirectResponse(path + (f"?{urlencode(query, doseq=True)}" if query else ""), 303)
        answer.set_cookie(self._address.cookie, self._address.token, httponly=True, samesite="strict")
        return answer

    def _opens(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._address.token.encode())

    def _opens_once(self, given: str) -> bool:
        if not self._once or not hmac.compare_digest(given.encode("utf-8", "replace"), self._once.encode()):
            return False
        self._once = ""
        return True


def _is_foreign(headers: Headers, path: str) -> bool:
    """Whether a browser says that another page asks; to cookies, all ports of this machine are one site.

    A page may be gone to from anywhere: it has nothing of the project in it.
    """
    gone_to = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    own = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    return not own and (not gone_to or path.startswith("/api"))


def _closed() -> Response:
    return PlainTextResponse("open the address that the terminal shows, with its token", 403)


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""
