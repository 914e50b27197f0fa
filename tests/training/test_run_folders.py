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
    *("9_fake.png.old", "9_explorer.html.old", "best.pth", "best_G_copy.pth"),
)


def files(config):
    return {path for folder in config.folders.values() for path in folder.rglob("*")}


def test_a_second_run_is_refused_until_the_first_ends(make_config):
    config = make_config()
    with lock_folders(config):
        with pytest.raises(UserError, match="--version"), lock_folders(make_config()):
            pass
        with lock_folders(make_config(version="other")):
            pass
    with lock_folders(config):
        pass


def test_results_are_not_overwritten_without_the_option(make_trainer):
    make_trainer(model_save_step=0.2).train()
    config = make_trainer().config
    with pytest.raises(UserError, match="--overwrite true"):
        check_folders(config, 0)


def test_going_back_is_refused_with_both_ways_on(make_trainer, make_config, tmp_path):
    make_trainer(model_save_step=0.2).train()  # checkpoints 1, 2 and 3
    folder = make_config().model_folder
    state = folder / "2_state.pth"
    for wanted in ("2", str(state), str(tmp_path / "model_save_path/../model_save_path/sagan_celeb/2_state.pth")):
        with pytest.raises(UserError, match=r"--overwrite true.*--version.*2_state\.pth"):
            check_folders(make_config(pretrained_model=wanted), 2)
        check_folders(make_config(pretrained_model=wanted, overwrite=True), 2)
        check_folders(make_config(pretrained_model=wanted, version="other"), 2)
    for wanted, step in (("3", 3), ("latest", 2), ("auto", 2)):  # the newest, or one before those that are damaged
        check_folders(make_config(pretrained_model=wanted), step)
    for path in folder.glob("3_*"):
        path.unlink()
    check_folders(make_config(pretrained_model="2"), 2)
    (folder / "3_G.pth").touch()
    with pytest.raises(UserError, match="3_G"):
        check_folders(make_config(pretrained_model="2"), 2)
    (folder / "3_G.pth").unlink()
    checkpoint.save(folder, "best", {"step": 3, "G": {}, "D": {}})
    with pytest.raises(UserError, match="best_"):
        check_folders(make_config(pretrained_model="2"), 2)
    (folder / "best_state.pth").unlink()  # which alone tells the step
    (make_config().sample_folder / "test_3").mkdir()
    with pytest.raises(UserError, match="test_3"):
        check_folders(make_config(pretrained_model="2"), 2)


