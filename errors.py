"""How the program speaks to the user when something is wrong, one line on stderr each, and the signals that end it."""

import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, suppress
from functools import cache
from types import FrameType, ModuleType
from typing import Any

from tqdm import tqdm

StopFn = Callable[[], int]  # returns the number of the signal that asks the training to stop, 0 before it
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
# CUDA and MPS; torch's CPU allocator on Windows and elsewhere; cuBLAS, cuDNN 9
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC(ATION)?_FAILED")


class UserError(Exception):
    """A mistake that the user can correct; the message says how."""


class PeerFailed(Exception):
    """Another rank failed and prints why; this one ends silently."""


class RankLost(Exception):
    """The connection to another rank is lost."""


class Drop(suppress, ContextDecorator):
    """`contextlib.suppress`, as a decorator too."""


def make_output_robust() -> None:
    """Let lines appear at once in files and pipes too, with any characters, and drop what cannot be written.

    As when the reader of a pipe or the terminal is gone, or the disk is full.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):  # closed: the next file opened would get what libraries print
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
            if "write" not in vars(stream):  # not yet done
                stream.write, stream.flush = Drop(OSError)(stream.write), Drop(OSError)(stream.flush)


def exit_code(error: BaseException) -> int:
    """Print the line that the user needs about an error, and return the exit code; raise the error if it is a bug."""
    if isinstance(error, PeerFailed):
        return 2
    if isinstance(error, KeyboardInterrupt):  # before the training loop, in which it saves a checkpoint
        print("interrupted", file=sys.stderr)
        return 130
    if _is_out_of_memory(error):
        message = "out of memory: reduce --batch_size, --imsize or --g_conv_dim/--d_conv_dim"
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        message = "no more threads can be started: raise ulimit -u, or the container's pids limit"
    elif isinstance(error, RuntimeError) and "no kernel image" in str(error):  # of CUDA, such as for a GTX 1080
        message = "the installed torch does not support this GPU: install one that does (pytorch.org), or --device cpu"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        message = f"{error.strerror}{where}: free space, or choose other folders (see --help)"
    elif isinstance(error, (UserError, RankLost, OSError)):  # OSError: such as a name that is too long
        message = " ".join(str(error).splitlines())  # a file's name may have line breaks
    else:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return 1 if isinstance(error, RankLost) else 2


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def import_optional(name: str, problem: str) -> ModuleType:
    """Import a package that may be missing or broken; `UserError` of the problem and the reason if it is."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # such as protobuf's TypeErrors and ValueErrors where its version does not fit
        raise UserError(f"{problem} ({one_line(error)})") from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, the system or torch could not allocate memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # By message: torch raises different types for CUDA, and plain RuntimeErrors for its libraries, MPS and the CPU.
    is_from_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError) or is_from_torch


def stop_signals() -> list[signal.Signals]:
    """Return the signals that end a run: Ctrl-C, and those of terminals (SIGHUP) and schedulers (SIGTERM, SIGUSR1).

    Without those that the system does not have, and those that are ignored, as `nohup` does with SIGHUP. Ctrl-C counts
    even so: shells let background jobs ignore it.
    """
    found = [signal.Signals[name] for name in STOP_SIGNALS if name in signal.Signals.__members__]
    return [number for number in found if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any], numbers: Iterable[int]) -> Iterator[None]:
    """Handle signals with a function; with the handlers from before at the end."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stop_on_signals() -> Iterator[StopFn]:
    """Yield a function that returns the number of the first of `stop_signals`, 0 before it; a second one exits."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            sys.exit(128 + number)
        received.append(number)

    with handle_signals(receive, stop_signals()):
        yield lambda: received[0] if received else 0


def warn(message: str) -> None:
    """Print a warning: something the user should know but need not act on at once."""
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, if there is one


@cache
def warn_once(message: str) -> None:
    """Print a warning, unless it was printed before."""
    warn(message)


class Tolerate(AbstractContextManager, ContextDecorator):
    """A context, or a decorator, in which an error is a warning: training goes on without what it would have written.

    The warning is printed once for each kind of error.

    Args:
        what: what may be missing, for the warning.
    """

    tolerated: type[Exception] = Exception  # the tests tolerate OSErrors only

    def __init__(self, what: str):
        self._what = what
        self._seen: set[tuple] = set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, self.tolerated):
            return False
        if (found := (kind, getattr(error, "errno", None))) not in self._seen:
            self._seen.add(found)
            warn(f"{self._what} cannot be written ({one_line(error)}); the run goes on without")
        return True
