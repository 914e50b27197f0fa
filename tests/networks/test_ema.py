import copy

import torch

from networks.ema import EMA
from sagan_models import Generator


def test_ema_is_the_weighted_average_with_a_ramp():
    torch.manual_seed(0)
    G = Generator(32, 16, 8)
    ema = EMA(G, decay=0.5)
    expected = copy.deepcopy(G.state_dict())
    for step in range(20):
        with torch.no_grad():
            for parameter in G.parameters():
                parameter.add_(torch.randn_like(parameter))
        G(torch.randn(4, 16))
        source = copy.deepcopy(G.state_dict())  # which stays as it is
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, value in source.items():
            copied = key.endswith(("_u", "_v", "num_batches_tracked"))
            expected[key] = value if copied else decay * expected[key] + (1 - decay) * value
    torch.testing.assert_close(ema.network.state_dict(), expected)
    torch.testing.assert_close(G.state_dict(), source, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