def test_a_checkpoint_from_elsewhere_starts_in_a_folder_without_results(make_config):
    config = make_config(pretrained_model="backup/2_state.pth")
    with lock_folders(config):
        check_folders(config, 2)
        (config.sample_folder / "1_ema.png").touch()  # earlier than the checkpoint: of another course all the same
    with pytest.raises(UserError, match="another --version"):
        check_folders(config, 2)
    (config.log_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint.save(config.model_folder, 1, {"step": 1, "G": {}, "D": {}})
    init_folders(make_config(pretrained_model="backup/2_state.pth", overwrite=True), 2, [], 1000)
    names = {path.name for path in files(config)}
    assert not names & {"1_ema.png", "metrics.jsonl", "1_state.pth", "1_G.pth", "1_D.pth"}


def test_pictures_after_the_newest_checkpoint_go_when_a_run_resumes(make_config):
    """It takes these steps again, as for its log; checkpoints, tests and what comes before stay."""
    config = make_config(pretrained_model="latest")
    with lock_folders(config):
        (config.sample_folder / "test_4").mkdir()
        stay = [config.sample_folder / "3_ema.png", config.model_folder / "4_state.pth", config.attn_folder / "4.png"]
        stay += [config.log_folder / "events.out.tfevents.1.host", config.attn_folder / "3_explorer.html"]
        go = [config.sample_folder / "4_ema.png", config.sample_folder / "4_fake.png"]
        go += [config.attn_folder / "5_G_attn1.png", config.attn_folder / "5_explorer.html"]
        for path in (*stay, *go):
            path.touch()
        init_folders(config, 3, [], 1000)
        assert all(path.exists() for path in stay) and not any(path.exists() for path in go)
        assert (config.sample_folder / "test_4").exists()
        init_folders(config, 0, [], 1000)  # --pretrained_model auto where the first checkpoint was not reached
        assert not stay[0].exists() and not stay[3].exists() and stay[1].exists()


def test_one_folder_for_all_results(make_config, tmp_path):
    paths = dict.fromkeys(("sample_path", "attn_path", "model_save_path", "log_path"), str(tmp_path / "out"))
    with lock_folders(make_config(**paths)), pytest.raises(UserError), lock_folders(make_config(**paths)):
        pass


def test_overwrite_removes_the_results_of_later_steps(make_trainer):
    trainer = make_trainer(model_save_step=0.2, sample_step=1, attn_step=1, overwrite=True)
    trainer.train()
    config = trainer.config
    for name in ("test_3", "test_2", "test_x"):
        (config.sample_folder / name).mkdir()
    checkpoint.save(config.model_folder, "best", {"step": 2, "G": {}, "D": {}})
    (config.log_folder / "events.out.tfevents.1").touch()
    before = files(config)
    check_folders(config, 0)

    init_folders(config, 2, [], 1000)
    assert files(config) == {path for path in before if not re.match("3_|test_3", path.name)}
    init_folders(config, 1, [], 1000)
    assert not list(config.model_folder.glob("best_*"))
    init_folders(config, 0, [], 1000)
    left = {".lock", "real.png", "test_x", "config.json", "metrics.jsonl", "report.html"}
    assert files(config) == {path for path in before if path.name in left}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_a_warning(make_config, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    config = make_config()
    with lock_folders(config):
        assert all(folder.is_dir() for folder in config.folders.values())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "locks" in lines[0]


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
    assert thinned(tmp_path, last, keep) == left
    assert list(files_by_step(tmp_path, "ema.png")) == left


def test_thinning_leaves_later_steps_and_the_users_files(tmp_path):
    users = {tmp_path / name for name in ("10_left.png", "real.png", "20_fake.png.bak", "20_G.pth")}
    for path in {*users, tmp_path / "500_fake.png"}:
        path.touch()
    assert thinned(tmp_path, 90, 2) == [80, 90, 500]
    assert all(path.exists() for path in users)


@pytest.mark.parametrize("content, name", [
    ("samples", "100_ema.png"), ("samples", "test_100"), ("checkpoints", "best_state.pth"),
    ("checkpoints", "100_G.pth"), ("attention", "100_G_attn1.png"), ("attention", "100_explorer.html"),
])  # fmt: skip
def test_results_of_any_kind_are_not_overwritten_without_the_option(make_config, content, name):
    config = make_config()
    with lock_folders(config):
        check_folders(config, 0)
        (config.folders[content] / name).touch()
    with pytest.raises(UserError, match="--overwrite true"):
        check_folders(config, 0)
    check_folders(make_config(overwrite=True), 0)


@pytest.mark.parametrize("step", [0, 5])
def test_overwrite_keeps_the_users_files(make_config, step):
    config = make_config(overwrite=True)
    with lock_folders(config):
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
        assert files(config) - {config.log_folder / "config.json"} == before


def test_auto_and_overwrite_ask_nothing(make_config):
    config = make_config()
    with lock_folders(config):
        (config.log_folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=f"--version {config.version}"):
        check_folders(config, 0)
    check_folders(make_config(pretrained_model="auto"), 0)
    check_folders(make_config(overwrite=True), 0)


def test_a_folder_that_cannot_be_made_is_refused(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        check_folders(make_config(sample_path=str(tmp_path / "file")), 0)


def test_the_configuration_and_skipped_images_are_written(make_config, capsys):
    config = make_config(total_step=9)
    with lock_folders(config):
        init_folders(config, 0, ["a.png: truncated", "b.png: empty"], 1000)
        assert json.loads((config.log_folder / "config.json").read_text())["total_step"] == 9
        path = config.log_folder / "skipped_images.txt"
        assert path.read_text().splitlines() == ["a.png: truncated", "b.png: empty"]
        err = capsys.readouterr().err
        assert "2 of 1,000 images" in err and "skipped_images.txt" in err
        (config.model_folder / "5_G.tmp").touch()
        init_folders(config, 0, [], 1000)
        assert not path.exists()
        assert not (config.model_folder / "5_G.tmp").exists()


@pytest.mark.parametrize("free, warns", [(11_999, True), (12_000, False)])
def test_a_disk_without_room_for_three_checkpoints_is_a_warning(make_config, monkeypatch, capsys, free, warns):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    warn_of_small_disk(make_config(), [torch.nn.Linear(10, 25, bias=False)])  # 1,000 bytes
    assert ("three checkpoints" in capsys.readouterr().err) == warns
