"""How the program speaks to its user about what went wrong: one line on stderr."""

import sys


class UserError(Exception):
    """Something the user can put right. `main.py` prints the message as one line and exits with code 2.

    Everything else that is raised is a bug of ours and keeps its traceback.
    """


def warn(message: str) -> None:
    """Something the user should know and need not act on at once."""
    print(f"warning: {message}", file=sys.stderr)
