"""Work that the training loop does not wait for: encoding images, writing files."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Background(AbstractContextManager):
    """Run jobs one after the other in a thread; the end of the `with` block waits for all, also after an error.

        with Background(device) as background:
            background.submit(image.save, path)

    A job must not read what the loop changes: pass copies. An exception in a job is raised by a later `submit`, or at
    the end. At most `capacity` jobs are pending; `submit` waits when there are more, which bounds memory.

    On CUDA the thread has a stream of its own, so that a job waits for the GPU up to where it was submitted, and not
    for the training steps queued since. On MPS, `submit` moves tensors to the CPU: operations on MPS in two threads
    abort the process.
    """

    def __init__(self, device: torch.device, capacity: int = 8):
        self.device, self.capacity = device, capacity
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # `set_stream` does nothing for None. It selects the device too; a `with` block would select GPU 0 afterwards.
        self._thread = ThreadPoolExecutor(1, "background", initializer=torch.cuda.set_stream, initargs=(self._stream,))
        self._pending: deque[Future] = deque()

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue a job; the tensors among its arguments, also those inside of containers, are on `device`."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self.capacity):
            self._pending.popleft().result()
        if self.device.type == "mps":
            arguments = tree_map_only(Tensor, Tensor.cpu, arguments)
        if self._stream:
            arguments = (torch.cuda.current_stream(self.device).record_event(), job, *arguments)
            job = self._run_on_stream
        self._pending.append(self._thread.submit(job, *arguments))

    def _run_on_stream(self, submitted: torch.cuda.Event, job: Callable[..., None], *arguments: Any) -> None:
        self._stream.wait_event(submitted)
        job(*arguments)
        self._stream.synchronize()  # before the arguments are freed: their memory is reused on the stream of the loop

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)  # a second Ctrl-C, or SystemExit
        self._thread.shutdown(cancel_futures=interrupted)
        if kind is None:  # otherwise the first error is already being raised
            for future in self._pending:
                future.result()
