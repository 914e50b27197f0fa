"""Weights to train from: `export.py --format weights` and what reads them, and `--init_from` of all that it takes."""

import dataclasses
import hashlib
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, assert_same, run_main, train_in, weights_of

import export
import hubconf
from errors import UserError
from exporting.loading import PRETRAINED, load_discriminator, load_generator
from training.checkpoint import load, read_export
from training.guards import image_spread
from training.resuming import load_resume_checkpoint
from visuals.figures import to_uint8

STEPS = 20
STATE = f"models/cats/{STEPS}_state.pth"
WEIGHTS = "pretrained/cats/G.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run "cats", its exported weights in pretrained/cats, and G's of them in pretrained/alone."""
    folder = tmp_path_factory.mktemp("runs")
    train_in(folder, *WORDS, *shlex.split(f"--version cats --total_step {STEPS} --g_lr 0.01 --d_lr 0.01"))
    assert run_main(folder, *shlex.split("--version cats --format weights --export_path out"), program=export)[0] == 0
    shutil.copytree(folder / f"out/cats/{STEPS}", folder / "pretrained/cats")
    (folder / "pretrained/alone").mkdir()
    shutil.copy(folder / WEIGHTS, folder / "pretrained/alone")
    (folder / "damaged.safetensors").write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    return folder


def rounded(weights):
    """Kernels and matrices as float16 has them; vectors as they are."""
    return {key: value.half().float() if value.dim() > 1 else value for key, value in weights.items()}


def test_the_files_are_the_networks_to_within_a_rounding(runs):
    card = (runs / "pretrained/cats/model_card.md").read_text("utf-8")
    for path in (runs / "pretrained/cats").glob("?.safetensors"):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in card
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, similar = (load_generator(runs / name)(z) for name in (STATE, WEIGHTS))
        logits, similar_logits = (load_discriminator(runs / name)(images)
                                  for name in (STATE, WEIGHTS.replace("G.", "D.")))  # fmt: skip
    assert images.std(0).mean() > 0.05 and (to_uint8(images).int() - to_uint8(similar).int()).abs().max() <= 1
    torch.testing.assert_close(similar_logits, logits, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["cats", "alone"])
def test_an_evaluation_without_images(runs, tmp_path, monkeypatch, name):
    """In the folder of results that is named after the weights; with D's maps if D is beside G."""
    monkeypatch.setattr("tester.SUMMARY_IMAGES", 4)
    words = shlex.split("--train false --device cpu --dataset folder --image_path none --batch_size 4")
    code, _, err = run_main(tmp_path, *words, "--pretrained_model", str(runs / "pretrained" / name / "G.safetensors"))
    assert code == 0 and err.count("without training images") == 1
    folder = tmp_path / "samples" / name / f"test_{STEPS}"
    assert (folder / "playground.html").exists() and (folder / "G_attn1.png").exists()
    assert (folder / "D_attn1.png").exists() == (name == "cats")


@pytest.mark.parametrize("name", [STATE, STATE.replace("state", "G"), WEIGHTS, "pretrained/cats"])
def test_a_run_starts_from_weights_and_resumes_without_them(runs, make_trainer, capsys, name):
    state = torch.load(runs / STATE)
    G, ema, D = (state[part] for part in ("G", "ema", "D"))
    if name != STATE:
        G = ema = rounded(ema) if "pretrained" in name else G
        D = rounded(D) if "pretrained" in name else D
    trainer = make_trainer(init_from=str(runs / name), holdout=0.2, pretrained_model="auto")
    out, err = capsys.readouterr()
    assert f"starting from the weights of {runs / name} (step {STEPS})\n" in out
    # Only of a state is known which images D was trained on.
    assert err.count("\n") == err.count("trained on images that are held out now") == (name == STATE)
    for ours, theirs in zip(weights_of(trainer), (G, D, ema), strict=True):
        assert_same(ours, theirs)
    fresh = make_trainer(init_from=str(runs / name), holdout=0.2, toy_num=24)
    assert "held out" not in capsys.readouterr().err  # other images
    assert trainer.step == 0 and not trainer.g_optimizer.state and not trainer.d_optimizer.state
    assert trainer.state.lr_factor == 1 and torch.equal(trainer.state.fixed_z, fresh.state.fixed_z)
    assert trainer.train() == 0 and trainer.step == 3 and capsys.readouterr()
    resumed = make_trainer(init_from="/gone.pth", holdout=0.2, pretrained_model="auto")
    assert resumed.step == 3 and ("held out now" in capsys.readouterr().err) == (name == STATE)
    assert_same(weights_of(resumed), weights_of(trainer))


