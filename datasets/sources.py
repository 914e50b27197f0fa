"""Find a dataset and decode its images.

    source = find_source("folder", "~/cats")
    image = source.decode(source.items[0], 64)   # an RGB Pillow image, 64x64

Worker processes import this module, so that torch and torchvision are imported only in the functions that need them.
"""

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from datasets.image_files import count_by_ending, decode_file, find_images, image_size, resize, to_rgb
from datasets.labels import Labels, celeb_labels, folder_labels
from datasets.toy_faces import HAIR_LENGTHS, draw_face, hair_length
from errors import UserError, import_optional, one_line, warn

CELEB_COUNT, CELEB_SIZE = 202_599, (178, 218)  # of the aligned images
CELEB_CROP = 160  # pixels, as in the reference
LSUN_CLASS = "church_outdoor_train"
READ_ALL = "import lmdb, sys; all(lmdb.open(sys.argv[1], readonly=True, lock=False).begin().cursor())"
CIFAR10_FOLDER = "cifar-10-batches-py"
FOLDER_DECODING = 2  # version of how the images of folders are decoded, for the fingerprint


@dataclass(frozen=True)
class Source:
    """A dataset that is not decoded yet.

    Attributes:
        name: short, for file names and messages.
        items: what to decode, in order: file names, numbers or keys.
        decode: function of an item and a size in pixels; returns an RGB Pillow image of that size. Can be pickled.
        fingerprint: changes whenever the decoded pixels may change; does not depend on the labels.
        description: what and how many images these are.
        labels: function that returns the class of each item; None if there are no classes.
    """

    name: str
    items: Sequence[str] | Sequence[int] | Sequence[bytes]
    decode: Callable[[Any, int], Image.Image]
    fingerprint: str
    description: str
    labels: Callable[[], Labels] | None = None


def find_source(
    dataset: str,
    image_path: str = "./data",
    crop_size: int | None = None,
    download: bool = False,
    toy_num: int = 10_000,
    seed: int = 0,
    *,
    attribute: str | None = None,
    run_folders: Collection[Path] = (),
    exclude: Collection[Path] = (),
) -> Source:
    """Return the source of a dataset. Reads file names, sizes and dates, and the headers of a few images.

    Args:
        dataset: celeb, folder, lsun, cifar10 or toy.
        crop_size: side of the center square cut from celeb (None: 160) and folder images (None: the largest square).
        download: download celeb or cifar10 if it is missing.
        toy_num, seed: how many toy faces, and which.
        attribute: the one that divides celeb into two classes.
        run_folders, exclude: see `find_images`.

    Raises:
        UserError: the data is missing, unreadable or where the program writes; the message says what is expected.
    """
    root = Path(os.path.expanduser(image_path))
    find = partial(find_images, run_folders=run_folders, exclude=exclude)
    match dataset:
        case "celeb":
            return _celeb(root, crop_size, download, attribute, find)
        case "folder":
            return _folder(root, crop_size, find)
        case "lsun":
            return _lsun(root)
        case "cifar10":
            return _cifar10(root, download)
        case "toy":
            decode, labels = partial(draw_face, seed), partial(_toy_labels, seed, toy_num)
            return Source("toy", range(toy_num), decode, _digest([seed, toy_num]), f"{toy_num:,} toy faces", labels)
    raise ValueError(f"unknown dataset {dataset!r}")


def _celeb(root: Path, crop_size: int | None, download: bool, attribute: str | None, find: Callable) -> Source:
    by_hand = (
        f"Download img_align_celeba.zip by hand (CelebA, mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
        f"'Align&Cropped Images') and unpack it to {root / 'celeba' / 'img_align_celeba'}/000001.jpg ..."
    )
    layouts = [root / name for name in ("celeba/img_align_celeba", "CelebA", "celeba", "img_align_celeba")]
    if root.name.lower() in ("celeba", "img_align_celeba", "img_align_celeba_png"):
        layouts.append(root)
    found = _first_with_images(layouts, find)
    if found is None and download:
        from torchvision.datasets import CelebA

        try:
            CelebA(str(root), split="all", download=True)
        except Exception as error:  # Google Drive's quota, no network, gdown missing: the advice is the same
            raise UserError(f"the download of CelebA failed ({one_line(error)}). {by_hand}") from error
        found = _first_with_images(layouts, find)
    if found is None:
        raise UserError(
            f"no CelebA in {root}: expected {layouts[0]}/*.jpg (torchvision's layout) or {layouts[1]}/*/*.jpg "
            f"(the reference's). {by_hand}, set --image_path to its folder, or use --dataset toy, which needs no data"
        )
    folder, files = found
    if crop_size is None:
        _check_celeb_size(folder, files)
    description = f"{len(files):,} of CelebA's {CELEB_COUNT:,} images in {folder}"
    source = _file_source("celeb", folder, files, crop_size or CELEB_CROP, [], description)
    return replace(source, labels=partial(celeb_labels, root, folder, source.items, attribute))


