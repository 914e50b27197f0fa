import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tester
from data_loader import to_model_range
from errors import UserError
from visuals.attention_stats import attention_stats

FILES = {"grid.png", "samples", "interpolation.png", "interpolation.gif", "progress.gif", "attention.json", "gamma.svg",
         "G_attn1.png", "G_attn2.png", "D_attn1.png", "D_attn2.png", "nearest.png"}  # fmt: skip


@pytest.fixture
def trained(make_trainer):
    """A finished run of three steps with a log line and a sample for each."""
    trainer = make_trainer(log_step=1, sample_step=1)
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def small_summary(monkeypatch):
    monkeypatch.setattr(tester, "SUMMARY_IMAGES", 64)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_test_leaves_is_a_function_of_the_seed(trained, make_config, capsys):
    folder = trained.config.sample_folder / "test_3"
    tester.Tester(make_config(num_samples=6), trained.loader).test()
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == FILES
    assert len(list((folder / "samples").iterdir())) == 6
    assert (trained.config.attn_folder / "3_explorer.html").stat().st_size > 10_000
    assert "G attn1" in out and "the averaged generator after step 3" in out
    first = contents(folder)
    tester.Tester(make_config(num_samples=6, batch_size=5), trained.loader).test()
    again = contents(folder)
    assert again.keys() == first.keys()
    assert all(again[path] == first[path] for path in first if "samples" in path.parts)
    tester.Tester(make_config(num_samples=2, seed=1), trained.loader).test()
    other = contents(folder)
    assert len(list((folder / "samples").iterdir())) == 2  # nothing of the test before is left
    assert other[next(path for path in other if "samples" in path.parts)] not in first.values()


def test_what_the_files_show(trained, make_config):
    tested = tester.Tester(make_config(num_samples=5, truncation=0.7), trained.loader)
    tested.test()
    z = tested._noise(5)
    assert z.abs().max() <= 0.7
    with torch.no_grad():
        expected = tested.G.eval()(z)
    for index, image in enumerate(expected):
        shown = np.array(Image.open(tested.folder / "samples" / f"{index:05}.png"))
        shown = to_model_range(torch.from_numpy(shown)[None])[0]
        assert torch.allclose(shown, image, atol=0.011)  # of 256 levels
    numbers = json.loads((tested.folder / "attention.json").read_text())
    with torch.no_grad():
        maps = tested.G(tested._noise(64), return_attention=True)[1]
    assert numbers["G attn1"]["distance"] == pytest.approx(attention_stats(maps).distance, rel=1e-4)
    assert Image.open(tested.folder / "interpolation.png").size == (10 * 34 + 2, 5 * 34 + 2)
    assert Image.open(tested.folder / "progress.gif").n_frames == 3


def test_which_generator_is_looked_at(trained, make_config):
    averaged, raw = (tester.Tester(make_config(use_ema=use_ema), None) for use_ema in (True, False))
    assert torch.equal(averaged.G.last[0].weight, trained.ema.network.last[0].weight)
    assert torch.equal(raw.G.last[0].weight, trained.G.last[0].weight)
    (trained.config.model_folder / "3_state.pth").unlink()  # as the reference saves them
    assert torch.equal(
        tester.Tester(make_config(pretrained_model="3"), None).G.last[0].weight, trained.G.last[0].weight
    )


def test_the_reference_s_weights_alone_without_images_and_logs(trained, make_config):
    (trained.config.model_folder / "3_state.pth").unlink()
    shutil.rmtree(trained.config.log_folder)
    for path in trained.config.sample_folder.glob("*.png"):
        path.unlink()
    tested = tester.Tester(make_config(), None)
    assert tested.test() == 0
    assert {path.name for path in tested.folder.iterdir()} == FILES - {"progress.gif", "gamma.svg", "nearest.png"}


def test_without_a_checkpoint(make_config):
    with pytest.raises(UserError, match="no checkpoint"):
        tester.Tester(make_config(), None)
