"""Scores of images by OpenCV, which need no download: face-detection rate and Fréchet distance of HOG features.

OpenCV is an optional dependency: import this module only for metrics that need it.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from cv2 import CascadeClassifier, HOGDescriptor  # fails here, at import, with OpenCV 5, which has neither

from metrics.scores import Images
from utils import progress

# OpenCV's usual settings, at one image size. Without resizing, the cascade misses 10% of CelebA at 64x64. A finer scale
# factor (1.05) finds 1% more there, takes three times as long, and finds four times as many faces in shuffled patches.
CASCADE = "haarcascade_frontalface_default.xml"
FACE_SIDE = 128  # images are resized to FACE_SIDE x FACE_SIDE pixels
MIN_SIZE = 38  # smallest face in pixels: 0.3 of the side
SCALE_FACTOR, MIN_NEIGHBORS = 1.1, 3

# Histograms of 9 orientations in cells of 8x8 pixels, normalized in blocks of 2x2 cells at every cell: 1,764 features.
HOG_SIDE, HOG_BLOCK, HOG_CELL, HOG_BINS = 64, 16, 8, 9
HOG_COMPONENTS = 64  # principal components that are compared: some hundred images determine their covariances


def face_scores(fakes: Images, reals: Images, batch_size: int, cached: Path) -> dict[str, float]:
    """Return the face-detection rates; that of the real images is cached in a file."""
    scores = {"faces": face_rate(fakes, batch_size, "faces")}
    try:
        scores["faces_real"] = float(cached.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not cached yet, or cut off
        scores["faces_real"] = face_rate(reals, batch_size, "faces of real images")
        cached.write_text(str(scores["faces_real"]), encoding="utf-8")
    return scores


def face_rate(images: Images, batch_size: int, title: str) -> float:
    """Return the fraction of images in which OpenCV's frontal-face cascade finds a face."""
    cascade, found = CascadeClassifier(cv2.data.haarcascades + CASCADE), 0
    for image in gray_images(images, batch_size, title, FACE_SIDE):
        faces = cascade.detectMultiScale(image, SCALE_FACTOR, MIN_NEIGHBORS, minSize=(MIN_SIZE, MIN_SIZE))
        found += len(faces) > 0
    return found / images.count


def hog_features(images: Images, batch_size: int, title: str) -> np.ndarray:
    """Return histograms of oriented gradients (Dalal and Triggs, CVPR 2005), (count, 1764)."""
    sides = [(side, side) for side in (HOG_SIDE, HOG_BLOCK, HOG_CELL, HOG_CELL)]
    descriptor = HOGDescriptor(*sides, HOG_BINS)
    return np.stack([descriptor.compute(image).ravel() for image in gray_images(images, batch_size, title, HOG_SIDE)])


def hog_scores(fakes: Images, reals: Images, batch_size: int) -> dict[str, float]:
    """Return Fréchet distances of HOG features: of fake to real images, and of the two halves of the real ones.

    The real features' first principal components are compared, which have most of their variance.
    """
    fake = hog_features(fakes, batch_size, "hog")
    real = hog_features(reals, batch_size, "hog of real images")
    mean, covariance = real.mean(0), np.cov(real, rowvar=False, dtype=np.float64)
    _, vectors = np.linalg.eigh(covariance)  # by ascending eigenvalue
    basis = vectors[:, -min(HOG_COMPONENTS, len(real) // 2 - 1) :]  # no more than half of the images can have
    fake, real = (fake - mean) @ basis, (real - mean) @ basis
    return {"hog": frechet_distance(fake, real), "hog_real": frechet_distance(real[::2], real[1::2])}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Fréchet distance between normal distributions fitted to the rows of a and of b.

    Dowson and Landau, *The Fréchet distance between multivariate normal distributions* (1982).
    """
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of (A B)^(1/2) is the sum of the square roots of AB's eigenvalues, which are real and not negative.
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0))
    squared = np.square(a.mean(0) - b.mean(0)).sum()
    return float(squared + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum())


def gray_images(images: Images, batch_size: int, title: str, side: int) -> Iterator[np.ndarray]:
    """Yield images in gray, resized to (side, side) uint8, with a progress bar of that title."""
    with progress(None, title, "img", total=images.count) as bar:
        for start in range(0, images.count, batch_size):
            batch = images.read(start, min(batch_size, images.count - start))
            for image in batch.permute(0, 2, 3, 1).cpu().numpy():
                gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
                interpolation = cv2.INTER_AREA if len(gray) > side else cv2.INTER_CUBIC
                yield cv2.resize(gray, (side, side), interpolation=interpolation)
                bar.update()
