import threading
from types import SimpleNamespace

import pytest
import torch

from training.background import Background
from visuals.attention_stats import AttentionSample

CPU = torch.device("cpu")


def test_all_jobs_run_in_order():
    done = []
    with Background(CPU) as background:
        for number in range(30):
            background.submit(done.append, number)
    assert done == list(range(30))


def test_submit_blocks_only_when_too_many_jobs_are_pending():
    gate, happened, submitted = threading.Event(), [], threading.Event()

    def job():
        happened.append(gate.wait(30))

    def submit():
        background.submit(job)
        submitted.set()

    with Background(CPU, capacity=2) as background:
        background.submit(job)
        background.submit(job)
        assert not happened  # nobody waited for a job
        third = threading.Thread(target=submit)
        third.start()
        assert not submitted.wait(0.2)
        gate.set()
        third.join()
    assert happened == [True] * 3


def fail():
    raise OSError("disk full")


def test_an_error_in_a_job_is_raised_by_a_later_submit_or_at_the_end():
    with pytest.raises(OSError, match="disk full"), Background(CPU) as background:
        background.submit(fail)
    with pytest.raises(OSError, match="disk full"), Background(CPU, capacity=1) as background:
        background.submit(fail)
        background.submit(print)
        pytest.fail("the error came too late")


def test_an_error_in_the_block_is_raised_first():
    with pytest.raises(KeyError), Background(CPU) as background:
        background.submit(fail)
        raise KeyError


def test_on_mps_jobs_are_given_tensors_on_the_cpu(monkeypatch):
    """Also those inside of what checkpoints and figures are made of."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor + 100)  # there is no MPS here
    seen = []
    with Background(torch.device("mps")) as background:
        state = {"G": {"weight": torch.zeros(1)}, "moments": [torch.ones(1)], "step": 7}
        background.submit(lambda *found: seen.extend(found), 3, state)
        background.submit(seen.append, [AttentionSample("real", torch.ones(1), {"D attn1": torch.zeros(1)})])
    step, state, (sample,) = seen
    assert (step, state) == (3, {"G": {"weight": 100}, "moments": [101], "step": 7})
    assert sample == AttentionSample("real", torch.tensor([101.0]), {"D attn1": torch.tensor([100.0])})


def test_on_cuda_a_job_waits_on_a_stream_of_its_own_for_what_was_queued_before_it(monkeypatch):
    """With fakes; tests/test_cuda.py has real ones."""
    happened, gate = [], threading.Event()
    queued = iter(["one step", "two steps"])

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_event(self, event):
            happened.append(("wait for", event))

        def synchronize(self):
            happened.append("synchronize")

    def set_stream(stream):
        happened.append((threading.current_thread() is threading.main_thread(), stream.device))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(record_event=lambda: next(queued)))
    with Background(torch.device("cuda", 1)) as background:
        background.submit(lambda name: gate.wait() and happened.append(name), "first")
        background.submit(happened.append, "second")
        gate.set()
    assert happened == [(False, torch.device("cuda", 1)),
                        ("wait for", "one step"), "first", "synchronize",
                        ("wait for", "two steps"), "second", "synchronize"]  # fmt: skip
