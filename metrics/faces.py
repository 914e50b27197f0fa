"""Face-detection rate: the fraction of images in which OpenCV's frontal-face cascade finds a face.

OpenCV is an optional dependency: import this module only for `--metrics faces`.
"""

from collections.abc import Callable

import cv2
import numpy as np
from cv2 import CascadeClassifier  # fails here, at import, with OpenCV 5, which has none
from torch import Tensor

from utils import progress

# OpenCV's usual settings, at one image size. Without resizing, the cascade misses 10% of CelebA at 64x64. A finer scale
# factor (1.05) finds 1% more there, takes three times as long, and finds four times as many faces in shuffled patches.
CASCADE = "haarcascade_frontalface_default.xml"
SIDE = 128  # images are resized to SIDE x SIDE pixels
MIN_SIZE = 38  # smallest face in pixels: 0.3 of the side
SCALE_FACTOR, MIN_NEIGHBORS = 1.1, 3


def face_rate(read: Callable[[int, int], Tensor], count: int, batch_size: int, title: str) -> float:
    """Return the fraction of `count` images in which at least one face is detected.

    Args:
        read: read(start, count) returns images start ... start + count - 1, (count, 3, S, S) uint8.
        count: number of images.
        batch_size: images to read at a time.
        title: of the progress bar.
    """
    cascade = CascadeClassifier(cv2.data.haarcascades + CASCADE)
    found = 0
    with progress(None, title, "img", total=count) as bar:
        for start in range(0, count, batch_size):
            for image in read(start, min(batch_size, count - start)).permute(0, 2, 3, 1).cpu().numpy():
                gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
                interpolation = cv2.INTER_AREA if len(gray) > SIDE else cv2.INTER_CUBIC
                gray = cv2.resize(gray, (SIDE, SIDE), interpolation=interpolation)
                faces = cascade.detectMultiScale(gray, SCALE_FACTOR, MIN_NEIGHBORS, minSize=(MIN_SIZE, MIN_SIZE))
                found += len(faces) > 0
                bar.update()
    return found / count
