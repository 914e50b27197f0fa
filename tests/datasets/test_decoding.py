"""Decoding in worker processes, as a program of its own: what it prints, and that its processes end."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import wait_for
from PIL import Image

from datasets.decoding import CHUNK, decode_chunks
from errors import UserError

ROOT = Path(__file__).parent.parent.parent
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
DECODE_HEIC = """
from pathlib import Path
from datasets.decoding import decode_chunks
from datasets.sources import find_source

if __name__ == "__main__":
    source = find_source("folder", "pictures")
    assert not any(decode_chunks(source.decode, source.items, 8, Path("images.bin"), 2))
"""
PILLOW_HEIF = """
import io
from PIL import Image, PngImagePlugin

def register_heif_opener():
    Image.register_open("HEIF", lambda file, name: PngImagePlugin.PngImageFile(io.BytesIO(file.read()[4:])),
                        lambda prefix: prefix.startswith(b"heic"))
    Image.register_extensions("HEIF", [".heic"])
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@pytest.fixture
def start(tmp_path, start_process):
    """A function that starts a program in `tmp_path`."""

    def start_it(program=PROGRAM):
        (tmp_path / "program.py").write_text(program)
        (tmp_path / "workers").mkdir()
        (tmp_path / "images.bin").touch()
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return start_process([sys.executable, "program.py"], tmp_path, env=os.environ | {"PYTHONPATH": path})

    return start_it


@pytest.fixture
def decoding(tmp_path, start):
    """The program when two workers decode, and their process numbers."""
    process = start()
    wait_for(lambda: len([*(tmp_path / "workers").iterdir()]) == 2, process)
    return process, [int(path.name) for path in (tmp_path / "workers").iterdir()]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGKILL"])
def test_a_signal_to_all_processes_or_a_kill_of_the_program_ends_them_at_once_and_silently(decoding, name):
    process, _ = decoding
    process.kill() if name == "SIGKILL" else os.killpg(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)  # a chunk takes 102 seconds; the pipes close when no process is left
    assert name == "SIGKILL" or (process.returncode, err) == (128 + getattr(signal, name), "")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_signal_while_processes_start_ends_them_too(start, count):
    process = start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    wait_for(lambda: len(children.read_text().split()) >= count, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_a_killed_worker_is_one_line_of_advice(decoding):
    process, workers = decoding
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "memory" in line and "--num_workers" in line


def test_processes_that_cannot_be_started_are_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    with pytest.raises(UserError, match=r"temporarily unavailable.*--num_workers 0"):
        list(decode_chunks(Image.new, range(1000), 8, tmp_path / "images.bin", 2))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing stays blocked


def test_heic_is_read_in_worker_processes(tmp_path, start):
    (tmp_path / "pillow_heif.py").write_text(PILLOW_HEIF)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "pictures").mkdir()
    for number in range(CHUNK + 1):
        (tmp_path / "pictures" / f"{number}.heic").write_bytes(b"heic" + (tmp_path / "a.png").read_bytes())
    process = start(DECODE_HEIC)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "images.bin").read_bytes() == bytes([1, 2, 3]) * 64 * (CHUNK + 1)
