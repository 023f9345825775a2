"""A client of one server on this machine that speaks OpenAI's protocol: Ollama, LM Studio, llama.cpp, mlx_lm.server.

Whatever the server does, a question ends: within its time, with a bounded body, and with an answer or one of two
exceptions. Plain `http.client` knows no proxies, follows no redirects, and keeps no cookies.
"""

import http.client
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from mlx_ppo.config.addresses import Address
from mlx_ppo.files import parse_json

_LARGEST = 1 << 20  # bytes of an answer's body
_SHOWN = 120  # characters
Messages = list[dict[str, str]]


class LostError(Exception):
    """There is no server, or it gives no answer; another question would fare no better."""


class UselessError(Exception):
    """There is an answer, of which nothing can be made."""

    def __init__(self, why: str, said: str | None = None) -> None:
        """Keep the reason, and what the model said, if it did."""
        super().__init__(why)
        self.said = said

    @property
    def answered(self) -> bool:
        """Whether the model said anything, be it nothing; else the server refused the question."""
        return self.said is not None


class JudgeServer:
    """Asks for completions of chats at temperature 0; several threads may ask at once."""

    def __init__(
        self, address: Address, model: str, *, timeout: float, max_tokens: int, key: str | None = None
    ) -> None:
        """Nothing is sent yet.

        Args:
            address: of the server; it is the only one that is ever connected to.
            model: its name there.
            timeout: seconds that a question may take in all.
            max_tokens: of an answer.
            key: sent as a bearer token (RFC 6750); nothing that is shown has it.
        """
        self.address = address
        self.model = model
        self.timeout = timeout
        self.max_tokens = max_tokens
        self._key = key
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = False

    def ask(self, messages: Messages, *, at_most: int | None = None) -> str:
        """The model's answer; `at_most`: a bound on its tokens below that of all answers.

        Raises:
            LostError: there is no connection, it ends, it takes too long, or what comes isn't HTTP.
            UselessError: another status than 200, too large a body, or no whole completion in it.
        """
        bound = self.max_tokens if at_most is None else min(at_most, self.max_tokens)
        document = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": bound,
            "stream": False,
        }
        status, place, body = self._exchange(json.dumps(document).encode("ascii"))
        if 300 <= status < 400:
            raise UselessError(f"HTTP {status}, a redirect to {self.shown(place)}, which is never followed")
        if status == 401 and self._key is None:
            raise UselessError("HTTP 401: the server asks for a key; name the variable that holds it by 'key_env'")
        if status != 200:
            raise UselessError(f"HTTP {status}: {self.shown(body.decode('utf-8', 'replace'))}")
        if len(body) > _LARGEST:
            raise UselessError(f"an answer of more than {_LARGEST >> 20} MiB")
        return self._content(body, bound)

    def shown(self, text: str) -> str:
        """A text of the server in quotes, on one line, cut where it is long, and without the key."""
        if self._key is not None:
            for written in (self._key, self._key.replace("/", "\\/")):  # as some write it in JSON
                text = text.replace(written, "[key]")
        return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")

    def abort(self) -> None:
        """Cut every connection; whoever waits for an answer gets LostError."""
        with self._lock:
            self._ended = True
            for each in self._open:
                _cut(each)

    def _exchange(self, body: bytes) -> tuple[int, str, bytes]:
        """Status, where a redirect leads, and the body's beginning."""
        deadline = time.monotonic() + self.timeout
        connection = http.client.HTTPConnection(self.address.host, self.address.port, timeout=self.timeout)
        late = threading.Event()
        timer: threading.Timer | None = None
        held: socket.socket | None = None
        try:
            connection.connect()
            held = connection.sock
            self._hold(held)
            timer = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut_late, (held, late))
            timer.daemon = True
            timer.start()
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request("POST", f"{self.address.path}/chat/completions", body, headers)
            with connection.getresponse() as response:
                found = response.status, response.getheader("Location") or "", response.read(_LARGEST + 1)
            if late.is_set():
                raise TimeoutError
            if response.length and len(found[2]) <= _LARGEST:  # it said that more would come, and closed
                raise http.client.IncompleteRead(found[2], response.length)
            return found
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LostError(self._why(error, late.is_set())) from None
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._open.discard(held)
            connection.close()

    def _hold(self, held: socket.socket) -> None:
        with self._lock:
            if self._ended:
                raise ConnectionAbortedError("it was ended")
            self._open.add(held)

    def _why(self, error: Exception, late: bool) -> str:
        if late or isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | ConnectionError):
            refused = isinstance(error, ConnectionRefusedError)
            return "nobody listens there" if refused else "the connection ended before there was an answer"
        if isinstance(error, OSError):
            return error.strerror or str(error)
        return f"what came isn't HTTP ({self.shown(str(error) or type(error).__name__)})"

    def _content(self, body: bytes, bound: int) -> str:
        try:
            choice = parse_json(body)["choices"][0]
            content: Any = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise UselessError(f"no completion of a chat: {self.shown(body.decode('utf-8', 'replace'))}") from None
        if choice.get("finish_reason") == "length":  # half a number is another number
            said = content if isinstance(content, str) else ""
            raise UselessError(f"an answer cut off at its {bound} tokens: {self.shown(said)}", said)
        if not isinstance(content, str) or not content.strip():
            raise UselessError("an empty answer", "")
        return content


def _cut(held: socket.socket) -> None:
    with suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)


def _cut_late(held: socket.socket, late: threading.Event) -> None:
    late.set()
    _cut(held)
