import numpy as np
import pytest
import torch
from page_tools import bound

from visuals.pages import LEVELS, fill_template, quantize


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 200.0])
def test_quantization_error_is_within_the_bound(scale):
    maps = torch.softmax(scale * torch.randn(256, 256), -1).numpy()
    levels, maxima = quantize(maps)
    assert (levels.dtype, levels.max(), maxima.dtype) == (np.uint8, LEVELS, np.float32)
    assert (np.abs((levels / LEVELS) ** 2 * maxima[:, None] - maps) <= bound(maps)).all()
    assert (np.abs(levels / LEVELS - np.sqrt(maps / maxima[:, None])) <= 1 / 126 + 1e-6).all()


def test_rows_of_zeros_are_quantized_to_zeros():
    levels, maxima = quantize(np.zeros((16, 16), np.float32))
    assert not levels.any() and not maxima.any()


@pytest.mark.parametrize("name", ["explorer", "playground"])
def test_a_page_has_no_placeholder_left_and_no_address_to_load_from(name):
    page = fill_template(name, "A title", {"images": []})
    assert "{{" not in page and "A title" in page
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "url("))
