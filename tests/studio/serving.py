"""A page's server in a process of its own, and a headless browser that never goes online."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.parse
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

_COMMAND = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Served:
    """A running `mlx-ppo` command that serves a page."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, *(arguments or ("studio", str(folder))), "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.folder = folder.resolve()
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        parts = urllib.parse.urlsplit(self.url)
        assert parts.port is not None, (self.url, self.process.stdout.read())
        self.port = parts.port
        self.token = urllib.parse.parse_qs(parts.query)["token"][0]

    @property
    def headers(self) -> dict[str, str]:
        """What a browser sends once it has opened the address."""
        return {"Host": f"127.0.0.1:{self.port}", "Cookie": f"mlx-ppo-{self.port}={self.token}"}

    def ask(self, path: str, headers: dict[str, str], method: str = "GET", body: str | None = None) -> Any:
        """A request with exactly these headers; the answer with its text as `text`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body.encode())))
        connection.endheaders(body.encode() if body is not None else None)
        answer: Any = connection.getresponse()
        answer.body = answer.read()
        connection.close()
        return answer

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def end_jobs(project: Path) -> None:
    """End what a project's jobs left running; they outlive their server."""
    for file in project.glob(".studio/jobs/*/process.json"):
        for pid in json.loads(file.read_text()).values():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(project):
                    for each in (*process.children(recursive=True), process):
                        each.kill()


def open_browser(profile: Path) -> Any:
    """Chromium with a profile of its own; selenium is told where everything is, so that it looks nowhere else."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver aren't installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    made.set_window_size(1280, 900)
    return made
