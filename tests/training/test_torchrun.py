"""The program on two ranks that torchrun starts: its messages, how it ends, its files."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port, log, log_lines, wait_for

LOGS = "logs/sagan_celeb"
ROOT = Path(__file__).parents[2]
TOY = ["--dataset", "toy", "--toy_num", "40", "--imsize", "32", "--z_dim", "16", "--g_conv_dim", "8",
       "--d_conv_dim", "8", "--batch_size", "4", "--num_workers", "0", "--device", "cpu",
       "--log_step", "1"]  # fmt: skip
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in Linux's /proc")


@pytest.fixture
def torchrun(start_process):
    """A function that starts the program under torchrun."""

    def start(folder, *words, launcher=("--standalone", "--nproc_per_node=2")):
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "main.py"), *TOY, *words]
        return start_process(command, folder)

    return start


def pid_of(launcher, rank):
    """The newest process of that rank that this launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"RANK={rank}".encode() in
                Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))  # fmt: skip


@needs_proc
def test_sigterm_saves_one_checkpoint_and_ends_all_ranks(tmp_path, torchrun):
    launcher = torchrun(tmp_path, "--total_step", "100000", "--save_minutes", "0", "--model_save_step", "1000000")
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= 2, launcher)
    began = time.monotonic()
    launcher.terminate()
    out, _ = launcher.communicate(timeout=100)
    assert time.monotonic() - began < 30
    step = len(log_lines(tmp_path / LOGS))
    assert out.count("SIGTERM") == 1
    assert out.count("torchrun --nproc_per_node=2 main.py") == out.count(f"--pretrained_model {step}") == 1
    saved = {path.name for path in (tmp_path / "models/sagan_celeb").glob("*.pth")}
    assert saved == {f"{step}_{part}.pth" for part in ("G", "D", "state")}


@needs_proc
def test_a_killed_rank_0_ends_all(tmp_path, torchrun):
    """The next test kills rank 1."""
    launcher = torchrun(tmp_path, "--total_step", "100000")
    wait_for(lambda: log_lines(tmp_path / LOGS), launcher)
    began = time.monotonic()
    os.kill(pid_of(launcher, 0), signal.SIGKILL)
    _, err = launcher.communicate(timeout=100)
    assert time.monotonic() - began < 30
    assert launcher.returncode != 0
    assert err.count("error: rank 1") == 1
    assert 'main.py", line' not in err


@needs_proc
def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(tmp_path, torchrun):
    words = ["--total_step", "60", "--pretrained_model", "auto", "--model_save_step", "1", "--min_save_step", "1",
             "--sample_step", "1000"]  # fmt: skip
    launcher = torchrun(tmp_path, *words, launcher=["--nproc_per_node=2", "--max_restarts=1"])
    wait_for((tmp_path / "models/sagan_celeb/10_state.pth").exists, launcher)
    os.kill(pid_of(launcher, 1), signal.SIGKILL)
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert err.count("error: rank 0") == 1
    assert 'main.py", line' not in err
    assert out.count("resuming from step") == 1
    assert (tmp_path / "models/sagan_celeb/60_state.pth").exists()
    assert [line["step"] for line in log(tmp_path / LOGS)] == list(range(1, 61))


def on_two_machines(torchrun, folder, *words):
    """Run two launchers, each with one process and its own folder. Returns their output and exit codes."""
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    launchers = {}
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        launchers[name] = torchrun(folder / name, *words, launcher=nodes)
    printed = {name: launcher.communicate(timeout=100) for name, launcher in launchers.items()}
    return printed, [launcher.returncode for launcher in launchers.values()]


@pytest.mark.skipif(os.name == "nt", reason="makes a symbolic link")
def test_two_machines_train_and_evaluate_and_one_writes(tmp_path, torchrun):
    printed, codes = on_two_machines(torchrun, tmp_path, "--total_step", "2")
    assert codes == [0, 0], printed
    writers = [name for name in printed if (tmp_path / name / "models/sagan_celeb/2_state.pth").exists()]
    assert len(writers) == 1
    assert [bool(out) for out, _ in printed.values()].count(True) == 1
    other = ({"a", "b"} - {*writers}).pop()
    assert [path.name for path in (tmp_path / other).iterdir()] == ["cache"]
    (tmp_path / other / "models").symlink_to(tmp_path / writers[0] / "models")  # whichever is rank 0 this time
    printed, codes = on_two_machines(torchrun, tmp_path, "--train", "false", "--num_samples", "4")
    assert codes == [0, 0], printed
    assert len([*tmp_path.glob("*/samples/sagan_celeb/test_2/grid.png")]) == 1


def parallel(start_process, folder, *words):
    """Start the program with `--parallel true` as if there were two GPUs, though its ranks find none."""
    words = [str(ROOT / "main.py"), *TOY, "--device", "auto", "--parallel", "true", *words]
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {words}; import torch, main; "
        "torch.cuda.device_count = lambda: 2; sys.exit(main.main())"
    )
    command = ["sh", "-c", f'trap "" HUP; exec {shlex.join([sys.executable, "-c", script])}']  # as nohup does
    return start_process(command, folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_parallel_starts_a_process_per_gpu_and_returns_their_exit_code(tmp_path, start_process):
    for code, token in ((0, "world size 2"), (2, "--overwrite")):
        launcher = parallel(start_process, tmp_path, "--total_step", "2")
        out, err = launcher.communicate(timeout=100)
        assert launcher.returncode == code, err
        assert out.count("--parallel") == 1
        assert (out + err).count(token) == 1
        assert "Traceback" not in err


@needs_proc
def test_parallel_passes_on_a_scheduler_s_warning_and_ignores_what_nohup_ignores(tmp_path, start_process):
    launcher = parallel(start_process, tmp_path, "--total_step", "100000")
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= 2, launcher)
    launcher.send_signal(signal.SIGHUP)
    steps = len(log_lines(tmp_path / LOGS))
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= steps + 3, launcher)
    launcher.send_signal(signal.SIGUSR1)
    out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 128 + signal.SIGUSR1, err
    assert out.count("checkpoint saved") == 1
    assert list((tmp_path / "models/sagan_celeb").glob("*_state.pth"))
