"""Three threads in place of processes; that a killed process ends the others is in test_torchrun.py."""

import socket
from threading import Barrier, Event, Thread

import pytest
import torch.distributed as dist

from errors import PeerFailed
from training import lifeline


class Crash(Exception):
    pass


@pytest.fixture
def run(monkeypatch):
    """Runs three processes, the first of which leaves as told; returns who was told of a death."""
    monkeypatch.setattr(lifeline, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(lifeline, "WRITE_SECONDS", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "localhost")

    def run(leaver: int, error: type[Exception] | None) -> set[int]:
        store, told, together, left = dist.HashStore(), set(), Barrier(3), Event()

        def process(rank: int) -> None:
            try:
                with lifeline.lifeline(store, rank, 3, 10, lambda: told.add(rank)):
                    together.wait()
                    if rank == leaver and error:
                        raise error
                    if rank != leaver:
                        left.wait()
            except (Crash, PeerFailed):
                pass

        threads = [Thread(target=process, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        threads[leaver].join()
        Event().wait(1)  # in which the others may notice
        left.set()
        for thread in threads:
            thread.join()
        return told

    return run


@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize("error", [None, PeerFailed])
def test_who_says_goodbye_is_not_dead(run, leaver, error):
    assert run(leaver, error) == set()


def test_rank_0_hears_of_any_death_and_all_of_its_own(run):
    assert run(0, Crash) == {1, 2}
    assert run(1, Crash) == {0}


def test_the_first_process_cannot_be_reached(monkeypatch):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    store = dist.HashStore()
    store.set("lifeline", str(port))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(dist.DistNetworkError, match=f"localhost, port {port}"), lifeline.lifeline(store, 1, 2, 5, int):
        pass
