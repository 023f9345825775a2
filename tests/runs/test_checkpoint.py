import json
import resource
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.config.sections import OptimizerSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import MANIFEST, Checkpoint, alike, folder_of, load, newest, save, steps, verify
from mlx_ppo.stages.optimizer import Optimizer


def content(step=1, seed=0):
    arrays = {f"a.{i}": mx.random.normal((3, 5), key=mx.random.key(seed + i)) for i in range(3)}
    odd = {
        "scalar": mx.array(7, mx.uint64),
        "half": mx.array([1.1, -0.0], mx.float16),
        "brain": mx.array([1.1, 3e38], mx.bfloat16),
        "bits": mx.array([float("nan"), float("-inf"), 1e-45]),
        "none": mx.zeros((0, 3)),
    }
    state = {"cursor": step * 32, "kl": {"coef": 0.1 + seed}, "best": None, "nested": [1, 2.5, "ü"]}
    return Checkpoint(step, {"adapters": arrays, "optimizer": odd}, state, {"adapter_config.json": {"rank": 8}})


def put(run, step, *, seed=0, keep_last=9, best=None):
    return save(run, content(step, seed), keep_last=keep_last, best=best)


def raw(array):
    return array.dtype, array.shape, bytes(memoryview(array.view(mx.uint8) if array.size and array.ndim else array))


