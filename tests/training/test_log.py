import errno
import os

import pytest
from conftest import log
from tensorboardX.proto.event_pb2 import Event, SessionLog

from training.log import RunLog


@pytest.mark.parametrize("step, left, end", [(0, 0, ""), (20, 2, ""), *((100, 3, end) for end in (
    "", '{"step": 4', '{"step": 40}', "no json\n", "[40]\n", '{"d_loss": 1}\n'))])  # fmt: skip
def test_a_resumed_run_drops_later_entries_and_a_damaged_or_incomplete_line(tmp_path, end, step, left):
    values = {"d_loss": 0.10000000149011612}  # as many digits as a float32 has are written
    with RunLog(tmp_path, 0, use_tensorboard=False) as run_log:
        for number in (10, 20, 30):
            run_log.scalars(number, values)
        assert log(tmp_path) == [{"step": number, "d_loss": 0.100000001} for number in (10, 20, 30)]  # at once
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(end)
    with RunLog(tmp_path, step, use_tensorboard=False) as run_log:
        run_log.scalars(110, {})
    assert [entry["step"] for entry in log(tmp_path)] == [*(10, 20, 30)[:left], 110]


def test_a_run_that_goes_back_drops_later_tensorboard_entries(tmp_path):
    """A new file that starts a session at the next step lets TensorBoard hide them."""
    with RunLog(tmp_path, 5, use_tensorboard=True):
        pass
    (events,) = tmp_path.glob("events.out.tfevents.*")
    entry = Event(step=6, session_log=SessionLog(status=SessionLog.START))  # without its time, which comes first
    assert entry.SerializeToString() in events.read_bytes()


def test_a_full_disk_costs_the_entry_and_leaves_no_half_line(tmp_path, capsys):
    """A limit of the size of files stands for the disk: a write fills what is left, and the next one fails."""
    resource = pytest.importorskip("resource")  # of POSIX
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with RunLog(tmp_path, 0, use_tensorboard=False) as run_log:
            run_log.scalars(10, {})
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
            run_log.scalars(20, {})
            run_log.scalars(30, {})
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            run_log.scalars(40, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log(tmp_path) == [{"step": 10}, {"step": 40}]
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("method", ["write_event", "flush", "close"])
@pytest.mark.timeout(30)
def test_tensorboard_that_cannot_write_neither_ends_nor_stops_the_run(tmp_path, monkeypatch, capsys, method):
    """One error in tensorboardX's thread would end it: its queue fills up, and the 11th scalar waits for ever."""
    from tensorboardX.event_file_writer import EventsWriter

    original, failures = getattr(EventsWriter, method), []

    def fail_once(self, *arguments):
        if failures:
            raise failures.pop()
        return original(self, *arguments)

    monkeypatch.setattr(EventsWriter, method, fail_once)
    with RunLog(tmp_path, 0, use_tensorboard=True) as run_log:
        failures.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        for step in range(100):
            run_log.scalars(step, {"d_loss": 1.0, "g_loss": 2.0})
    assert len(log(tmp_path)) == 100
    assert capsys.readouterr().err.count("warning") == 1
    (events,) = tmp_path.glob("events.out.tfevents.*")
    pending = 10 if method == "close" else 1  # what may be lost with the failed call
    assert events.read_bytes().count(b"g_loss") >= 100 - pending
