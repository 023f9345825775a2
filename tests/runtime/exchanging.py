"""A process of several, started by `test_group.py`: it exchanges what the test says and compares what all have found.

exchanging.py RANK HOSTS TIMES      one of machines that meet over mlx's ring
exchanging.py PROCESSES TIMES       leads others of this machine, which `serve`; MEMFD=no: without Linux's call
"""

import json
import os
import sys
import zlib
from pathlib import Path

import mlx_ppo  # noqa: F401  before mlx

# isort: split
import mlx.core as mx
import numpy as np

from mlx_ppo.runtime.local_group import followed, local_group
from mlx_ppo.runtime.ring import Ring, joined


def digest(arrays):
    """A checksum of arrays, by which processes see whether they hold the same."""
    found = 0
    for name in sorted(arrays):
        bits = arrays[name].reshape(-1).view(mx.uint8) if arrays[name].size else arrays[name]
        found = zlib.crc32(np.ascontiguousarray(np.asarray(bits)).data, zlib.crc32(name.encode(), found))
    return found


def arrays(rank):
    generator = np.random.default_rng(rank)
    shapes = {"scalar": (), "one": (1,), "small": (3, 5), "odd": (7, 11, 13), "none": (0, 4), "large": (1 << 21, 2)}
    return {name: mx.array(generator.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def exchanged(group):
    size = group.size
    given = arrays(group.rank)
    given["turned"] = mx.array(given["small"]).T  # not in the order of its rows
    total = group.total(given)
    turned = total.pop("turned")
    assert np.allclose(np.array(turned), np.array(total["small"]).T, atol=1e-5) and not given
    for name, array in total.items():
        wanted = sum(np.array(arrays(rank)[name], np.float64) for rank in range(size))
        assert array.shape == wanted.shape and np.abs(np.array(array) - wanted).max(initial=0.0) < 1e-5, name
    given = group.gather([np.full((group.rank, 2), group.rank, np.int32), np.array([group.rank > 0])])
    assert [part[0].shape for part in given] == [(rank, 2) for rank in range(size)]
    assert [bool(part[1][0]) for part in given] == [rank > 0 for rank in range(size)]
    assert group.gather([]) == [[]] * size
    for spare in (-9, -8, -7, 0, 1):  # round the size of a piece, and of what goes before it
        sent = [np.full(rank * (1 << 20) + spare, rank + 1, np.uint8) if rank else np.zeros(0) for rank in range(size)]
        found = [part[0] for part in group.gather([sent[group.rank]])]
        assert all(np.array_equal(one, other) for one, other in zip(found, sent, strict=True)), spare
    counts = [3 * rank for rank in range(size)]
    rows = mx.full((counts[group.rank], 1 << 18), group.rank, mx.float16)
    wanted = [rank for rank in range(size) for _ in range(counts[rank])]
    assert np.array(group.rows(rows, counts))[:, [0, -1]].tolist() == [[rank, rank] for rank in wanted]
    large = {"large": mx.arange(3 << 18).astype(mx.float32), "end": mx.array([7], mx.int64)}
    told = group.given(large if group.leads else {name: mx.zeros_like(array) for name, array in large.items()})
    assert digest(told) == digest(large)
    sizes = [3, 1, 5, 2, 4]
    found = group.divided(sizes, lambda at: np.full(sizes[at], 10 * at + 1.5))
    assert [array.tolist() for array in found] == [[10 * at + 1.5] * size for at, size in enumerate(sizes)]
    assert group.told({"text": "é", "values": [1.5, None]} if group.leads else None)["text"] == "é"
    counts = [rank % 2 for rank in range(size)]
    rows = mx.full((counts[group.rank], 2, 3), group.rank + 0.1, mx.bfloat16)
    assert (
        np.array(group.rows(rows, counts).astype(mx.float32))[:, 0, 0].round().tolist()
        == [float(rank) for rank in range(size) if rank % 2]
        or size == 1
    )
    odd = {"minus": mx.array([-0.0, float("nan"), 1.0]), "half": mx.array([0.1], mx.bfloat16), "no": mx.zeros((0, 2))}
    mine = odd if group.leads else {name: mx.zeros_like(array) for name, array in odd.items()}
    whole = group.given(mine)
    assert {name: (array.shape, array.dtype) for name, array in whole.items()} == {
        name: (array.shape, array.dtype) for name, array in odd.items()
    }
    assert digest(whole) == digest(odd)
    parts = [list(group.part(10, rank=rank)) for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(10)) and max(map(len, parts)) - min(
        map(len, parts)
    ) <= 1
    digests = group.gather([np.array([digest(total)])])
    assert len({int(part[0][0]) for part in digests}) == 1


def often(group, times):
    values = mx.array(np.arange(1000, dtype=np.float32))
    for time in range(times):
        total = group.total({"values": values + time})["values"]
        assert np.array_equal(np.array(total), group.size * np.arange(1000) + group.size * time), time


def serve(requests, answers, arguments):
    order = json.loads(arguments[0])
    try:
        group = followed(order, requests, answers)
        exchanged(group)
        often(group, order["times"])
        group._come()
    except Exception as error:
        os.write(answers, json.dumps({"failed": repr(error)}).encode() + b"\n")
    os._exit(0)


def lead(processes, times):
    with local_group(Path(__file__), {"times": times}, processes=processes, patience=60.0) as group:
        exchanged(group)
        often(group, times)
        group._come()


def join(rank, hosts, times):
    ring = Ring(joined(rank, hosts, 60.0), 60.0)
    exchanged(ring)
    often(ring, times)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        join(int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    else:
        if os.environ.get("MEMFD") == "no":
            vars(os).pop("memfd_create", None)
        lead(int(sys.argv[1]), int(sys.argv[2]))
