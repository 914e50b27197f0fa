"""Where images come from: `find_source` looks for a data set and says how to decode it.

    source = find_source("folder", "~/cats")
    image = source.decode(source.items[0], 64)   # a Pillow image, RGB, 64x64

Nothing heavy is imported at the top: worker processes start with this module, and most need no torch.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from datasets.toy_faces import draw_face
from errors import UserError

CELEB_CROP = 160  # the reference's
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LSUN_CLASS = "church_outdoor_train"


@dataclass(frozen=True)
class Source:
    """A data set not yet decoded.

    Attributes:
        name: short, for file names and messages.
        items: what to decode, in order: file names, numbers or keys.
        decode: takes an item and a size in pixels, returns an RGB Pillow image of that size; can be pickled.
        fingerprint: changes whenever the decoded pixels may change.
    """

    name: str
    items: Sequence[str] | Sequence[int] | Sequence[bytes]
    decode: Callable[[Any, int], Image.Image]
    fingerprint: str


def find_source(
    dataset: str,
    image_path: str = "./data",
    crop_size: int | None = None,
    download: bool = False,
    toy_num: int = 10_000,
    seed: int = 0,
) -> Source:
    """Looks for a data set; reads file names, sizes and dates only.

    Args:
        dataset: celeb, folder, lsun, cifar10 or toy.
        image_path: where to look.
        crop_size: side of the centre square cut from celeb (None: 160) and folder images (None: the largest).
        download: fetch celeb or cifar10 first, where it is missing.
        toy_num, seed: how many toy faces, and which.

    Raises:
        UserError: nothing usable is there; says what was expected.
    """
    root = Path(image_path).expanduser()
    match dataset:
        case "celeb":
            return _celeb(root, crop_size or CELEB_CROP, download)
        case "folder":
            return _folder("folder", root, crop_size)
        case "lsun":
            return _lsun(root)
        case "cifar10":
            return _cifar10(root, download)
        case "toy":
            return Source("toy", range(toy_num), ToyDecoder(seed), _digest([seed, toy_num]))
    raise ValueError(f"unknown data set {dataset!r}")


@dataclass(frozen=True)
class FileDecoder:
    """Decodes image files below `root`: upright, RGB, centre square of side `crop` (None: the largest), resized."""

    root: str
    crop: int | None

    def __call__(self, name: str, size: int) -> Image.Image:
        path = os.path.join(self.root, name)
        if not os.path.isfile(path):  # a pipe would keep its reader waiting
            raise OSError("not a file")
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # copies only what it turns
            return resize(crop_center(to_rgb(image), self.crop), size)


@dataclass(frozen=True)
class ToyDecoder:
    seed: int

    def __call__(self, index: int, size: int) -> Image.Image:
        return draw_face(self.seed, index, size)


@dataclass(frozen=True)
class LsunDecoder:
    """LSUN's churches, resized without a crop as the reference does."""

    folder: str

    def __call__(self, key: bytes, size: int) -> Image.Image:
        with _open_lsun(self.folder).begin(buffers=False) as transaction:
            return resize(to_rgb(Image.open(io.BytesIO(transaction.get(key)))), size)


@dataclass(frozen=True)
class Cifar10Decoder:
    root: str

    def __call__(self, index: int, size: int) -> Image.Image:
        return resize(_open_cifar10(self.root)[index][0], size)


def decode_chunk(
    decode: Callable[[Any, int], Image.Image], size: int, path: Path, first: int, items: Sequence
) -> tuple[int, list[str]]:
    """Decodes some items into a file of uint8 images (size, size, 3), from image number `first` of the file on.

    What a worker process runs: it is here so that the process need not import torch, and it writes to the file itself
    so that the pixels need not pass through another process.

    Returns:
        How many images it wrote, and a line of name and reason for each item that cannot be read.
    """
    images, failures = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of very large images and of damaged EXIF data, which do not matter here
        for item in items:
            try:
                images.append(np.asarray(decode(item, size)))
            except Exception as error:  # a damaged file can make Pillow's readers raise nearly anything
                line = f"{item}: {type(error).__name__}: {error}".replace("\n", "\\n")
                failures.append(line.encode("utf-8", "backslashreplace").decode())
    with open(path, "r+b") as file:
        file.seek(first * size * size * 3)
        file.writelines(images)
    return len(images), failures


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit and float greys are scaled to 8 bits, transparency is laid over white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "F":
        low, high = image.getextrema()
        scale = 255 / (high - low) if high > low else 0
        image = image.point(lambda value: value * scale - low * scale).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_center(image: Image.Image, side: int | None) -> Image.Image:
    """The centre square of the given side, or the largest that the image has; never pads."""
    width, height = image.size
    side = min(side or width, width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)  # rounded as torchvision's CenterCrop
    return image.crop((left, top, left + side, top + side))


