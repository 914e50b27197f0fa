"""Progress bars for what may take more than a second."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None, title: str, unit: str, total: int | None = None) -> tqdm:
    """A bar around `items` that shows after a second, and is gone at the end; a log file gets few lines of it."""
    seconds = refresh_seconds()
    return tqdm(
        items, title, total, unit=unit, leave=False, delay=1, dynamic_ncols=True, mininterval=seconds, miniters=1
    )


def refresh_seconds() -> float:
    """How long a bar stays as it is: a log file is not a terminal."""
    return 0.1 if sys.stderr.isatty() else 10
