"""Connections between the processes of a run on which nothing is said but goodbye: who is gone without one has died.

What exchanges tensors does not always notice: a GPU waits minutes for another machine's that no longer answers.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Thread

from torch.distributed import DistNetworkError, Store

from errors import PeerFailed

NOTICE_SECONDS = 5  # in which the main thread mostly notices by itself that another process died
WRITE_SECONDS = 15  # the same for rank 0, which then writes what is not written yet
# A dead machine or link shows after 20 seconds. macOS has another name for the first.
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@contextmanager
def lifeline(store: Store, rank: int, size: int, seconds: float, on_death: Callable[[], None]) -> Iterator[None]:
    """Calls `on_death`, in a thread, some seconds after another process is gone without a goodbye.

    A process says it when its context ends in order, or with `PeerFailed`: then rank 0 may still have to write what it
    did before. All have a connection to rank 0 alone; that rank 0 gives up is how the others hear of a death.

    Args:
        store: through which rank 0 says where it can be reached, at `MASTER_ADDR`.
        seconds: to wait for the others at the beginning.

    Raises:
        DistNetworkError: the others cannot be reached.
    """
    over = Event()
    with ExitStack() as stack:
        try:
            lines = [stack.enter_context(line) for line in _connect(store, rank, size, seconds)]
        except OSError as error:
            where = f"{os.environ['MASTER_ADDR']}, port {store.get('lifeline').decode()}"
            raise DistNetworkError(f"no connection to the first process at {where}: {error}") from error
        patience = NOTICE_SECONDS if rank else WRITE_SECONDS
        watcher = Thread(target=_watch, args=(lines, over, patience, on_death), daemon=True)
        watcher.start()
        farewell = False
        try:
            yield
            farewell = True
        except PeerFailed:
            farewell = True
            raise
        finally:
            over.set()
            watcher.join()
            for line in lines if farewell else ():
                with suppress(OSError):  # who is gone needs none
                    line.send(b".")


def _connect(store: Store, rank: int, size: int, seconds: float) -> Sequence[socket.socket]:
    """Rank 0's connections to all others, or another's to rank 0."""
    if rank:
        address = os.environ["MASTER_ADDR"], int(store.get("lifeline"))  # waits for it
        lines = [socket.create_connection(address, seconds)]
    else:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, backlog=size, dualstack_ipv6=family == socket.AF_INET6
        ) as server:
            server.settimeout(seconds)
            store.set("lifeline", str(server.getsockname()[1]))
            lines = [server.accept()[0] for _ in range(size - 1)]
    for line in lines:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return lines


def _watch(lines: Sequence[socket.socket], over: Event, patience: float, on_death: Callable[[], None]) -> None:
    lines = {*lines}
    while lines and not over.is_set():
        for line in select.select(lines, [], [], 0.2)[0]:
            lines.remove(line)
            if not _said_goodbye(line) and not over.wait(patience):
                on_death()


def _said_goodbye(line: socket.socket) -> bool:
    try:
        return line.recv(1) != b""
    except OSError:
        return False
