"""How the program speaks to its user about what went wrong: one line on stderr."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType


class UserError(Exception):
    """Something the user can put right. `main.py` prints the message as one line and exits with code 2.

    Everything else that is raised is a bug of ours and keeps its traceback.
    """


class PeerFailed(Exception):
    """Another process of the run failed and says why: this one ends without a word."""


def warn(message: str) -> None:
    """Something the user should know and need not act on at once."""
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """What is printed inside is dropped where torchrun started this process as another than the first."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def require(module: str, attribute: str, package: str, names: Sequence[str]) -> ModuleType:
    """Imports a library that --metrics of these names need, and not every user has.

    Raises:
        UserError: it is not there, or a version without the attribute by which those that will do are known.
    """
    try:
        library = importlib.import_module(module)
        getattr(library, attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f'--metrics {",".join(names)} needs {package}: pip install "{package}" ({error})') from error
    return library
