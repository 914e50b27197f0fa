import numpy as np
import pytest
import torch
from conftest import generator_of
from PIL import ImageFilter

from datasets.toy_faces import draw_face

pytest.importorskip("cv2")
from metrics.opencv import frechet_distance


def draw_faces(numbers, size: int) -> torch.Tensor:
    """Blurred toy faces (N, size, size, 3) uint8. OpenCV finds only those that have the bands that it looks for."""
    images = [draw_face(0, number, size).filter(ImageFilter.GaussianBlur(1)) for number in numbers]
    return torch.from_numpy(np.stack(images))


def test_faces_are_found_in_faces_and_not_in_noise_and_the_rate_of_real_images_is_cached(compute, tmp_path):
    drawn = draw_faces(range(60), 64).repeat(1, 2, 2, 1)  # four in an image
    faces = drawn[[4, 6, 19, 22, 27, 30, 36, 43, 44, 45, 48, 56]]
    noise = torch.randint(0, 256, faces.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fake = torch.cat([faces[:9], noise[:3]])
    assert compute(generator_of(fake), faces, ["faces"], metric_num=12) == {"faces": 0.75, "faces_real": 1}
    assert compute(generator_of(fake), noise, ["faces"], metric_num=12) == {"faces": 0.75, "faces_real": 1}
    for path in (tmp_path / "cache" / "metrics").iterdir():
        path.write_bytes(b"")  # cut off: computed again
    assert compute(generator_of(fake), noise, ["faces"], metric_num=12) == {"faces": 0.75, "faces_real": 0}
    # As in later versions; another OpenCV or Pillow may find one more or less.
    rate = compute(generator_of(drawn), noise, ["faces"], metric_num=60)["faces"]
    assert rate == pytest.approx(20 / 60, abs=1.01 / 60)


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


@pytest.mark.parametrize("size, hog, hog_real", [(32, 1.072, 3.596), (128, 0.8185, 2.566)])  # as in later versions
def test_hog_sees_shapes_in_gray_but_not_brightness(size, hog, hog_real, compute):
    """The distance of faces to other faces, or darker ones, is far below that of squares."""
    faces = draw_faces(range(264), size)
    real, others = faces[::2], faces[1::2]
    flat = torch.full_like(others, 100)
    squares, unseen = flat.clone(), flat.clone()  # unseen: of a color of the same gray
    for row in range(size // 2):
        place = slice(row, None, size // 2), slice(row, row + size // 3), slice(size // 4, size // 2)
        squares[place], unseen[place] = 200, torch.tensor([0, 121, 255]).byte()
    fakes = map(generator_of, (others, (others * 0.5).byte(), squares, unseen, flat))
    scores = [compute(fake, real, ["hog"], metric_num=132) for fake in fakes]
    near, dark, far, unseen, flat = (score["hog"] for score in scores)
    assert max(near, dark) < 0.15 * far and unseen == flat
    assert 0 < scores[0]["hog_real"] == scores[2]["hog_real"] < 0.5 * far
    assert [near, scores[0]["hog_real"]] == pytest.approx([hog, hog_real], rel=0.02)
