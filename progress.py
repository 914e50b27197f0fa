"""Progress bars for what may take more than a second."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None, title: str, unit: str, total: int | None = None) -> tqdm:
    """A bar around `items` that shows after a second, and is gone at the end; a log file gets few lines of it."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        items, title, total, unit=unit, leave=False, delay=1, dynamic_ncols=True, mininterval=interval, miniters=1
    )
