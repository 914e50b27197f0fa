"""Class labels of datasets: the folder of an image file, an attribute of CelebA.

labels = folder_labels("data/animals", ["cat/1.jpg", "dog/1.jpg"])
labels.classes, labels.targets                          # ("cat", "dog"), [0, 1]
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from errors import UserError, warn

LISTED = 8  # classes to name in a line; of more, the first and their number
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
ATTRIBUTE_FILES = ("list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt")


class Labels(NamedTuple):
    """The names of the classes, and for each item the number of its class, counted from 0."""

    classes: tuple[str, ...]
    targets: Sequence[int]

    def check(self) -> None:
        """Raise `UserError` unless there are two classes or more, with two items or more each."""
        counts = Counter(self.targets)
        if len(self.classes) < 2:
            raise UserError(f"--conditional true needs two classes or more; the only one is {join_names(self.classes)}")
        if few := [f"{name} has {counts[number]}" for number, name in enumerate(self.classes) if counts[number] < 2]:
            needs = f"--conditional true needs two images or more of each class: {', '.join(few[:LISTED])}"
            raise UserError(f"{needs}; add images, or remove the class")

    def without(self, items: Container[int]) -> "Labels":
        """Return the labels of all items but these."""
        return Labels(self.classes, [number for item, number in enumerate(self.targets) if item not in items])


def join_names(names: Sequence[str]) -> str:
    """Join names by commas; of many, the first and how many there are."""
    return ", ".join(names[:LISTED]) + (f", ... ({len(names):,} in all)" if len(names) > LISTED else "")


def as_text(name: str) -> str:
    r"""Return a name that the system gave, the same in every locale; bytes that are no UTF-8 become \xe9 etc."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def folder_labels(root: str, names: Sequence[str]) -> Labels:
    """Return the labels of image files `names`, relative to `root`: the folders directly below it, as ImageFolder.

    Raises:
        UserError: some files are in none of these folders.
    """
    if beside := [name for name in names if os.sep not in name]:
        raise UserError(
            f"--conditional true takes the folders directly below {root} as classes; images that are in none: "
            f"{len(beside):,}, the first {beside[0]}: move them into one"
        )
    folders = [as_text(name.split(os.sep, 1)[0]) for name in names]
    classes = tuple(sorted({*folders}))
    _warn_of_splits(root, names)
    number = {folder: index for index, folder in enumerate(classes)}
    return Labels(classes, [number[folder] for folder in folders])


def _warn_of_splits(root: str, names: Sequence[str]) -> None:
    """Warn of folders called train and val, or whose folders have all the same names: the classes are below them."""
    below: dict[str, set[str]] = {}
    for folder, inner, *file in (name.split(os.sep, 2) for name in names):
        below.setdefault(folder, set()).add(inner if file else "")
    first, *others = below.values()
    alike = len(first - {""}) > 1 and not first <= SPLITS and all(other == first for other in others)
    if others and (alike or {folder.lower() for folder in below} <= SPLITS):
        found = f"the folders {join_names(sorted(below))} of {root} look like parts of a dataset, not like classes"
        warn(f"{found}: set --image_path to one of them to train on the folders in it")


def celeb_labels(root: Path, folder: Path, names: Sequence[str], attribute: str | None) -> Labels:
    """Return the labels of CelebA's images: 1 where the attribute is present.

    Args:
        root, folder: the data and the images in it; CelebA's list of attributes is beside the images, or in a folder
            above them up to that of `root`.
        names: image files, found in the list by their name without folder and ending.
        attribute: a name in the list, such as "Smiling".

    Raises:
        UserError: the list is missing or damaged, lacks an image, or has no such attribute.
    """
    images, top = (folder / names[0]).absolute().parent, root.absolute().parent
    places = [place for place in (images, *images.parents) if place.is_relative_to(top)]
    path = next(filter(Path.is_file, (place / name for place in places for name in ATTRIBUTE_FILES)), None)
    if path is None:
        target = folder.parent if folder.name.startswith("img_align_celeba") else folder
        raise UserError(
            f"--conditional true needs CelebA's attributes: download {ATTRIBUTE_FILES[0]} from its page "
            f"(mmlab.ie.cuhk.edu.hk/projects/CelebA.html, folder Anno) and put it into {target}"
        )
    rows, header, first = _read_rows(path), [], []
    for first in rows:
        if len(first) > 1 and re.fullmatch(r"-?\d+", first[1]):  # the first image
            break
        header = first  # the .txt begins with the number of images
    attributes = header[1:] if path.suffix == ".csv" or header[:1] == ["image_id"] else header
    if not attributes or len(attributes) != len(first) - 1:
        raise UserError(f"{path} has no line with a name for each attribute before the first image: download it again")
    if attribute not in attributes:
        given = f"--attribute {attribute} is not in {path}" if attribute else "--dataset celeb needs --attribute"
        raise UserError(f"{given}; choose one of {', '.join(attributes)}")
    present = dict(_presence(path, chain([first], rows), attributes.index(attribute)))
    stems = [Path(name).stem for name in names]
    if missing := [name for name, stem in zip(names, stems, strict=True) if stem not in present]:
        raise UserError(f"{path} lacks images: {len(missing):,}, the first {missing[0]}: add a line for each")
    return Labels((f"not_{attribute}", attribute), [present[stem] for stem in stems])


def _read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each line: between commas, as in the .csv that Kaggle has, or between blanks."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    has_commas = "," in text
    if "\0" in text:  # of PowerShell and some programs for tables
        raise UserError(f"{path} is in UTF-16 or damaged: save it in UTF-8")
    try:
        for line in filter(str.strip, text.splitlines()):
            cells = next(csv.reader([line], skipinitialspace=True)) if has_commas else line.split()
            yield [cell.strip() for cell in cells]
    except csv.Error as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _presence(path: Path, rows: Iterable[list[str]], column: int) -> Iterator[tuple[str, int]]:
    """Yield the name without ending, and 1 or 0, of each row: a file name, then 1 or -1 for each attribute."""
    for row in rows:
        try:
            yield Path(row[0]).stem, int(int(row[1 + column]) > 0)
        except (IndexError, ValueError) as error:
            line = " ".join(row)[:80]
            raise UserError(f"{path} is damaged: a line is {line!r}, not a file name and 1 or -1 each") from error
