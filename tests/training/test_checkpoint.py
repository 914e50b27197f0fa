import os
import pickle

import pytest
import torch

from errors import UserError
from sagan_models import Discriminator, Generator
from training import checkpoint

SIZES = dict(imsize=32, z_dim=16, g_conv_dim=8, d_conv_dim=8)


@pytest.fixture
def networks():
    return Generator(32, 16, 8).state_dict(), Discriminator(32, 8).state_dict()


def save(folder, step, networks, state=True):
    checkpoint.save(folder, step, *networks, {"step": step})
    if not state:
        (folder / f"{step}_state.pth").unlink()


def test_round_trip(tmp_path, networks):
    save(tmp_path, 7, networks)
    loaded = checkpoint.load(tmp_path, "7", SIZES)
    assert loaded.step == 7
    assert loaded.state["step"] == 7
    for ours, theirs in zip(networks, (loaded.G, loaded.D), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7_D.pth", "7_G.pth", "7_state.pth"]


def test_latest_is_the_newest_whole_one(tmp_path, networks):
    for step in (9, 10, 100):
        save(tmp_path, step, networks)
    (tmp_path / "200_G.pth").write_bytes(b"a save that was killed")
    assert checkpoint.load(tmp_path, "latest", SIZES).step == 100
    save(tmp_path, 300, networks, state=False)  # killed before the state file
    assert checkpoint.load(tmp_path, "latest", SIZES).step == 100


def test_latest_takes_weights_alone_where_there_is_no_state(tmp_path, networks):
    for step in (5, 20):
        save(tmp_path, step, networks, state=False)
    loaded = checkpoint.load(tmp_path, "latest", SIZES)
    assert (loaded.step, loaded.state) == (20, None)


def test_a_missing_step_lists_those_that_are_there(tmp_path, networks):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(tmp_path, "latest", SIZES)
    for step in (10, 20):
        save(tmp_path, step, networks)
    with pytest.raises(UserError, match="10, 20"):
        checkpoint.load(tmp_path, "15", SIZES)


@pytest.mark.parametrize("name, value", [("imsize", 64), ("z_dim", 128), ("g_conv_dim", 64), ("d_conv_dim", 64)])
def test_another_architecture_names_the_option(tmp_path, networks, name, value):
    save(tmp_path, 1, networks)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path, "1", SIZES | {name: value})
    assert f"--{name} {SIZES[name]} (this run: {value})" in str(error.value)
    assert str(error.value).count("--") == 1


@pytest.mark.parametrize("part", ["G", "D", "state"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 500),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_text("weights"),
        lambda path: torch.save([1], path),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, networks, part, damage):
    save(tmp_path, 1, networks)
    damage(tmp_path / f"1_{part}.pth")
    with pytest.raises(UserError, match=f"1_{part}.pth") as error:
        checkpoint.load(tmp_path, "1", SIZES)
    assert "\n" not in str(error.value)


def test_weights_of_something_else(tmp_path):
    save(tmp_path, 1, ({"weight": torch.ones(2)}, {"weight": torch.ones(2)}))
    with pytest.raises(UserError, match="does not hold SAGAN"):
        checkpoint.load(tmp_path, "1", SIZES)


def test_the_reference_s_parallel_prefix_is_taken_off(tmp_path, networks):
    prefixed = [{f"module.{key}": value for key, value in weights.items()} for weights in networks]
    save(tmp_path, 1, prefixed, state=False)
    loaded = checkpoint.load(tmp_path, "1", SIZES)
    assert loaded.G.keys() == networks[0].keys()
    assert loaded.D.keys() == networks[1].keys()


def test_files_of_the_old_torch_format_load(tmp_path, networks):
    save(tmp_path, 1, networks, state=False)
    for part, weights in zip("GD", networks, strict=True):
        torch.save(weights, tmp_path / f"1_{part}.pth", _use_new_zipfile_serialization=False)
    Generator(32, 16, 8).load_state_dict(checkpoint.load(tmp_path, "1", SIZES).G, strict=True)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path, networks):
    save(tmp_path, 1, networks)
    for write in (
        lambda path, content: torch.save(content, path),
        lambda path, content: path.write_bytes(pickle.dumps(content)),
    ):
        write(tmp_path / "1_G.pth", {"l1": Bomb(tmp_path / "ran")})
        with pytest.raises(UserError, match=r"1_G\.pth"):
            checkpoint.load(tmp_path, "1", SIZES)
    assert not (tmp_path / "ran").exists()


