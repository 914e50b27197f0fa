"""Work that the training loop does not wait for: encoding images, writing files."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Run jobs one after the other in a thread; the end of the `with` block waits for all, also after an error.

        with Background() as background:
            background.submit(image.save, path)

    A job must not read what the loop changes: pass copies. An exception in a job is raised by a later `submit`, or at
    the end. At most `capacity` jobs are pending; `submit` waits when there are more, which bounds memory.
    """

    def __init__(self, capacity: int = 8):
        self.capacity = capacity
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._pending: deque[Future] = deque()

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue a job."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self.capacity):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(job, *arguments))

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)  # a second Ctrl-C, or SystemExit
        self._thread.shutdown(cancel_futures=interrupted)
        if kind is None:  # otherwise the first error is already being raised
            for future in self._pending:
                future.result()
