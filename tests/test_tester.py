import pytest
import torch

import tester
from errors import UserError


def test_pictures_of_a_checkpoint(make_trainer, make_config):
    trainer = make_trainer()
    trainer.train()
    tested = tester.Tester(make_config(train=False))
    assert tested.step == 3
    assert torch.equal(tested.G.last[0].weight, trainer.ema.network.last[0].weight)
    tested.test()
    folder = trainer.config.sample_folder / "test_3"
    assert {path.name for path in folder.iterdir()} == {"grid.png", "G_attn1.png", "G_attn2.png"}
    first = (folder / "grid.png").read_bytes()
    tester.Tester(make_config(train=False)).test()
    assert (folder / "grid.png").read_bytes() == first


def test_weights_of_the_reference_alone(make_trainer, make_config):
    trainer = make_trainer()
    trainer.train()
    (trainer.config.model_folder / "3_state.pth").unlink()
    assert torch.equal(tester.Tester(make_config(pretrained_model="3")).G.last[0].weight, trainer.G.last[0].weight)


def test_without_a_checkpoint(make_config):
    with pytest.raises(UserError, match="no checkpoint"):
        tester.Tester(make_config(train=False))
