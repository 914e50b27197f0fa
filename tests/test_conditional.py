"""Conditional training and evaluation, end to end: labels of real and generated images, grids, samples, checkpoints."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_inputs, build_trainer, inputs_of, make_pictures, page_data, page_pixels, toy_config
from PIL import Image

import main
import tester
from errors import UserError
from metrics import projection, scores
from training import checkpoint
from training.previews import select_classes
from training.resuming import check_classes, load_resume_checkpoint, load_test_checkpoint, saved_classes
from training.run_folders import folder_names, remove_test_results
from visuals.figures import to_pixels

pytestmark = pytest.mark.usefixtures("fewer_images")
OPTIONS = dict(model="paper", conditional=True, imsize=64, g_num=4)
CLASSES = ("short", "medium", "long")
CPU = torch.device("cpu")


@pytest.fixture
def make(make_trainer):
    return lambda **changes: make_trainer(**(OPTIONS | changes))


def separate_classes(G):
    """Give each class a scale of its own in G, whose classes are equal at first."""
    for layer in G.modules():
        if isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one step."""
    trainer = build_trainer(toy_config(tmp_path_factory.mktemp("trained"), **OPTIONS, total_step=1))
    for network in (trainer.G, trainer.ema.network):
        separate_classes(network)
    trainer.train()
    return trainer


def make_tester(trainer, loader=True, **changes):
    given = dataclasses.replace(trainer.config, train=False, **changes)
    saved, config = load_test_checkpoint(given, set(changes))
    return tester.Tester(config, trainer.loader if loader else None, saved, CPU)


def test_real_images_have_their_labels_and_fakes_have_labels_as_frequent(make):
    trainer = make(n_critic=2, batch_size=5)
    trainer.loader.training_labels = torch.tensor([0] * 14 + [1] * 4 + [2] * 2)
    seen = inputs_of(trainer, 200)
    for step, (*of_D, _) in enumerate(seen):
        for index, given in enumerate(of_D, start=2 * step):
            real, labels = trainer.loader.batch(index)
            assert torch.equal(given["real"], real) and torch.equal(given["real_labels"], labels)
    drawn = torch.stack([given["fake_labels"] for step in seen for given in step])
    assert drawn.shape == (600, 5)
    frequencies = drawn.flatten().bincount().numpy() / drawn.numel()
    assert np.abs(frequencies - [0.7, 0.2, 0.1]).max() < 0.03  # four standard deviations
    assert len({labels.numpy().tobytes() for labels in drawn}) > 60  # drawn anew each time
    for pair in ((0, 1), (0, 2), (1, 2)):  # and for each update
        assert not all(torch.equal(*(step[update]["fake_labels"] for update in pair)) for step in seen)


def test_z_and_images_are_those_without_classes(make):
    """Labels are drawn last: the same seed gives both the same images and latents."""
    for given in zip(inputs_of(make(), 2), inputs_of(make(conditional=False), 2), strict=True):
        assert_same_inputs(*given)


def test_both_networks_judge_and_draw_by_the_same_labels(make):
    trainer, calls = make(adv_loss="wgan-gp"), []
    separate_classes(trainer.G)
    real, z, of_real, of_fake = trainer.loader.batch(0)[0], torch.randn(4, 16), [0, 1, 2, 0], [2, 2, 1, 0]
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        network.register_forward_pre_hook(lambda _, given, name=name: calls.append((name, given[1].tolist(), given[0])))
    trainer.d_step(real, z, torch.tensor(of_real), torch.tensor(of_fake), alpha=torch.rand(4, 1, 1, 1))
    trainer.g_step(z, torch.tensor(of_fake))
    of_D = [("G", of_fake), ("D", of_real), ("D", of_fake), ("D", of_real)]  # the last call is the penalty's
    assert [call[:2] for call in calls] == [*of_D, ("G", of_fake), ("D", of_fake)]
    assert torch.equal(calls[1][2], real)
    changed = [trainer.G.block1.bn1.gain.weight.grad, trainer.D.embedding.module.weight_bar.grad]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in changed)


def test_samples_of_training_are_rows_of_classes(trained):
    images, z = trained.previews.samples()["ema"], trained.state.fixed_z
    with torch.no_grad():
        expected = [trained.ema.network(z, torch.full((4,), label)) for label in range(3)]
    torch.testing.assert_close(images, torch.cat(expected))
    names = trained.config.sample_folder
    grid = Image.open(names / "1_ema.png")
    assert grid.height == 2 + 3 * 66 and grid.width > 2 + 4 * 66  # the names are beside the images
    real = np.asarray(Image.open(names / "real.png"))
    left = real.shape[1] - (2 + 4 * 66)
    first = trained.loader.images[(trained.loader.labels == 2).nonzero()[0, 0]].numpy()
    assert np.array_equal(real[2 + 132 : 2 + 132 + 64, left + 2 : left + 66], first)


