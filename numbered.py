"""Files that are named after a step, such as 500_fake.png: what a run leaves in its folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def numbered_files(folder: Path, ending: str) -> dict[int, Path]:
    """The files `{step}_{ending}` in a folder by step, in ascending order; none where there is no such folder."""
    pattern = re.compile(rf"([0-9]+)_{re.escape(ending)}")
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*"))
    return {step: folder / name for step, name in sorted((int(match[1]), match[0]) for match in matches if match)}


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all if there are fewer: the first, the last, and others evenly between them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
