import contextlib
import errno
import itertools
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from errors import UserError, warn_once
from training import checkpoint
from utils import write_atomically


def make_state(step, first=None):
    """The state of a checkpoint in which every tensor counts from `first`, by default the step."""
    numbers = torch.arange(1000.0) + (step if first is None else first)
    return {"step": step, "G": {"weight": numbers}, "D": {"weight": -numbers}, "numbers": numbers}


def save(folder, *steps, **options):
    for step in steps:
        checkpoint.save(folder, step, make_state(step), **options)


def save_weights(folder, *steps):
    """Weights without a state file, as the reference saves them."""
    for step, part in itertools.product(steps, "GD"):
        torch.save(make_state(step)[part], folder / f"{step}_{part}.pth")


def assert_is(loaded, step, first=None, full=True):
    expected = make_state(step, first)
    assert loaded.step == step
    for weights, part in ((loaded.G, "G"), (loaded.D, "D")):
        assert weights.keys() == {"weight"} and torch.equal(weights["weight"], expected[part]["weight"])
    assert (loaded.state is not None) == full
    assert not full or torch.equal(loaded.state["numbers"], expected["numbers"])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice


@pytest.mark.parametrize("change", [Path.unlink, flip_a_bit])
@pytest.mark.parametrize("part", ["G", "D"])
def test_weights_need_their_files_and_a_full_checkpoint_does_not(tmp_path, part, change):
    save(tmp_path, 5, 7)
    change(tmp_path / f"7_{part}.pth")
    for wanted in ("7", "latest", tmp_path / "7_state.pth"):
        assert_is(checkpoint.load(tmp_path, wanted), 7)
    (tmp_path / "7_state.pth").unlink()
    with pytest.raises(UserError, match=rf"7_{part}\.pth"):
        checkpoint.load(tmp_path, tmp_path / "7_G.pth")


def test_latest_is_the_newest_full_checkpoint_then_the_newest_weights_a_generator_alone_only_for_a_test(tmp_path):
    save_weights(tmp_path, 20, 200, 300)
    (tmp_path / "300_D.pth").unlink()
    assert_is(checkpoint.load(tmp_path, "latest"), 200, full=False)
    alone = checkpoint.load(tmp_path, "latest", needs_D=False)
    assert (alone.step, alone.D, alone.state) == (300, None, None)
    for wanted in ("300", tmp_path / "300_G.pth"):
        with pytest.raises(UserError, match=r"300_D\.pth is missing"):
            checkpoint.load(tmp_path, wanted)
    save(tmp_path, 9, 10, 100)
    assert checkpoint.list_steps(tmp_path) == [100, 10, 9, 200, 20]
    assert_is(checkpoint.load(tmp_path, "latest"), 100)


@pytest.mark.parametrize("damage", [
    flip_a_bit, lambda path: os.truncate(path, 500), lambda path: os.truncate(path, 0),
    lambda path: path.write_text("weights"), lambda path: torch.save([1], path),
    lambda path: torch.save({"step": 1}, path),
])  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_and_latest_falls_back_from_it(tmp_path, capsys, damage):
    save(tmp_path, 10, 20)
    damage(tmp_path / "20_state.pth")
    with pytest.raises(UserError, match="checkpoint") as error:
        checkpoint.load(tmp_path, "20")
    assert "\n" not in str(error.value)
    assert_is(checkpoint.load(tmp_path, "latest"), 10)
    assert capsys.readouterr().err == f"warning: {error.value}; falling back to the previous checkpoint\n"


def test_weights_of_the_references_parallel_and_of_torchs_format_before_zip(tmp_path):
    for part, weights in (("G", make_state(1)["G"]), ("D", make_state(1)["D"])):
        prefixed = {f"module.{key}": value for key, value in weights.items()}
        torch.save(prefixed, tmp_path / f"mine_{part}.pth", _use_new_zipfile_serialization=False)
    assert_is(checkpoint.load(tmp_path, tmp_path / "mine_G.pth"), 0, first=1, full=False)


