"""Class labels of datasets: the folder of an image file, an attribute of CelebA.

labels = folder_labels("data/animals", ["cat/1.jpg", "dog/1.jpg"])
labels.classes, labels.targets                          # ("cat", "dog"), [0, 1]
"""

import os
import re
from collections import Counter
from collections.abc import Container, Sequence
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
    if {folder.lower() for folder in classes} <= SPLITS:
        found = f"the folders {join_names(classes)} of {root} look like parts of a dataset, not like classes"
        warn(f"{found}: set --image_path to one of them to train on the folders in it")
    number = {folder: index for index, folder in enumerate(classes)}
    return Labels(classes, [number[folder] for folder in folders])


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
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    separator = r"\s*,\s*" if "," in text else r"\s+"  # of Kaggle's .csv, or of the .txt
    rows = [re.split(separator, line.strip()) for line in text.splitlines() if line.strip()]
    header, *rows = [row for row in rows if len(row) > 1 or not row[0].isdecimal()] or [[]]  # no number of images
    damaged = UserError(f"{path} has lines that are not a file name and 1 or -1 for each attribute: download it again")
    if {len(row) - len(header) for row in rows} not in ({0}, {1}):
        raise damaged
    attributes = header[1 - len(rows[0]) :]  # without a title of the file names
    if attribute not in attributes:
        given = f"--attribute {attribute} is not in {path}" if attribute else "--dataset celeb needs --attribute"
        raise UserError(f"{given}; choose one of {', '.join(attributes)}")
    try:
        present = {Path(name).stem: int(int(row[attributes.index(attribute)]) > 0) for name, *row in rows}
    except (IndexError, ValueError) as error:
        raise damaged from error
    stems = [Path(name).stem for name in names]
    if missing := [name for name, stem in zip(names, stems, strict=True) if stem not in present]:
        raise UserError(f"{path} lacks images: {len(missing):,}, the first {missing[0]}: add a line for each")
    return Labels((f"not_{attribute}", attribute), [present[stem] for stem in stems])
