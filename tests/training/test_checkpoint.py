import contextlib
import errno
import functools
import itertools
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from errors import UserError, warn_once
from sagan_models import Discriminator, Generator
from training import checkpoint

SIZES = dict(model="sagan", imsize=32, z_dim=16, g_conv_dim=8, d_conv_dim=8, conditional=False,
             attention="full")  # fmt: skip


@functools.cache
def zeros():
    """State dicts of G and D filled with zeros."""
    networks = Generator(32, 16, 8).state_dict(), Discriminator(32, 8).state_dict()
    return [{key: torch.zeros_like(value) for key, value in weights.items()} for weights in networks]


def make_state(step, first=None):
    """The state of a checkpoint in which every tensor counts from `first`, by default the step."""
    first = step if first is None else first
    G, D = ({key: count_from(first, value) for key, value in weights.items()} for weights in zeros())
    return {"step": step, "G": G, "D": D, "numbers": count_from(first, torch.zeros(1000))}


def count_from(first, like):
    return torch.arange(first, first + like.numel()).reshape(like.shape).to(like.dtype)


def save_weights(folder, name, state):
    """Weights without a state file, as the reference saves them."""
    for part in ("G", "D"):
        torch.save(state[part], folder / f"{name}_{part}.pth")


def assert_is(loaded, step, first=None, full=True):
    expected = make_state(step, first)
    assert loaded.step == step
    for weights, part in ((loaded.G, "G"), (loaded.D, "D")):
        assert weights.keys() == expected[part].keys()
        assert all(torch.equal(value, expected[part][key]) for key, value in weights.items())
    assert (loaded.state is not None) == full
    if full:
        assert loaded.state["step"] == step
        assert torch.equal(loaded.state["numbers"], expected["numbers"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps):
    return sorted(f"{step}_{part}.pth" for step in steps for part in ("G", "D", "state"))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path):
    checkpoint.save(tmp_path, 7, make_state(7))
    assert_is(checkpoint.load(tmp_path, "7"), 7)
    assert names(tmp_path) == files_of(7)


def test_exports_are_the_state_dicts_of_the_networks(tmp_path):
    checkpoint.save(tmp_path, 7, make_state(7))
    for part, network in (("G", Generator(32, 16, 8)), ("D", Discriminator(32, 8))):
        network.load_state_dict(torch.load(tmp_path / f"7_{part}.pth", weights_only=True), strict=True)
        assert all(torch.equal(value, make_state(7)[part][key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("change", [Path.unlink, flip_a_bit, lambda path: torch.save({"other": torch.ones(2)}, path)])
def test_a_full_checkpoint_needs_no_exports(tmp_path, change):
    checkpoint.save(tmp_path, 5, make_state(5))
    checkpoint.save(tmp_path, 7, make_state(7))
    for part in ("G", "D"):
        change(tmp_path / f"7_{part}.pth")
    for wanted in ("7", "latest"):
        assert_is(checkpoint.load(tmp_path, wanted), 7)


def test_latest_is_the_newest_full_checkpoint(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, make_state(step))
    save_weights(tmp_path, 200, make_state(200))
    (tmp_path / "300_G.pth").write_bytes(b"no D beside it")
    assert checkpoint.list_steps(tmp_path) == [100, 10, 9, 200]
    assert_is(checkpoint.load(tmp_path, "latest"), 100)


def test_latest_falls_back_to_weights_only(tmp_path):
    for step in (5, 20):
        save_weights(tmp_path, step, make_state(step))
    assert_is(checkpoint.load(tmp_path, "latest"), 20, full=False)


def test_a_missing_step_lists_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="--pretrained_model latest"):
        checkpoint.load(tmp_path, "latest")
    for step in (10, 20):
        checkpoint.save(tmp_path, step, make_state(step))
    with pytest.raises(UserError, match="10, 20"):
        checkpoint.load(tmp_path, "15")


@pytest.mark.parametrize(
    "name, value", [("model", "paper"), ("imsize", 64), ("z_dim", 128), ("g_conv_dim", 64), ("d_conv_dim", 64)]
)
def test_an_architecture_mismatch_names_the_option(tmp_path, name, value):
    checkpoint.save(tmp_path, 1, make_state(1))
    with pytest.raises(UserError, match=f"--{name} {SIZES[name]}.*{value}") as error:
        checkpoint.check_architecture(checkpoint.load(tmp_path, "1"), SIZES | {name: value})
    assert str(error.value).count("--") == 1


@pytest.mark.parametrize("part", ["G", "D", "state"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 500),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_text("weights"),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"G": 1}, path),
        flip_a_bit,
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, part, damage):
    if part == "state":
        checkpoint.save(tmp_path, 1, make_state(1))
    else:
        save_weights(tmp_path, 1, make_state(1))
    damage(tmp_path / f"1_{part}.pth")
    with pytest.raises(UserError, match="checkpoint") as error:
        checkpoint.saved_architecture(checkpoint.load(tmp_path, "1"))
    assert "\n" not in str(error.value)


