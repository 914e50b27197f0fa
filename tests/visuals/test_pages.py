import numpy as np
import torch
from page_tools import bound

from visuals.pages import LEVELS, quantize


def test_quantization_error_is_within_the_bound():
    for scale in (0.0, 1.0, 10.0, 200.0):
        maps = torch.softmax(scale * torch.randn(256, 256), -1).numpy()
        levels, maxima = quantize(maps)
        assert (levels.dtype, levels.max(), maxima.dtype) == (np.uint8, LEVELS, np.float32)
        assert (np.abs((levels / LEVELS) ** 2 * maxima[:, None] - maps) <= bound(maps)).all()
        assert (np.abs(levels / LEVELS - np.sqrt(maps / maxima[:, None])) <= 1 / 126 + 1e-6).all()
    assert not any(part.any() for part in quantize(np.zeros((16, 16), np.float32)))
