"""A checkpoint at every point where writing it can fail or be killed, and with every kind of damage."""

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ppo.errors import RunError
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import folder_of, load, newest, require_sound, steps, verify

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint import assert_equal, content, put

# Everything that writes: the owner, the name, and whether the file stays behind half written.
POINTS = (
    (mx, "save_safetensors", True),
    (Path, "write_text", True),
    (Path, "mkdir", False),
    (os, "fsync", False),
    (os, "rename", False),
    (checkpoint, "sha256", False),  # reads, of what was written
)
# The step that is saved where there are checkpoints of these steps already.
CASES = {"the first": ((), 1), "a later one": ((1,), 2), "the same step again": ((1,), 1)}


def faulty(patch, fail_at, fail):
    """Let the call number `fail_at` of all that writes fail; returns the list of calls made."""
    made = []

    def wrap(owner, name, halves):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            made.append(name)
            if len(made) != fail_at:
                return original(*args, **kwargs)
            if halves:
                original(*args, **kwargs)
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            return fail()

        patch(owner, name, call)

    for point in POINTS:
        wrap(*point)
    return made


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_either(found, step, before):
    """The checkpoint that is there is the one from before, or all of the new one."""
    seed = found.state["kl"]["coef"] - 0.1
    assert (found.step, round(seed)) in {(step, 5), *((old, 0) for old in before)}
    assert_equal(found, content(found.step, round(seed)))


def hidden(run):
    return [path.name for path in run.glob("checkpoints/.*")]


@pytest.mark.parametrize("case", CASES)
def test_a_failure_at_every_write_keeps_the_earlier_checkpoint_and_leaves_nothing(tmp_path, monkeypatch, case):
    before, step = CASES[case]
    for number in itertools.count(1):
        run = tmp_path / str(number)
        run.mkdir()
        for old in before:
            put(run, old)
        error = None
        with monkeypatch.context() as patch:
            made = faulty(patch.setattr, number, full)
            try:
                put(run, step, seed=5, keep_last=1)
            except RunError as caught:
                error = str(caught)
        if len(made) < number:  # there is no further point
            assert error is None and steps(run) == [step]
            break
        assert "\n" not in str(error), made
        assert all(verify(folder_of(run, old)) == "" for old in steps(run)) and hidden(run) == [], made
        assert set(before) <= set(steps(run)), made
        if error is None:  # the old one could not be removed; or, of the same step, not be read, and was replaced
            assert (made[number - 1], steps(run)) in (("rename", [1, 2]), ("sha256", [1])), made
        else:
            assert f"{step:06d}: the checkpoint cannot be written (" in error and "earlier ones are untouched" in error
        if steps(run):
            is_either(newest(run), step, before)
        put(run, step, seed=5, keep_last=1)  # and the next attempt succeeds
        assert_equal(load(run, step), content(step, 5))
        assert steps(run) == [step] and hidden(run) == []
    assert number > 18 and {"save_safetensors", "write_text", "mkdir", "fsync", "rename", "sha256"} == set(made)


KILLED = """
import itertools, json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint_faults import faulty, put
root, step = Path(sys.argv[2]), int(sys.argv[3])
calls = []
for number in itertools.count(1):
    shutil.copytree(root / "before", root / str(number))
    child = os.fork()  # nothing has been computed yet, so mlx has no threads
    if child == 0:
        made = faulty(setattr, number, lambda: os._exit(9))
        put(root / str(number), step, seed=5, keep_last=1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 9:
        break
print(number)
"""


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_every_write_leaves_a_checkpoint_to_go_on_from(tmp_path, case):
    before, step = CASES[case]
    (tmp_path / "before").mkdir()
    for old in before:
        put(tmp_path / "before", old)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(step)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stderr
    last, aside = int(shown.stdout), 0
    assert last > 18
    for number in range(1, last):
        run = tmp_path / str(number)
        aside += steps(run) == [] and (run / "checkpoints/.000001.old").exists()
        found = newest(run)
        assert found is not None or not before
        if found is not None:
            is_either(found, step, before)
        assert all(verify(folder_of(run, old)) == "" for old in steps(run))
        assert hidden(run) == []
    assert aside == (case == "the same step again")  # the only moment without one in its place
    assert_equal(load(tmp_path / str(last), step), content(step, 5))


def damages(files, generator):
    """1,000 single bytes changed to another value, and some truncations and additions: file name, new content."""
    for _ in range(1000):
        name = generator.choice(sorted(files))
        damaged = bytearray(files[name])
        damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
        yield name, bytes(damaged)
    for name, whole in files.items():
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            yield name, whole[:cut]
        for more in (b"\0", b"\n", b" ", b"}", whole):
            yield name, whole + more


def test_every_changed_byte_is_found_and_the_file_named(tmp_path):
    put(tmp_path, 1)
    folder = put(tmp_path, 2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen = dict.fromkeys(files, 0)
    for name, damaged in damages(files, random.Random(0)):
        (folder / name).write_bytes(damaged)
        assert verify(folder).startswith(f"{folder / name}: "), (name, damaged)
        for read in (lambda: load(tmp_path, 2), lambda: require_sound(tmp_path)):
            with pytest.raises(RunError) as caught:
                read()
            assert str(caught.value).startswith(f"{folder / name}: ") and str(caught.value).count("\n") == 0
        (folder / name).write_bytes(files[name])
        seen[name] += 1
    assert verify(folder) == "" and min(seen.values()) > 150 and sum(seen.values()) == 1000 + 9 * len(files)


def test_the_manifest_has_one_spelling(tmp_path):
    """Other white space is the same JSON, and still not what was written."""
    folder = put(tmp_path, 1)
    manifest = folder / checkpoint.MANIFEST
    document = json.loads(manifest.read_text())
    for text in (json.dumps(document), json.dumps(document, indent="\t"), manifest.read_text().replace("\n", "\r\n")):
        manifest.write_bytes(text.encode())
        assert verify(folder) == f"{manifest}: missing or damaged"


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 64 KB, in a user namespace of its own."""
    code = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint_faults import RunError, assert_equal, content, hidden, load, put, steps
run = Path(sys.argv[2])
put(run, 1)
free, number = shutil.disk_usage(run).free, 0
while shutil.disk_usage(run).free:
    number += 1
    try:
        (run / f"filling-{number}").write_bytes(b"x" * 4096)
    except OSError:
        break
for left in range(number + 1):  # every amount of free space, in blocks
    for step in (1, 2):
        try:
            put(run, step, seed=5, keep_last=1)
        except RunError as error:
            assert "No space left" in str(error) or "Unable to write" in str(error), error
            assert_equal(load(run, 1), content(1))
            assert steps(run) == [1] and hidden(run) == []
        else:
            print(left, step)
            sys.exit()
    (run / f"filling-{number - left}").unlink()
"""
    mount = 'mount -t tmpfs -o size=64k tmpfs "$3" && exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, code, str(Path(__file__).parent), str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "-c", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout.split()[0]) > 2, shown.stdout  # it failed with so many blocks free, and then it fitted