def test_weights_of_other_networks_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1, "G": {"weight": torch.ones(2)}, "D": {"weight": torch.ones(2)}})
    with pytest.raises(UserError, match="--model"):
        checkpoint.saved_architecture(checkpoint.load(tmp_path, "1"))


def test_the_prefix_of_the_references_parallel_is_removed(tmp_path):
    state = make_state(1)
    for part in ("G", "D"):
        prefixed = {f"module.{key}": value for key, value in state[part].items()}
        torch.save(prefixed, tmp_path / f"1_{part}.pth")
    assert_is(checkpoint.load(tmp_path, "1"), 1, full=False)


def test_files_of_torchs_format_before_zip_load(tmp_path):
    state = make_state(1)
    for part in ("G", "D"):
        torch.save(state[part], tmp_path / f"1_{part}.pth", _use_new_zipfile_serialization=False)
    assert_is(checkpoint.load(tmp_path, "1"), 1, full=False)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("part", ["G", "state"])
@pytest.mark.parametrize(
    "write",
    [lambda path, content: torch.save(content, path), lambda path, content: path.write_bytes(pickle.dumps(content, 2))],
)
def test_code_in_a_checkpoint_does_not_run(tmp_path, part, write):
    save_weights(tmp_path, 1, make_state(1))
    write(tmp_path / f"1_{part}.pth", {"l1": Bomb(tmp_path / "ran")})
    with pytest.raises(UserError, match=f"1_{part}.pth"):
        checkpoint.load(tmp_path, "1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize("part", ["G", "D", "state"])
def test_a_full_disk_leaves_the_older_checkpoint_and_no_temporary_file(tmp_path, part):
    checkpoint.save(tmp_path, 1, make_state(1))
    (tmp_path / f"2_{part}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left.*--pretrained_model latest"):
        checkpoint.save(tmp_path, 2, make_state(2))
    assert names(tmp_path) == files_of(1)


@pytest.mark.parametrize("wanted", ["latest", "20"])
def test_latest_falls_back_from_a_damaged_checkpoint(tmp_path, capsys, wanted):
    """One changed bit among the weights: torch itself would read it."""
    for step in (10, 20):
        checkpoint.save(tmp_path, step, make_state(step))
    flip_a_bit(tmp_path / "20_state.pth")
    torch.load(tmp_path / "20_state.pth", weights_only=True)
    if wanted == "latest":
        assert_is(checkpoint.load(tmp_path, wanted), 10)
        assert "20_state.pth" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"20_state\.pth"):
            checkpoint.load(tmp_path, wanted)


class Killed(BaseException):
    """Raised in place of SIGKILL."""


def save_until(monkeypatch, point, *arguments, **options):
    """Save until the call number `point` that touches the disk; it and all later ones fail, as after SIGKILL.

    Returns whether the save ended before it.
    """
    calls = itertools.count(1)

    def killed_at_the_point(original):
        def call(*args, **kwargs):
            if next(calls) >= point:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, killed_at_the_point(getattr(owner, name)))
        try:
            checkpoint.save(*arguments, **options)
        except Killed:
            return False
    return True


