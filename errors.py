"""Errors and warnings for the user: one line on stderr. `main.py` prints the errors and chooses the exit codes."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout


class UserError(Exception):
    """A mistake that the user can correct; the message says how."""


class PeerFailed(Exception):
    """Another rank failed and prints why; this one ends silently."""


class RankLost(Exception):
    """The connection to another rank is lost."""


def warn(message: str) -> None:
    """Print a warning: something the user should know but need not act on at once."""
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Discard what is printed inside on ranks other than 0."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(null))
            stack.enter_context(redirect_stderr(null))
        yield
