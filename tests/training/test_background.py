import threading
from unittest import mock

import pytest
import torch

from training.background import Background
from visuals.attention_stats import AttentionSample

CPU = torch.device("cpu")
fail = mock.Mock(side_effect=OSError("disk full"))


def test_jobs_run_in_order_and_submit_blocks_only_when_too_many_are_pending():
    gate, done = threading.Event(), []
    with Background(CPU, capacity=2) as background:
        background.submit(lambda: done.append(gate.wait(30)))
        background.submit(done.append, 1)
        assert not done  # nobody waited for a job
        third = threading.Thread(target=background.submit, args=(done.append, 2))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        gate.set()
        third.join()
        for number in range(3, 30):
            background.submit(done.append, number)
    assert done == [True, *range(1, 30)]


def test_an_error_in_a_job_is_raised_by_a_later_submit_or_at_the_end():
    with pytest.raises(OSError, match="disk full"), Background(CPU) as background:
        background.submit(fail)
    with pytest.raises(OSError, match="disk full"), Background(CPU, capacity=1) as background:
        background.submit(fail)
        background.submit(print)
        pytest.fail("the error came too late")


@pytest.mark.parametrize("error, runs", [(KeyError, True), (KeyboardInterrupt, False)])
def test_an_error_in_the_block_is_raised_first(error, runs):
    """The jobs still run, unless the user ends the program."""
    gate, done = threading.Event(), []
    with pytest.raises(error), Background(CPU) as background:
        background.submit(gate.wait)
        background.submit(fail)
        background.submit(done.append, 1)
        threading.Timer(0.2, gate.set).start()
        raise error
    assert bool(done) == runs


def test_on_mps_jobs_are_given_tensors_on_the_cpu(monkeypatch):
    """Also those inside of what checkpoints and figures are made of."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor + 100)  # there is no MPS here
    seen, sample = [], AttentionSample("real", torch.ones(1), {"D attn1": torch.zeros(1)})
    with Background(torch.device("mps")) as background:
        background.submit(lambda *found: seen.extend(found), 3, {"G": {"weight": torch.zeros(1)}}, [sample])
    assert seen == [3, {"G": {"weight": 100}}, [AttentionSample("real", torch.tensor([101.0]), {"D attn1": 100})]]
