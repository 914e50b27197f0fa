import math

import pytest
import torch

from sagan_models import Discriminator, Generator
from training.previews import collect_attention
from visuals.attention_stats import attention_stats, format_attention_stats, mean_attention_stats


@pytest.mark.parametrize("query_side, key_side", [(8, 8), (8, 4), (8, 2)])
def test_stats_equal_sums_over_queries_and_keys(query_side, key_side):
    torch.manual_seed(0)
    maps = torch.softmax(3 * torch.randn(2, query_side**2, key_side**2), -1)
    maps[0, 5] = torch.eye(key_side**2)[0]  # all to one key
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
    effective = sum(math.exp(-sum(p * math.log(p) for p in row if p)) for row in maps.flatten(0, 1).tolist())
    assert attention_stats(maps) == pytest.approx((distance / count, effective / count, outside / count), rel=1e-5)


def test_maps_of_both_networks_are_collected_and_a_table_names_the_grids_of_queries_and_keys():
    torch.manual_seed(0)
    G, D = Generator(32, 16, 8).eval(), Discriminator(32, 8).eval()
    real = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        generated, on_real = collect_attention(G, D, torch.randn(3, 16), real=real)
        assert len(collect_attention(G, D, torch.randn(3, 16))) == 1
        assert torch.allclose(on_real.maps["D attn1"], D(real, return_attention=True)[1], atol=1e-6)
    assert (generated.name, list(generated.maps)) == ("generated", ["G attn1", "G attn2", "D attn1", "D attn2"])
    assert (on_real.name, list(on_real.maps)) == ("real", ["D attn1", "D attn2"]) and on_real.images is real

    generated.maps["D attn2"] = torch.rand(1, 64, 16)
    layers = mean_attention_stats([generated, generated])
    assert layers["G attn2"] == ((16, 16), pytest.approx(attention_stats(generated.maps["G attn2"])))
    head, *lines = format_attention_stats(layers).splitlines()
    assert [line.split("  ")[0] for line in lines] == list(generated.maps)
    grids = [line[10 : head.index("mean")].strip() for line in lines]
    assert grids == ["8 x 8", "16 x 16", "8 x 8", "8 x 8 over 4 x 4"]
    assert "(0.52)" in lines[1] and "(256)" in lines[1] and "(16)" in lines[3]  # of uniform attention
