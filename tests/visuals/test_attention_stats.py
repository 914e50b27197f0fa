import math

import pytest
import torch

from sagan_models import Discriminator, Generator
from visuals.attention_stats import (
    attention_stats,
    collect_attention,
    format_attention_stats,
    mean_attention_stats,
    uniform_attention_stats,
)


def test_reach_of_looking_at_oneself():
    found = attention_stats(torch.eye(64).expand(2, 64, 64))
    assert found == pytest.approx((0, 1, 0))


def test_reach_of_looking_at_one_far_place():
    """From each of 4 x 4 positions to the top left one."""
    maps = torch.zeros(1, 16, 16)
    maps[..., 0] = 1
    found = attention_stats(maps)
    expected = sum(math.hypot(row, column) for row in range(4) for column in range(4)) / 16 / 4
    assert found == pytest.approx((expected, 1, 12 / 16))


def test_reach_of_an_even_gaze():
    found = uniform_attention_stats(16)
    assert found.effective_positions == pytest.approx(256)
    assert found.distance == pytest.approx(0.5214, abs=0.01)  # the mean distance of two points in a square
    neighbours = (14 * 3 + 2 * 2) ** 2 / 256
    assert found.non_local_share == pytest.approx(1 - neighbours / 256)


def test_both_networks_are_looked_into():
    torch.manual_seed(0)
    G, D = Generator(32, 16, 8).eval(), Discriminator(32, 8).eval()
    real = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        generated, real_shown = collect_attention(G, D, torch.randn(3, 16), real)
        assert len(collect_attention(G, D, torch.randn(3, 16), None)) == 1
    assert (generated.name, list(generated.maps)) == ("generated", ["G attn1", "G attn2", "D attn1", "D attn2"])
    assert (real_shown.name, list(real_shown.maps)) == ("real", ["D attn1", "D attn2"])
    assert generated.maps["G attn2"].shape == (3, 256, 256)
    assert torch.equal(real_shown.images, real)
    assert torch.allclose(real_shown.maps["D attn1"], D(real, return_attention=True)[1], atol=1e-6)

    layers = mean_attention_stats([generated, generated])
    assert layers["G attn2"] == (16, pytest.approx(attention_stats(generated.maps["G attn2"])))
    assert format_attention_stats(layers).splitlines()[1].startswith("G attn1")