@pytest.mark.parametrize(
    "name, step, before",
    [
        pytest.param(3, 3, {1: 1, 2: 2}, id="a new one"),
        pytest.param(2, 2, {1: 1, 2: 2}, id="one that exists"),
        pytest.param(1, 1, {}, id="the first one"),
        pytest.param("best", 3, {"best": 2}, id="the best one"),
        pytest.param("best", 3, {}, id="the first best one"),
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, name, step, before):
    """`before`: the checkpoints that exist, and their steps. The tensors of the new one count from 9."""
    wanted = "best" if name == "best" else "latest"
    outcomes = []
    for point in itertools.count(1):
        folder = tmp_path / str(point)
        folder.mkdir()
        for other, other_step in before.items():
            checkpoint.save(folder, other, make_state(other_step))
        ended = save_until(monkeypatch, point, folder, name, make_state(step, 9), keep_checkpoints=1)

        # What the next run finds, before and after it has cleared up.
        for _ in range(2):
            path = folder / f"{name}_state.pth"
            is_new = path.exists() and bool(torch.load(path)["numbers"][0] == 9)
            if is_new:
                assert_is(checkpoint.load(folder, wanted), step, 9)
            elif before:
                assert_is(checkpoint.load(folder, wanted), max(before.values()))
            else:
                assert checkpoint.list_steps(folder) == []
            checkpoint.remove_unfinished(folder)
            assert not list(folder.glob("*.tmp"))
        outcomes.append(is_new)

        checkpoint.save(folder, name, make_state(step, 9), keep_checkpoints=1)
        assert_is(checkpoint.load(folder, wanted), step, 9)
        assert all(torch.load(folder / f"{name}_{part}.pth")["attn1.gamma"] == 9 for part in "GD")
        if ended:
            break
    assert outcomes == sorted(outcomes)  # once renamed, it stays
    assert outcomes.count(False) >= 6 and outcomes.count(True) >= 5


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed where the system can")
def test_files_are_flushed_before_they_are_renamed_and_the_folder_before_others_are_removed(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, make_state(1))
    calls = []
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _name=name, _do=original, **k: calls.append(_name) or _do(*a, **k))
    checkpoint.save(tmp_path, 2, make_state(2), keep_checkpoints=1)
    assert calls[:8] == ["fsync"] * 3 + ["replace"] * 3 + ["fsync", "unlink"]


@pytest.mark.parametrize("point", range(1, 20))
def test_a_kill_loses_no_weights_when_older_checkpoints_are_pruned(tmp_path, monkeypatch, point):
    checkpoint.save(tmp_path, 1, make_state(1))
    save_until(monkeypatch, point, tmp_path, 2, make_state(2), keep_checkpoints=1)
    checkpoint.remove_unfinished(tmp_path)
    present = checkpoint.list_steps(tmp_path)
    checkpoint.save(tmp_path, 3, make_state(3), keep_checkpoints=1)
    for step in present:
        loaded = checkpoint.load(tmp_path, str(step))
        assert_is(loaded, step, full=loaded.state is not None)


def test_old_checkpoints_are_pruned(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, make_state(step), keep_checkpoints=2)
    left = {
        part: sorted(int(path.name.split("_")[0]) for path in tmp_path.glob(f"*_{part}.pth"))
        for part in ("G", "D", "state")
    }
    assert left == {"G": [*range(1, 8)], "D": [*range(1, 8)], "state": [6, 7]}


def test_pruning_keeps_later_checkpoints(tmp_path):
    for step in (1, 2, 50, 60, 3):
        checkpoint.save(tmp_path, step, make_state(step), keep_checkpoints=1)
    assert sorted(path.name for path in tmp_path.glob("*_state.pth")) == ["3_state.pth", "60_state.pth"]


