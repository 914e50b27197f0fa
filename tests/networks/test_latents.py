import numpy as np
import pytest
import torch
from conftest import random_generator

from networks.latents import latent_directions, sample_z, slerp
from spectral import fold_spectral_norm


def test_z_is_a_function_of_the_seed():
    z, again, other = (sample_z(seed, 2000, 16, "cpu") for seed in (3, 3, 4))
    assert torch.equal(z, again) and not torch.equal(z, other)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_slerp_moves_on_an_arc_at_constant_speed():
    start, end = sample_z(0, 2, 128, "cpu"), 2 * sample_z(1, 2, 128, "cpu")
    path = slerp(start, end, 9)
    assert path.shape == (2, 9, 128)
    assert torch.allclose(path[:, [0, -1]], torch.stack([start, end], 1), atol=1e-5)
    lengths = path.norm(dim=2)
    assert torch.allclose(lengths.diff(dim=1), (lengths[:, -1:] - lengths[:, :1]) / 8, atol=1e-4)  # linear
    directions = path / lengths[..., None]
    angles = (directions[:, 1:] * directions[:, :-1]).sum(2).acos()
    assert torch.allclose(angles, angles[:, :1].expand_as(angles), atol=1e-4)
    for factor in (1.0, 3.0):  # between equal directions, without dividing by 0
        assert torch.allclose(slerp(start, factor * start, 3)[:, 1], (1 + factor) / 2 * start, atol=1e-4)


@pytest.mark.parametrize("model", ["sagan", "paper"])
@torch.no_grad()
def test_directions_are_the_right_singular_vectors_of_the_first_layer(model):
    """By numpy, from what the layer computes, with spectral norm folded in or not."""
    G = random_generator(model, 32)
    shape = (-1, 16, 1, 1) if model == "sagan" else (-1, 16)
    points = torch.cat([torch.eye(16), torch.zeros(1, 16)])
    outputs = G.first_layer(points.view(shape)).flatten(1).double()
    _, values, vectors = np.linalg.svd((outputs[:-1] - outputs[-1]).T.numpy())
    directions = latent_directions(G.first_layer, 8)
    assert torch.allclose(directions @ directions.T, torch.eye(8), atol=1e-6)
    assert (np.diff(values) < 0).all()  # otherwise the vectors are not unique
    assert np.abs((directions.numpy() * vectors[:8]).sum(1)) == pytest.approx(1, abs=1e-5)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(latent_directions(G.first_layer, 8), directions)  # it was not changed
    assert torch.allclose(latent_directions(fold_spectral_norm(G).first_layer, 99)[:8], directions, atol=1e-5)
