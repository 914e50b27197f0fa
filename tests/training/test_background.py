import threading
import time

import pytest

from training.background import Background


def test_all_jobs_run_in_order():
    done = []
    with Background() as background:
        for number in range(30):
            background.submit(done.append, number)
    assert done == list(range(30))


def test_submit_blocks_only_when_too_many_jobs_are_pending():
    gate = threading.Event()
    with Background(capacity=2) as background:
        start = time.monotonic()
        background.submit(gate.wait)
        background.submit(gate.wait)
        assert time.monotonic() - start < 1
        threading.Timer(0.2, gate.set).start()
        background.submit(gate.wait)
        assert time.monotonic() - start >= 0.2


def fail():
    raise OSError("disk full")


def test_an_error_in_a_job_is_raised_by_a_later_submit_or_at_the_end():
    with pytest.raises(OSError, match="disk full"), Background() as background:
        background.submit(fail)
    with pytest.raises(OSError, match="disk full"), Background(capacity=1) as background:
        background.submit(fail)
        background.submit(print)
        pytest.fail("the error came too late")


def test_an_error_in_the_block_is_raised_first():
    with pytest.raises(KeyError), Background() as background:
        background.submit(fail)
        raise KeyError
