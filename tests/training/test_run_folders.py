import dataclasses
import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from training import checkpoint
from training.run_folders import check_folders, init_folders, lock_folders, thin_results, warn_of_small_disk
from utils import files_by_step

# Names that resemble those of results, and are the user's.
USERS_FILES = (
    *("0_left.png", "9_left.png", "9_notes.html", "9_G.png", "x9_G.pth", "9_G_copy.pth", "9_G.pth.old"),
    *("9_fake.png.old", "9_explorer.html.old", "best.pth", "best_G_copy.pth", "my_G.pth.tmp"),
)


def files(config):
    return {path for folder in config.folders.values() for path in folder.rglob("*")}


def make_folders(config):
    for folder in config.folders.values():
        folder.mkdir(parents=True)
    return config


def test_a_second_run_is_refused_until_the_first_ends(make_config, tmp_path):
    names = ("sample_path", "attn_path", "model_save_path", "log_path")
    for paths in ({}, dict.fromkeys(names, str(tmp_path / "all results in one folder"))):
        for _ in range(2):
            with lock_folders(make_config(**paths)):
                with pytest.raises(UserError, match="--version"), lock_folders(make_config(**paths)):
                    pass
                with lock_folders(make_config(**paths, version="other")):
                    pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(make_config, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folders(make_config()):
        assert all(folder.is_dir() for folder in make_config().folders.values())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "locks" in err


@pytest.mark.parametrize("kind, name", [
    ("logs", "metrics.jsonl"), ("samples", "100_ema.png"), ("samples", "test_100"), ("checkpoints", "best_state.pth"),
    ("checkpoints", "100_G.pth"), ("attention", "100_G_attn1.png"), ("attention", "100_explorer.html"),
])  # fmt: skip
def test_results_of_any_kind_are_not_overwritten_without_the_option(make_config, kind, name):
    config = make_folders(make_config())
    check_folders(config, 0)
    (config.folders[kind] / name).write_text("{}\n")
    with pytest.raises(UserError, match=f"--version {config.version}.*--overwrite true"):
        check_folders(config, 0)
    for options in ({"overwrite": True}, {"pretrained_model": "auto"}, {"version": "other"}):
        check_folders(make_config(**options), 0)


def test_going_back_is_refused_with_both_ways_on(make_config, tmp_path):
    config = make_folders(make_config())
    for step in (1, 2):
        checkpoint.save(config.model_folder, step, {"step": step, "G": {}, "D": {}})
    state = config.model_folder / "2_state.pth"

    def check(wanted="2", step=2, **options):
        check_folders(make_config(pretrained_model=wanted, **options), step)

    def check_refusal(match, *wanted):
        with pytest.raises(UserError, match=match):
            check(*wanted)

    check()
    for later in (config.sample_folder / "test_3", config.model_folder / "3_G.pth"):
        later.touch()
        for wanted in ("2", str(state), str(tmp_path / "model_save_path/../model_save_path/sagan_celeb/2_state.pth")):
            check_refusal(rf"{later.name}.*--overwrite true.*--version.*2_state\.pth", wanted)
            check(wanted, overwrite=True)
            check(wanted, version="other")
        for wanted, step in (("3", 3), ("latest", 2), ("auto", 2)):  # the newest, or one before those that are damaged
            check(wanted, step)
        later.unlink()
    checkpoint.save(config.model_folder, "best", {"step": 2, "G": {}, "D": {}})
    check()
    checkpoint.save(config.model_folder, "best", {"step": 3, "G": {}, "D": {}})
    check_refusal("best_")


def test_a_checkpoint_from_elsewhere_starts_in_a_folder_without_results(make_config):
    config = make_folders(make_config(pretrained_model="backup/2_state.pth"))
    check_folders(config, 2)
    (config.sample_folder / "1_ema.png").touch()  # earlier than the checkpoint: of another course all the same
    with pytest.raises(UserError, match="another --version"):
        check_folders(config, 2)
    (config.log_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint.save(config.model_folder, 1, {"step": 1, "G": {}, "D": {}})
    init_folders(make_config(pretrained_model="backup/2_state.pth", overwrite=True), 2, [], 1000)
    assert {path.name for path in files(config)} == {"config.json"}


def test_pictures_after_the_newest_checkpoint_go_when_a_run_resumes(make_config):
    """It takes these steps again, as for its log; checkpoints, tests and what comes before stay."""
    config = make_folders(make_config(pretrained_model="latest"))
    samples, attn = config.sample_folder, config.attn_folder
    early = {samples / "3_ema.png", attn / "3_explorer.html", config.log_folder / "events.out.tfevents.1.host"}
    late = {samples / "4_ema.png", samples / "4_fake.png", attn / "5_G_attn1.png", attn / "5_explorer.html"}
    others = {
        samples / "test_4",
        config.model_folder / "4_state.pth",
        attn / "4.png",
        config.log_folder / "config.json",
    }
    for path in early | late | others:
        path.touch()
    init_folders(config, 3, [], 1000)
    assert files(config) == early | others
    init_folders(config, 0, [], 1000)  # --pretrained_model auto where the first checkpoint was not reached
    assert files(config) == others


def test_overwrite_removes_the_results_of_later_steps(make_trainer):
    trainer = make_trainer(model_save_step=0.2, sample_step=1, attn_step=1)
    trainer.train()
    config = dataclasses.replace(trainer.config, overwrite=True, pretrained_model="latest")
    for name in ("test_3", "test_2", "test_x"):
        (config.sample_folder / name).mkdir()
    checkpoint.save(config.model_folder, "best", {"step": 2, "G": {}, "D": {}})
    (config.log_folder / "events.out.tfevents.1").touch()
    before = files(config)
    init_folders(config, 2, [], 1000)
    assert files(config) == {path for path in before if not re.match("3_|test_3", path.name)}
    init_folders(config, 1, [], 1000)
    assert files(config) == {path for path in before if not re.match("[23]_|test_[23]|best", path.name)}
    init_folders(config, 0, [], 1000)
    left = {".lock", "real.png", "test_x", "config.json", "metrics.jsonl", "report.html"}
    assert files(config) == {path for path in before if path.name in left}


@pytest.mark.parametrize("step", [0, 5])
def test_overwrite_keeps_the_users_files(make_config, step):
    config = make_folders(make_config(overwrite=True))
    for folder in config.folders.values():
        for name in USERS_FILES:
            (folder / name).touch()
        (folder / "9_left").mkdir()
    (config.sample_folder / "test_9" / "samples").mkdir(parents=True)
    for name in ("notes.txt", "samples/best.png"):
        (config.sample_folder / "test_9" / name).touch()
    for path in (config.attn_folder / "9_fake.png", config.sample_folder / "9_G.pth"):
        path.touch()  # names of another folder's results
    before = files(config)
    init_folders(config, step, [], 1000)
    assert files(config) == before | {config.log_folder / "config.json"}


def test_a_folder_that_cannot_be_made_is_refused(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        check_folders(make_config(sample_path=str(tmp_path / "file")), 0)


def test_the_configuration_and_skipped_images_are_written(make_config, capsys):
    config = make_folders(make_config(total_step=9))
    (config.model_folder / "5_G.pth.tmp").touch()  # of a process that was killed
    init_folders(config, 0, ["a.png: truncated", "b.png: empty"], 1000)
    assert json.loads((config.log_folder / "config.json").read_text())["total_step"] == 9
    path = config.log_folder / "skipped_images.txt"
    assert path.read_text().splitlines() == ["a.png: truncated", "b.png: empty"]
    err = capsys.readouterr().err
    assert "2 of 1,000 images" in err and "skipped_images.txt" in err
    init_folders(config, 0, [], 1000)
    assert {path.name for path in files(config)} == {"config.json"}


@pytest.mark.parametrize("free, warns", [(11_999, True), (12_000, False)])
def test_a_disk_without_room_for_three_checkpoints_is_a_warning(make_config, monkeypatch, capsys, free, warns):
    def disk_usage(folder):
        assert folder.is_dir()
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    warn_of_small_disk(make_config(), [torch.nn.Linear(10, 25, bias=False)])  # 1,000 bytes
    assert ("three checkpoints" in capsys.readouterr().err) == warns


def thinned(folder, last, keep, interval=10):
    """The steps whose grids are left after a run of `last` steps that thinned at each grid."""
    for step in range(interval, last + 1, interval):
        for kind in ("fake", "ema"):
            (folder / f"{step}_{kind}.png").touch()
            thin_results(folder, f"{kind}.png", interval, keep, step)
    return list(files_by_step(folder, "fake.png"))


@pytest.mark.parametrize("last, keep, left", [
    (90, 1, [90]), (30, 3, [10, 20, 30]), (40, 3, [20, 40]), (90, 3, [40, 80, 90]), (100, 6, [20, 40, 60, 80, 100]),
    (110, 6, [20, 40, 60, 80, 100, 110]), (130, 6, [40, 80, 120, 130]),
])  # fmt: skip
def test_old_results_are_thinned_evenly(tmp_path, last, keep, left):
    assert thinned(tmp_path, last, keep) == left == list(files_by_step(tmp_path, "ema.png"))


def test_thinning_leaves_later_steps_and_the_users_files(tmp_path):
    users = {tmp_path / name for name in ("10_left.png", "real.png", "20_fake.png.bak", "20_G.pth")}
    for path in {*users, tmp_path / "500_fake.png"}:
        path.touch()
    assert thinned(tmp_path, 90, 2) == [80, 90, 500]
    assert all(path.exists() for path in users)