@pytest.mark.parametrize("name, options, line", [
    (STATE, {"imsize": 64}, "needs --imsize 32 .not 64"), (WEIGHTS, {"z_dim": 8}, "needs --z_dim 16 .not 8"),
    (WEIGHTS, {"imsize": 64, "model": "paper", "conditional": True}, "--conditional false"),
    ("damaged.safetensors", {}, "damaged or not an export"),
    ("none.pth", {}, "there is no .*none.pth; it takes"), ("models", {}, "there is no .*models.G.safetensors"),
    ("pretrained/cats/D.safetensors", {}, "not be D.safetensors"),
    ("pretrained/alone", {}, "D.safetensors is missing"), ("pretrained/cats/model_card.md", {}, "name must end in"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_one_line(runs, make_config, name, options, line):
    with pytest.raises(UserError, match=rf"^[^\n]*{line}[^\n]*$"):
        load_resume_checkpoint(make_config(init_from=str(runs / name), **options))


def test_weights_that_overwrite_would_delete_are_refused(runs, make_config):
    config = make_config(init_from=str(runs / STATE), model_save_path=str(runs / "models"), overwrite=True)
    load_resume_checkpoint(dataclasses.replace(config, version="new"))
    with pytest.raises(UserError, match=r"would delete .*20_state\.pth: move it"):
        load_resume_checkpoint(dataclasses.replace(config, version="cats"))


def test_a_discriminator_of_another_checkpoint_is_refused(runs, tmp_path):
    shutil.copytree(runs / "pretrained/cats", tmp_path / "mixed")
    path = tmp_path / "mixed/D.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(f'"step":"{STEPS}"'.encode(), b'"step":"21"'))
    assert path.read_bytes() != content
    with pytest.raises(UserError, match="not of the checkpoint"):
        load(tmp_path, tmp_path / "mixed/G.safetensors", needs_D=False)


@pytest.mark.parametrize("name", [path.parent.name for path in PRETRAINED.glob("*/model_card.md")])
def test_weights_of_the_repository(name):
    """They are small, as their card says, and draw different images that D does not know at once."""
    files = [PRETRAINED / name / f"{part}.safetensors" for part in "GD"]
    assert sum(path.stat().st_size for path in files) < 15e6
    card = (PRETRAINED / name / "model_card.md").read_text("utf-8")
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() in card for path in files)
    with torch.no_grad():
        images = load_generator(files[0])(torch.randn(16, 128, generator=torch.Generator().manual_seed(0)))
        logits = load_discriminator(files[1])(images)
    assert image_spread(images) > 0.5 and logits.abs().mean() < 5


def test_weights_of_the_repository_by_name(runs, monkeypatch):
    monkeypatch.setattr(hubconf._loading, "PRETRAINED", runs / "pretrained")
    assert_same(hubconf.generator(pretrained="cats").state_dict(), load(runs, runs / WEIGHTS).G)
    assert_same(hubconf.discriminator(pretrained="cats").state_dict(), load(runs, runs / WEIGHTS).D)
    for name in ("dogs", "../cats"):
        with pytest.raises(ValueError, match=f"pretrained must be one of alone, cats, got {name}"):
            hubconf.generator(pretrained=name)


@pytest.mark.parametrize("name, line", [("alone/G", "needs a checkpoint with a discriminator"), ("cats/G", "")])
def test_an_export_of_the_weights(runs, tmp_path, name, line):
    """Of the same files, if D is there, and in another format."""
    for format in ("weights", "safetensors"):
        path = str(runs / "pretrained" / f"{name}.safetensors")
        words = ["--export_path", str(tmp_path / format), "--pretrained_model", path, "--format", format]
        code, _, err = run_main(runs, *words, program=export)
        assert code == (2 if line and format == "weights" else 0)
        assert line in err or format == "safetensors"
    files = [*tmp_path.glob(f"*/{Path(name).parent}/{STEPS}/*.safetensors")]
    for file in (file for file in files if len(file.stem) == 1):
        ours, (theirs, metadata) = read_export(file), read_export(runs / "pretrained/cats" / file.name)
        assert_same(ours[0], theirs)
        assert ours[1] == metadata
    assert len(files) == (1 if line else 3)
