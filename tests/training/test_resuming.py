import hashlib

import pytest
import torch

from errors import UserError
from sagan_models import Discriminator, Generator
from training import checkpoint
from training.divergence import NonFiniteError
from training.resuming import changed_options, load_resume_checkpoint, non_finite_message


def save(config, step):
    state = {"step": step, "G": Generator(32, 16, 8).state_dict(), "D": Discriminator(32, 8).state_dict()}
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
    config = make_config(batch_size=8)
    saved = vars(config) | {"batch_size": 4, "colour": "blue", "pretrained_model": "3", "overwrite": True}
    del saved["save_minutes"]
    changes = changed_options(saved, config)
    assert [change.split()[0] for change in changes] == ["--batch_size", "--save_minutes", "colour"]
    assert "8" in changes[0] and "4" in changes[0]
    assert changed_options(vars(config), config) == []


def test_a_run_that_diverged_names_the_last_checkpoint(make_config):
    config = make_config(version="mine")
    assert "--pretrained_model" not in non_finite_message(config, NonFiniteError("d_loss=nan"))
    save(config, 4)
    message = non_finite_message(config, NonFiniteError("d_loss=nan"))
    for token in ("d_loss=nan", "--g_lr", "--d_lr", "--version mine", "--pretrained_model 4"):
        assert token in message


def to_old_format(folder, step):
    """Rewrite a checkpoint as older versions of the program wrote it: G and D in their own files only."""
    state = torch.load(folder / f"{step}_state.pth", weights_only=True)
    old = {name: value for name, value in state.items() if name not in ("G", "D", "best_fid")}
    old["sha256"] = {part: hashlib.sha256((folder / f"{step}_{part}.pth").read_bytes()).hexdigest() for part in "GD"}
    torch.save(old, folder / f"{step}_state.pth")


def change_exports(folder, step):
    (folder / f"{step}_G.pth").unlink()
    torch.save({"other": torch.ones(1)}, folder / f"{step}_D.pth")


@pytest.mark.parametrize("rewrite", [to_old_format, change_exports])
def test_a_run_resumes_exactly(make_trainer, rewrite):
    """From a checkpoint in the old format, and from a state file alone: as if the run had not been stopped."""
    whole = make_trainer(version="whole", total_step=6)
    whole.train()
    make_trainer(version="stopped", total_step=3).train()
    folder = make_trainer(version="stopped").config.model_folder
    rewrite(folder, 3)
    make_trainer(version="stopped", total_step=6, pretrained_model="3").train()

    expected, resumed = (
        torch.load(path / "6_state.pth", weights_only=True) for path in (whole.config.model_folder, folder)
    )
    for name in ("G", "D", "ema", "g_optimizer", "d_optimizer", "fixed_z"):
        torch.testing.assert_close(resumed[name], expected[name], rtol=0, atol=0)
