"""Decoding in worker processes, as a program of its own: what it prints, and that its processes end."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datasets.decoding import CHUNK, decode_chunks, start_worker, try_decode
from errors import UserError, stop_signals

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from PIL import Image
from errors import exit_code, handle_signals, stop_signals

def slow(item, size):
    Path("workers", str(os.getpid())).touch()
    time.sleep(0.4)
    return Image.new("RGB", (size, size))

def main():
    from datasets.decoding import decode_chunks

    print("started", flush=True)
    with handle_signals(lambda number, _: sys.exit(128 + number), stop_signals()):
        list(decode_chunks(slow, range(100_000), 8, Path("images.bin"), 2))

if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(exit_code(error))
"""
PILLOW_HEIF = """
import io
from PIL import Image, PngImagePlugin

def register_heif_opener():
    Image.register_open("HEIF", lambda file, name: PngImagePlugin.PngImageFile(io.BytesIO(file.read()[4:])),
                        lambda prefix: prefix.startswith(b"heic"))
    Image.register_extensions("HEIF", [".heic"])
"""


def gray(item, size):
    if item % 100 == 7:
        raise OSError("broken\nin two lines")
    return Image.new("RGB", (size, size), (item % 256,) * 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_images_are_written_in_order_and_failures_named_by_the_number_of_the_item(tmp_path, workers):
    path = tmp_path / "images.bin"
    path.touch()
    results = list(decode_chunks(gray, range(2 * CHUNK + 10), 2, path, workers))
    assert [[*failures] for failures in results] == [[7, 107, 207], [307, 407, 507], []]
    assert results[0][7] == "7: OSError: broken\\nin two lines"
    stored = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 12)
    assert len(stored) == 2 * CHUNK + 10
    assert stored[CHUNK : 2 * CHUNK - 3, 0].tolist() == [
        item % 256 for item in range(CHUNK, 2 * CHUNK) if item % 100 != 7
    ]


def test_an_item_with_any_name_makes_one_line():
    line = try_decode(lambda item, size: 1 / 0, "a\nb\udcff", 8)
    assert line == "a\\nb\\udcff: ZeroDivisionError: division by zero"


@pytest.fixture
def start(tmp_path):
    """A function that starts a program in `tmp_path`, in a process group of its own, which is killed at the end."""
    started = []

    def start(program=PROGRAM):
        (tmp_path / "program.py").write_text(textwrap.dedent(program))
        (tmp_path / "workers").mkdir()
        (tmp_path / "images.bin").touch()
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        started.append(subprocess.Popen(
            [sys.executable, "program.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_workers(folder, count=2):
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in (folder / "workers").iterdir()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return pids


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@needs_signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_all_processes_ends_them_at_once_and_silently(tmp_path, start, name):
    process = start()
    wait_for_workers(tmp_path)
    os.killpg(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)  # a chunk takes 102 seconds; the pipes close when no process is left
    assert process.returncode == 128 + getattr(signal, name)
    assert err == ""


@needs_signals
def test_a_signal_while_the_workers_start_prints_nothing(tmp_path, start):
    process = start()
    assert process.stdout.readline() == "started\n"
    time.sleep(0.15)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""


@needs_signals
def test_a_signal_that_reaches_a_worker_alone_does_nothing(tmp_path, start):
    process = start()
    for worker in wait_for_workers(tmp_path):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker, number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.communicate(timeout=60)[1] == ""


def test_workers_ignore_the_signals_also_where_none_are_blocked(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr("datasets.decoding.parent_process", lambda: SimpleNamespace(join=threading.Event().wait))
    start_worker()
    assert handlers == dict.fromkeys(stop_signals(), signal.SIG_IGN)


@needs_signals
def test_workers_end_when_the_program_is_killed(tmp_path, start):
    process = start()
    wait_for_workers(tmp_path)
    process.kill()
    process.communicate(timeout=60)


@needs_signals
def test_a_killed_worker_is_one_line_of_advice(tmp_path, start):
    process = start()
    os.kill(wait_for_workers(tmp_path)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "memory" in line and "--num_workers" in line


def test_processes_that_cannot_be_started_are_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    with pytest.raises(UserError, match=r"temporarily unavailable.*--num_workers 0"):
        list(decode_chunks(gray, range(1000), 8, tmp_path / "images.bin", 2))
    if sys.platform != "win32":
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing stays blocked


@needs_signals
def test_heic_is_read_in_worker_processes(tmp_path, start):
    (tmp_path / "pillow_heif.py").write_text(PILLOW_HEIF)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "pictures").mkdir()
    for number in range(CHUNK + 1):
        (tmp_path / "pictures" / f"{number}.heic").write_bytes(b"heic" + (tmp_path / "a.png").read_bytes())
    process = start("""
        from pathlib import Path
        from datasets.decoding import decode_chunks
        from datasets.sources import find_source

        if __name__ == "__main__":
            source = find_source("folder", "pictures")
            assert not any(decode_chunks(source.decode, source.items, 8, Path("images.bin"), 2))
    """)  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "images.bin").read_bytes() == bytes([1, 2, 3]) * 64 * (CHUNK + 1)


def test_an_interruption_while_tasks_are_submitted_does_not_decode_the_rest(tmp_path, monkeypatch):
    submit, submitted, path = ProcessPoolExecutor.submit, [], tmp_path / "images.bin"

    def interrupted(*arguments):
        submitted.append(arguments)
        if len(submitted) > 100:
            raise KeyboardInterrupt
        return submit(*arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    path.touch()
    with pytest.raises(KeyboardInterrupt):
        list(decode_chunks(gray, range(200 * CHUNK), 8, path, 2))
    assert path.stat().st_size < 50 * CHUNK * 8 * 8 * 3
