"""Exit codes, and the line that an error prints."""

import pytest
import torch

from errors import PeerFailed, RankLost, UserError, exit_code, silence_other_ranks


@pytest.mark.parametrize("error, code, token", [
    (UserError("set --imsize"), 2, "--imsize"),
    (OSError(28, "No space left on device"), 2, "No space"),
    (RankLost("rank 1"), 1, "rank 1"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "--batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch_size"),
])  # fmt: skip
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, token):
    assert exit_code(error) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and token in lines[0]


def test_running_out_of_memory_on_a_cpu_is_recognized(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert exit_code(caught.value) == 2
    assert "--batch_size" in capsys.readouterr().err


def test_another_rank_prints_its_own_failure(capsys):
    assert exit_code(PeerFailed("rank 1 failed")) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ZeroDivisionError(), AssertionError()])
def test_a_bug_is_raised_again(capsys, error):
    with pytest.raises(type(error)) as caught:
        exit_code(error)
    assert caught.value is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank, printed", [(None, "text\n"), ("0", "text\n"), ("3", "")])
def test_only_rank_zero_prints(monkeypatch, capsys, rank, printed):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with silence_other_ranks():
        print("text")
    print("after")
    assert capsys.readouterr().out == printed + "after\n"