def test_a_save_that_fails_leaves_the_older_one_and_no_temporary_file(tmp_path, networks, monkeypatch):
    save(tmp_path, 1, networks)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path, 2, *networks, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_D.pth", "1_G.pth", "1_state.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize("part", ["G", "D", "state"])
def test_a_full_disk_leaves_the_older_one_and_no_temporary_file(tmp_path, networks, part):
    save(tmp_path, 1, networks)
    (tmp_path / f"2_{part}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left.*--pretrained_model latest"):
        checkpoint.save(tmp_path, 2, *networks, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_D.pth", "1_G.pth", "1_state.pth"]


@pytest.mark.parametrize("part", ["G", "D", "state"])
def test_latest_passes_over_a_damaged_one(tmp_path, networks, part, capsys):
    """One bit among the weights: torch itself would read it."""
    for step in (10, 20):
        checkpoint.save(tmp_path, step, *networks, {"numbers": torch.ones(1000)})
    path = tmp_path / f"20_{part}.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert checkpoint.load(tmp_path, "latest", SIZES).step == 10
    assert f"20_{part}.pth is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path, "20", SIZES)


def test_weights_of_another_step_do_not_pass(tmp_path, networks):
    save(tmp_path, 1, networks)
    checkpoint.save(tmp_path, 2, {**networks[0], "last.0.bias": torch.ones(3)}, networks[1], {})
    os.replace(tmp_path / "2_G.pth", tmp_path / "1_G.pth")
    with pytest.raises(UserError, match="not the file that was saved"):
        checkpoint.load(tmp_path, "1", SIZES)


def test_old_checkpoints_keep_their_weights_only(tmp_path, networks):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, *networks, {}, keep_checkpoints=2, keep_weights=3)
    left = {part: sorted(int(path.name.split("_")[0]) for path in tmp_path.glob(f"*_{part}.pth"))
            for part in ("G", "D", "state")}  # fmt: skip
    assert left == {"G": [3, 4, 5, 6, 7], "D": [3, 4, 5, 6, 7], "state": [6, 7]}


def test_pruning_leaves_newer_ones_alone(tmp_path, networks):
    for step in (1, 2, 50, 60, 3):
        checkpoint.save(tmp_path, step, *networks, {}, keep_checkpoints=1)
    assert sorted(path.name for path in tmp_path.glob("*_state.pth")) == ["3_state.pth", "60_state.pth"]


def test_a_save_that_was_killed_between_its_files_is_no_checkpoint(tmp_path, networks):
    save(tmp_path, 1, networks)
    save(tmp_path, 2, networks)
    (tmp_path / "2_state.pth").rename(tmp_path / "2_state.tmp")
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_D.pth", "1_G.pth", "1_state.pth"]


def test_the_best_one_stands_beside_the_others(tmp_path, networks):
    with pytest.raises(UserError, match="--metrics fid keeps one"):
        checkpoint.load(tmp_path, "best", SIZES)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *networks, {"step": step}, keep_checkpoints=1, keep_weights=1)
    checkpoint.save(tmp_path, "best", *networks, {"step": 2}, keep_checkpoints=1, keep_weights=1)
    assert checkpoint.load(tmp_path, "best", SIZES).step == 2
    assert checkpoint.steps(tmp_path) == [3, 2]
    checkpoint.save(tmp_path, "best", *networks, {"step": 3})
    assert checkpoint.load(tmp_path, "best", SIZES).step == 3
    (tmp_path / "best_G.tmp").touch()
    checkpoint.remove_unfinished(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    os.truncate(tmp_path / "best_D.pth", 1000)
    with pytest.raises(UserError, match=r"best_D\.pth is damaged"):
        checkpoint.load(tmp_path, "best", SIZES)
