import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errors import UserError, warn_once
from sagan_models import Generator
from utils import (
    conv_memory_format,
    derive_seed,
    eval_mode,
    evenly_spaced,
    files_by_step,
    memory_mib,
    no_param_grads,
    set_backends,
    setup_device,
    write_atomically,
)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes torch report these devices."""

    def report(gpus=0, capability=(8, 0), mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield report
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("devices, name, local_rank, expected", [
    (dict(gpus=2), "auto", None, "cuda:0"), (dict(mps=True), "auto", None, "cpu"), (dict(), "auto", None, "cpu"),
    (dict(gpus=2), "cuda", None, "cuda:0"), (dict(gpus=2), "cuda:1", None, "cuda:1"),
    (dict(gpus=2), "cpu", None, "cpu"), (dict(gpus=2), "auto", 1, "cuda:1"), (dict(gpus=2), "cuda", 1, "cuda:1"),
    (dict(gpus=2), "cpu", 1, "cpu"),
])  # fmt: skip
def test_resolved_device(machine, capsys, devices, name, local_rank, expected):
    machine(**devices)
    assert setup_device(name, local_rank) == torch.device(expected)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("devices, name, local_rank", [
    (dict(), "cuda", None), (dict(gpus=2), "cuda:2", None), (dict(), "mps", None),
    (dict(gpus=2), "auto", 2), (dict(gpus=2), "cuda:1", 1), (dict(mps=True), "mps", 0),
])  # fmt: skip
def test_an_unavailable_device_is_a_user_error(machine, devices, name, local_rank):
    machine(**devices)
    with pytest.raises(UserError, match="--device"):
        setup_device(name, local_rank)


def test_mps_is_used_by_name_only_and_warns_once(machine, capsys):
    machine(mps=True)
    warn_once.cache_clear()
    for _ in range(2):  # `main` and `Trainer`
        assert setup_device("mps").type == "mps"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name, device, capability, expected", [
    ("auto", "cpu", None, "fp32"), ("auto", "cuda", (8, 0), "bf16"), ("auto", "cuda", (7, 5), "fp32"),
    ("tf32", "cuda", (9, 0), "tf32"), ("bf16", "cuda", (8, 0), "bf16"), ("bf16", "cpu", None, "bf16"),
    ("fp32", "cuda", (7, 5), "fp32"),
])  # fmt: skip
def test_resolved_precision(machine, monkeypatch, name, device, capability, expected):
    machine(gpus=1, capability=capability)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", device == "cpu")
    assert set_backends(torch.device(device), name, deterministic=False) == expected
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (expected == "tf32")
    assert torch.backends.cudnn.benchmark == (device == "cuda")


@pytest.mark.parametrize("device, precision, expected", [
    ("cpu", "fp32", torch.channels_last), ("cpu", "bf16", torch.channels_last),
    ("cuda", "tf32", torch.channels_last), ("cuda", "bf16", torch.channels_last),
    ("cuda", "fp32", torch.contiguous_format),  # no tensor cores
    ("mps", "fp32", torch.contiguous_format), ("mps", "bf16", torch.contiguous_format),
])  # fmt: skip
def test_memory_format_of_convolutions(device, precision, expected):
    assert conv_memory_format(torch.device(device), precision) == expected


@pytest.mark.parametrize("name, device", [("tf32", "cpu"), ("tf32", "cuda"), ("bf16", "cuda")])
def test_precision_without_tensor_cores_is_a_user_error(machine, name, device):
    machine(gpus=1, capability=(7, 5))
    with pytest.raises(UserError, match=f"--precision {name}"):
        set_backends(torch.device(device), name, deterministic=False)


@pytest.mark.parametrize("failing", ["builtins.open", "os.fsync", "os.replace"])
def test_files_are_written_all_or_none(tmp_path, monkeypatch, failing):
    paths = [tmp_path / "a", tmp_path / "b"]
    for content in (b"old", b"new"):
        write_atomically({path: content for path in paths})

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically({path: b"newer" for path in paths})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"new"}


def test_seeds_are_distinct_and_stable():
    seeds = {derive_seed(seed, stream, step) for seed in range(10) for stream in range(2) for step in range(100)}
    assert len(seeds) == 2000
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_eval_mode_restores_training_mode_after_an_error():
    G, always = Generator(32, 16, 8), Generator(32, 16, 8).eval()
    with pytest.raises(RuntimeError), eval_mode(G, always):
        assert not G.training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert G.training and not always.training
    assert torch.is_grad_enabled()


def test_no_param_grads_lets_input_gradients_through():
    network, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with no_param_grads(network):
        network(x).sum().backward()
    assert x.grad is not None
    assert network.weight.grad is None
    assert network.weight.requires_grad


@pytest.mark.skipif(sys.platform == "win32", reason="memory is not measured on Windows")
def test_peak_memory_is_in_mib():
    before, statm = memory_mib(torch.device("cpu")), Path("/proc/self/statm")
    assert 50 < before < 50_000
    resident = int(statm.read_text().split()[1]) * mmap.PAGESIZE / 2**20 if statm.exists() else 0
    more = int(before - resident + 100)  # 100 MiB above the peak
    with mmap.mmap(-1, more * 2**20) as block:  # a tensor might be given memory that was freed
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert before + 90 < memory_mib(torch.device("cpu")) < before + more + 50


PAGE_FAULTS = """
import resource, torch, utils

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
utils.tune_malloc()
page_faults()  # the first blocks are not reused
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_tuned_malloc_reuses_freed_memory():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=root, capture_output=True, text=True, check=True)
    default, tuned = map(int, done.stdout.split())
    assert tuned < default / 10


def test_files_by_step_in_ascending_order(tmp_path):
    for name in ("100_fake.png", "9_fake.png", "9_ema.png", "real.png", "x_fake.png", "9_fake.png.tmp", "-1_fake.png"):
        (tmp_path / name).touch()
    assert list(files_by_step(tmp_path, "fake.png")) == [9, 100]
    assert files_by_step(tmp_path, "fake.png")[9] == tmp_path / "9_fake.png"
    assert files_by_step(tmp_path / "nowhere", "fake.png") == {}


def test_evenly_spaced_keeps_the_ends():
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert evenly_spaced(range(3), 4) == [0, 1, 2]
    assert evenly_spaced([], 4) == []
