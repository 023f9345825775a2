"""Who is answered, and with what headers."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn

from mlx_ppo.studio import server

PATHS = ("/", "/label", "/static/studio.js", "/static/style.css")


def test_only_the_token_opens_the_page_and_it_leaves_the_address(serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    host = {"Host": f"127.0.0.1:{served.port}"}
    opened = served.ask(f"/label?x=1&token={served.token}", host)
    assert opened.status == 303 and opened.getheader("location") == "/label?x=1"
    cookie = opened.getheader("set-cookie")
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and served.token in cookie
    for path in PATHS:
        assert served.ask(path, served.headers).status == 200
        assert served.ask(path, host).status == 403
        assert served.ask(path, {**host, "Cookie": f"mlx-ppo-{served.port}=wrong"}).status == 403
        assert served.ask(f"{path}?token=wrong", served.headers).status == 403
    away = served.ask(f"//elsewhere.org/?token={served.token}", host)
    assert away.status == 303 and away.getheader("location") == "/elsewhere.org/"


@pytest.mark.parametrize("path", PATHS)
def test_other_names_and_other_pages_are_refused(serve, tmp_path: Path, path: str) -> None:
    served = serve(tmp_path)
    for wrong in ("evil.org", f"evil.org:{served.port}", "127.0.0.1", f"127.0.0.1:{served.port}.evil.org", ""):
        assert served.ask(path, {**served.headers, "Host": wrong}).status == 403, wrong
    for wrong in ("http://evil.org", "null", "http://127.0.0.1:1", f"https://127.0.0.1:{served.port}"):
        assert served.ask(path, {**served.headers, "Origin": wrong}).status == 403, wrong
    assert served.ask(path, {**served.headers, "Origin": f"http://127.0.0.1:{served.port}"}).status == 200


SCRIPT = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
GONE_TO = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize("site", ["same-site", "cross-site"])  # same-site: another port of this machine
def test_other_pages_can_link_to_a_page_and_no_more(serve, tmp_path: Path, site: str) -> None:
    served = serve(tmp_path)
    for path in ("/api/project", "/api/label/next?mode=pair&set=&tab=t", "/static/studio.js"):
        assert served.ask(path, {**served.headers, **SCRIPT, "Sec-Fetch-Site": site}).status == 403, path
        assert served.ask(path, {**served.headers, **SCRIPT, "Sec-Fetch-Site": "same-origin"}).status in (200, 400)
    framed = {**GONE_TO, "Sec-Fetch-Dest": "iframe", "Sec-Fetch-Site": site}
    assert served.ask("/label", {**served.headers, **framed}).status == 403
    assert served.ask("/api/project", {**served.headers, **GONE_TO, "Sec-Fetch-Site": site}).status == 403
    for own in (site, "none"):
        assert served.ask("/label", {**served.headers, **GONE_TO, "Sec-Fetch-Site": own}).status == 200


def test_the_token_is_not_on_the_command_line_of_a_browser(tmp_path: Path, monkeypatch) -> None:
    """Whoever works on this machine sees command lines; what stands there opens the page a single time."""
    opened: list[str] = []
    said: list[str] = []
    held: list[uvicorn.Server] = []
    monkeypatch.setattr("mlx_ppo.studio.server.webbrowser.open", opened.append)
    monkeypatch.setattr("mlx_ppo.studio.server.has_screen", lambda: True)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: held.append(server))
    server.serve([], "/", port=0, show=True, say=said.append)
    (once,) = parse_qs(urlsplit(opened[0]).query)["token"]
    (token,) = parse_qs(urlsplit(said[0].split("\n")[0]).query)["token"]
    assert once != token and once not in said[0]
    application: Any = held[0].config.app
    host = urlsplit(opened[0]).netloc.encode()

    def status(given: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "query_string": f"token={given}".encode(),
                 "headers": [(b"host", host)], "root_path": "", "scheme": "http"}  # fmt: skip
        asyncio.run(application(scope, None, send))
        return int(sent[0]["status"])

    assert [status(each) for each in (once, once, token, token, "x")] == [303, 403, 303, 303, 403]


def test_every_answer_forbids_what_the_page_does_not_need(serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    for path, headers in (
        ("/", served.headers),
        ("/", {"Host": "evil.org"}),
        ("/static/dom.js", served.headers),
        ("/none", served.headers),
    ):
        answer = served.ask(path, headers)
        policy = answer.getheader("content-security-policy")
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert answer.getheader("cache-control") == "no-store"
        assert answer.getheader("x-content-type-options") == "nosniff"
        assert answer.getheader("server") is None


def test_nothing_outside_the_packages_files_is_served(serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/server.py"):
        assert served.ask(path, served.headers).status == 404, path


def test_it_listens_on_the_loopback_address_alone(serve, tmp_path: Path) -> None:
    import psutil

    served = serve(tmp_path)
    listening = [c.laddr for c in psutil.Process(served.process.pid).net_connections() if c.status == "LISTEN"]
    assert [(place.ip, place.port) for place in listening] == [("127.0.0.1", served.port)]


def test_a_port_that_is_taken_is_one_line(serve, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from mlx_ppo.cli.main import main

    served = serve(tmp_path)
    result = CliRunner().invoke(main, ["studio", str(tmp_path / "other"), "--no-browser", "--port", str(served.port)])
    assert result.exit_code == 4 and result.stderr.startswith(f"error: port {served.port}: cannot be used")


def test_ctrl_c_ends_it_cleanly(serve, tmp_path: Path) -> None:
    assert serve(tmp_path).end() == 0


def test_a_folder_that_is_made_is_said(tmp_path: Path, monkeypatch) -> None:
    from click.testing import CliRunner

    from mlx_ppo.cli.pages import studio

    monkeypatch.setattr("mlx_ppo.studio.open.open_page", lambda *_, say, **__: say("address"))
    (tmp_path / "there").mkdir()
    for name, said in (("there", ""), ("mistyped", f"note: {tmp_path / 'mistyped'} is a new, empty project\n")):
        assert CliRunner().invoke(studio, [str(tmp_path / name)]).output == f"address\n{said}"
