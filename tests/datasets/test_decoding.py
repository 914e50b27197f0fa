"""Decoding in worker processes, as a program of its own: what it prints, and that its processes end."""

import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT, wait_for
from PIL import Image

from datasets.decoding import decode_chunks
from errors import UserError

PROGRAM = """
import os, sys, time
from pathlib import Path
from PIL import Image
from errors import exit_code, handle_signals, stop_signals

def slow(item, size):
    Path("workers", str(os.getpid())).touch()
    time.sleep(0.4)
    return Image.new("RGB", (size, size))

def main():
    from datasets.decoding import decode_chunks

    with handle_signals(lambda number, _: sys.exit(128 + number), stop_signals()):
        list(decode_chunks(slow, range(100_000), 8, Path("images.bin"), 2))

if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(exit_code(error))
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@pytest.fixture
def program(tmp_path, start_process):
    """The program, started in `tmp_path`."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "workers").mkdir()
    (tmp_path / "images.bin").touch()
    return start_process([sys.executable, "program.py"], tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def workers(tmp_path, program):
    """The process numbers of its two workers, which decode."""
    wait_for(lambda: len([*(tmp_path / "workers").iterdir()]) == 2, program)
    return [int(path.name) for path in (tmp_path / "workers").iterdir()]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGKILL"])
def test_a_signal_to_all_processes_or_a_kill_of_the_program_ends_them_at_once_and_silently(program, workers, name):
    program.kill() if name == "SIGKILL" else os.killpg(program.pid, getattr(signal, name))
    _, err = program.communicate(timeout=60)  # a chunk takes 102 seconds; the pipes close when no process is left
    assert name == "SIGKILL" or (program.returncode, err) == (128 + getattr(signal, name), "")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_signal_while_processes_start_ends_them_too(program, count):
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    wait_for(lambda: len(children.read_text().split()) >= count, program)
    os.killpg(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (130, "")


def test_a_killed_worker_is_one_line_of_advice(program, workers):
    os.kill(workers[0], signal.SIGKILL)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 2
    (line,) = err.splitlines()
    assert "memory" in line and "--num_workers" in line


def test_processes_that_cannot_be_started_are_an_error(tmp_path, monkeypatch):
    refuse = Mock(side_effect=BlockingIOError(11, "Resource temporarily unavailable"))
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    monkeypatch.setattr(sys, "platform", "win32")  # where so many in a pool would be another error
    with pytest.raises(UserError, match=r"temporarily unavailable.*--num_workers 0"):
        list(decode_chunks(Image.new, range(30_000), 8, tmp_path / "images.bin", 100))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing stays blocked
