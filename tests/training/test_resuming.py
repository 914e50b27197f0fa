import dataclasses
import re
import shutil

import pytest
from training.divergence import NonFiniteError

from errors import UserError
from parameter import Config
from sagan_models import Discriminator, Generator
from training import checkpoint
from training.resuming import (
    changed_options,
    load_resume_checkpoint,
    load_test_checkpoint,
    non_finite_message,
    warn_of_other_images,
)


def save(config, step):
    networks = {"G": Generator(32, 16, 8).state_dict(), "D": Discriminator(32, 8).state_dict()}
    state = {"step": step, "config": dataclasses.asdict(config), **networks}
    config.model_folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(config.model_folder, step, state)


def test_auto_resumes_if_there_is_a_checkpoint(make_config):
    config = make_config(pretrained_model="auto")
    assert load_resume_checkpoint(config) is None
    for step in (5, 20):
        save(config, step)
    assert load_resume_checkpoint(config).step == 20


def test_a_run_resumes_from_the_named_checkpoint_only(make_config):
    with pytest.raises(UserError, match="--pretrained_model latest"):
        load_resume_checkpoint(make_config(pretrained_model="latest"))
    for step in (5, 20):
        save(make_config(), step)
    assert load_resume_checkpoint(make_config()) is None
    assert load_resume_checkpoint(make_config(pretrained_model="5")).step == 5
    assert load_resume_checkpoint(make_config(pretrained_model="latest")).step == 20
    with pytest.raises(UserError, match="--pretrained_model 7"):
        load_resume_checkpoint(make_config(pretrained_model="7"))
    with pytest.raises(UserError, match="--z_dim"):
        load_resume_checkpoint(make_config(pretrained_model="5", z_dim=24))


def test_changed_options_are_those_that_differ(make_config):
    config = make_config(batch_size=8, save_minutes=5)
    saved = vars(config) | {"batch_size": 4, "color": "blue", "pretrained_model": "3", "overwrite": True}
    del saved["save_minutes"], saved["augment"]  # of an older version
    assert changed_options(saved, config) == [
        "--batch_size 8 (was 4)", "--save_minutes 5 (was 10.0)", "color blue (no longer an option)"]  # fmt: skip
    assert changed_options(vars(config), config) == []


def test_a_run_that_diverged_names_the_last_checkpoint(make_config):
    config = make_config(version="mine")
    assert "--pretrained_model" not in non_finite_message(config, NonFiniteError("d_loss=nan"))
    save(config, 4)
    message = non_finite_message(config, NonFiniteError("d_loss=nan"))
    for token in ("d_loss=nan", "--g_lr", "--d_lr", "--version mine", "--pretrained_model 4"):
        assert token in message


def test_an_evaluation_takes_network_and_data_from_the_checkpoint(make_config, capsys):
    trained = make_config(dataset="folder", image_path="/pics", crop_size=40, seed=3, batch_size=16)
    save(trained, 5)
    default = dataclasses.replace(
        Config(train=False), **{name: getattr(trained, name) for name in ("model_save_path", "version")}
    )
    saved, config = load_test_checkpoint(default, {"train", "model_save_path", "version"})
    assert saved.step == 5
    names = ("imsize", "z_dim", "g_conv_dim", "d_conv_dim", "dataset", "image_path", "crop_size", "seed", "batch_size")
    assert all(getattr(config, name) == getattr(trained, name) for name in names)
    out, err = capsys.readouterr()
    assert "--dataset folder" in out and "--z_dim 16" in out and not err

    moved = dataclasses.replace(default, image_path="/moved", seed=4)
    config = load_test_checkpoint(moved, {"image_path", "seed"})[1]
    assert (config.dataset, config.image_path, config.crop_size, config.seed) == ("folder", "/moved", 40, 4)
    assert "--image_path /pics" in capsys.readouterr().err

    other = dataclasses.replace(default, dataset="toy")
    config = load_test_checkpoint(other, {"dataset"})[1]
    assert (config.dataset, config.image_path, config.crop_size, config.imsize) == ("toy", "./data", None, 32)
    assert "--dataset folder" in capsys.readouterr().err

    with pytest.raises(UserError, match="--z_dim 16"):
        load_test_checkpoint(dataclasses.replace(default, z_dim=8), {"z_dim"})


def test_weights_alone_tell_the_sizes_of_their_networks(make_config):
    save(make_config(), 5)
    (make_config().model_folder / "5_state.pth").unlink()
    default = dataclasses.replace(make_config(), imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64)
    assert load_test_checkpoint(default, set())[1].architecture == make_config().architecture


@pytest.mark.parametrize("current, line", [
    ({"images": 20, "checksum": 1}, ""), ({"images": 21, "checksum": 2}, "21 .*20"),
    ({"images": 20, "checksum": 3}, "20 .*not those"), ({"images": 20, "checksum": 1, "holdout": 0.2}, ""),
])  # fmt: skip
def test_other_images_are_pointed_out_in_one_line(capsys, current, line):
    warn_of_other_images({"images": 20, "checksum": 1}, current)
    err = capsys.readouterr().err
    assert re.search(line, err) if line else not err
    assert err.count("\n") == bool(line)
    warn_of_other_images(None, current)
    assert not capsys.readouterr().err


def test_the_best_checkpoint_alone_is_resumed(make_config):
    folder = make_config().model_folder
    save(make_config(), 5)
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("5_", "best_"))
    for wanted in ("latest", "auto"):
        assert load_resume_checkpoint(make_config(pretrained_model=wanted)).step == 5


@pytest.mark.parametrize("name, version", [("cats/5_state.pth", "cats"), ("cats/12/5_G.pth", "cats")])
def test_an_evaluation_of_a_file_goes_to_the_version_of_its_folder(make_config, tmp_path, name, version):
    """So that results of other weights are not among those of the default version."""
    save(make_config(seed=3), 5)
    path = tmp_path / name
    shutil.copytree(make_config().model_folder, path.parent)
    config = make_config(train=False, pretrained_model=str(path))
    saved, tested = load_test_checkpoint(config, {"train", "pretrained_model"})
    assert (saved.step, tested.version, saved.state is None) == (5, version, path.name == "5_G.pth")
    assert load_test_checkpoint(config, {"train", "pretrained_model", "version"})[1].version == config.version
    assert load_resume_checkpoint(make_config(pretrained_model=str(path))).step == 5


@pytest.mark.parametrize("name, line", [
    ("6_state.pth", "there is no"), ("5_D.pth", r"_state\.pth, _G\.pth"), ("alone_G.pth", r"alone_D\.pth is missing"),
])  # fmt: skip
def test_a_file_that_cannot_be_resumed_is_one_line(make_config, name, line):
    save(make_config(), 5)
    folder = make_config().model_folder
    shutil.copy(folder / "5_G.pth", folder / "alone_G.pth")
    with pytest.raises(UserError, match=line):
        load_resume_checkpoint(make_config(pretrained_model=str(folder / name)))
