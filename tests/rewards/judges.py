"""A server on the loopback address that answers as a judge does, or as a test wants it to."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", dict[str, Any]], str | None]
QUOTED = re.compile(r"\[(?P<name>[^\]]*) (?P<mark>[0-9a-f]{8})\]\n(.*?)\n\[end of (?P=name) (?P=mark)\]", re.DOTALL)


def texts(document: dict[str, Any]) -> dict[str, str]:
    """What is quoted in a question, by name."""
    question = document["messages"][0]["content"]
    return {match["name"]: match[3] for match in QUOTED.finditer(question)}


def sensible(_: "Handler", document: dict[str, Any]) -> str:
    """Longer is better: a grade, a letter, or a ranking, whichever is asked."""
    found, form = texts(document), document["messages"][-1]["content"].rpartition("\n\n")[2]
    completions = {name: text for name, text in found.items() if name != "prompt"}
    if '"score"' in form:
        return json.dumps({"score": min(10, len(completions["completion"]) % 11)})
    if '"better"' in form:
        a, b = len(completions["A"]), len(completions["B"])
        return json.dumps({"better": "A" if a > b else "B" if b > a else "tie"})
    if '"ranking"' in form:
        order = sorted(completions, key=lambda name: (-len(completions[name]), completions[name]))
        return json.dumps({"ranking": [int(name) for name in order]})
    return "1"


class Server(ThreadingHTTPServer):
    """Counts, and keeps what was asked."""

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def questions(self) -> list[str]:
        """Of each request the whole chat, without the trial at a start."""
        found = [json.dumps(document["messages"]) for document in self.asked]
        return [text for text in found if "the number 1 and nothing else" not in text]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    """An answer is a text that is put into a completion, or None where the function has written all itself."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.paths.append(self.path)
            server.asked.append(document)
            server.together += 1
            server.most_together = max(server.together, server.most_together)
        try:
            said = server.answer(self, document)
        finally:
            self.close_connection = True
            with server.lock:  # before it is answered: the next question may come at once
                server.together -= 1
        if said is not None:
            self.completion(said)

    def completion(self, said: Any, finish: str = "stop", **more: Any) -> None:
        """Answer as a chat's completion."""
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": said}}
        self.document({"object": "chat.completion", "choices": [choice], **more})

    def document(self, document: Any, status: int = 200) -> None:
        """Answer with JSON."""
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quietly."""


@contextmanager
def serving(answer: Answer = sensible, port: int = 0) -> Iterator[Server]:
    """A server for the length of a `with` block."""
    server = Server(answer, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slowly(seconds: float, then: Answer = sensible) -> Answer:
    """After a while."""

    def answer(handler: Handler, document: dict[str, Any]) -> str | None:
        time.sleep(seconds)
        return then(handler, document)

    return answer


def asking_for(key: str) -> Answer:
    """Only who sends a key gets an answer; who sends another one gets it back, as OpenAI's servers do."""

    def answer(handler: Handler, document: dict[str, Any]) -> str | None:
        given = handler.headers["Authorization"]
        if given == f"Bearer {key}":
            return sensible(handler, document)
        return handler.document({"error": {"message": f"Incorrect API key provided: {given}"}}, 401)

    return answer
