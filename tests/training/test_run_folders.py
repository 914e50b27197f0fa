import dataclasses
import errno
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import make_folders

from errors import UserError
from training import checkpoint
from training.run_folders import check_folders, init_folders, lock_folders, thin_results, warn_of_small_disk
from utils import files_by_step


def files(config):
    return {path for folder in config.folders for path in folder.rglob("*")}


def make_result(path):
    """A file, or the folder of a test."""
    path.write_text("{}\n") if path.suffix else path.mkdir()


def test_a_second_run_is_refused_until_the_first_ends(make_config, tmp_path):
    names = ("sample_path", "attn_path", "model_save_path", "log_path")
    for paths in ({}, dict.fromkeys(names, str(tmp_path / "all results in one folder"))):
        for _ in range(2):
            with lock_folders(make_config(**paths)):
                with pytest.raises(UserError, match="--version"), lock_folders(make_config(**paths)):
                    pass
                with lock_folders(make_config(**paths, version="other")):
                    pass


def test_a_file_system_without_locks_is_a_warning(make_config, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with lock_folders(make_config()):
        assert all(folder.is_dir() for folder in make_config().folders)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_going_back_is_refused_with_both_ways_on(make_config, tmp_path):
    config = make_folders(make_config())
    for step in (1, 2):
        checkpoint.save(config.model_folder, step, {"step": step, "G": {}, "D": {}})
    state = config.model_folder / "2_state.pth"

    def check(wanted="2", step=2, **options):
        check_folders(make_config(pretrained_model=wanted, **options), step)

    check()
    for name in ("2_G.pth", "best_G.pth", "mean_state.pth"):  # would replace 2_state.pth, or start at step 0
        with pytest.raises(UserError, match="would replace checkpoints"):
            check(str(state.with_name(name)), overwrite=True)
    for later in (config.sample_folder / "test_3", config.model_folder / "3_G.pth"):
        make_result(later)
        for wanted in ("2", str(state), str(tmp_path / "model_save_path/../model_save_path/sagan_celeb/2_state.pth")):
            with pytest.raises(UserError, match=rf"{later.name}.*--overwrite true.*--version.*2_state\.pth"):
                check(wanted)
            check(wanted, overwrite=True)
            check(wanted, version="other")
        for wanted, step in (("3", 3), ("latest", 2), ("auto", 2)):  # the newest, or one before those that are damaged
            check(wanted, step)
        later.rename(tmp_path / later.name)
    for best in (2, 3):  # the command that a report gives resumes from the newest checkpoint, maybe before the best
        checkpoint.save(config.model_folder, "best", {"step": best, "G": {}, "D": {}})
        check()


def test_auto_does_not_start_over_a_run_whose_checkpoints_are_missing(make_config, tmp_path):
    """As where the disk of --model_save_path is not mounted. A run killed before its first checkpoint starts again."""
    config = make_folders(make_config(pretrained_model="auto"))
    (config.log_folder / "metrics.jsonl").write_text("{}\n")
    (config.sample_folder / "1_ema.png").touch()
    check_folders(config, 0)
    for path in (config.log_folder / "report.html", config.sample_folder / "test_1", config.model_folder / "1_G.pth"):
        make_result(path)
        with pytest.raises(UserError, match=r"no checkpoint in .*--model_save_path.*--overwrite true"):
            check_folders(config, 0)
        check_folders(dataclasses.replace(config, overwrite=True), 0)
        path.rename(tmp_path / path.name)


@pytest.mark.parametrize("kind, name", [
    ("log", "metrics.jsonl"), ("sample", "1_ema.png"), ("sample", "test_1"), ("model", "best_state.pth"),
    ("model", "1_G.pth"), ("attn", "1_G_attn1.png"), ("attn", "1_explorer.html"), ("log", "report.html"),
])  # fmt: skip
@pytest.mark.parametrize("start", [None, "backup/2_state.pth"])
def test_a_new_run_or_a_checkpoint_from_elsewhere_needs_folders_without_results(make_config, kind, name, start):
    """Also without those that are earlier than the checkpoint: they are of another course."""
    config = make_folders(make_config(pretrained_model=start))
    check_folders(config, 2)
    make_result(getattr(config, f"{kind}_folder") / name)
    with pytest.raises(UserError, match=r"another --version.*--overwrite true"):
        check_folders(config, 2)
    config = dataclasses.replace(config, overwrite=True)
    check_folders(config, 2)
    init_folders(config, 2, [], 1000)
    assert {path.name for path in files(config)} == {"config.json"}


def test_later_pictures_go_when_a_run_resumes_and_under_overwrite_all_later_results(train):
    """It takes these steps again, as for its log. "auto" starts at step 0 if the first checkpoint was not reached."""
    trainer = train(model_save_step=0.2, sample_step=1, attn_step=1)
    resumed = dataclasses.replace(trainer.config, pretrained_model="auto")
    overwriting = dataclasses.replace(resumed, overwrite=True)
    for name in ("test_3", "test_2", "test_x"):
        (resumed.sample_folder / name).mkdir()
    checkpoint.save(resumed.model_folder, "best", {"step": 2, "G": {}, "D": {}})
    (resumed.log_folder / "events.out.tfevents.1").touch()
    before, gone = files(resumed), "never"
    for config, step, names in (
        (resumed, 2, r"3_.*(png|html)"), (overwriting, 2, "3_|test_3"), (overwriting, 1, "2_|test_2|best"),
        (resumed, 0, r"1_.*(png|html)|events|report"), (overwriting, 0, "1_"),
    ):  # fmt: skip
        init_folders(config, step, [], 1000)
        gone += f"|{names}"
        assert files(config) == {path for path in before if not re.match(gone, path.name)}


@pytest.mark.parametrize("step", [0, 5])
def test_overwrite_keeps_the_users_files(make_config, step):
    """Their names resemble those of results, or are those of another folder's."""
    config = make_folders(make_config(overwrite=True))
    names = "0_left.png 9_left.png 9_notes.html 9_G.png x9_G.pth 9_G_copy.pth 9_G.pth.old 9_fake.png.old best.pth "
    names += "9_explorer.html.old best_G_copy.pth my_G.pth.tmp 09_fake.png 09_G.pth 09_G.pth.tmp 9_G_attn09.png"
    users = {folder / name for folder in config.folders for name in names.split()}
    users |= {config.sample_folder / name for name in ("test_9/a.txt", "test_9/samples/best.png", "9_G.pth", "test_8",
                                                      "test_09/grid.png")}  # fmt: skip
    for path in {*users, config.attn_folder / "9_fake.png", config.sample_folder / "9_left" / "image.png"}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = files(config)
    init_folders(config, step, [], 1000)
    assert files(config) == before | {config.log_folder / "config.json"}


def test_skipped_images_are_listed_and_unfinished_checkpoints_removed(make_config, capsys):
    config = make_folders(make_config())
    (config.model_folder / "5_G.pth.tmp").touch()  # of a process that was killed
    init_folders(config, 0, ["a.png: truncated", "b.png: empty"], 1000)
    path = config.log_folder / "skipped_images.txt"
    assert files(config) == {path, config.log_folder / "config.json"}
    assert path.read_text().splitlines() == ["a.png: truncated", "b.png: empty"]
    assert "2 of 1,000 images" in capsys.readouterr().err
    init_folders(config, 0, [], 1000)
    assert not path.exists()


@pytest.mark.parametrize("free, warns", [(11_999, True), (12_000, False)])
def test_a_disk_without_room_for_three_checkpoints_is_a_warning(make_trainer, monkeypatch, capsys, free, warns):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free if folder.is_dir() else -1))
    warn_of_small_disk(make_trainer().config, [torch.nn.Linear(10, 25, bias=False)])  # 1,000 bytes
    assert capsys.readouterr().err.count("three checkpoints") == 1 + warns  # the trainer's networks are larger


