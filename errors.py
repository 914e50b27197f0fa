"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Something the user can put right. `main.py` prints the message as one line and exits with code 2.

    Everything else that is raised is a bug of ours and keeps its traceback.
    """
