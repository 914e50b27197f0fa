import torch

from data_loader import to_model_range
from metrics import nearest


def test_nearest_images_are_those_of_a_full_sort(monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 7)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    queries = to_model_range(images[[3, 48]]) + 0.01 * torch.randn(2, 3, 8, 8)
    queries[1] = queries[1].flip(2)
    found = nearest.nearest_images(queries, images, 4)
    both = torch.stack([queries, queries.flip(3)])[:, :, None]
    expected, mirrored = (both - to_model_range(images)).square().mean(dim=(3, 4, 5)).sqrt().min(0)  # (2, 50)
    assert found.indices[:, 0].tolist() == [3, 48]
    assert torch.equal(found.indices, expected.argsort(1)[:, :4])
    assert found.mirrored[:, 0].tolist() == [False, True]
    assert torch.equal(found.mirrored, mirrored.gather(1, found.indices) == 1)
    assert torch.allclose(found.distances, expected.sort(1).values[:, :4], atol=1e-4)