def resize(image: Image.Image, size: int) -> Image.Image:
    """To size x size, antialiased bilinear: what torchvision's Resize does to a Pillow image."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _celeb(root: Path, crop: int, download: bool) -> Source:
    by_hand = (
        f"Fetch img_align_celeba.zip (CelebA, mmlab.ie.cuhk.edu.hk/projects/CelebA.html, 'Align&Cropped Images') "
        f"and unpack it to {root / 'celeba' / 'img_align_celeba'}/000001.jpg ..."
    )
    layouts = [root / "celeba" / "img_align_celeba", root / "CelebA", root / "img_align_celeba"]
    if root.name == "img_align_celeba":
        layouts.append(root)
    found = next((folder for folder in layouts if next(iter(_walk(str(folder))), None)), None)
    if found is None and download:
        from torchvision.datasets import CelebA

        try:
            CelebA(str(root), split="all", download=True)
        except Exception as error:  # Google Drive's quota, no network, gdown missing: all end in the same advice
            raise UserError(f"the download of CelebA failed ({_first_line(error)}). {by_hand}") from error
        found = layouts[0]
    if found is None:
        raise UserError(
            f"no CelebA in {root}: expected {layouts[0]}/*.jpg (torchvision's layout) or {layouts[1]}/*/*.jpg "
            f"(the reference's). {by_hand}, point --image_path at it, or try --dataset toy, which needs no data"
        )
    return _folder("celeb", found, crop)


def _folder(name: str, root: Path, crop: int | None) -> Source:
    if not root.is_dir():
        raise UserError(
            f"--image_path {root} is not a folder; point it at your images, or try --dataset toy, which needs no data"
        )
    files = sorted(_walk(str(root)))
    if not files:
        raise UserError(f"no image in {root} or below it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return Source(
        name, [file for file, _, _ in files], FileDecoder(str(root.absolute()), crop), _digest([crop, *files])
    )


def _walk(root: str) -> Iterable[tuple[str, int, int]]:
    """Every image file below root: relative name, size, modification time in ns. Links to folders are followed once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                path = os.path.join(folder, name)
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a dangling link fails when decoded
                yield os.path.relpath(path, root), status.st_size, status.st_mtime_ns


def _lsun(root: Path) -> Source:
    folder = root / f"{LSUN_CLASS}_lmdb"
    data = folder / "data.mdb"
    if not data.is_file():
        raise UserError(f"no LSUN in {root}: expected {data} (github.com/fyu/lsun: {LSUN_CLASS})")
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("--dataset lsun reads LMDB files: pip install lmdb") from error
    try:
        with _open_lsun(str(folder)).begin(buffers=False) as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise UserError(f"{data} cannot be read: {error}") from error
    status = data.stat()
    return Source("lsun", keys, LsunDecoder(str(folder)), _digest([len(keys), status.st_size, status.st_mtime_ns]))


def _cifar10(root: Path, download: bool) -> Source:
    try:
        count = len(_open_cifar10(str(root), download))
    except Exception as error:  # torchvision raises RuntimeError, OSError or URLError by what is missing
        raise UserError(
            f"no CIFAR-10 in {root} ({_first_line(error)}): --download true fetches it, or unpack "
            f"cifar-10-python.tar.gz there by hand"
        ) from error
    # Nothing of the files is in the fingerprint: torchvision has checked their MD5 sums.
    return Source("cifar10", range(count), Cifar10Decoder(str(root)), _digest([count]))


@lru_cache(maxsize=1)
def _open_lsun(folder: str):
    """Not torchvision's LSUN: that leaves a pickled list of keys in the current folder and mixes up data sets by it."""
    import lmdb

    return lmdb.open(folder, max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)


@lru_cache(maxsize=1)
def _open_cifar10(root: str, download: bool = False):
    from torchvision.datasets import CIFAR10

    return CIFAR10(root, download=download)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
