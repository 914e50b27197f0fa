import pytest

from errors import UserError
from training.run_folders import check_folders, lock_folders, prepare


def test_a_second_run_is_refused_while_the_first_lives(make_config):
    config = make_config()
    with lock_folders(config):
        with pytest.raises(UserError, match="another run is writing"), lock_folders(make_config()):
            pass
        with lock_folders(make_config(version="other")):
            pass
    with lock_folders(config):
        pass


def test_results_are_not_overwritten_unasked(make_trainer):
    make_trainer(model_save_step=0.2).train()
    config = make_trainer().config
    (config.log_folder / "events.out.tfevents.1").touch()
    with pytest.raises(UserError, match="--overwrite true"):
        check_folders(config, 0)
    prepare(config, 0, [])
    assert (config.model_folder / "3_G.pth").exists()

    config = make_trainer(overwrite=True).config
    check_folders(config, 0)
    prepare(config, 2, [])
    assert {path.name for path in config.model_folder.glob("*_G.pth")} == {"1_G.pth", "2_G.pth"}
    prepare(config, 0, [])
    for folder in config.folders.values():
        assert not list(folder.glob("[0-9]*")) and not list(folder.glob("events*"))
    assert (config.sample_folder / "real.png").exists()


def test_newer_checkpoints_are_pointed_out(make_trainer, capsys):
    make_trainer(model_save_step=0.2).train()
    check_folders(make_trainer(pretrained_model="2").config, 2)
    assert "--pretrained_model latest means" in capsys.readouterr().err
