"""Several machines share a run: played by addresses of this one, and by network namespaces with a slow line between."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from free_ports import free_ports
from test_cli_parallel import CLOSE, adapters, finished, trained

from mlx_ppo.errors import ConfigError
from mlx_ppo.runtime.hosts import placed, read_hosts

WIRE = """
set -e
ip netns add {a}; ip netns add {b}
ip link add {a} netns {a} type veth peer name {b} netns {b}
ip -n {a} addr add 10.77.0.1/24 dev {a}; ip -n {a} link set {a} up
ip -n {b} addr add 10.77.0.2/24 dev {b}; ip -n {b} link set {b} up
"""


def hosts_file(project, hosts):
    file = project.folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    return file


@pytest.fixture
def hosts(project):
    ports = free_ports(2)
    return hosts_file(project, [[f"127.0.0.1:{ports[0]}"], [f"127.0.0.2:{ports[1]}"]])


def test_two_machines_do_what_one_does_and_a_run_goes_on(project, hosts):
    trained(project, "one", 1)
    config = project.config(rollout={"prompts": 5, "max_tokens": 6, "batch_size": 8, "samples_per_prompt": 2})
    other = project.start("train", config, "--hosts", hosts, "--rank", 1)
    finished(project, "train", config, "--hosts", hosts, "--rank", 0, "--set", "run.name=two")
    output, errors = other.communicate(timeout=60)
    assert other.returncode == 0 and "has the run" in output, (output, errors)
    assert np.abs(adapters(project, "one") - adapters(project, "two")).max() < CLOSE
    before = project.checkpoints("two")
    shutil.rmtree(project.run("two") / "checkpoints" / "000003")
    other = project.start("train", config, "--hosts", hosts, "--rank", 1)
    finished(project, "resume", project.run("two"))
    other.communicate(timeout=60)
    assert other.returncode == 0 and project.checkpoints("two") == before


def test_another_model_or_configuration_is_named_before_anything_is_computed(project, hosts):
    config = project.config()
    for key, words in (("ppo.epochs=1", "ppo.epochs"), (f"model.path={project.folder}/other", "model.path")):
        if "model" in key:
            shutil.copytree(project.folder / "model", project.folder / "other")
            (project.folder / "other" / "note.txt").write_text("x")
        other = project.start("train", config, "--hosts", hosts, "--rank", 1, "--set", key)
        leading = project.start("train", config, "--hosts", hosts, "--rank", 0)
        for process in (leading, other):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2 and f"has another {words}" in errors and errors.count("\n") == 1, errors
    assert not (project.folder / "runs").exists()


def test_a_machine_that_is_lost_ends_the_run_in_a_line(project, hosts):
    run, parallel = {"iterations": 10_000}, {"patience": 5.0}
    config = project.config(run=run, parallel=parallel)
    other = project.start("train", config, "--hosts", hosts, "--rank", 1)
    leading = project.start("train", config, "--hosts", hosts, "--rank", 0)
    while not (project.run() / "metrics.jsonl").exists():
        assert leading.poll() is None and other.poll() is None
    other.kill()
    other.communicate()
    _, errors = leading.communicate(timeout=60)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert leading.returncode == 4 and "another machine (127.0.0.2:" in line and "mlx-ppo resume" in line


def test_nobody_who_comes_is_told_in_time(project, hosts):
    config = project.config(parallel={"patience": 2.0})
    shown = project.start("train", config, "--hosts", hosts, "--rank", 0)
    _, errors = shown.communicate(timeout=60)
    assert shown.returncode == 4 and "could not be reached within 2 seconds" in errors


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("{}", "a list of two hosts or more"),
        ('[["127.0.0.1:1"]]', "a list of two hosts or more"),
        ('[["127.0.0.1:1"], ["127.0.0.1:1"]]', "names an address twice"),
        ('[["127.0.0.1:1"], ["127.0.0.2"]]', "host 1 must be"),
        ('[["127.0.0.1:1"], ["127.0.0.2:70000"]]', "host 1 must be"),
        ('[["127.0.0.1:1"], 5]', "host 1 must be"),
        ('[["127.0.0.1:1"], ["127.0.0.1:2"]]', "say which host this is with --rank"),
        ('[["203.0.113.1:1"], ["203.0.113.2:2"]]', "no address of this machine"),
    ],
)
def test_files_of_hosts_that_are_none(project, content, words):
    (project.folder / "hosts.json").write_text(content)
    project.refused(2, words, "train", project.config(), "--hosts", "hosts.json")


def test_a_file_for_the_launcher_of_mlx_is_read_too(tmp_path, monkeypatch):
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "a", "ips": ["127.0.0.1"]}, {"ssh": "b", "ips": ["203.0.113.2"]}]')
    assert read_hosts(file) == [["127.0.0.1:32323"], ["203.0.113.2:32324"]]
    assert placed(file).rank == 0 and placed(None) is None
    with pytest.raises(ConfigError, match="ranks 0 to 1, and not 2"):
        placed(file, 2)
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    monkeypatch.setenv("MLX_RANK", "1")
    assert placed(None).rank == 1 and placed(None).others == "127.0.0.1:32323"


@pytest.fixture
def wired(request):
    """Two network namespaces with a line of 100 Mbit/s between them; commands that enter them."""
    names = {"a": "mlxppo-a", "b": "mlxppo-b"}
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("ip is missing")
    try:
        made = subprocess.run(["sh", "-c", WIRE.format(**names)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"the system allows no network namespaces: {made.stderr}")
        for name in names.values():  # where the kernel can: without it the line is as fast as memory
            limit = [
                "tc",
                "qdisc",
                "add",
                "dev",
                name,
                "root",
                "tbf",
                "rate",
                "100mbit",
                "burst",
                "64kb",
                "latency",
                "50ms",
            ]
            subprocess.run(["ip", "netns", "exec", name, *limit], capture_output=True)
        yield [["ip", "netns", "exec", name] for name in names.values()]
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_namespaces_with_a_line_between_them(project, wired):
    file = hosts_file(project, [["10.77.0.1:5000"], ["10.77.0.2:5000"]])
    code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(project.config()), "--hosts", str(file)]
    started = [
        subprocess.Popen(
            [*enter, *command], cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for enter in wired
    ]
    shown = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], shown
    assert "following 10.77.0.1:5000 as 10.77.0.2:5000, rank 1" in shown[1]
