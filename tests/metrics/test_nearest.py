import numpy as np
import pytest
import torch

from data_loader import to_model_range
from metrics import nearest


def test_nearest_images_are_those_of_a_full_sort(monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 7)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    queries = to_model_range(images[[3, 48]]) + 0.01 * torch.randn(2, 3, 8, 8)
    found = nearest.nearest_images(queries, images, 4)
    expected = (queries[:, None] - to_model_range(images)).square().mean(dim=(2, 3, 4)).sqrt()  # (2, 50)
    assert found.indices[:, 0].tolist() == [3, 48]
    assert torch.equal(found.indices, expected.argsort(1)[:, :4])
    assert torch.allclose(found.distances, expected.sort(1).values[:, :4], atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_spread_is_the_mean_distance_of_all_pairs(memory_format):
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (30, 3, 8, 8)) * random.uniform(0, 1, (30, 1, 1, 1))
    pairs = [(images[i] - images[j]) ** 2 for i in range(30) for j in range(i)]
    spread = nearest.image_spread(torch.tensor(images, dtype=torch.float32).contiguous(memory_format=memory_format))
    assert spread == pytest.approx(np.mean([np.sqrt(pair.mean()) for pair in pairs]), rel=1e-5)
    assert nearest.image_spread(torch.ones(3, 3, 8, 8)) == 0
