import errno
import json
import os
import shutil
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
    with RunLog(tmp_path, 5, use_tensorboard=False) as log:
        log.scalars(6, {"d_loss": 1.5})
    _, events = sorted(tmp_path.glob("events.out.tfevents.*"))
    content, found = events.read_bytes(), []
    while content:  # records: the length in 8 bytes, a checksum of 4, the event, a checksum of 4
        end = 12 + int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12:end]))
        content = content[end + 4 :]
    assert (found[-1].step, found[-1].session_log.status) == (6, SessionLog.START)


@pytest.mark.parametrize("use_tensorboard", [False, True])
def test_files_that_somebody_removes_are_made_again(tmp_path, use_tensorboard):
    folder = tmp_path / "logs"
    folder.mkdir()
    with RunLog(folder, 0, use_tensorboard) as log:
        log.scalars(10, {"d_loss": 1.0})
        shutil.rmtree(folder)
        log.flush()
        log.scalars(20, {"d_loss": 1.0})
        log.scalars(30, {"d_loss": 1.0})
    assert logged_steps(folder) == [20, 30]
    assert len(list(folder.glob("events.out.tfevents.*"))) == use_tensorboard


@pytest.mark.parametrize("comes_back", [False, True])  # with its file, such as a network drive
def test_a_folder_that_cannot_be_made_again_costs_the_entries_and_one_warning(tmp_path, capsys, comes_back):
    folder = tmp_path / "logs"
    folder.mkdir()
    with RunLog(folder, 0, use_tensorboard=True) as log:
        shutil.rmtree(folder)
        folder.touch()  # a file
        for step in (10, 20):
            log.scalars(step, {"d_loss": 1.0})
            log.flush()
            log.image(step, "samples/fake", Image.new("RGB", (8, 8)))
        folder.unlink()
        if comes_back:
            folder.mkdir()
            (folder / "metrics.jsonl").touch()
        log.scalars(30, {"d_loss": 1.0})
    assert logged_steps(folder) == [30]
    assert capsys.readouterr().err.count("warning") == 1


class FullDisk:
    """A file to which at most `free` bytes can be written until the disk has room again."""

    def __init__(self, file, free):
        self.file, self.free = file, free

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.free])
        self.free -= written
        return written


def test_a_full_disk_costs_the_entry_and_leaves_no_half_line(tmp_path, capsys):
    with RunLog(tmp_path, 0, use_tensorboard=False) as log:
        log.scalars(10, {})
        disk = log._file = FullDisk(log._file, 5)
        log.scalars(20, {})
        log.scalars(30, {})
        disk.free = 1000
        log.scalars(40, {})
    assert logged_steps(tmp_path) == [10, 40]
    assert capsys.readouterr().err.count("warning") == 1


def test_tensorboard_of_other_private_names_is_written_too(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventFileWriter

    class Renamed:
        def __init__(self, *arguments):
            self.inner = EventFileWriter(*arguments)

        def __getattr__(self, name):
            return getattr(self.inner, "" if name.startswith("_") else name)

    monkeypatch.setattr("tensorboardX.writer.EventFileWriter", Renamed)
    with RunLog(tmp_path, 0, use_tensorboard=True) as log:
        log.scalars(10, {"d_loss": 1.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"d_loss" in events.read_bytes()


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
