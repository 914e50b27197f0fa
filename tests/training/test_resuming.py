import contextlib
import dataclasses
import shutil

import pytest
import torch

from errors import UserError
from parameter import Config
from sagan_models import Discriminator, Generator
from spectral import fold_spectral_norm
from training import checkpoint
from training.guards import NonFiniteError
from training.models import build_networks
from training.resuming import load_resume_checkpoint, load_test_checkpoint, non_finite_message

SIZES = {"imsize": 32, "z_dim": 16, "g_conv_dim": 8, "d_conv_dim": 8}
NETWORKS = {"G": Generator(32, 16, 8).state_dict(), "D": Discriminator(32, 8).state_dict()}


def save(config, *steps, **changes):
    """Checkpoints of a run with these options; returns their folder."""
    for step in steps:
        state = {"step": step, "config": dataclasses.asdict(config), "classes": [], **NETWORKS}
        checkpoint.save(config.model_folder, step, state | changes)
    return config.model_folder


@pytest.mark.parametrize("wanted", ["auto", "latest"])
def test_the_best_checkpoint_is_resumed_if_it_is_all_there_is(make_config, wanted):
    config = make_config(pretrained_model=wanted)
    with contextlib.nullcontext() if wanted == "auto" else pytest.raises(UserError, match="--pretrained_model latest"):
        assert load_resume_checkpoint(config) is None
    save(config, "best", step=5)
    assert load_resume_checkpoint(config).step == 5


@pytest.mark.parametrize("changes", [{"model": "paper", "imsize": 64}, *({name: 2 * SIZES[name]} for name in SIZES)])
def test_another_architecture_is_one_line_that_names_the_options(make_config, changes):
    save(make_config(), 5)
    config = make_config(pretrained_model="5", **changes)
    for load in (load_resume_checkpoint, lambda config: load_test_checkpoint(config, {*changes})):
        with pytest.raises(UserError) as error:
            load(config)
        expected = {f"--{name} {getattr(make_config(), name)} (not {value})" for name, value in changes.items()}
        assert {*str(error.value).partition("needs ")[2].split(", ")} == expected


def test_weights_of_another_network_are_one_line(make_config):
    save(make_config(), 7, G={"weight": torch.ones(2)})
    with pytest.raises(UserError, match="of any --model"):
        load_resume_checkpoint(make_config(pretrained_model="7"))
    path = save(make_config(), 8) / "8_G.pth"
    G = build_networks(make_config(), 0)[0]
    torch.save(fold_spectral_norm(G).state_dict(), path)
    path.with_name("8_state.pth").unlink()
    with pytest.raises(UserError, match="8 has spectral norm folded in"):
        load_resume_checkpoint(make_config(pretrained_model="8"))


def test_the_first_state_files_resume(train, capsys):
    """They have fewer options, and less of the images' fingerprint."""
    first = train(holdout=0.2)
    path = first.config.model_folder / "3_state.pth"
    state = torch.load(path, weights_only=True)
    state["data"] = {"images": state["data"]["images"], "checksum": 7}
    del state["config"]["holdout"], state["config"]["augment"]
    state["config"] |= {"color": "blue", "truncation": None}  # None: the option was not used
    torch.save(state, path)
    capsys.readouterr()
    train(holdout=0.2, pretrained_model="latest", total_step=4)
    out, err = capsys.readouterr()
    changes = "--total_step 4 (was 3), --holdout 0.2 (was 0.0), color blue (no longer an option)"
    assert f"resuming from step 3; changed options: {changes}\n" in out
    assert "may have been trained on images that are held out now" in err
    assert "the 20 images are not those of the checkpoint" in err


def test_a_run_that_diverged_names_the_last_checkpoint(make_config):
    config = make_config(version="mine")
    assert "--pretrained_model" not in non_finite_message(config, NonFiniteError("d_loss=nan"))
    save(config, 4, 10)
    message = non_finite_message(config, NonFiniteError("d_loss=nan"))
    assert all(text in message for text in ("d_loss=nan", "--version mine", "--pretrained_model 10"))


def test_an_evaluation_takes_network_and_data_from_the_checkpoint(make_config, capsys):
    trained = make_config(dataset="folder", image_path="/pics", crop_size=40, seed=3, batch_size=16, train=False,
                          attribute="Smiling")  # fmt: skip
    folder = save(trained, 5)
    default = Config(train=False, model_save_path=trained.model_save_path)
    names = ("architecture", "dataset", "image_path", "crop_size", "attribute", "seed", "batch_size")
    of_default, of_trained = ({name: getattr(config, name) for name in names} for config in (default, trained))

    def tested(**given):
        config = load_test_checkpoint(dataclasses.replace(default, **given), {"train", *given})[1]
        out, err = capsys.readouterr()
        assert "--z_dim 16" in out
        assert all((f"--{name} {of_trained[name]}" in err) == (name != "seed") for name in given)
        return {name: getattr(config, name) for name in names}

    assert tested() == of_trained
    assert tested(image_path="/moved", seed=4) == of_trained | {"image_path": "/moved", "seed": 4}
    other = {"dataset": "toy", "image_path": "./data", "crop_size": None, "attribute": None}
    assert tested(dataset="toy") == of_trained | other
    (folder / "5_state.pth").unlink()  # the weights alone tell the sizes
    assert tested() == of_default | {"architecture": trained.architecture}


@pytest.mark.parametrize("name", ["cats/5_state.pth", "cats/2024/5_G.pth"])
def test_an_evaluation_of_a_file_goes_to_the_version_of_its_folder(make_config, tmp_path, name, monkeypatch):
    """So that results of other weights are not among those of the default version."""
    path = tmp_path / name
    shutil.copytree(save(make_config(seed=3), 5), path.parent)
    (path.parent / "below").mkdir()
    monkeypatch.chdir(path.parent / "below")
    config = make_config(train=False, pretrained_model=f"../{path.name}")
    saved, tested = load_test_checkpoint(config, {"train", "pretrained_model"})
    assert (saved.step, tested.version, saved.state is None) == (5, path.parent.name, path.name == "5_G.pth")
    assert load_test_checkpoint(config, {"train", "pretrained_model", "version"})[1].version == config.version
