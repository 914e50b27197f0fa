"""The share of images in which a face is found, by the frontal-face cascade that comes with OpenCV."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from errors import require
from utils import progress

# OpenCV's usual settings, on pictures of one size. At their own 64x64 the cascade misses 10% of CelebA; finer scales
# (1.05) find 1% more there, cost three times as much, and find four times as many faces in faces cut to pieces.
FACE_CASCADE = "haarcascade_frontalface_default.xml"
FACE_SIDE = 128  # pixels to which a picture is resized
FACE_MIN_SIZE = 38  # pixels of these: 0.3 of the side
FACE_SCALE_FACTOR, FACE_MIN_NEIGHBORS = 1.1, 3


def open_cascade() -> tuple[ModuleType, Any]:
    """OpenCV and its frontal-face cascade, which comes with it."""
    cv2 = require("cv2", "CascadeClassifier", "opencv-python-headless<5", ["faces"])  # gone from OpenCV 5
    return cv2, cv2.CascadeClassifier(cv2.data.haarcascades + FACE_CASCADE)


def face_rate(images: Callable[[int, int], Tensor], count: int, batch_size: int, title: str) -> float:
    """The share of `count` images in which at least one face is found.

    Args:
        images: images(start, count) -> images number start ... start + count - 1, (count, 3, S, S) uint8.
        count: how many there are.
        batch_size: how many to ask for at a time.
        title: of the progress bar.

    Raises:
        UserError: OpenCV is not there.
    """
    cv2, cascade = open_cascade()
    found = 0
    with progress(None, title, "img", total=count) as bar:
        for start in range(0, count, batch_size):
            for picture in images(start, min(batch_size, count - start)).permute(0, 2, 3, 1).cpu().numpy():
                grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
                method = cv2.INTER_AREA if len(grey) > FACE_SIDE else cv2.INTER_CUBIC
                grey = cv2.resize(grey, (FACE_SIDE, FACE_SIDE), interpolation=method)
                faces = cascade.detectMultiScale(
                    grey, FACE_SCALE_FACTOR, FACE_MIN_NEIGHBORS, minSize=(FACE_MIN_SIZE, FACE_MIN_SIZE)
                )
                found += len(faces) > 0
                bar.update()
    return found / count
