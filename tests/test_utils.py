import mmap
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import utils
from errors import UserError, warn_once
from sagan_models import Generator


def test_a_log_gets_lines_of_progress_without_cursor_codes(capsys):
    """tqdm moves the cursor for a second bar."""
    for text in ("\r a 10%", "\x1b[A", "\r a 20%\x1b[A"):
        utils.bar_options()["file"].write(text)
    assert capsys.readouterr().err == "a 10%\na 20%\n"


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
    (dict(gpus=2), "cpu", 1, "cpu"), (dict(mps=True), "mps", None, "mps"),
    (dict(), "cuda", None, None), (dict(gpus=2), "cuda:2", None, None), (dict(), "mps", None, None),
    (dict(gpus=2), "auto", 2, None), (dict(gpus=2), "cuda:1", 1, None), (dict(mps=True), "mps", 0, None),
])  # fmt: skip
def test_resolved_device(machine, capsys, devices, name, local_rank, expected):
    machine(**devices)
    warn_once.cache_clear()
    with nullcontext() if expected else pytest.raises(UserError, match="--device"):
        for _ in range(2):  # `main` and `Trainer`
            assert utils.setup_device(name, local_rank) == torch.device(expected)
    assert capsys.readouterr().err.count("\n") == (expected == "mps")  # one warning


@pytest.mark.parametrize("name, device, capability, expected", [
    ("auto", "cpu", None, "fp32"), ("auto", "cuda", (8, 0), "bf16"), ("auto", "cuda", (7, 5), "fp32"),
    ("tf32", "cuda", (9, 0), "tf32"), ("bf16", "cuda", (8, 0), "bf16"), ("bf16", "cpu", None, "bf16"),
    ("fp32", "cuda", (7, 5), "fp32"),
    ("tf32", "cpu", None, None), ("tf32", "cuda", (7, 5), None), ("bf16", "cuda", (7, 5), None),  # no tensor cores
])  # fmt: skip
def test_resolved_precision(machine, monkeypatch, name, device, capability, expected):
    machine(gpus=1, capability=capability)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", device == "cpu")
    with nullcontext() if expected else pytest.raises(UserError, match=f"--precision {name}"):
        assert utils.set_backends(torch.device(device), name, deterministic=False) == expected
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (expected == "tf32")
        assert torch.backends.cudnn.benchmark == (device == "cuda")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_memory_format_of_convolutions(device, precision):
    is_contiguous = device == "mps" or (device, precision) == ("cuda", "fp32")  # the latter has no tensor cores
    expected = torch.contiguous_format if is_contiguous else torch.channels_last
    assert utils.conv_memory_format(torch.device(device), precision) == expected


FULL = pytest.param("file.write", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only on Linux"))


@pytest.mark.parametrize("failing", ["builtins.open", FULL, "os.fsync", "os.replace"])
def test_files_are_written_all_or_none(tmp_path, monkeypatch, failing):
    paths = [tmp_path / "a", tmp_path / "b"]
    utils.write_atomically({path: b"old" for path in paths})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        if failing == "file.write":
            (tmp_path / "b.tmp").symlink_to("/dev/full")
        else:
            patch.setattr(failing, Mock(side_effect=OSError(28, "No space left on device")))
        utils.write_atomically({path: b"new" for path in paths})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_a_drive_of_windows_that_is_not_there(monkeypatch):
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    with pytest.raises(UserError, match="drive"):
        utils.check_writable(ROOT)


def test_seeds_are_distinct():
    seeds = {utils.derive_seed(seed, stream, step) for seed in range(10) for stream in range(2) for step in range(100)}
    assert len(seeds) == 2000 and min(seeds) >= 0 and max(seeds) < 2**63


def test_eval_mode_restores_training_mode_after_an_error():
    G, always = Generator(32, 16, 8), Generator(32, 16, 8).eval()
    with pytest.raises(RuntimeError), utils.eval_mode(G, always):
        assert not G.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert G.training and not always.training and torch.is_grad_enabled()


@pytest.mark.skipif(sys.platform == "win32", reason="memory is not measured on Windows")
def test_peak_memory_is_in_mib():
    before = utils.memory_mib(torch.device("cpu"))
    more = int(before) + 100  # above the peak, whatever part of it is in use
    with mmap.mmap(-1, more * 2**20) as block:  # a tensor might be given memory that was freed
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
    assert 50 < before < before + 90 < utils.memory_mib(torch.device("cpu")) < before + more + 50


PAGE_FAULTS = """import resource, torch, utils
for prepare in (int, utils.tune_malloc, int):
    prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):  # until glibc reuses every block it takes it up to a dozen
        torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_tuned_malloc_reuses_freed_memory():
    default, _, tuned = map(int, subprocess.check_output([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT).split())
    assert tuned < default / 10


def test_files_by_step_in_ascending_order(tmp_path):
    for name in ("100_fake.png", "9_fake.png", "9_ema.png", "real.png", "x_fake.png", "9_fake.png.tmp", "-1_fake.png"):
        (tmp_path / name).touch()
    found = utils.files_by_step(tmp_path, "fake.png")
    assert list(found.items()) == [(9, tmp_path / "9_fake.png"), (100, tmp_path / "100_fake.png")]
    assert utils.files_by_step(tmp_path / "nowhere", "fake.png") == {}


def test_evenly_spaced_keeps_the_ends():
    assert utils.evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert utils.evenly_spaced(range(3), 4) == [0, 1, 2] and utils.evenly_spaced([], 4) == []