@pytest.mark.parametrize("name", ["1_G.pth", "1_state.pth", "best_state.pth"])
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_checkpoint_does_not_run(tmp_path, name, write):
    save_weights(tmp_path, 1)
    bomb = type("Bomb", (), {"__reduce__": lambda _: (os.mkdir, (str(tmp_path / "ran"),))})()
    write({"l1": bomb}, tmp_path / name)
    assert checkpoint.peek(tmp_path, "best") == {}
    with pytest.raises(UserError, match=name):
        checkpoint.load(tmp_path, name.partition("_")[0])
    assert not (tmp_path / "ran").exists()


def save_until(point, *arguments, **options):
    """Save until the call `point` that touches the disk, which fails with all later ones; return whether it ended."""
    calls = itertools.count(1)

    def killed_at_the_point(original):
        def call(*args, **kwargs):  # a function, which a class binds
            if next(calls) >= point:
                raise KeyboardInterrupt  # in place of SIGKILL
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, killed_at_the_point(getattr(owner, name)))
        checkpoint.save(*arguments, **options)
        return True
    return False


@pytest.mark.parametrize("name, step, before", [
    (3, 3, {1: 1, 2: 2}), (2, 2, {1: 1, 2: 2}), (1, 1, {}), ("best", 3, {"best": 2}), ("best", 3, {}),
])  # fmt: skip
def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, name, step, before):
    """`before`: the checkpoints that exist, and their steps. The tensors of the new one count from 9."""
    wanted, new, outcomes, ended = "best" if name == "best" else "latest", make_state(step, 9), [], False
    while not ended:
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        for other, other_step in before.items():
            checkpoint.save(folder, other, make_state(other_step))
        ended = save_until(len(outcomes) + 1, folder, name, new, keep_checkpoints=1)

        def is_new(part, folder=folder):
            path = folder / f"{name}_{part}.pth"
            return path.exists() and torch.load(path).get("numbers" if part == "state" else "weight").abs()[0] == 9

        # What the next run finds, before and after it has cleared up.
        for _ in range(2):
            if is_new("state"):
                assert_is(checkpoint.load(folder, wanted), step, 9)
            elif before:
                assert_is(checkpoint.load(folder, wanted), max(before.values()))
            assert is_new("state") or not (is_new("G") or is_new("D"))
            checkpoint.remove_unfinished(folder)
            assert not list(folder.glob("*.tmp"))
        outcomes.append(is_new("state"))

        # It saves a later step, which removes older state files, but no weights; and it may save this one again.
        present = checkpoint.list_steps(folder)
        save(folder, 5, keep_checkpoints=1)
        assert all(checkpoint.load(folder, str(other)).step == other for other in present)
        checkpoint.save(folder, name, new, keep_checkpoints=1)
        assert is_new("state") and is_new("G") and is_new("D")
    assert outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1]  # once renamed, it stays


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed where the system can")
@pytest.mark.parametrize("number, is_refusal", [(errno.EINVAL, True), (errno.EIO, False)])
def test_files_are_flushed_before_they_are_renamed_then_the_folder(tmp_path, monkeypatch, capsys, number, is_refusal):
    """A file system that refuses to flush folders is a warning."""
    flushed, fsync, replace = {}, os.fsync, os.replace

    def flush(descriptor):
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)
        flushed[status.st_ino] = status.st_size

    def rename(source, target):
        assert flushed[os.stat(source).st_ino] == os.stat(source).st_size
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    warn_once.cache_clear()
    with contextlib.nullcontext() if is_refusal else pytest.raises(UserError, match="--pretrained_model auto"):
        save(tmp_path, 1, 2)
        write_atomically({tmp_path / "small": b"smaller than a buffer"})
    assert capsys.readouterr().err.count("warning") == is_refusal
    assert checkpoint.list_steps(tmp_path) == ([2, 1] if is_refusal else [1])


def test_old_checkpoints_lose_their_state_but_not_later_ones_nor_those_without_exports(tmp_path):
    save(tmp_path, 50, 60, 0, 1, 2)
    (tmp_path / "0_D.pth").unlink()
    os.truncate(tmp_path / "0_state.pth", 500)  # does not say whether it had exports
    (tmp_path / "1_G.pth").unlink()
    save(tmp_path, 3, 4, 5, keep_checkpoints=2)
    left = {path.name for path in tmp_path.glob("*_state.pth")}
    assert left == {f"{step}_state.pth" for step in (0, 1, 4, 5, 50, 60)}
    for step in (1, 2, 3):
        assert_is(checkpoint.load(tmp_path, str(step)), step, full=step == 1)
