import pytest
import torch
from conftest import random_generator

from exporting.loading import load_discriminator, load_generator, pretrained_file
from metrics import projection
from networks.latents import sample_z
from training.models import MODELS


@torch.no_grad()
def test_an_image_that_g_made_gives_its_own_z_back():
    """To 0.05 of pixels; of real weights, as random ones make images of noise."""
    G, D = load_generator(pretrained_file("faces64", "G")), load_discriminator(pretrained_file("faces64", "D"))
    own = sample_z(1, 1, 128, "cpu")
    image = G(own)
    found = projection.project(G, D, image, sample_z(2, 64, 128, "cpu"))
    assert found.rmse[0, -1] < 0.05 < 0.2 < found.rmse[0, 0]
    assert (found.z - own).norm() < 0.5 * (sample_z(2, 64, 128, "cpu") - own).norm(dim=1).min()
    assert torch.allclose(G(found.z), found.images[:, -1], atol=1e-4)
    assert found.labels is None and all(parameter.grad is None for parameter in G.parameters())


@pytest.mark.parametrize("model, num_classes, has_D", [("sagan", 0, True), ("sagan", 0, False), ("paper", 3, True)])
def test_it_starts_from_the_nearest_z_and_keeps_its_class_and_length(monkeypatch, model, num_classes, has_D):
    monkeypatch.setattr(projection, "SHOWN_STEPS", (0, 30))
    monkeypatch.setattr(projection, "CHUNK", 4)
    G = random_generator(model, 32, num_classes)
    D = MODELS[model].Discriminator(32, 8, num_classes=num_classes).eval() if has_D else None
    z = torch.randn(9, 16)
    labels = torch.arange(9) % 3 if num_classes else None
    chosen = torch.tensor([7, 2])
    with torch.no_grad():
        targets = G(z[chosen], None if labels is None else labels[chosen])
    targets += 0.01 * torch.randn_like(targets)
    found, again = (projection.project(G, D, targets, z, labels) for _ in range(2))
    assert torch.equal(found.z, again.z)
    assert torch.allclose(found.images[:, 0], targets, atol=0.1)
    assert found.labels is None if labels is None else found.labels.tolist() == [1, 2]
    assert (found.rmse[:, 0] < 0.02).all() and found.rmse.shape == (2, 2)
    start, end = ((run.norm(dim=1) / 4 - 1).abs() for run in (z[chosen], found.z))
    assert (end < start).all()  # what is left to gain is the penalty


@pytest.mark.parametrize("model", ["sagan", "paper"])
@torch.no_grad()
def test_the_last_features_are_those_that_d_s_last_layer_reads(model):
    D, images = MODELS[model].Discriminator(32, 8).eval(), torch.rand(2, 3, 32, 32)
    pixels, *features = projection._layers(D, images)
    assert torch.equal(pixels, images) and len(features) == sum(name[-1].isdigit() for name, _ in D.named_children())
    logits = D.last(features[-1]) if model == "sagan" else D.linear(features[-1].relu().sum((2, 3)))
    assert torch.allclose(logits.flatten(), D(images), atol=1e-5)


def test_distance_is_that_of_pixels_plus_the_mean_of_those_of_features_relative_to_the_wanted_ones():
    layers = [torch.tensor([0.5, 1.0]).view(2, 1, 1, 1), torch.zeros(2, 3, 2, 2), torch.full((2, 4, 1, 1), 12.0)]
    wanted = [torch.zeros(1, 1, 1, 1), torch.ones(1, 3, 2, 2), torch.full((1, 4, 1, 1), 10.0)]
    assert projection._distances(layers, wanted).tolist() == pytest.approx([0.25 + 0.52, 1 + 0.52])
    assert projection._distances(layers[:1], wanted[:1]).tolist() == [0.25, 1]
