"""Exit codes, and the line that an error prints."""

import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

from errors import PeerFailed, RankLost, Tolerate, UserError, exit_code, stop_on_signals


@pytest.mark.parametrize("error, code, token", [
    (UserError("set --imsize"), 2, "--imsize"),
    (UserError("class a\nb has 1"), 2, "class a b has 1"),
    (OSError(28, "No space left on device"), 2, "No space"),
    (RankLost("rank 1"), 1, "rank 1"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "--batch_size"),
    (OSError(12, "Cannot allocate memory"), 2, "--batch_size"), (PeerFailed("rank 1 failed"), 2, None),  # it says so
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), 2, "--batch_size"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), 2, "--batch_size"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2, "--batch_size"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 2, "--batch_size"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), 2, "--batch_size"),
    (RuntimeError("can't start new thread"), 2, "ulimit -u"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"), 2, "--device cpu"),
    # Bugs
    (RuntimeError("shapes differ"), None, None), (ZeroDivisionError(), None, None), (AssertionError(), None, None),
])  # fmt: skip
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, token):
    with nullcontext() if code else pytest.raises(type(error)):
        assert exit_code(error) == code
    out, err = capsys.readouterr()
    assert out == "" and (err.count("\n") == 1 and token in err if token else err == "")


def test_running_out_of_memory_on_a_cpu_is_recognized(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert exit_code(caught.value) == 2
    assert "--batch_size" in capsys.readouterr().err


def test_an_error_is_tolerated_with_one_warning_for_each_kind(capsys, monkeypatch):
    monkeypatch.setattr(Tolerate, "tolerated", Exception)
    tolerate = Tolerate("pictures")
    full = OSError(28, "No space")
    for error in (full, full, OSError(13, "Permission"), ValueError("two\nlines")):
        with tolerate:
            raise error
    tokens = ("No space", "Permission", "ValueError: two lines")
    for line, token in zip(capsys.readouterr().err.splitlines(), tokens, strict=True):
        assert "pictures" in line and token in line
    with pytest.raises(KeyboardInterrupt), tolerate:
        raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="no such shell")
@pytest.mark.parametrize("redirection", ["2>&1 | true", "| true", "2>&1 >/dev/null | true", "<&- >&-", "2>&-",
                                         "<&- >&- 2>&-"])  # fmt: skip
def test_output_that_cannot_be_written_changes_no_exit_code(tmp_path, redirection):
    """Also not at the end of the interpreter, which flushes once more. A closed standard stream is not a file's."""
    code = f"""import errors, os, sys, time, tqdm
errors.make_output_robust()
file = open({str(tmp_path / "file")!r}, "w")
for _ in tqdm.trange(4):
    print("line"), errors.warn("line"), os.write(1, b"") , time.sleep(0.1)
sys.exit(7 if file.fileno() > 2 else 1)"""
    program = f"{sys.executable} -c {shlex.quote(code)}; echo $? >{tmp_path / 'code'}"
    subprocess.run(["sh", "-c", f"({program}) {redirection}"], cwd=ROOT, check=True)
    assert (tmp_path / "code").read_text() == "7\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_first_signal_is_received_and_the_second_exits(name):
    number = getattr(signal, name, signal.SIGINT)  # Windows lacks two
    previous = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop() == 0
        signal.raise_signal(number)
        assert stop() == number
        with pytest.raises(SystemExit, match=str(128 + number)):
            signal.raise_signal(number)
    assert signal.getsignal(number) == previous
