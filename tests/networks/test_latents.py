import pytest
import torch

from networks.latents import sample_z, slerp


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_z_is_a_function_of_the_seed_and_truncated_z_fills_the_interval(truncation):
    z, again, other = (sample_z(seed, 2000, 16, "cpu", truncation) for seed in (3, 3, 4))
    assert torch.equal(z, again) and not torch.equal(z, other)
    if truncation:
        assert z.abs().max() <= 0.5 and z.max() > 0.49 and z.min() < -0.49
        assert (z.abs() == z.abs().max()).sum() < 10  # redrawn, not clamped
    else:
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


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_slerp_between_equal_directions_is_finite(factor):
    z = sample_z(0, 1, 8, "cpu")
    path = slerp(z, factor * z, 3)
    assert torch.allclose(path[0, 1], (1 + factor) / 2 * z[0], atol=1e-4)
