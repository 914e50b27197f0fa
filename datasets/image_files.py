"""Find and decode image files.

    files, others = find_images("data/cats")
    image = decode_file("data/cats", None, files[0][0], 64)   # an RGB Pillow image, 64x64

Worker processes import this module, so it must not import torch.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from errors import UserError, warn

JUNK_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found"}  # in lower case; @eadir: Synology's
COMPANIONS = {  # endings of files that are expected beside images
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".rst", ".html", ".htm", ".xml", ".yaml", ".yml", ".db", ".ini",
    ".log", ".xmp", ".aae", ".url",
}  # fmt: skip
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # only identified, or need another program
HEIF_ENDINGS = {".heic", ".heics", ".heif", ".heifs", ".hif"}


def find_images(
    root: str, run_folders: Iterable[Path] = (), exclude: Iterable[Path] = ()
) -> tuple[list[tuple[str, int, int]], Counter[str]]:
    """Find the image files below a folder, through links too. Leaves out hidden files and `JUNK_FOLDERS`.

    Args:
        run_folders: folders of a run's results, which may not be or contain `root`.
        exclude: folders to leave out; none may be `root`.

    Returns:
        (name relative to root, bytes, modification time in ns) of each image, sorted; the other files by ending.

    Raises:
        UserError: the images are where the program writes, or `root` cannot be listed.
    """
    excluded = {os.path.realpath(folder) for folder in exclude}
    _check_apart(root, run_folders, excluded)
    seen: set[str] = set()  # a link may lead to a folder above it
    endings = image_endings()
    images, others, unlisted, left_out = [], Counter(), [], []
    for folder, subfolders, names in os.walk(root, onerror=unlisted.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in excluded:
            left_out.append(folder)
        if real in excluded or real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if name[0] != "." and name.lower() not in JUNK_FOLDERS]
        # Of two ways to a folder that without a link is taken, on every system.
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        prefix = "" if folder == root else os.path.relpath(folder, root)
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith(".") or ending in COMPANIONS:
                continue
            if ending in endings:
                images.append((os.path.join(prefix, name), *_size_and_time(os.path.join(folder, name))))
            else:
                others[ending if re.fullmatch(r"\.\w{1,10}", ending) else "without ending"] += 1
    _report_unlisted(root, unlisted)
    if left_out:
        warn(f"folders that the program writes to are not searched for images: {', '.join(left_out)}")
    return sorted(images), others


def _check_apart(root: str, run_folders: Iterable[Path], exclude: set[str]) -> None:
    """Raise `UserError` if the images would be mixed with what the program writes, which --overwrite may delete."""
    real = Path(os.path.realpath(root))
    for folder in run_folders:
        if real.is_relative_to(os.path.realpath(folder)):
            raise UserError(
                f"the images in {root} would be among the run's own results in {folder}: choose another --version or "
                "folder of results"
            )
    if str(real) in exclude:
        raise UserError(
            f"{root} is the folder of the images, and the program would write there: choose another --sample_path, "
            "--attn_path, --model_save_path, --log_path or --cache_path"
        )


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # such as a dangling link: an image that cannot be read when it is decoded
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _report_unlisted(root: str, errors: list[OSError]) -> None:
    if errors and errors[0].filename == root:
        raise UserError(f"the folder of images {root} cannot be listed: {errors[0].strerror}")
    if errors:
        where = errors[0].filename or f"in {root}"  # there is no name if the disk fails
        count = "" if len(errors) == 1 else f", and {len(errors) - 1:,} more"
        warn(f"folders that cannot be listed are left out: {where} ({errors[0].strerror}){count}")


def count_by_ending(others: Counter[str]) -> str:
    """Return how many files of which ending there are, such as "12 .heic, 1 .mov", and what would read them."""
    text = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(6))
    text += ", ..." if len(others) > 6 else ""
    return text + (" (pip install pillow-heif reads .heic)" if others.keys() & HEIF_ENDINGS else "")


@lru_cache(maxsize=1)
def image_endings() -> set[str]:
    """Return the endings, in lower case, of the files that the installed Pillow can decode."""
    Image.preinit()  # the common formats first: files are tried in this order
    register_heif()
    formats = Image.registered_extensions()  # loads all formats
    readable = {*Image.OPEN, "MPO"} - UNREADABLE_FORMATS  # MPO: a JPEG with more images, opened as JPEG
    return {ending for ending, format in formats.items() if format in readable}


@lru_cache(maxsize=1)
def register_heif() -> None:
    """Let Pillow read HEIC files, if pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def image_size(path: str) -> tuple[int, int] | None:
    """Return width and height as the header of an image file says, or None if it cannot be read."""
    register_heif()
    with suppress(Exception), Image.open(path) as image:  # Pillow's readers raise nearly any type
        return image.size
    return None


def decode_file(root: str, crop: int | None, name: str, size: int) -> Image.Image:
    """Decode an image file below `root`: center square of side `crop`, resized."""
    return resize(crop_center(read_rgb(os.path.join(root, name)), crop), size)


def read_rgb(path: str) -> Image.Image:
    """Read an image file in RGB, rotated as its EXIF data says."""
    register_heif()
    if not os.path.isfile(path):  # reading from a pipe would block
        raise OSError("not a file")
    with Image.open(path) as image:
        image.load()  # a damaged image fails here, not below, where errors are suppressed
        with suppress(Exception):  # EXIF data that cannot be parsed; it fails before or after the rotation, not halfway
            ImageOps.exif_transpose(image, in_place=True)  # in place, so that only rotated images are copied
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB: grays of more bits or of floats to 8 bits, transparency to white."""
    if image.mode.startswith(("I", "F")):  # I, the I;16 family and F
        gray = image.convert(image.mode[0])
        factor = _factor_to_8_bits(gray)
        image = gray.point(lambda value: value * factor).convert("L")
        image.info.pop("transparency", None)  # a gray of the file's bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies


def _factor_to_8_bits(gray: Image.Image) -> float:
    """Return the factor that scales an image of mode I or F to 8 bits.

    Floats are in [0, 1], unless they are too large. Integers have the fewest of 8, 12, 16 and more bits that hold the
    image's maximum.
    """
    maximum = gray.getextrema()[1]
    if gray.mode == "F" and not 2 <= maximum < 2**32:  # a maximum a bit above 1 is common
        return 255
    bits = int(maximum).bit_length()
    return 2.0 ** (8 - next((limit for limit in (8, 12, 16) if bits <= limit), bits))


def crop_center(image: Image.Image, side: int | None) -> Image.Image:
    """Return the center square of the given side, at most the largest square (None) of the image; never pads."""
    width, height = image.size
    side = min(side or width, width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)  # rounded as torchvision's CenterCrop
    return image.crop((left, top, left + side, top + side))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resize to size x size pixels, antialiased bilinear, as torchvision's Resize does with a Pillow image."""
    return image.resize((size, size), Image.Resampling.BILINEAR)
