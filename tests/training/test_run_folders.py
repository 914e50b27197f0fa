import errno
import json
import os
import re

import pytest

from errors import UserError
from training.run_folders import check_folders, init_folders, lock_folders, thin_results
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
    before = files(config)
    init_folders(config, 0, [], 1000)
    assert files(config) == before | {config.log_folder / "metrics_until_3.jsonl"}


def test_resuming_from_an_earlier_checkpoint_keeps_the_log(make_trainer, capsys):
    make_trainer(model_save_step=0.2, log_step=1).train()
    config = make_trainer().config
    log, kept = (config.log_folder / name for name in ("metrics.jsonl", "metrics_until_3.jsonl"))
    init_folders(config, 3, [], 1000)
    assert not kept.exists()
    whole = log.read_bytes()
    init_folders(config, 2, [], 1000)
    assert kept.read_bytes() == whole and str(kept) in capsys.readouterr().out
    log.write_text("")
    init_folders(config, 1, [], 1000)
    assert kept.read_bytes() == whole
    init_folders(make_trainer(overwrite=True).config, 2, [], 1000)
    assert not kept.exists()


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
    for part in ("G", "D", "state"):
        (config.model_folder / f"best_{part}.pth").touch()
    (config.log_folder / "events.out.tfevents.1").touch()
    before = files(config)
    check_folders(config, 0)

    init_folders(config, 2, [], 1000)
    assert files(config) == {path for path in before if not re.match("3_|test_3", path.name)}
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


def test_later_checkpoints_are_pointed_out(make_trainer, capsys):
    make_trainer(model_save_step=0.2).train()
    check_folders(make_trainer(pretrained_model="2").config, 2)
    assert "--pretrained_model latest" in capsys.readouterr().err
    check_folders(make_trainer(pretrained_model="3").config, 3)
    assert "--pretrained_model latest" not in capsys.readouterr().err


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
