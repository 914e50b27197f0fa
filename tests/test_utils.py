import os
import signal

import pytest
import torch

from errors import UserError
from sagan_models import Generator
from utils import EMA, StopSignals, check_writable, derive_seed, eval_mode, memory_mib, resolve_device, tune_malloc


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device auto"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_one():
    with pytest.raises(UserError, match="--device cuda"):
        resolve_device("cuda")


def test_writable_folders(tmp_path):
    check_writable(tmp_path / "new" / "newer")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_writable(tmp_path / "file" / "below")


def test_seeds_are_distinct_and_stable():
    seeds = {derive_seed(seed, stream, step) for seed in range(10) for stream in range(2) for step in range(100)}
    assert len(seeds) == 2000
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_evaluating_restores_training_mode_after_an_error():
    G = Generator(32, 16, 8)
    with pytest.raises(RuntimeError), eval_mode(G):
        assert not G.training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert G.training
    assert torch.is_grad_enabled()


def test_ema_is_the_weighted_average_with_a_ramp():
    torch.manual_seed(0)
    G = Generator(32, 16, 8)
    ema = EMA(G, decay=0.5)
    expected = {key: value.clone() for key, value in G.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for parameter in G.parameters():
                parameter.add_(torch.randn_like(parameter))
        G(torch.randn(4, 16))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, value in G.state_dict().items():
            copied = key.endswith(("_u", "_v", "num_batches_tracked"))
            expected[key] = value.clone() if copied else decay * expected[key] + (1 - decay) * value
    for key, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_ema_takes_no_part_in_training():
    G = Generator(32, 16, 8)
    ema = EMA(G, 0.9)
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    before = {key: value.clone() for key, value in G.state_dict().items()}
    ema.update(0)
    assert all(torch.equal(before[key], value) for key, value in G.state_dict().items())


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_first_signal_asks_and_second_stops(number):
    previous = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(SystemExit, match=str(128 + number)):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == previous


def test_allocator_and_memory():
    tune_malloc()
    assert memory_mib(torch.device("cpu")) >= 0
