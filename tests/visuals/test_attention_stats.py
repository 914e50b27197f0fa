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


def test_stats_of_self_attention_to_the_query_alone():
    stats = attention_stats(torch.eye(64).expand(2, 64, 64))
    assert stats == pytest.approx((0, 1, 0))


def test_stats_if_all_queries_attend_to_the_top_left_position():
    maps = torch.zeros(1, 16, 16)
    maps[..., 0] = 1
    stats = attention_stats(maps)
    expected = sum(math.hypot(row, column) for row in range(4) for column in range(4)) / 16 / 4
    assert stats == pytest.approx((expected, 1, 12 / 16))


def test_stats_of_uniform_attention():
    stats = uniform_attention_stats(16)
    assert stats.effective_positions == pytest.approx(256)
    assert stats.distance == pytest.approx(0.5214, abs=0.01)  # mean distance of two random points in a square
    neighborhood = (14 * 3 + 2 * 2) ** 2 / 256  # mean size; 2 x 2 in a corner
    assert stats.non_local_share == pytest.approx(1 - neighborhood / 256)


def test_maps_of_both_networks_are_collected():
    torch.manual_seed(0)
    G, D = Generator(32, 16, 8).eval(), Discriminator(32, 8).eval()
    real = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        generated, on_real = collect_attention(G, D, torch.randn(3, 16), real)
        assert len(collect_attention(G, D, torch.randn(3, 16), None)) == 1
    assert (generated.name, list(generated.maps)) == ("generated", ["G attn1", "G attn2", "D attn1", "D attn2"])
    assert (on_real.name, list(on_real.maps)) == ("real", ["D attn1", "D attn2"])
    assert generated.maps["G attn2"].shape == (3, 256, 256)
    assert torch.equal(on_real.images, real)
    assert torch.allclose(on_real.maps["D attn1"], D(real, return_attention=True)[1], atol=1e-6)

    layers = mean_attention_stats([generated, generated])
    assert layers["G attn2"] == (16, pytest.approx(attention_stats(generated.maps["G attn2"])))
    assert [line.split("  ")[0] for line in format_attention_stats(layers).splitlines()[1:]] == list(generated.maps)
