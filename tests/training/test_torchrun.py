"""The program on two ranks that torchrun starts: its messages, how it ends, its files."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import log, log_lines, wait_for

LOGS = "logs/sagan_celeb"
MODELS = "models/sagan_celeb"
ROOT = Path(__file__).parents[2]
TOY = ["--dataset", "toy", "--toy_num", "40", "--imsize", "32", "--z_dim", "16", "--g_conv_dim", "8",
       "--d_conv_dim", "8", "--batch_size", "4", "--num_workers", "0", "--log_step", "1"]  # fmt: skip
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in Linux's /proc"),
]


@pytest.fixture
def torchrun(start_process, tmp_path):
    """A function that starts the program under torchrun."""

    def start(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1"]
        return start_process([*command, str(ROOT / "main.py"), *TOY, "--device", "cpu", *words], tmp_path)

    return start


def pid_of(launcher, rank):
    """The newest process of that rank that this launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"RANK={rank}".encode() in
                Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))  # fmt: skip


def test_a_killed_rank_is_restarted_the_run_resumes_and_one_rank_evaluates(tmp_path, torchrun):
    words = ["--total_step", "60", "--pretrained_model", "auto", "--model_save_step", "1", "--min_save_step", "1",
             "--sample_step", "1000"]  # fmt: skip
    launcher = torchrun(*words)
    wait_for((tmp_path / MODELS / "10_state.pth").exists, launcher)
    os.kill(pid_of(launcher, 1), signal.SIGKILL)
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert err.count("error: rank 0") == 1
    assert 'main.py", line' not in err
    assert out.count("resuming from step") == 1
    assert (tmp_path / MODELS / "60_state.pth").exists()
    assert [line["step"] for line in log(tmp_path / LOGS, "d_loss")] == list(range(1, 61))

    launcher = torchrun("--train", "false", "--num_samples", "4")
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert (tmp_path / "samples/sagan_celeb/test_60/grid.png").exists()
    assert out.count("results in") == 1


def test_parallel_stops_all_ranks_at_a_signal_and_ignores_what_nohup_ignores(tmp_path, start_process):
    """As if there were two GPUs, though the ranks find none."""
    words = [str(ROOT / "main.py"), *TOY, "--parallel", "true", "--total_step", "100000", "--save_minutes", "0",
             "--model_save_step", "1000000"]  # fmt: skip
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {words}; import torch, main; "
        "torch.cuda.device_count = lambda: 2; sys.exit(main.main())"
    )
    command = ["sh", "-c", f'trap "" HUP; exec {shlex.join([sys.executable, "-c", script])}']  # as nohup does
    launcher = start_process(command, tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= 2, launcher)
    launcher.send_signal(signal.SIGHUP)
    steps = len(log_lines(tmp_path / LOGS))
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= steps + 3, launcher)
    launcher.send_signal(signal.SIGUSR1)
    out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 128 + signal.SIGUSR1, err
    step = len(log_lines(tmp_path / LOGS))
    assert out.count("world size 2") == out.count("checkpoint saved") == out.count(f"--pretrained_model {step}") == 1
    saved = {path.name for path in (tmp_path / MODELS).glob("*.pth")}
    assert saved == {f"{step}_{part}.pth" for part in ("G", "D", "state")}