@pytest.mark.parametrize("last, keep, left", [
    (90, 1, [90]), (30, 3, [10, 20, 30]), (40, 3, [20, 40]), (90, 3, [40, 80, 90]), (100, 6, [20, 40, 60, 80, 100]),
    (110, 6, [20, 40, 60, 80, 100, 110]), (130, 6, [40, 80, 120, 130]), (230, 8, [40, 80, 120, 160, 200, 230]),
])  # fmt: skip
def test_results_are_thinned_evenly_but_not_later_ones_and_the_users_files(tmp_path, last, keep, left):
    others = {"10_left.png", "real.png", "20_fake.png.bak", "20_G.pth", "500_fake.png"}
    for name in others:
        (tmp_path / name).touch()
    for step in range(10, last + 1, 10):
        for ending in ("fake.png", "ema.png"):
            (tmp_path / f"{step}_{ending}").touch()
            thin_results(tmp_path, ending, 10, keep, step)
    kept = {f"{step}_{ending}" for step in left for ending in ("fake.png", "ema.png")}
    assert {path.name for path in tmp_path.iterdir()} == others | kept


def test_another_interval_keeps_about_as_many_of_the_earlier_results(tmp_path):
    for step in (*range(100, 2000, 100), 1950, 2000):
        (tmp_path / f"{step}_ema.png").touch()
    thin_results(tmp_path, "ema.png", 130, 20, 2000)
    steps = [*files_by_step(tmp_path, "ema.png")]
    assert 13 <= len(steps) <= 20 and max(b - a for a, b in pairwise(steps)) == 200 and steps[-1] == 2000
