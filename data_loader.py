"""From images to batches. Every dataset is decoded once into a uint8 cache, which is memory-mapped from then on.

loader = Loader(find_source("toy"), image_size=64, batch_size=64).open()
images, labels = loader.batch(1000)     # (64, 3, 64, 64) in [-1, 1], on the device; None
"""

import os
import warnings
import zlib
from collections.abc import Container, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.cache import open_cache
from datasets.image_files import crop_center, read_rgb, resize
from datasets.labels import Labels, join_names
from datasets.sources import CELEB_CROP, CELEB_SIZE, Source
from errors import UserError, one_line

MAX_GPU_MEMORY_FRACTION = 0.5  # of the free GPU memory, for the images


class Loader:
    """Batches of real images, each a function of (seed, number), so that a checkpoint needs no loader state.

    `len(loader)` is the number of batches per epoch; the last partial batch is dropped. Held-out images are in
    no batch.

    Args:
        image_size: height and width S in pixels.
        cache_path: folder of all caches.
        num_workers: decoding processes while the cache is built; 0 decodes in this process.
        seed: determines the order of the images, and which are flipped and held out.
        hflip: flip half of the images horizontally.
        conditional: with labels.
        holdout: probability of each image to be held out, in [0, 1). A hash of the seed and its file name, number or
            key decides, whatever the other images are; if all are above it and it is not 0, the lowest is held out.

    Attributes, of which all but `classes` are empty before `open`:
        classes: their names; empty without labels.
        images: all images (N, S, S, 3) in uint8, held out or not, on the GPU where they fit, otherwise memory-mapped.
        labels: the class of each image, (N,) int64 below `len(classes)`, on the device.
        training_labels: those of the images that are not held out.
        skipped: a line with name and reason for each image that could not be read.

    Raises:
        UserError: the source has fewer items than one batch, no labels, or fewer than two classes of two images.
    """

    def __init__(
        self,
        source: Source,
        image_size: int = 64,
        batch_size: int = 64,
        *,
        cache_path: str = "./cache",
        num_workers: int = 2,
        seed: int = 0,
        hflip: bool = False,
        conditional: bool = False,
        holdout: float = 0.0,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.channels_last,
    ):
        _check_size(len(source.items), batch_size)
        self._labels = _find_labels(source) if conditional else None
        self.source, self.image_size, self.batch_size = source, image_size, batch_size
        self.cache_path, self.num_workers = Path(os.path.expanduser(cache_path)), num_workers
        self.seed, self.hflip, self.holdout = seed, hflip, holdout
        self.device, self.memory_format = torch.device(device), memory_format
        self.classes = self._labels.classes if self._labels else ()
        self.images: Tensor = torch.empty(0)
        self.labels = self.training_labels = torch.empty(0, dtype=torch.long)
        self.skipped: list[str] = []
        self._epoch: int | None = None  # of `_order` and `_flip`
        self._order = self._flip = torch.empty(0)
        self._training = self._held_out = np.empty(0, np.int64)  # numbers of the images
        self._limit, self._held_out_checksum = 0.0, 0

    def open(self) -> "Loader":
        """Open the cache, or build it if there is none, and return self.

        Raises:
            UserError: the cache cannot be read or written, or the images that could be read, or are not held out, are
                too few for a batch or lack a class.
        """
        images, skipped = open_cache(self.source, self.image_size, self.cache_path, self.num_workers)
        self.skipped = list(skipped.values())
        self._hold_out(len(images), skipped)
        if self._labels:
            self._assign_labels(self._labels.without(skipped))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the array is read-only; nothing writes to it
            self.images = torch.from_numpy(images)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.images.nbytes < MAX_GPU_MEMORY_FRACTION * free:
                self.images = self.images.to(self.device)
        return self

    @cached_property
    def fingerprint(self) -> dict[str, int | float]:
        """What tells apart the data of runs or ranks.

        Returns:
            images and training_images, their numbers with and without those held out; checksum, a CRC32 of up to 256
            images and of all labels; seed, holdout (see `_hold_out`) and held_out_checksum, of the names held out.
        """
        count = len(self.images)
        checksum = zlib.crc32(self.images[:: -(-count // 256)].cpu().numpy().tobytes(), count)
        return {
            "images": count,
            "training_images": len(self._training),
            "checksum": zlib.crc32(self.labels.cpu().numpy().tobytes(), checksum),
            "seed": self.seed,
            "holdout": self._limit,
            "held_out_checksum": self._held_out_checksum,
        }

    def __len__(self) -> int:
        return len(self._training) // self.batch_size

    def batch(self, batch_index: int, shard: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Return the rows `shard` of a batch, whose number is counted from the start of training.

        Returns:
            images (B, 3, S, S) float32 in [-1, 1], and labels (B,) or None if there are no classes.
        """
        epoch, index = divmod(batch_index, len(self))
        if epoch != self._epoch:
            self._shuffle(epoch)
        rows = range(self.batch_size * index, self.batch_size * (index + 1))[shard]
        rows = slice(rows.start, rows.stop)
        numbers = self._order[rows]
        return self.images_at(numbers, self._flip[rows] if self.hflip else None), self._labels_of(numbers)

    def held_out(self, index: int, count: int, classes: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """Return batch number `index` of up to `count` held-out images, as `batch`; after the last come the first.

        They are in an order that mixes folders. With `classes`, only those of these classes.
        """
        numbers = torch.from_numpy(self._held_out)
        if classes:
            numbers = numbers[torch.isin(self.labels.cpu()[numbers], torch.tensor(classes))]
        rows = torch.arange(min(count, len(numbers))) + index * count
        numbers = numbers[rows % max(len(numbers), 1)]
        return self.images_at(numbers), self._labels_of(numbers)

    def images_of_class(self, label: int, count: int) -> Tensor:
        """Return the first training images of a class, at most `count`, as `images_at`."""
        return self.images_at(torch.from_numpy(self._training)[(self.training_labels == label).cpu()][:count])

    def images_at(self, numbers: Tensor, flip: Tensor | None = None) -> Tensor:
        """Return images by their numbers (B,), mirrored where `flip` (B, 1, 1, 1) is true; as those of `batch`."""
        pixels = self.images[numbers.to(self.images.device)]
        if self.device.type == "cuda" and not pixels.is_cuda:  # too many for its memory: copied while it computes
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        pixels = pixels.to(self.device)
        if flip is not None:
            pixels = torch.where(flip, pixels.flip(2), pixels)
        return to_model_range(pixels).contiguous(memory_format=self.memory_format)

    def _labels_of(self, numbers: Tensor) -> Tensor | None:
        return self.labels[numbers.to(self.device)] if self.classes else None

    def _hold_out(self, count: int, skipped: Container[int]) -> None:
        """Hold out the images whose hash is at most `_limit`: `holdout`, or the lowest hash if that is higher."""
        self._training = np.arange(count)
        if self.holdout:
            names = [_name(item) for number, item in enumerate(self.source.items) if number not in skipped]
            digests = (blake2b(b"%d/%b" % (self.seed, name), digest_size=8).digest() for name in names)
            hashes = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
            self._limit = max(self.holdout, float(hashes.min()))
            self._training, self._held_out = np.flatnonzero(hashes > self._limit), np.flatnonzero(hashes <= self._limit)
            self._held_out_checksum = zlib.crc32(b"\n".join(names[number] for number in self._held_out))
            self._held_out = self._held_out[hashes[self._held_out].argsort()]
        _check_size(count, self.batch_size, len(self._held_out))

    def _assign_labels(self, labels: Labels) -> None:
        """Take the labels of the images that could be read."""
        try:
            labels.check()
        except UserError as error:  # there were enough of each class before
            reason = f"Unreadable: {len(self.skipped):,} images, the first {self.skipped[0]}"
            raise UserError(f"{error}. {reason}") from error
        self.labels = torch.tensor(labels.targets, device=self.device)
        self.training_labels = self.labels[torch.from_numpy(self._training).to(self.device)]
        trained = {labels.targets[index] for index in self._training}
        if untrained := [name for number, name in enumerate(self.classes) if number not in trained]:
            raise UserError(
                f"--holdout {self.holdout} leaves no training images of {join_names(untrained)}: lower it, or choose "
                "another --seed"
            )

    def _shuffle(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        count = len(self._training)
        self._order = torch.from_numpy(self._training[random.permutation(count)]).to(self.images.device)
        self._flip = torch.from_numpy(random.random(count) < 0.5).view(-1, 1, 1, 1).to(self.device)
        self._epoch = epoch


def _find_labels(source: Source) -> Labels:
    if source.labels is None:
        raise UserError(f"--conditional true: --dataset {source.name} has no classes")
    classes, targets = source.labels()
    labels = Labels((*classes,), [*map(int, targets)])  # some of torchvision's datasets have tensors
    labels.check()
    return labels


def _name(item: str | int | bytes) -> bytes:
    """Return an item of a source as bytes, the same on any system and for any locale."""
    return item if isinstance(item, bytes) else os.fsencode(str(item).replace(os.sep, "/"))


def load_photo(path: str, dataset: str, crop_size: int | None, size: int) -> Tensor:
    """Return an image file from anywhere, cropped like the images of a dataset: (1, 3, size, size) in [-1, 1].

    In place of celeb's crop, whose images have a width of 178 pixels, the same share of the shorter side; of lsun none.

    Raises:
        UserError: there is no such file, or it cannot be read as an image.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise UserError(f"there is no image file {path}")
    try:
        image = read_rgb(path)
    except Exception as error:  # Pillow's readers raise nearly any type
        raise UserError(f"the image {path} cannot be read: {one_line(error)}") from error
    if dataset == "celeb":
        crop_size = round(min(image.size) * (crop_size or CELEB_CROP) / CELEB_SIZE[0])
    image = resize(image if dataset == "lsun" else crop_center(image, crop_size), size)
    return to_model_range(torch.from_numpy(np.array(image))[None])


def to_model_range(pixels: Tensor) -> Tensor:
    """Convert (B, S, S, 3) uint8 to (B, 3, S, S) float32 in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _check_size(images: int, batch_size: int, held_out: int = 0) -> None:
    """Raise `UserError` if the images that are not held out are fewer than one batch."""
    left = images - held_out
    if left < batch_size:
        found = f"--holdout leaves {left} of the {images} images" if held_out else f"the dataset has {images} images"
        ways = ["lower --holdout (0: none)"] * bool(held_out) + [f"set --batch_size to {left} or less"] * bool(left)
        raise UserError(f"{found}, fewer than one batch: {' or '.join(ways)}")
