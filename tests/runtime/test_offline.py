"""Nothing but loopback can be reached from the project's own processes."""

import json
import resource
import subprocess
import sys

import pytest

from mlx_ppo.runtime import offline

TRIES = """
import json, os, socket, sys, tempfile, threading
from mlx_ppo.runtime.offline import NetworkRefused, refuse_connections
refuse_connections(), refuse_connections()
UDP, TCP, SIX = socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.AF_INET6

def made(kind=TCP, family=socket.AF_INET):
    return socket.socket(family, kind)

def listening():
    server = made()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server

def talk():
    with listening() as server, made() as client:
        client.connect(("localhost", server.getsockname()[1]))
        assert client.send(b"x") == client.sendall(b"y") or True
        assert client.sendmsg([b"z"]) == 1

def datagram():
    with made(UDP) as one, made(UDP) as other:
        one.bind(("127.0.0.1", 0))
        assert other.sendto(b"ab", one.getsockname()) == 2
        assert other.sendto(b"ab", 0, one.getsockname()) == 2
        assert other.sendmsg([b"ab"], [], 0, one.getsockname()) == 2

def unix():
    with tempfile.TemporaryDirectory() as folder, made(TCP, socket.AF_UNIX) as server:
        server.bind(os.path.join(folder, "s"))
        server.listen()
        with made(TCP, socket.AF_UNIX) as client:
            client.connect(os.path.join(folder, "s"))
    for end in socket.socketpair():
        end.close()

def direct():
    import _socket
    _socket.socket(socket.AF_INET, UDP).connect(("192.0.2.1", 9))

tries = {
    "refused": {
        "connect": lambda: made().connect(("192.0.2.1", 9)),
        "connect_ex": lambda: made().connect_ex(("192.0.2.1", 9)),
        "connect by name": lambda: made().connect(("example.com", 9)),
        "connect, empty": lambda: made().connect(("", 9)),
        "connect, short form": lambda: made().connect(("127.1", 9)),
        "connect, bytes": lambda: made().connect((b"192.0.2.1", 9)),
        "connect, any": lambda: made().connect(("0.0.0.0", 9)),
        "connect, IPv6": lambda: made(TCP, SIX).connect(("2001:db8::1", 9)),
        "connect, mapped": lambda: made(TCP, SIX).connect(("::ffff:192.0.2.1", 9)),
        "connect, C": direct,
        "create_connection": lambda: socket.create_connection(("example.com", 80)),
        "sendto": lambda: made(UDP).sendto(b"x", ("192.0.2.1", 9)),
        "sendto, flags": lambda: made(UDP).sendto(b"x", 0, ("192.0.2.1", 9)),
        "sendto by name": lambda: made(UDP).sendto(b"x", ("example.com", 9)),
        "sendmsg": lambda: made(UDP).sendmsg([b"x"], [], 0, ("192.0.2.1", 9)),
        "broadcast": lambda: made(UDP).sendto(b"x", ("<broadcast>", 9)),
        "bind, empty": lambda: made().bind(("", 0)),
        "bind, any": lambda: made().bind(("0.0.0.0", 0)),
        "bind, any IPv6": lambda: made(TCP, SIX).bind(("::", 0)),
        "create_server": lambda: socket.create_server(("", 0)),
        "getaddrinfo": lambda: socket.getaddrinfo("example.com", 80),
        "getaddrinfo, bytes": lambda: socket.getaddrinfo(b"example.com", 80),
        "gethostbyname": lambda: socket.gethostbyname("example.com"),
        "gethostbyname_ex": lambda: socket.gethostbyname_ex("example.com"),
        "gethostbyaddr": lambda: socket.gethostbyaddr("192.0.2.1"),
        "getnameinfo": lambda: socket.getnameinfo(("192.0.2.1", 80), 0),
    },
    "allowed": {
        "talk": talk, "datagram": datagram, "unix": unix,
        "getaddrinfo": lambda: socket.getaddrinfo("localhost", 80),
        "getaddrinfo, this machine": lambda: socket.getaddrinfo(None, 80),
        "getnameinfo": lambda: socket.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICHOST),
    },
}
found = {}
for kind, cases in tries.items():
    for name, case in cases.items():
        try:
            case()
            found[f"{kind}: {name}"] = ["allowed", ""]
        except NetworkRefused as refusal:
            found[f"{kind}: {name}"] = ["refused", str(refusal)]
        except Exception as error:
            found[f"{kind}: {name}"] = [repr(error), ""]
print(json.dumps(found))
"""


def test_everything_but_loopback_is_refused_by_name_of_the_address() -> None:
    shown = subprocess.run([sys.executable, "-c", TRIES], capture_output=True, text=True, check=True).stdout
    found = json.loads(shown)
    assert len(found) == 32
    assert {name: answer for name, (answer, _) in found.items() if not name.startswith(answer + ":")} == {}
    for name, (_, text) in found.items():
        assert name.startswith("allowed") or ("was refused: mlx-ppo lets nothing leave" in text and "\n" not in text)
    assert found["refused: connect"][1].startswith("connect to '192.0.2.1' port 9 was refused")
    assert found["refused: create_connection"][1].startswith("the look-up of 'example.com' was refused")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST"])
def test_loopback(host: str) -> None:
    assert offline.is_loopback(host) and offline.is_loopback(host.encode())


@pytest.mark.parametrize(
    "host",
    ["128.0.0.1", "0.0.0.0", "::", "", "127.1", "2130706433", "localhost.example.com", "::ffff:192.0.2.1", "10.0.0.1",
     "fe80::1", None, 5, b"\xff"],
)  # fmt: skip
def test_no_loopback(host: object) -> None:
    assert not offline.is_loopback(host)


def test_importing_the_package_leaves_the_callers_process_alone() -> None:
    code = "import mlx_ppo.train, mlx_ppo.cli.doctor; from mlx_ppo.runtime import offline; print(offline.refusing())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert not offline.refusing()


def test_a_command_that_reaches_out_ends_with_a_line() -> None:
    code = (
        "import socket\nfrom mlx_ppo.cli.main import main\n"
        "@main.command()\ndef leak():\n    socket.create_connection(('192.0.2.1', 9))\nmain(['leak'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr == "error: the look-up of '192.0.2.1' was refused: mlx-ppo lets nothing leave this machine\n"


def test_imports_leave_the_limit_of_open_files_alone() -> None:
    """mlx-lm lowers it when it is imported."""
    code = (
        "import resource; before = resource.getrlimit(resource.RLIMIT_NOFILE); import mlx_ppo.train, mlx_ppo.sft\n"
        "import mlx_ppo.reward_training, mlx_ppo.exporting.export, mlx_ppo.importing.convert, mlx_ppo.cli.plan\n"
        "print(before == resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 < hard <= 4096:
        pytest.skip("the limit is no higher than mlx-lm's")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize(
    "module", ["mlx_ppo.train", "mlx_ppo.compute.kv_cache", "mlx_ppo.models.load", "mlx_ppo.memory.model"]
)
@pytest.mark.parametrize("limits", [(64, 1024), (512, 2048), (1024, 1024)])
def test_imports_work_under_a_low_limit_of_open_files_and_leave_it(module: str, limits: tuple[int, int]) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits}); import {module}\n"
        "from mlx_ppo.models.load import load_trunk\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{limits}\n"), done.stderr
