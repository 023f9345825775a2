"""Every command where there is no network, and its system calls: nothing tries to leave this machine."""

import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
from project import Project, write_task

from mlx_ppo.cli.main import main

MAIN = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
CALLS = "connect,sendto,sendmsg,sendmmsg,bind"
# Sockets of the file system and to the kernel stay here; a call without an address is on a connected socket.
ELSEWHERE = re.compile(r"sa_family=(?!AF_UNIX|AF_LOCAL|AF_NETLINK)")
LOOPBACK = re.compile(r'inet_addr\("127\.|inet_pton\(AF_INET6, "(::1|::ffff:127\.[\d.]+)"')


@cache
def namespace() -> tuple[str, ...]:
    """The command that runs another without a network; empty where the system doesn't allow that."""
    command = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which(command[0]) is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return ()
    return command


@cache
def tracer() -> tuple[str, ...]:
    """The command that traces another's system calls; empty where there is none or it may not."""
    command = ("strace", "--follow-forks", "--seccomp-bpf", "--quiet=all", f"--trace={CALLS}", "--signal=none")
    if shutil.which(command[0]) is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return ()
    return command


def reaching_out(trace: str) -> list[str]:
    """The calls of a trace that name an address elsewhere."""
    return [line for line in trace.splitlines() if ELSEWHERE.search(line) and not LOOPBACK.search(line)]


def commands(project) -> dict[str, list[object]]:
    """One of each, in an order in which they build on each other; some finish in a second run."""
    train = project.config(run={"iterations": 2, "save_every": 1}, data={"eval_count": 2})
    once = {"epochs": 1}
    project.jsonl("pairs.jsonl", [{"prompt": "it was", "chosen": " good", "rejected": " bad"}])
    evaluate: dict[str, list[object]] = {}
    if find_spec("lm_eval") is not None:
        evaluate["evaluate"] = ["runs/a", "--tasks", "kind", "--include", write_task(project)]
    return {
        "train": [train],
        "sft": [project.config("sft", sft=once, run={"name": "s"})],
        "dpo": [project.config("dpo", dpo=once, run={"name": "d"})],
        "reward": [project.config("reward", reward_training=once, run={"name": "r"})],
        "resume": ["runs/a"],
        "sample": ["runs/a", "--prompt", "it", "--max-tokens", 2],
        "compare": ["model", "runs/a", "--reward", "runs/r/reward", "--count", 2, "--max-tokens", 2],
        "verify": ["runs/a"],
        "data": ["prompts.jsonl"],
        "report": ["runs/a"],
        "plan": [train, "--memory-gb", 1],
        "bench": [train, "--iterations", 1],
        "export": ["runs/a", "exported", "--format", "gguf", "--dtype", "f16"],
        "import": ["exported/exported.gguf", "imported"],
        "best-of": ["runs/a", "--n", 2, "--count", 2],
        "forgetting": ["runs/a", "--tokens", 64],
        "frontier": ["runs/a", "--samples", 2, "--prompts", 2],
        **evaluate,
        "merge": ["model", "runs/a/checkpoints/000002", "merged"],
        "doctor": [],
        "init": ["fresh"],
    }


@pytest.fixture(scope="module")
def done(request, tmp_path_factory):
    """Every command's exit code, output and trace, behind as many walls as there are."""
    if not namespace() and not tracer():
        return None
    folder = tmp_path_factory.mktemp("walls") / "project"
    folder.mkdir()
    project = Project(folder, request.getfixturevalue("model_folder"))
    found = {}
    for name, arguments in commands(project).items():
        trace = folder.parent / f"{name}.trace"
        recorded = [*tracer(), f"--output={trace}"] if tracer() else []
        found[name] = subprocess.run(
            [*namespace(), *recorded, sys.executable, "-c", MAIN, name, *map(str, arguments)],
            cwd=folder, capture_output=True, text=True,
        ), trace  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.skipif(not namespace(), reason="the system allows no network namespace (unshare)")
def test_every_command_works_without_a_network(done):
    serving = {"studio", "label", "watch"}  # they listen on the loopback address: tests/studio/test_server.py
    asking = {"agreement"}  # a server on that address: tests/end_to_end/test_cli_judge.py
    optional = set() if find_spec("lm_eval") is not None else {"evaluate"}
    assert set(done) == set(main.commands) - serving - asking - optional
    assert {name: shown.stderr for name, (shown, _) in done.items() if shown.returncode} == {}
    assert "was refused before anything was sent" in done["doctor"][0].stdout


@pytest.mark.slow
@pytest.mark.skipif(not tracer(), reason="strace isn't installed, or may not trace")
def test_no_command_reaches_out(done):
    traces = {name: trace.read_text() for name, (_, trace) in done.items()}
    assert {name: reaching_out(trace) for name, trace in traces.items() if reaching_out(trace)} == {}


@pytest.mark.skipif(not tracer(), reason="strace isn't installed, or may not trace")
def test_the_trace_would_show_it(tmp_path):
    """To give a datagram socket an address sends nothing."""
    code = """
import socket, subprocess, sys
for family, host in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    try:
        socket.socket(family, socket.SOCK_DGRAM).connect((host, 9))
    except OSError:
        pass
"""
    outside = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    trace = tmp_path / "trace"
    subprocess.run([*namespace(), *tracer(), f"--output={trace}", sys.executable, "-c", outside], check=True)
    (line,) = reaching_out(trace.read_text())
    assert "192.0.2.1" in line and trace.read_text().count("127.0.0.1") == 1


def test_a_reward_function_that_reaches_out_is_refused(project):
    (project.folder / "rule.py").write_text(
        "import urllib.request\n"
        "def letters(prompts, completions):\n"
        "    return [float(urllib.request.urlopen('http://192.0.2.1/score').read())] * len(completions)\n"
    )
    first, *rest = project.refused(4, "rule.py:letters raised", "train", project.config()).splitlines()
    assert first.endswith(
        "rule.py:letters raised offline.NetworkRefused: the look-up of '192.0.2.1' was refused: "
        "mlx-ppo lets nothing leave this machine (line 3, in a batch of 3)"
    )
    assert not [line for line in rest if "mlx_ppo" in line]
    (project.folder / "rule.py").write_text("import socket\nsocket.socket().connect(('192.0.2.1', 9))\n")
    words = (
        "rule.py:2: the reward function can't be loaded: raised offline.NetworkRefused: connect to '192.0.2.1' port 9"
    )
    project.refused(2, words, "train", project.config())
