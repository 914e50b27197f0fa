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
