import math

import pytest
import torch

from sagan_models import Discriminator, Generator
from training.previews import collect_attention
from visuals.attention_stats import (
    AttentionSample,
    attention_stats,
    format_attention_stats,
    mean_attention_stats,
    uniform_attention_stats,
)


def test_stats_of_self_attention_to_the_query_alone():
    assert attention_stats(torch.eye(64).expand(2, 64, 64)) == pytest.approx((0, 1, 0))


@pytest.mark.parametrize("query_side, key_side", [(8, 8), (8, 4), (8, 2)])
def test_stats_equal_sums_over_queries_and_keys(query_side, key_side):
    torch.manual_seed(0)
    maps = torch.softmax(3 * torch.randn(2, query_side**2, key_side**2), -1)
    width = query_side // key_side  # of a key's cell, in queries
    distance, outside = 0, 0
    for query in range(query_side**2):
        row, column = divmod(query, query_side)
        for key in range(key_side**2):
            top, left = width * (key // key_side), width * (key % key_side)
            covered = [(top + down, left + right) for down in range(width) for right in range(width)]
            weight = maps[:, query, key].sum().item()
            down, right = top + width / 2 - (row + 0.5), left + width / 2 - (column + 0.5)
            distance += weight * math.hypot(down, right) / query_side
            outside += weight * all(abs(y - row) > 1 or abs(x - column) > 1 for y, x in covered)
    count = 2 * query_side**2
    effective = sum(math.exp(-sum(p * math.log(p) for p in row)) for row in maps.flatten(0, 1).tolist())
    assert attention_stats(maps) == pytest.approx((distance / count, effective / count, outside / count), rel=1e-5)


@pytest.mark.parametrize("query_side, neighborhood", [  # the mean number of keys that 3 x 3 queries touch, per axis
    (16, (14 * 3 + 2 * 2) / 16),  # two at the border
    (32, (30 * 2 + 2 * 1) / 32),  # pooled keys; one at the border
])  # fmt: skip
def test_stats_of_uniform_attention(query_side, neighborhood):
    stats = uniform_attention_stats(query_side, 16)
    assert stats.effective_positions == pytest.approx(256)
    assert stats.distance == pytest.approx(0.5214, abs=0.01)  # mean distance of two random points in a square
    assert stats.non_local_share == pytest.approx(1 - neighborhood**2 / 256)


def test_table_names_the_grids_of_queries_and_keys():
    sample = AttentionSample("generated", None, {"G attn1": torch.rand(1, 64, 64), "G attn2": torch.rand(1, 64, 16)})
    lines = format_attention_stats(mean_attention_stats([sample])).splitlines()
    assert [line[10 : lines[0].index("mean")].strip() for line in lines] == ["grid", "8 x 8", "8 x 8 over 4 x 4"]
    assert "(64)" in lines[1] and "(16)" in lines[2]


def test_maps_of_both_networks_are_collected():
    torch.manual_seed(0)
    G, D = Generator(32, 16, 8).eval(), Discriminator(32, 8).eval()
    real = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        generated, on_real = collect_attention(G, D, torch.randn(3, 16), real=real)
        assert len(collect_attention(G, D, torch.randn(3, 16))) == 1
    assert (generated.name, list(generated.maps)) == ("generated", ["G attn1", "G attn2", "D attn1", "D attn2"])
    assert (on_real.name, list(on_real.maps)) == ("real", ["D attn1", "D attn2"])
    assert generated.maps["G attn2"].shape == (3, 256, 256)
    assert torch.equal(on_real.images, real)
    assert torch.allclose(on_real.maps["D attn1"], D(real, return_attention=True)[1], atol=1e-6)

    layers = mean_attention_stats([generated, generated])
    assert layers["G attn2"] == ((16, 16), pytest.approx(attention_stats(generated.maps["G attn2"])))
    assert [line.split("  ")[0] for line in format_attention_stats(layers).splitlines()[1:]] == list(generated.maps)