def _first_with_images(folders: Iterable[Path], find: Callable) -> tuple[Path, list] | None:
    """Return the first folder with images below it, and its image files.

    Only the aligned ones, where they are apart: CelebA's own folder has the unaligned images too.
    """
    for folder in folders:
        files = find(str(folder))[0] if os.path.isdir(folder) else []
        for name in ("img_align_celeba", "img_align_celeba_png"):
            if aligned := [file for file in files if name in file[0].split(os.sep)[:-1]]:
                return folder, aligned
        if files:
            return folder, files
    return None


def _check_celeb_size(folder: Path, files: list) -> None:
    """Warn if the images are not CelebA's aligned ones, by the first, the middle and the last."""
    for name, _, _ in (files[0], files[len(files) // 2], files[-1]):
        size = image_size(str(folder / name))
        if size not in (CELEB_SIZE, None):
            warn(
                f"{folder / name} has {size[0]}x{size[1]} pixels, CelebA's aligned images have 178x218: of each image "
                f"the center square of at most {CELEB_CROP} pixels is used; set --crop_size, or use --dataset folder, "
                "which takes the largest square"
            )
            return


def _folder(root: Path, crop_size: int | None, find: Callable) -> Source:
    if not os.path.isdir(root):
        raise UserError(f"--image_path {root} is not a folder of images (--dataset toy needs none)")
    files, others = find(str(root))
    if not files:
        listed = f"; other files: {count_by_ending(others)}" if others else ""
        raise UserError(f"no image that can be read in {root} or its subfolders{listed}")
    if others:
        count, listed = sum(others.values()), count_by_ending(others)
        warn(f"{root}: {count:,} files are not images that can be read here and are left out: {listed}")
    description = f"{len(files):,} images in {root}"
    source = _file_source("folder", root, files, crop_size, [FOLDER_DECODING], description)
    return replace(source, labels=partial(folder_labels, str(root), source.items))


def _file_source(name: str, root: Path, files: list, crop: int | None, version: list, description: str) -> Source:
    """Return a source of image files (name, bytes, time) below `root`."""
    decode = partial(decode_file, str(root.absolute()), crop)
    items = [file for file, _, _ in files]
    return Source(name, items, decode, _digest([*version, crop, *files]), description)


def _lsun(root: Path) -> Source:
    folder = root / f"{LSUN_CLASS}_lmdb"
    data = folder / "data.mdb"
    if not data.is_file():
        raise UserError(f"no LSUN in {root}: expected {data} (github.com/fyu/lsun: {LSUN_CLASS})")
    lmdb = import_optional("lmdb", "--dataset lsun reads LMDB files: pip install lmdb")
    try:
        database = _open_lsun(str(folder))
        size, expected = data.stat().st_size, (database.info()["last_pgno"] + 1) * database.stat()["psize"]
        # Reading beyond the end kills the process. A file may also be short because entries were deleted.
        read_all = [sys.executable, "-c", READ_ALL, str(folder)]
        if size < expected and subprocess.run(read_all, capture_output=True).returncode:
            raise UserError(f"{data} is cut off: {size:,} of {expected:,} bytes; download or unpack it again")
        with database.begin(buffers=False) as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise UserError(f"{data} cannot be read: {error}") from error
    fingerprint = _digest([len(keys), size, data.stat().st_mtime_ns])
    description = f"{len(keys):,} images of LSUN {LSUN_CLASS} in {folder}"
    return Source("lsun", keys, partial(_decode_lsun, str(folder)), fingerprint, description)


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
    if root.name == CIFAR10_FOLDER and not (root / CIFAR10_FOLDER).is_dir():
        root = root.parent
    try:
        count = len(_open_cifar10(str(root), download))
    except Exception as error:  # torchvision raises RuntimeError, OSError or URLError by what is missing
        found = (root / CIFAR10_FOLDER).is_dir()
        state = f"CIFAR-10 in {root / CIFAR10_FOLDER} is incomplete or damaged" if found else f"no CIFAR-10 in {root}"
        reason = "" if "not found or corrupted" in str(error) else f" ({one_line(error)})"  # torchvision's advice
        advice = "" if found or download else "use --download true, or "
        raise UserError(f"{state}{reason}: {advice}unpack cifar-10-python.tar.gz in {root}") from error
    decode, labels = partial(_decode_cifar10, str(root)), partial(_cifar10_labels, str(root))
    fingerprint = _digest([count])  # without the files, because torchvision checks their MD5 sums
    return Source("cifar10", range(count), decode, fingerprint, f"{count:,} images of CIFAR-10", labels)


@lru_cache(maxsize=1)
def _open_cifar10(root: str, download: bool):
    from torchvision.datasets import CIFAR10

    return CIFAR10(root, download=download)


def _cifar10_labels(root: str) -> Labels:
    dataset = _open_cifar10(root, False)
    return Labels((*dataset.classes,), dataset.targets)


def _decode_cifar10(root: str, index: int, size: int) -> Image.Image:
    return resize(_open_cifar10(root, False)[index][0], size)


def _toy_labels(seed: int, toy_num: int) -> Labels:
    names = (*HAIR_LENGTHS,)
    return Labels(names, [names.index(hair_length(seed, index)) for index in range(toy_num)])


def _digest(parts: Iterable[Any]) -> str:
    text = "".join(f"{part!r}\n" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