def test_rows_of_real_images_may_be_short(make):
    trainer = make(total_step=1, toy_num=40)
    trainer.loader.training_labels = torch.tensor([1] * 2 + [2] * 3 + [0] * 35)
    trainer.previews.fixed_z = torch.randn(12, 16)
    images = trainer.previews.real_images().flatten(1)
    assert (images != images[:, :1]).any(1).unflatten(0, (3, 10)).sum(1).tolist() == [10, 2, 3]  # not black


def test_attention_figures_name_the_classes(trained):
    generated, real = trained.previews.attention()
    with torch.no_grad():
        expected = trained.ema.network(trained.state.fixed_z, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(generated.images, expected)
    assert generated.classes == ["short", "medium", "long", "short"]
    assert real.classes == [CLASSES[number] for number in trained.loader.batch(0)[1]]
    entries = page_data(trained.config.attn_folder / "1_explorer.html")
    assert [image["class"] for image in entries["images"]] == [*generated.classes, *real.classes]
    assert "classes short, medium, long" in (trained.config.log_folder / "report.html").read_text()


def test_the_checkpoint_tells_the_classes(trained):
    saved = checkpoint.load(trained.config.model_folder, "1")
    assert saved_classes(saved) == CLASSES
    with pytest.raises(UserError, match=r"--conditional true \(not false\)"):
        load_resume_checkpoint(dataclasses.replace(trained.config, conditional=False, pretrained_model="1"))
    weights = dataclasses.replace(saved, state=None)
    assert saved_classes(weights) == tester.Tester(trained.config, None, weights, CPU).classes == ("0", "1", "2")
    check_classes(weights, ["a", "b", "c"])  # their names are not known
    assert tester.Tester(trained.config, trained.loader, weights, CPU).classes == CLASSES


@pytest.mark.parametrize("classes, words", [
    (["short", "medium", "long", "bald"], "only the images have bald"),
    (["a", "medium", "long"], "only the checkpoint has short; only the images have a"),
    ([], "only the checkpoint has short, medium, long"),
    (["long", "medium", "short"], "has the classes in another order: short, medium, long"),
])  # fmt: skip
def test_a_checkpoint_of_other_classes_says_which(trained, monkeypatch, classes, words):
    config = dataclasses.replace(trained.config, pretrained_model="1")
    monkeypatch.setattr(main, "make_loader", lambda *_: SimpleNamespace(classes=classes))
    with pytest.raises(UserError, match=words) as error:
        build_trainer(config)
    assert "\n" not in str(error.value)


def test_samples_are_written_for_each_class(trained):
    tested = make_tester(trained, num_samples=5, batch_size=3)
    assert tested.test() == 0
    found = sorted(path.relative_to(tested.folder).as_posix() for path in tested.folder.rglob("*.*"))
    samples = [f"samples/{name}/{number:05}.png" for name in CLASSES for number in range(5)]
    assert {*samples, "grid.png", "class_interpolation.png", "class_interpolation.gif"} <= {*found}
    pixels = {name: np.asarray(Image.open(tested.folder / "samples" / name / "00001.png")) for name in CLASSES}
    assert not np.array_equal(pixels["short"], pixels["long"])
    grid = np.asarray(Image.open(tested.folder / "grid.png"))
    assert grid.shape[0] == 2 + 3 * 66
    left = grid.shape[1] - (2 + 5 * 66)
    for row, name in enumerate(CLASSES):  # the second z in each row
        tile = grid[2 + 66 * row : 66 + 66 * row, left + 68 : left + 132]
        assert np.abs(tile.astype(int) - pixels[name]).max() <= 1
    data = page_data(tested.folder / "playground.html")
    assert [shown["name"] for shown in data["classes"]] == [*CLASSES]
    for shown in data["classes"]:  # the second z is at the top right
        corner = page_pixels(shown["pixels"], 64)[data["side"] - 1]
        assert np.abs(corner - pixels[shown["name"]]).max() <= 1
    image = np.asarray(Image.open(tested.folder / "class_interpolation.png")).astype(int)
    left = image.shape[1] - 10 * 66
    steps = [image[2:66, left + 66 * step : left + 64 + 66 * step] for step in range(10)]  # of the first row
    distances = [np.abs(step - steps[0]).mean() for step in steps]
    assert distances == sorted(distances) and distances[9] > 0
    (tested.folder / "samples" / "short" / "mine.png").touch()
    remove_test_results(tested.folder)
    assert [path.name for path in tested.folder.rglob("*.*")] == ["mine.png"]
    assert not (tested.folder / "samples" / "long").exists()


def test_of_many_classes_eight_are_shown_and_all_have_samples(make, tmp_path):
    names = [f"class {number}" for number in range(10)]
    make_pictures(tmp_path / "data", [f"{name}/{number}.png" for name in names for number in range(2)])
    trainer = make(dataset="folder", image_path=str(tmp_path / "data"), total_step=1)
    trainer.train()
    tested = make_tester(trainer, num_samples=1)
    assert tested.test() == 0
    for path in (trainer.config.sample_folder / "1_ema.png", tested.folder / "grid.png"):
        assert Image.open(path).height == 2 + 8 * 66
    data = page_data(tested.folder / "playground.html")
    assert [shown["name"] for shown in data["classes"]] == names[:8] and data["allClasses"] == len(names)
    assert sorted(path.parent.name for path in tested.folder.glob("samples/*/00000.png")) == names


def test_projection_finds_a_class_which_the_playground_shows_first(trained, monkeypatch, capsys):
    monkeypatch.setattr(projection, "SHOWN_STEPS", (0, 2))
    tested = make_tester(trained, loader=False, num_samples=4, project="a.png")
    z, _ = tested._inputs(6)
    with torch.no_grad():
        tested.photo = tested.G(z[5:], torch.tensor([2]))  # the sixth of three classes in turn
    assert tested.test() == 0
    assert f"projection of a.png as {CLASSES[2]}: " in capsys.readouterr().out
    shown = page_data(tested.folder / "playground.html")["classes"]
    assert [entry["name"] for entry in shown] == [CLASSES[2], *CLASSES[:2]]
    assert np.abs(page_pixels(shown[0]["pixels"], 64)[0] - to_pixels(tested.photo)[0]).mean() < 5
    monkeypatch.setattr(trained.loader, "holdout", 0.3)
    monkeypatch.setattr(trained.loader, "_held_out", np.arange(7))
    tested = make_tester(trained, num_samples=4, project="a.png", class_name="long")
    with torch.no_grad():
        tested._write_projection(trained.loader.batch(0)[0][:1])
    rows = 1 + (trained.loader.labels[:7] == 2).sum().item()  # held-out images of that class only
    assert 1 < rows < 8 and Image.open(tested.folder / "projection.png").height == 34 + rows * 120 + 3 * 18 + 8


def test_class_name_chooses_the_classes(trained):
    tested = make_tester(trained, loader=False, num_samples=2, class_name="long,short")
    assert tested.test() == 0
    assert sorted(path.name for path in (tested.folder / "samples").iterdir()) == ["long", "short"]
    assert Image.open(tested.folder / "grid.png").height == 2 + 2 * 66
    assert (tested.folder / "class_interpolation.png").exists()
    tested = make_tester(trained, loader=False, num_samples=1, class_name="long")
    assert tested.test() == 0 and not (tested.folder / "class_interpolation.png").exists()
    with pytest.raises(UserError, match="--class_name bald: the checkpoint's classes are short, medium, long"):
        make_tester(trained, class_name="short,bald")
    with pytest.raises(UserError, match="no classes"):
        select_classes("long", ())


@pytest.mark.parametrize("names, found", [
    (" dog, cat, pug", [1, 0, 3]), ("cat,dog", [2]), ("dog,cat", [1, 0]), ("Bär,ko\u0308ter", [5, 4]),
])  # fmt: skip
def test_class_names_may_have_commas_and_blanks_and_decomposed_letters(names, found):
    assert select_classes(names, ["cat", "dog", "cat,dog", " pug", "köter", "Ba\u0308r"]) == found


@pytest.mark.parametrize("names, folders", [
    (["cat", "../../x", "..", "a/b", "Katze süß", "x\0", ""],
     ["cat_0", "_.._x_1", "__2", "a_b_3", "Katze süß_4", "x__5", "__6"]),
    (["a:b", "dog", "a?b", "Dog", "a"], ["a_b_0", "dog_1", "a_b_2", "Dog_3", "a_4"]),
    (["a:b", "Dog", "ä"], ["a_b", "Dog", "ä"]), (["a", "A", "a_0"], ["a_0", "A_1", "a_0_2"]),
])  # fmt: skip
def test_classes_of_any_name_have_folders_of_their_own_inside(names, folders):
    assert folder_names(names) == folders


def test_metrics_draw_classes_by_frequency(make_config, monkeypatch):
    config = make_config(**OPTIONS, metrics="faces", metric_num=1000)
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    loader, given, parts = SimpleNamespace(labels=labels, device=CPU), [], [[(0, 400), (400, 600)], [(0, 1000)]]
    monkeypatch.setattr(scores, "compute_scores", lambda _, generate, *__: [generate(*part) for part in parts.pop()])
    for _ in range(2):
        scores.compute_metrics(config, lambda *inputs: given.append(inputs), loader)
    torch.testing.assert_close(given[0], (*map(torch.cat, zip(*given[1:], strict=True)),), rtol=0, atol=0)
    frequencies = given[0][1].bincount() / 1000
    assert (frequencies - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.06


def test_evaluation_without_images_of_the_classes(trained, monkeypatch, capsys):
    """Samples need no images; those of other classes are no help."""
    loader = SimpleNamespace(classes=("cat", "dog"), open=lambda: None)
    monkeypatch.setattr(main, "make_loader", lambda *_, **__: loader)
    saved = checkpoint.load(trained.config.model_folder, "1")
    assert main.open_loader_if_any(trained.config, CPU, saved) is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "only the images have cat, dog" in err
    with pytest.raises(UserError, match="only the images have cat, dog"):
        main.open_loader_if_any(dataclasses.replace(trained.config, metrics="faces"), CPU, saved)
