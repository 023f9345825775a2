"""What a line between two machines costs a shared run, beside what `mlx-ppo plan --hosts` says of it: a table.

    python benchmarks/lines.py [CONFIG] [--set section.key=value ...] [--rates 1000 100]

Two network namespaces of this machine (Linux, as root; `ip` and `tc`) play the machines. For each rate in Mbit/s, and
without a bound, the configuration is trained in them twice, for 4 iterations and for 10. The difference tells what six
iterations send, evaluations, start and end left out; seconds are medians of the last six of ten.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from mlx_ppo.bundle import lora_example
from mlx_ppo.runs.folder import METRICS, Run

COMMAND = "from mlx_ppo.cli.main import main; main()"
NAMES, ADDRESSES = ("mlxppo-l0", "mlxppo-l1"), ("10.77.1.1", "10.77.1.2")
SHORT, LONG = 4, 10


def main() -> None:
    """Train, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=lora_example())
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--rates", type=int, nargs="+", default=[1000, 100], help="Mbit/s")
    given = parser.parse_args()
    options = [part for change in given.overrides for part in ("--set", change)]
    print("| Mbit/s | MB an iteration, each | predicted | s an iteration | more than without a bound | predicted |")
    print("|---|---|---|---|---|---|")
    unbound = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        hosts = Path(temporary) / "hosts.json"
        hosts.write_text(json.dumps([[f"{address}:5000"] for address in ADDRESSES]))
        for rate in (None, *given.rates):
            few, _ = trained(Path(temporary), given.config, options, hosts, SHORT, rate)
            many, seconds = trained(Path(temporary), given.config, options, hosts, LONG, rate)
            sent = (many - few) / (LONG - SHORT) / 1e6
            if rate is None:
                unbound = seconds
                print(f"| no bound | {sent:.2f} | | {seconds:.2f} | | |", flush=True)
                continue
            row = predicted(given.config, options, hosts, rate)
            cells = (f"{sent:.2f}", f"{row['sent_mb']:.2f}", f"{seconds:.2f}", f"{seconds - unbound:.2f}")
            print(f"| {rate} | {' | '.join(cells)} | {row['exchanging']:.2f} |", flush=True)


def trained(
    folder: Path, config: Path, options: Sequence[str], hosts: Path, iterations: int, rate: int | None
) -> tuple[float, float]:
    """Bytes that the machine which leads sent, and the median seconds of the last iterations."""
    name = f"{rate or 'free'}-{iterations}"
    changes = (f"run.folder={folder}", f"run.name={name}", f"run.iterations={iterations}", "run.evaluate_every=0")
    words = [part for change in (*changes, "data.eval_count=4") for part in ("--set", change)]
    with wired(rate) as enter:
        command = [sys.executable, "-c", COMMAND, "train", str(config), *options, *words, "--hosts", str(hosts)]
        started = [subprocess.Popen([*one, *command], stdout=subprocess.DEVNULL) for one in enter]
        if any([process.wait() for process in started]):
            sys.exit("lines.py: a run failed")
        counter = f"/sys/class/net/{NAMES[0]}/statistics/tx_bytes"
        sent = int(subprocess.run([*enter[0], "cat", counter], check=True, capture_output=True).stdout)
    rows = list(Run(folder / name).rows(METRICS))
    return sent, median(row["seconds"] for row in rows[SHORT:] or rows)


def predicted(config: Path, options: Sequence[str], hosts: Path, rate: int) -> dict[str, float]:
    """What the plan says of two machines."""
    words = ["plan", str(config), *options, "--hosts", str(hosts), "--bandwidth", str(rate / 1000), "--json"]
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], check=True, capture_output=True)
    row: dict[str, float] = next(row for row in json.loads(done.stdout)["computed"] if row["processes"] == 2)
    return row


@contextmanager
def wired(rate: int | None) -> Iterator[list[list[str]]]:
    """Two namespaces and a line between them; the words that enter each."""
    first, second = NAMES
    enter = [["ip", "netns", "exec", name] for name in NAMES]
    bound = f"tbf rate {rate}mbit burst 256kb latency 50ms" if rate else ""
    try:
        for name in NAMES:
            _run("ip", "netns", "add", name)
        _run(*f"ip link add {first} netns {first} type veth peer name {second} netns {second}".split())
        for name, address, words in zip(NAMES, ADDRESSES, enter, strict=True):
            _run(*f"ip -n {name} addr add {address}/24 dev {name}".split())
            _run(*f"ip -n {name} link set {name} up".split())
            if bound:
                _run(*words, *f"tc qdisc add dev {name} root {bound}".split())
        yield enter
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