def assert_equal(loaded, saved):
    assert loaded.step == saved.step and loaded.documents == saved.documents
    assert {key: loaded.state[key] for key in saved.state} == saved.state
    assert {name: {key: raw(a) for key, a in arrays.items()} for name, arrays in loaded.arrays.items()} == {
        name: {key: raw(a) for key, a in arrays.items()} for name, arrays in saved.arrays.items()
    }


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path):
    folder = put(tmp_path, 12)
    assert folder == folder_of(tmp_path, 12) and folder.name == "000012" and verify(folder) == ""
    assert_equal(load(tmp_path, 12), content(12))
    save(tmp_path, load(tmp_path, 12), keep_last=1, best=None)  # a loaded one can be saved again
    assert_equal(load(tmp_path, 12), content(12))
    assert steps(tmp_path) == [12] and [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_an_optimizer_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    section = OptimizerSection(learning_rate=0.1, schedule="cosine", warmup_steps=2, weight_decay=0.01)
    weights, optimizer = Weights({"w": mx.ones((4, 4))}), Optimizer(section, learning_rate=0.1, total_steps=4)

    def gradient(step):  # drawn anew: a step uses it up
        return {"w": mx.random.normal((4, 4), key=mx.random.key(10 + step))}

    for step in range(4):
        if step == 2:
            arrays = {"adapters": weights.arrays, "optimizer": optimizer.state()}
            save(tmp_path, Checkpoint(step, arrays, {"steps": optimizer.steps}, {}), keep_last=1, best=None)
        weights, _ = optimizer.step(CpuEngine(), weights, gradient(step), what="policy")
    saved = load(tmp_path, 2)
    again = Optimizer(section, learning_rate=0.1, total_steps=4)
    again.load(dict(saved.arrays["optimizer"]), saved.state["steps"])
    resumed = Weights({"w": mx.ones((4, 4))}).holding(dict(saved.arrays["adapters"]))
    for step in (2, 3):
        resumed, _ = again.step(CpuEngine(), resumed, gradient(step), what="policy")
    assert raw(resumed.arrays["w"]) == raw(weights.arrays["w"]) and again.steps == optimizer.steps
    assert {k: raw(a) for k, a in again.state().items()} == {k: raw(a) for k, a in optimizer.state().items()}


FILES = ("adapters.safetensors", "optimizer.safetensors", "state.json", "adapter_config.json", MANIFEST)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_in_every_file_and_named(tmp_path, name):
    folder = put(tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    whole = (folder / name).read_bytes()
    positions = range(len(whole)) if name == MANIFEST else np.unique(np.linspace(0, len(whole) - 1, 25, dtype=int))
    for position in positions:
        for bit in (0, 5, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            (folder / name).write_bytes(damaged)
            assert verify(folder).startswith(f"{folder / name}: "), (position, bit)
    with pytest.raises(RunError, match=name):
        load(tmp_path, 1)
    (folder / name).write_bytes(whole)
    assert verify(folder) == ""
    for damaged in (whole[:-2], whole + b"\0", b""):
        (folder / name).write_bytes(damaged)
        assert verify(folder).startswith(f"{folder / name}: ")
    (folder / name).unlink()
    assert verify(folder).startswith(f"{folder / name}: missing")


def test_a_damaged_one_is_refused_and_another_one_named(tmp_path):
    put(tmp_path, 1)
    folder = put(tmp_path, 2)
    (folder / MANIFEST).unlink()
    with pytest.raises(RunError, match=r"manifest\.json: missing or damaged; the checkpoint of step 1 is still there$"):
        load(tmp_path, 2)
    for text in ("[]", "{}", '{"state.json": 3}', '{"manifest.json": ""}'):
        (folder / MANIFEST).write_text(text)
        assert verify(folder) == f"{folder / MANIFEST}: missing or damaged"
    shutil.rmtree(folder_of(tmp_path, 1))
    with pytest.raises(RunError, match=r"damaged$"):
        load(tmp_path, 2)
    with pytest.raises(RunError, match=r"manifest\.json: missing"):
        load(tmp_path, 3)


def test_files_that_are_not_in_the_manifest_are_not_loaded(tmp_path):
    folder = put(tmp_path, 1)
    shutil.copy(folder / "adapters.safetensors", folder / "critic.safetensors")
    (folder / "more.json").write_text("{")
    assert_equal(load(tmp_path, 1), content(1))


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    put(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(RunError, match="000001: written in format 2; this version reads format 1"):
        load(tmp_path, 1)


def calls(monkeypatch, owner, name, fail_at):
    """Let the call number `fail_at` of a function fail; returns the list that counts them."""
    original, made = getattr(owner, name), []

    def call(*args, **kwargs):
        made.append(args)
        if len(made) == fail_at:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return made


def test_a_full_disk_in_the_middle_of_a_file(tmp_path):
    put(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))  # bytes a file; a write beyond fails as on a full disk
    try:
        with pytest.raises(RunError, match="cannot be written"):
            put(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(tmp_path) == [1] and len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert_equal(load(tmp_path, 1), content(1))


def test_a_write_that_goes_wrong_silently_is_found_before_anything_goes(tmp_path, monkeypatch):
    put(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "sync", lambda path: path.is_file() and path.write_bytes(b"lost"))
    for step in (1, 2):
        with pytest.raises(RunError, match=r"missing or damaged|damaged"):
            put(tmp_path, step, seed=1, keep_last=1)
    monkeypatch.undo()
    assert_equal(load(tmp_path, 1), content(1))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_saving_the_same_again_touches_nothing(tmp_path, monkeypatch):
    inode = put(tmp_path, 1).stat().st_ino
    made = calls(monkeypatch, checkpoint.os, "rename", 1)
    assert put(tmp_path, 1).stat().st_ino == inode and made == []
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_damaged_one_is_replaced(tmp_path):
    (put(tmp_path, 1) / "state.json").write_text("{}")
    put(tmp_path, 1)
    assert_equal(load(tmp_path, 1), content(1))


def test_a_checkpoint_in_a_folder_of_another_name_is_refused(tmp_path):
    put(tmp_path, 1).rename(folder_of(tmp_path, 7))
    with pytest.raises(RunError, match=r"000007: holds the checkpoint of step 1; give the folder its name back"):
        load(tmp_path, 7)


def test_one_that_stood_aside_when_the_process_was_killed_comes_back(tmp_path):
    put(tmp_path, 1)
    folder = put(tmp_path, 2)
    folder.rename(folder.with_name(".000002.old"))
    shutil.copytree(folder_of(tmp_path, 1), tmp_path / "checkpoints/.000001.old")
    assert steps(tmp_path) == [1]
    assert_equal(newest(tmp_path), content(2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000001", "000002"]
    assert newest(tmp_path / "other") is None


def test_arrays_of_another_shape_are_not_taken():
    one = {"a": mx.zeros((2, 3))}
    assert alike(one, {"a": mx.ones((2, 3))}) and not alike(one, {"a": mx.ones((3, 2))}) and not alike(one, {})


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path):
    put(tmp_path, 1)
    for name in (".000002.new", ".000003.new", ".000004.old"):
        shutil.copytree(folder_of(tmp_path, 1), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/000007.bak").mkdir()
    assert steps(tmp_path) == [1]
    put(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000001", "000002", "000007.bak"]


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(1, None, [5]), (2, None, [4, 5]), (9, None, [1, 2, 3, 4, 5]), (2, 2, [2, 4, 5]), (2, 5, [4, 5]), (1, 1, [1, 5])],
)
def test_rotation_keeps_the_last_and_the_best(tmp_path, keep_last, best, kept):
    for step in range(1, 6):
        put(tmp_path, step, keep_last=keep_last, best=best)
    assert steps(tmp_path) == kept
    assert all(verify(folder_of(tmp_path, step)) == "" for step in kept)


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    def killed(path, **_):
        if (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            raise KeyboardInterrupt

    put(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2] and len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert_equal(newest(tmp_path), content(2))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_steps_are_sorted_as_numbers(tmp_path):
    assert steps(tmp_path) == []
    for step in (1_000_000, 999_999, 2):
        put(tmp_path, step)
    assert steps(tmp_path) == [2, 999_999, 1_000_000]


def test_checkpoints_are_private_and_plain_files(tmp_path):
    folder = put(tmp_path, 1)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert set(json.loads((folder / MANIFEST).read_text())) == set(FILES)
    assert set(mx.load(str(folder / "adapters.safetensors"))) == {"a.0", "a.1", "a.2"}
