"""Errors and warnings for the user: one line on stderr each."""

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


def exit_code(error: BaseException) -> int:
    """Print the line that the user needs about an error, and return the exit code; raise the error if it is a bug."""
    match error:
        case PeerFailed():
            return 2
        case KeyboardInterrupt():  # before the training loop, which saves a checkpoint, or the second one inside it
            print("interrupted", file=sys.stderr)
            return 130
        case UserError() | OSError():  # OSError: a full disk, a folder that was removed, a name that is too long
            print(f"error: {error}", file=sys.stderr)
            return 2
        case RankLost():
            print(f"error: {error}", file=sys.stderr)
            return 1
    if not is_out_of_memory(error):
        raise error
    print("error: out of memory: reduce --batch_size, --imsize or --g_conv_dim/--d_conv_dim", file=sys.stderr)
    return 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python or torch could not allocate memory. On a CPU, torch raises a plain RuntimeError."""
    # By name: torch takes seconds to import, and need not be.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


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
