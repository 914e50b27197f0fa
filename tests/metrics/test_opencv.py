import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

from metrics.scores import compute_scores

pytest.importorskip("cv2")
from metrics.opencv import frechet_distance


def draw_faces(count: int) -> torch.Tensor:
    """Blurred gray faces, (count, 64, 64, 3) uint8: the dark and bright bands that the cascade looks for."""
    faces = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        x, y, skin = *random.uniform(-8, 8, 2), int(random.uniform(160, 220))
        image = Image.new("RGB", (256, 256), (60, 60, 60))
        draw = ImageDraw.Draw(image)
        brows = [(draw.rectangle, eye, 95.5, 22, 3.5, 70) for eye in (-34, 34)]
        eyes = [(draw.ellipse, eye, 114, *rest) for rest in ((22, 11, 90), (8, 8, 20)) for eye in (-34, 34)]
        hair_and_skin = (draw.ellipse, 0, 60, 68, 40, 50), (draw.ellipse, 0, 140, 70, 88, skin)
        nose, mouth = (draw.ellipse, 0, 150, 10, 18, min(255, skin + 20)), (draw.ellipse, 0, 168, 16, 6, skin - 65)
        for shape, dx, dy, width, height, gray in (
            *hair_and_skin, *brows, *eyes, nose, mouth, (draw.ellipse, 0, 198, 30, 8, 90)
        ):  # fmt: skip
            box = [128 + x + dx - width, dy + y - height, 128 + x + dx + width, dy + y + height]
            shape(box, fill=(gray,) * 3)
        faces.append(np.asarray(image.filter(ImageFilter.GaussianBlur(5)).resize((64, 64))))
    return torch.from_numpy(np.stack(faces))


def scores_of(fake: torch.Tensor, real: torch.Tensor, cache_path, name: str = "faces") -> dict[str, float]:
    floats = fake.permute(0, 3, 1, 2).float() / 127.5 - 1
    cpu = torch.device("cpu")
    options = dict(num_images=len(fake), batch_size=6, device=cpu, cache_path=cache_path, real_name="real")
    return compute_scores(lambda start, count: floats[start : start + count], real, [name], **options)


def test_faces_are_detected_in_faces_and_not_in_noise_and_the_rate_of_real_ones_is_cached(tmp_path):
    faces = draw_faces(20)
    noise = torch.randint(0, 256, faces.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = scores_of(torch.cat([faces[:15], noise[:5]]), faces, tmp_path)
    assert 0.7 <= scores["faces"] <= 0.75 and scores["faces_real"] >= 0.9
    assert scores_of(faces, noise, tmp_path)["faces_real"] == scores["faces_real"]
    for path in (tmp_path / "metrics").iterdir():
        path.write_bytes(b"")  # cut off: computed again
    assert scores_of(faces, noise, tmp_path)["faces_real"] <= 0.05


def test_frechet_distance_equals_that_of_a_matrix_square_root():
    """Of normal distributions whose covariances do not commute, where the root is easy to get wrong."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(500, 5)) @ random.normal(size=(5, 5)), 1 + random.normal(size=(400, 5))
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values) @ vectors.T  # A^(1/2)
    # The trace of (A^(1/2) B A^(1/2))^(1/2) is that of (A B)^(1/2).
    trace = np.sqrt(np.linalg.eigvalsh(root @ B @ root)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(5 * 4)


@pytest.mark.parametrize("size", [32, 128])
def test_hog_sees_shapes_not_brightness(size, tmp_path):
    """The distance of faces to other faces, or darker ones, is near that of two halves; of squares it is far above."""
    images = draw_faces(60).permute(0, 3, 1, 2).float()
    faces = F.interpolate(images, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).byte()
    others = faces[1::2]
    squares = torch.full_like(faces[:30], 60)
    for index, image in enumerate(squares):
        image[index * size // 60 : index * size // 60 + size // 3, size // 4 : size // 2] = 200
    near, far = (scores_of(fake, faces[::2], tmp_path, "hog") for fake in (others, squares))
    assert near["hog_real"] == far["hog_real"] > 0
    assert near["hog"] < 3 * near["hog_real"] < 0.3 * far["hog"]
    darker = scores_of((others.float() * 0.5).byte(), faces[::2], tmp_path, "hog")
    assert darker["hog"] < 0.3 * far["hog"]
