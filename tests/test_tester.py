import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_trainer, page_data, page_pixels, toy_config
from PIL import Image

import main
import tester
from data_loader import to_model_range
from errors import UserError
from metrics import projection
from metrics.nearest import nearest_images
from networks.latents import latent_directions
from training.resuming import load_test_checkpoint
from visuals.attention_stats import attention_stats
from visuals.figures import to_pixels

pytestmark = pytest.mark.usefixtures("fewer_images")
FILES = {"grid.png", "samples", "interpolation.png", "interpolation.gif", "progress.gif", "attention.json",
         "G_attn1.png", "G_attn2.png", "D_attn1.png", "D_attn2.png", "nearest.png", "directions.png",
         "playground.html"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The trainer of a run of three steps with a log entry and samples per step."""
    trainer = build_trainer(toy_config(tmp_path_factory.mktemp("run"), log_step=1, sample_step=1))
    trainer.train()
    return trainer


@pytest.fixture
def trained(finished, tmp_path, make_config):
    """That trainer, whose results are copies that a test may change."""
    shutil.copytree(Path(finished.config.log_path).parent, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(config=make_config(), loader=finished.loader, G=finished.G)


def make_tester(config, loader, photo=None):
    """A tester of the checkpoint that the options name, all of them as if they were on the command line."""
    saved, config = load_test_checkpoint(config, set(vars(config)))
    return tester.Tester(config, loader, saved, torch.device("cpu"), photo)


def test_output_names_every_file_and_those_of_an_earlier_test_go(trained, make_config, capsys):
    tested = make_tester(make_config(num_samples=6), trained.loader)
    kept, removed = tested.folder / "metrics.json", (tested.folder / "G_attn7.png", tested.folder / "samples/00006.png")
    removed[1].parent.mkdir(parents=True)
    for path in (kept, *removed):  # of an earlier test; metrics take long, and this test computes none
        path.touch()
    tested.test()
    kept.unlink()
    explorer = trained.config.attn_folder / "3_explorer.html"
    assert {path.name for path in tested.folder.iterdir()} == FILES
    assert len(list((tested.folder / "samples").iterdir())) == 6
    assert [image["group"] for image in page_data(explorer)["images"]] == ["generated"] * 5 + ["real"] * 4
    out = capsys.readouterr().out
    assert "EMA" in out and "G attn1" in out and all(name in out for name in FILES)
    pages = [explorer, tested.folder / "playground.html", tested.folder / "grid.png"]
    assert [line.strip() for line in out.splitlines()[-3:]] == [*map(str, pages)]


def test_contents_of_the_files(trained, make_config, monkeypatch):
    tested, norms, drawn = make_tester(make_config(num_samples=5), trained.loader), [], []
    draw = tester.figures.comparison_figure
    monkeypatch.setattr(tester.figures, "comparison_figure", lambda *parts: drawn.append(parts) or draw(*parts))
    shutil.copy(trained.config.sample_folder / "3_ema.png", trained.config.sample_folder / "4_ema.png")  # a later step
    hook = tested.G.register_forward_pre_hook(lambda _, given: norms.append(given[0].norm(dim=1)))
    tested.test()
    hook.remove()
    ends = next(index for index, norm in enumerate(norms) if len(norm) == 5)  # the first of the interpolations' columns
    assert (torch.stack(norms[ends : ends + 10]) > 0.8 * torch.minimum(norms[ends], norms[ends + 9])).all()  # slerp's
    data = page_data(tested.folder / "playground.html")
    (shown,), side = data["classes"], data["side"]
    tiles = page_pixels(shown["pixels"], 32)
    corners = dict(enumerate((0, side - 1, side**2 - side, side**2 - 1)))  # the first samples
    z = tested._inputs(5)[0]
    with torch.no_grad():
        expected = tested.G(z)
    for index, image in enumerate(expected):
        pixels = np.array(Image.open(tested.folder / "samples" / f"{index:05}.png"))
        assert torch.allclose(to_model_range(torch.from_numpy(pixels)[None])[0], image, atol=0.011)  # 256 levels
        assert index not in corners or np.abs(tiles[corners[index]] - pixels).max() <= 1  # rounding of other batches
    ((images, _, captions, footer),) = drawn  # of nearest.png
    distances = (images[:, :1] - images[:, 1:]).square().mean((2, 3, 4)).sqrt()
    assert captions == [["", *(f"{value:.3f}" for value in row)] for row in distances.tolist()]
    others = nearest_images(to_model_range(trained.loader.images), trained.loader.images, 2).distances[:, 1].mean()
    assert footer.endswith(f"{others:.3f} from other training images.")
    numbers = json.loads((tested.folder / "attention.json").read_text())
    with torch.no_grad():
        maps = tested.G(tested._inputs(tester.SUMMARY_IMAGES)[0], return_attention=True)[1]
    assert numbers["G attn1"]["distance"] == pytest.approx(attention_stats(maps).distance, rel=1e-6)
    layer = numbers["G attn1"]
    assert [layer["side"], layer["key_side"], layer["uniform"]["effective_positions"]] == pytest.approx([8, 8, 64])
    assert Image.open(tested.folder / "interpolation.png").size == (10 * 34 + 2, 5 * 34 + 2)
    frames = [Image.open(tested.folder / f"{name}.gif").n_frames for name in ("progress", "interpolation")]
    assert frames == [3, 19]  # the latter there and back
    check_directions(tested, data)


def check_directions(tested, data):
    """Those of the first sample, in a figure and in the playground."""
    z = tested._inputs(1)[0]
    assert (data["directions"], data["steps"], data["corner"]) == (8, 1, "")
    frames = page_pixels(data["classes"][0]["pixels"], 32)[data["side"] ** 2 :].reshape(8, 2, 32, 32, 3)  # -3, 3
    figure = np.asarray(Image.open(tested.folder / "directions.png")).astype(int)
    figure = figure[-(2 + 8 * 34) :, -(2 + 7 * 34) :]
    for row, direction in enumerate(latent_directions(tested.G.first_layer, 8)):
        with torch.no_grad():
            images = to_pixels(tested.G(z + torch.tensor([[-3], [0], [3]]) * direction))
        for column, image in zip((0, 3, 6), images, strict=True):
            tile = figure[2 + 34 * row : 34 * (row + 1), 2 + 34 * column : 34 * (column + 1)]
            assert np.abs(tile - image).max() <= 1  # rounding of other batches
        assert np.abs(frames[row] - images[::2]).max() <= 1


def test_projection_of_a_photo(trained, make_config, make_trainer, monkeypatch, capsys):
    """Beside held-out images, if there are any; the playground and the directions begin at its z."""
    monkeypatch.setattr(projection, "SHOWN_STEPS", (0, 10))
    color, options = (200, 30, 30), make_config(train=False, project="my photo.png")
    photo = to_model_range(torch.tensor(color, dtype=torch.uint8).expand(1, 32, 32, 3))
    for loader in (None, trained.loader, make_trainer(version="other", holdout=0.3).loader):
        tested = make_tester(options, loader, photo)
        tested.test()
        z = torch.from_numpy(np.load(tested.folder / "projection.npy"))
        with torch.no_grad():
            (found,) = to_pixels(tested.G(z[None])).astype(int)
        data = page_data(tested.folder / "playground.html")
        assert np.abs(page_pixels(data["classes"][0]["pixels"], 32)[0] - found).max() <= 1
        assert data["corner"] == "the z nearest to my photo.png" and z.norm() > 2  # as long as what G was trained on
        middle = np.asarray(Image.open(tested.folder / "directions.png"))[-(2 + 8 * 34) :, -(2 + 4 * 34) :][2:34, 2:34]
        assert np.abs(middle - found).max() <= 1
        held_out = len(loader._held_out) if loader else 0
        assert Image.open(tested.folder / "projection.png").height == 34 + (1 + min(held_out, 7)) * 120 + 3 * 18 + 8
        out, err = capsys.readouterr()
        rmse = float(re.search(r"projection of my photo.png: RMSE ([\d.]+) of pixels in \[-1, 1\]; ", out)[1])
        assert rmse == pytest.approx(np.sqrt((((found - color) / 127.5) ** 2).mean()), abs=0.01)
        assert ("no held-out images" in out) == ("held out now" not in err) == (held_out == 0)  # the run had none
    assert held_out > 0
    for name in ("3_D.pth", "3_state.pth"):
        (trained.config.model_folder / name).unlink()
    make_tester(options, None, photo).test()
    assert "without D, by pixels alone" in capsys.readouterr().out
    for name in ("project", "class_name"):
        with pytest.raises(UserError, match=f"--{name} is for --train false"):
            make_config(**{name: "my photo.png"})


def test_a_projection_is_compared_with_what_the_checkpoint_s_run_held_out(trained, make_config):
    path = trained.config.model_folder / "3_state.pth"
    state = torch.load(path)
    state["config"]["holdout"] = 0.25
    torch.save(state, path)
    for project, given, expected in (("a.png", set(), 0.25), (None, set(), 0), ("a.png", {"dataset"}, 0)):
        config = make_config(train=False, project=project, dataset="folder" if given else "toy")
        assert load_test_checkpoint(config, given)[1].holdout == expected


def test_weights_alone_and_a_generator_alone_are_enough(trained, make_config, monkeypatch):
    """Someone shares 500_G.pth: samples, the attention of G, nearest images and metrics work."""
    folder = trained.config.model_folder
    (folder / "3_state.pth").unlink()
    tested = make_tester(make_config(), None)
    assert torch.equal(tested.G.last[0].weight, trained.G.last[0].weight) and not tested.is_ema
    assert tested.test() == 0
    assert {path.name for path in tested.folder.iterdir()} == FILES - {"nearest.png"}
    (folder / "3_G.pth").rename(folder / "500_G.pth")
    (folder / "3_D.pth").unlink()
    tested = make_tester(make_config(metrics="faces", metric_num=12), trained.loader)
    tested.folder.mkdir(parents=True)
    (tested.folder / "metrics.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(tester, "compute_metrics", lambda *_: 1 / 0)
        tested.test()
    assert (tested.folder / "metrics.json").read_text() == "{}"
    assert tested.test() == 0
    names = FILES - {"D_attn1.png", "D_attn2.png"} | {"metrics.json"}
    assert {path.name for path in tested.folder.iterdir()} == names
    assert (trained.config.attn_folder / "500_explorer.html").exists()


@pytest.mark.parametrize("part, key", [("ema", "l1.0.module.weight_bar"), ("ema", "last.0.bias"), ("D", "attn1.gamma")])
def test_weights_that_are_not_finite_are_refused(trained, make_config, part, key):
    path = trained.config.model_folder / "3_state.pth"
    state = torch.load(path)
    state[part][key].fill_(torch.nan)
    torch.save(state, path)
    with pytest.raises(UserError, match="checkpoint 3 has weights that are NaN or Inf"):
        make_tester(make_config(), None)


def test_other_images_than_those_of_the_checkpoint_are_pointed_out(trained, make_config, make_trainer, capsys):
    make_tester(make_config(), make_trainer(toy_num=24, version="other").loader)
    assert "24 images; it had 20" in capsys.readouterr().err


def test_another_seed_draws_other_z_for_the_same_images(trained, make_config):
    saved, config = load_test_checkpoint(make_config(train=False, seed=1), {"seed"})
    loader = main.make_loader(config, torch.device("cpu"), saved=saved)
    assert (config.seed, loader.seed, loader.source.fingerprint) == (1, 0, trained.loader.source.fingerprint)
