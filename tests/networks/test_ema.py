"""The EMA of a generator."""

import torch

from networks.ema import EMA
from sagan_models import Generator


def test_ema_is_the_weighted_average_with_a_ramp():
    torch.manual_seed(0)
    G = Generator(32, 16, 8)
    ema = EMA(G, decay=0.5)
    expected = {key: value.clone() for key, value in G.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for parameter in G.parameters():
                parameter.add_(torch.randn_like(parameter))
        G(torch.randn(4, 16))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, value in G.state_dict().items():
            copied = key.endswith(("_u", "_v", "num_batches_tracked"))
            expected[key] = value.clone() if copied else decay * expected[key] + (1 - decay) * value
    for key, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_ema_does_not_change_the_source():
    G = Generator(32, 16, 8)
    ema = EMA(G, 0.9)
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    with torch.no_grad():
        G.last[0].bias.add_(1)
    before = {key: value.clone() for key, value in G.state_dict().items()}
    ema.update(0)
    assert all(torch.equal(before[key], value) for key, value in G.state_dict().items())
