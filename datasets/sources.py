"""Find a dataset and decode its images.

    source = find_source("folder", "~/cats")
    image = source.decode(source.items[0], 64)   # an RGB Pillow image, 64x64

Worker processes import this module, so that torch and torchvision are imported only in the functions that need them.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from datasets.toy_faces import draw_face
from errors import UserError

CELEB_CROP = 160  # pixels, as in the reference
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LSUN_CLASS = "church_outdoor_train"


@dataclass(frozen=True)
class Source:
    """A dataset that is not decoded yet.

    Attributes:
        name: short, for file names and messages.
        items: what to decode, in order: file names, numbers or keys.
        decode: function of an item and a size in pixels; returns an RGB Pillow image of that size. Can be pickled.
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
    """Return the source of a dataset. Reads file names, sizes and dates only.

    Args:
        dataset: celeb, folder, lsun, cifar10 or toy.
        image_path: folder of the data.
        crop_size: side of the center square cut from celeb (None: 160) and folder images (None: the largest square).
        download: download celeb or cifar10 if it is missing.
        toy_num: number of toy faces.
        seed: of the toy faces.

    Raises:
        UserError: the data is missing or unreadable; the message describes the expected files.
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
            return Source("toy", range(toy_num), partial(draw_face, seed), _digest([seed, toy_num]))
    raise ValueError(f"unknown dataset {dataset!r}")


def decode_chunk(
    decode: Callable[[Any, int], Image.Image], size: int, path: Path, first: int, items: Sequence
) -> tuple[int, list[str]]:
    """Decode some items into a file of uint8 images (size, size, 3), starting at image number `first` of the file.

    Worker processes run this. It writes to the file itself, because sending the pixels to another process is slower.

    Returns:
        The number of images written, and a line with name and reason for each item that cannot be read.
    """
    images, failures = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of very large images and damaged EXIF data; neither matters here
        for item in items:
            try:
                images.append(np.asarray(decode(item, size)))
            except Exception as error:  # Pillow's readers raise nearly any type for a damaged file
                line = f"{item}: {type(error).__name__}: {error}".replace("\n", "\\n")
                failures.append(line.encode("utf-8", "backslashreplace").decode())
    with open(path, "r+b") as file:
        file.seek(first * size * size * 3)
        file.writelines(images)
    return len(images), failures


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB: grays of 16 bits or of floats in [0, 1] to 8 bits, transparency to white."""
    if image.mode.startswith("I"):  # I and the I;16 family
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "F":
        image = image.point(lambda value: value * 255).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies


def crop_center(image: Image.Image, side: int | None) -> Image.Image:
    """Return the center square of the given side, at most the largest square (None) of the image; never pads."""
    width, height = image.size
    side = min(side or width, width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)  # rounded as torchvision's CenterCrop
    return image.crop((left, top, left + side, top + side))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resize to size x size pixels, antialiased bilinear, as torchvision's Resize does with a Pillow image."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _celeb(root: Path, crop: int, download: bool) -> Source:
    by_hand = (
        f"Download img_align_celeba.zip by hand (CelebA, mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
        f"'Align&Cropped Images') and unpack it to {root / 'celeba' / 'img_align_celeba'}/000001.jpg ..."
    )
    layouts = [root / "celeba" / "img_align_celeba", root / "CelebA", root / "img_align_celeba"]
    if root.name == "img_align_celeba":
        layouts.append(root)
    found = next((folder for folder in layouts if any(_walk(str(folder)))), None)
    if found is None and download:
        from torchvision.datasets import CelebA

        try:
            CelebA(str(root), split="all", download=True)
        except Exception as error:  # Google Drive's quota, no network, gdown missing: the advice is the same
            raise UserError(f"the download of CelebA failed ({_first_line(error)}). {by_hand}") from error
        found = layouts[0]
    if found is None:
        raise UserError(
            f"no CelebA in {root}: expected {layouts[0]}/*.jpg (torchvision's layout) or {layouts[1]}/*/*.jpg "
            f"(the reference's). {by_hand}, set --image_path to its folder, or use --dataset toy, which needs no data"
        )
    return _folder("celeb", found, crop)


def _folder(name: str, root: Path, crop: int | None) -> Source:
    if not root.is_dir():
        raise UserError(f"--image_path {root} is not a folder of images (--dataset toy needs none)")
    files = sorted(_walk(str(root)))
    if not files:
        raise UserError(f"no image in {root} or its subfolders (looked for {' '.join(IMAGE_SUFFIXES)})")
    decode = partial(_decode_file, str(root.absolute()), crop)
    return Source(name, [file for file, _, _ in files], decode, _digest([crop, *files]))


def _walk(root: str) -> Iterable[tuple[str, int, int]]:
    """Yield (relative name, size, modification time in ns) of the image files below a folder; each folder once."""
    seen = set()  # a link may lead to a folder above it
    for folder, subfolders, names in os.walk(root, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                path = os.path.join(folder, name)
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # dangling links fail when decoded
                yield os.path.relpath(path, root), status.st_size, status.st_mtime_ns


def _decode_file(root: str, crop: int | None, name: str, size: int) -> Image.Image:
    """Decode an image file below `root`: rotated as its EXIF data says, center square of side `crop`, resized."""
    path = os.path.join(root, name)
    if not os.path.isfile(path):  # reading from a pipe would block
        raise OSError("not a file")
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # in place, so that only rotated images are copied
        return resize(crop_center(to_rgb(image), crop), size)


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
    fingerprint = _digest([len(keys), status.st_size, status.st_mtime_ns])
    return Source("lsun", keys, partial(_decode_lsun, str(folder)), fingerprint)


@lru_cache(maxsize=1)
def _open_lsun(folder: str):
    """Open the database without torchvision's LSUN, which caches keys in the current folder and mixes up datasets."""
    import lmdb

    return lmdb.open(folder, max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)


def _decode_lsun(folder: str, key: bytes, size: int) -> Image.Image:
    """Decode an LSUN image, resized without a crop, as in the reference."""
    with _open_lsun(folder).begin(buffers=False) as transaction:
        return resize(to_rgb(Image.open(io.BytesIO(transaction.get(key)))), size)


def _cifar10(root: Path, download: bool) -> Source:
    try:
        count = len(_open_cifar10(str(root), download))
    except Exception as error:  # torchvision raises RuntimeError, OSError or URLError by what is missing
        raise UserError(
            f"no CIFAR-10 in {root} ({_first_line(error)}): use --download true, or unpack cifar-10-python.tar.gz there"
        ) from error
    # The fingerprint leaves out the files, because torchvision checks their MD5 sums.
    return Source("cifar10", range(count), partial(_decode_cifar10, str(root)), _digest([count]))


@lru_cache(maxsize=1)
def _open_cifar10(root: str, download: bool = False):
    from torchvision.datasets import CIFAR10

    return CIFAR10(root, download=download)


def _decode_cifar10(root: str, index: int, size: int) -> Image.Image:
    return resize(_open_cifar10(root)[index][0], size)


def _digest(parts: Iterable[Any]) -> str:
    text = "".join(f"{part!r}\n" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