def test_a_state_file_without_exports_is_not_pruned(tmp_path):
    checkpoint.save(tmp_path, 1, make_state(1))
    (tmp_path / "1_G.pth").unlink()
    for step in (2, 3):
        checkpoint.save(tmp_path, step, make_state(step), keep_checkpoints=1)
    assert_is(checkpoint.load(tmp_path, "1"), 1)
    assert not (tmp_path / "2_state.pth").exists()


def test_a_checkpoint_for_resuming_only_has_no_exports_and_does_not_stay(tmp_path):
    for step, export in ((1, True), (2, False), (3, False), (4, True)):
        checkpoint.save(tmp_path, step, make_state(step), export=export, keep_checkpoints=2)
        assert_is(checkpoint.load(tmp_path, "latest"), step)
    assert names(tmp_path) == ["1_D.pth", "1_G.pth", "3_state.pth", *files_of(4)]
    assert checkpoint.list_steps(tmp_path) == [4, 3, 1]


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    checkpoint.save(tmp_path / "models" / "v", 1, make_state(1))
    assert_is(checkpoint.load(tmp_path / "models" / "v", "1"), 1)


def test_a_generator_alone_is_enough_where_d_is_not_needed(tmp_path):
    save_weights(tmp_path, 500, make_state(500))
    save_weights(tmp_path, 600, make_state(600))
    (tmp_path / "600_D.pth").unlink()
    alone = checkpoint.load(tmp_path, "latest", needs_D=False)
    assert alone.step == 600 and alone.D is None and alone.state is None
    assert checkpoint.saved_architecture(alone) == {name: SIZES[name] for name in SIZES if name != "d_conv_dim"}
    assert checkpoint.load(tmp_path, "latest").step == 500
    (tmp_path / "500_D.pth").unlink()
    for wanted in ("latest", "600"):
        with pytest.raises(UserError, match=r"600_D\.pth is missing"):
            checkpoint.load(tmp_path, wanted)


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed where the system can")
@pytest.mark.parametrize("number, is_refusal", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_folders_is_a_warning(tmp_path, monkeypatch, capsys, number, is_refusal):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    warn_once.cache_clear()
    with contextlib.nullcontext() if is_refusal else pytest.raises(UserError):
        for step in (1, 2):
            checkpoint.save(tmp_path, step, make_state(step))
    assert capsys.readouterr().err.count("warning") == is_refusal
    assert_is(checkpoint.load(tmp_path, "latest"), 2 if is_refusal else 1)


def test_only_its_own_unfinished_files_are_removed(tmp_path):
    for name in ("5_state.tmp", "best_G.tmp", "my_G.tmp", "notes_state.tmp"):
        (tmp_path / name).touch()
    checkpoint.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["my_G.tmp", "notes_state.tmp"]


def test_the_best_checkpoint_is_kept_beside_the_others(tmp_path):
    with pytest.raises(UserError, match="--pretrained_model best"):
        checkpoint.load(tmp_path, "best")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_state(step), keep_checkpoints=1)
    checkpoint.save(tmp_path, "best", make_state(2), keep_checkpoints=1)
    assert_is(checkpoint.load(tmp_path, "best"), 2)
    assert checkpoint.list_steps(tmp_path) == [3, 2, 1]
    checkpoint.save(tmp_path, "best", make_state(3))
    assert_is(checkpoint.load(tmp_path, "best"), 3)
    os.truncate(tmp_path / "best_state.pth", 1000)
    with pytest.raises(UserError, match=r"best_state\.pth"):
        checkpoint.load(tmp_path, "best")


def test_errors_of_unfitting_content_become_one_line():
    with pytest.raises(UserError, match="checkpoint 5") as error, checkpoint.reraise_load_errors(5):
        raise RuntimeError("size mismatch for l1:\n\tcopying a param")
    assert "\n" not in str(error.value)
    with pytest.raises(ZeroDivisionError), checkpoint.reraise_load_errors(5):
        raise ZeroDivisionError
