import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from errors import UserError
from metrics.scores import check_requirements, compute_scores

pytest.importorskip("cv2")
CPU = torch.device("cpu")
COUNT, SIZE = 20, 64


def draw_face(seed: int) -> np.ndarray:
    """A blurred gray face, (SIZE, SIZE, 3) uint8: the dark and bright bands that the cascade looks for."""
    random = np.random.default_rng(seed)
    x, y, skin = *random.uniform(-8, 8, 2), int(random.uniform(160, 220))
    image = Image.new("RGB", (256, 256), (60, 60, 60))
    draw = ImageDraw.Draw(image)

    def ellipse(dx: float, dy: float, width: float, height: float, gray: int) -> None:
        draw.ellipse([128 + x + dx - width, dy + y - height, 128 + x + dx + width, dy + y + height], fill=(gray,) * 3)

    ellipse(0, 60, 68, 40, 50)  # hair
    ellipse(0, 140, 70, 88, skin)
    for eye in (-34, 34):
        draw.rectangle([128 + x + eye - 22, 92 + y, 128 + x + eye + 22, 99 + y], fill=(70, 70, 70))
        ellipse(eye, 114, 22, 11, 90)
        ellipse(eye, 114, 8, 8, 20)
    ellipse(0, 150, 10, 18, min(255, skin + 20))  # nose
    ellipse(0, 168, 16, 6, skin - 65)
    ellipse(0, 198, 30, 8, 90)  # mouth
    return np.asarray(image.filter(ImageFilter.GaussianBlur(5)).resize((SIZE, SIZE)))


def rates(fake: torch.Tensor, real: torch.Tensor, cache_path) -> dict[str, float]:
    floats = fake.permute(0, 3, 1, 2).float() / 127.5 - 1
    return compute_scores(lambda start, count: floats[start : start + count], real, ["faces"], num_images=COUNT,
                          batch_size=6, device=CPU, cache_path=cache_path, real_name="real")  # fmt: skip


def test_faces_are_detected_in_faces_and_not_in_noise(tmp_path):
    faces = torch.from_numpy(np.stack([draw_face(seed) for seed in range(COUNT)]))
    noise = torch.randint(0, 256, faces.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = rates(torch.cat([faces[:15], noise[:5]]), noise, tmp_path)
    assert 0.7 <= scores["faces"] <= 0.75
    assert scores["faces_real"] <= 0.05


def test_face_rate_of_real_images_is_cached(tmp_path):
    faces = torch.from_numpy(np.stack([draw_face(seed) for seed in range(COUNT)]))
    first = rates(faces, faces, tmp_path)
    assert first["faces_real"] >= 0.9
    assert rates(faces, torch.zeros_like(faces), tmp_path) == first
    for path in (tmp_path / "metrics").iterdir():
        path.write_bytes(b"")  # cut off: computed again
    assert rates(faces, torch.zeros_like(faces), tmp_path)["faces_real"] == 0


def test_missing_or_too_new_opencv(monkeypatch):
    monkeypatch.delitem(sys.modules, "metrics.faces", raising=False)
    monkeypatch.delattr("cv2.CascadeClassifier")
    with pytest.raises(UserError, match="opencv-python-headless<5"):
        check_requirements(["faces"], SIZE, CPU)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="opencv-python-headless<5"):
        check_requirements(["faces"], SIZE, CPU)
