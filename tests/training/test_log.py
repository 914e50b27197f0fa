import errno
import json
import os
import threading

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from training.log import RunLog


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, steps):
    with RunLog(folder, 0, use_tensorboard=False) as log:
        for step in steps:
            log.scalars(step, {})


def test_entries_are_written_at_once_as_float32(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=False) as log:
        log.scalars(10, {"d_loss": 0.10000000149011612})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "d_loss": 0.100000001}


def test_a_resumed_run_drops_later_entries(tmp_path):
    write_steps(tmp_path, (10, 20, 30))
    with RunLog(tmp_path, 20, use_tensorboard=False) as log:
        log.scalars(25, {})
    assert logged_steps(tmp_path) == [10, 20, 25]
    with RunLog(tmp_path, 0, use_tensorboard=False):
        pass
    assert logged_steps(tmp_path) == []


@pytest.mark.parametrize("end", ['{"step": 4', '{"step": 40}', "no json\n", "[40]\n", '{"d_loss": 1}\n'])
def test_a_resumed_run_drops_a_damaged_or_incomplete_line(tmp_path, end):
    write_steps(tmp_path, (10, 20))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(end)
    with RunLog(tmp_path, 100, use_tensorboard=False) as log:
        log.scalars(110, {})
    assert logged_steps(tmp_path) == [10, 20, 110]


def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=True) as log:
        log.scalars(10, {"d_loss": 1.5})
        log.image(10, "samples/fake", Image.new("RGB", (8, 8)))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"d_loss" in content
    assert b"samples/fake" in content
    assert b"PNG" in content


def test_a_run_that_goes_back_drops_later_tensorboard_entries(tmp_path):
    """A new file that starts a session at the next step lets TensorBoard hide them."""
    with RunLog(tmp_path, 10, use_tensorboard=False):
        assert not list(tmp_path.glob("events.out.tfevents.*"))
    (tmp_path / "events.out.tfevents.1.host").touch()
    with RunLog(tmp_path, 5, use_tensorboard=True):
        pass
    _, events = sorted(tmp_path.glob("events.out.tfevents.*"))
    content, found = events.read_bytes(), []
    while content:  # records: the length in 8 bytes, a checksum of 4, the event, a checksum of 4
        end = 12 + int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12:end]))
        content = content[end + 4 :]
    assert (found[-1].step, found[-1].session_log.status) == (6, SessionLog.START)


def test_a_full_disk_costs_the_entry_and_leaves_no_half_line(tmp_path, capsys):
    """A limit of the size of files stands for the disk: a write fills what is left, and the next one fails."""
    resource = pytest.importorskip("resource")  # of POSIX
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with RunLog(tmp_path, 0, use_tensorboard=False) as log:
            log.scalars(10, {})
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
            log.scalars(20, {})
            log.scalars(30, {})
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            log.scalars(40, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert logged_steps(tmp_path) == [10, 40]
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("method", ["write_event", "flush", "close"])
def test_tensorboard_that_cannot_write_neither_ends_nor_stops_the_run(tmp_path, monkeypatch, capsys, method):
    """One error in tensorboardX's thread would end it: its queue fills up, and the 11th scalar waits for ever."""
    from tensorboardX.event_file_writer import EventsWriter

    original, failures = getattr(EventsWriter, method), iter([True])

    def fail_once(self, *arguments):
        if started and next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *arguments)

    def write():
        nonlocal started
        with RunLog(tmp_path, 0, use_tensorboard=True) as log:
            started = True
            for step in range(100):
                log.scalars(step, {"d_loss": 1.0, "g_loss": 2.0})

    started = False
    monkeypatch.setattr(EventsWriter, method, fail_once)
    thread = threading.Thread(target=write, daemon=True)  # a test that waits without end would not fail
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert capsys.readouterr().err.count("warning") == 1
    assert logged_steps(tmp_path) == list(range(100))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    pending = 10 if method == "close" else 1  # what may be lost with the failed call
    assert events.read_bytes().count(b"g_loss") >= 100 - pending
