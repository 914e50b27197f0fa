"""Two gloo ranks against a single process: the same gradients, data, files and endings; then ranks of torchrun."""

import dataclasses
import os
import shlex
import signal
import socket
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, build_trainer, log, log_lines, toy_config, use_small_extractor, wait_for, weights_of
from torch import nn
from torch.utils._pytree import tree_leaves

import main
from errors import PeerFailed, UserError, exit_code
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from training import distributed, recorder
from training.distributed import LOCAL_RANKS, Ranks, process_group, processes_to_start, read_launch
from training.guards import NonFiniteError

SMALL_STDS = (0.0, 0.01)
CLASSES = dict(model="paper", imsize=64, conditional=True)
# Kinks amplify rounding: an input near 0 has another slope.
SMOOTH = dict(relu=F.silu, leaky_relu=lambda x, *_: F.silu(x), max_pool2d=F.avg_pool2d)
LOSSES = {"hinge": {}, "wgan-gp": {"adv_loss": "wgan-gp"}, "classes": CLASSES | {"adv_loss": "wgan-gp"}}
RUNS = {
    "run": dict(total_step=6, model_save_step=0.2, keep_checkpoints=0, hflip=True, adv_loss="wgan-gp"),
    "critic": dict(total_step=2, n_critic=2, augment="color,translation,cutout", metrics="fid", metric_num=16),
    "classes": dict(total_step=2, n_critic=2, **CLASSES),
}
TORCHRUN = dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")
MAIN = [str(ROOT / "main.py"), *(f"--{name}={value}" for name, value in SMALL.items()), "--log_step", "1"]
LOGS, MODELS = "logs/sagan_celeb", "models/sagan_celeb"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


def make(folder, name, ranks=Ranks(), **changes):  # noqa: B008
    """Return a trainer of a small run that records the inputs of its updates; its gammas are not 0."""
    options = {"version": name, "log_step": 1} | RUNS.get(name, {}) | changes
    trainer = build_trainer(toy_config(folder, **options), ranks)
    for layer in (*trainer.G.modules(), *trainer.D.modules()):
        if hasattr(layer, "gamma") and trainer.step == 0:
            nn.init.constant_(layer.gamma, 0.5)
    trainer.seen = []
    updates = trainer.updates
    trainer.updates = lambda inputs: trainer.seen.append(tree_leaves(inputs)) or updates(inputs)
    return trainer


def gradients(folder, ranks=Ranks()):  # noqa: B008
    """Return the gradients of a D step and of a G step at the same weights, for each loss, of smooth networks."""
    found = {}
    random = torch.Generator().manual_seed(1)
    z, alpha = torch.randn(8, 16, generator=random), torch.rand(8, 1, 1, 1, generator=random)
    for name, options in LOSSES.items():
        with mock.patch.multiple(F, **SMOOTH):
            trainer = make(folder, "gradients", ranks, batch_size=8, **options)
            shard = trainer.shard
            real, real_labels = trainer.loader.batch(0, shard)
            fake_labels = None if real_labels is None else torch.arange(8)[shard] % 3
            trainer.d_step(real, z[shard], real_labels, fake_labels, alpha[shard])
            found |= {f"{name} D {key}": value.grad.clone() for key, value in trainer.D.named_parameters()}
            trainer = make(folder, "gradients", ranks, batch_size=8, **options)
            trainer.g_step(z[shard], fake_labels)
            found |= {f"{name} G {key}": value.grad.clone() for key, value in trainer.G.named_parameters()}
    return found


def batch_norm(layer, shard, dtype, mean=3.0, std=1.0):
    """Return a layer's output on some of 4 images, its running statistics, and its output in eval mode."""
    layer.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    x = (mean + std * torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(3)))[shard].to(dtype)
    return [layer(x).detach(), layer.running_mean, layer.running_var, layer.eval()(x).detach()]


def error_of(function, *arguments):
    """Return the name of the error that a function raises for the user."""
    try:
        function(*arguments)
    except (UserError, NonFiniteError, PeerFailed) as error:
        return type(error).__name__


def compute(ranks, folder):
    """Save everything that the tests of two healthy ranks compare; then raise as a bug does."""

    def fail(broken):
        with ranks.raise_together():
            if ranks.rank == broken:
                raise UserError("mine")

    def interrupted(inputs):
        if ranks.rank == 1 and stopped.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return updates(inputs)

    use_small_extractor(pytest.MonkeyPatch())
    recorder.report_page = lambda *_: ""
    two = folder / "two"
    # Without turns, rank 0 would be later.
    turn = ranks.rank_zero_first(lambda: time.sleep(0.5 * (1 - ranks.rank)) or time.monotonic())
    found = {"gradients": gradients(two, ranks), "turn": turn}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = batch_norm(CpuSyncBatchNorm2d(5), ranks.shard(4), dtype)
    for std in SMALL_STDS:
        found[std] = batch_norm(CpuSyncBatchNorm2d(5), ranks.shard(4), torch.float32, 33.3, std)
    for name in RUNS:
        trainer = make(two, name, ranks)
        assert trainer.train() == 0
        found[name], found[f"{name} weights"] = trainer.seen, weights_of(trainer)
    stopped = make(two, "stopped", ranks, total_step=100)
    updates, stopped.updates = stopped.updates, interrupted
    found["stopped"] = stopped.train(), stopped.step
    mine, machines = folder / f"machine {ranks.rank}", dataclasses.replace(ranks, local_rank=0)
    make(mine, "machines", machines, total_step=2).train()
    found["errors"] = [error_of(fail, 0), error_of(fail, 1), error_of(ranks.shard, 9),
                       error_of(make(two, "diverges", ranks, d_lr=1e38, total_step=5).train),
                       error_of(lambda: make(mine, "others", machines, toy_num=20 + 4 * ranks.rank))]  # fmt: skip
    with mock.patch.object(distributed, "process_group", lambda _: nullcontext(ranks)):
        found["errors"].append(error_of(main.run, toy_config(mine, total_step=1, g_lr=0.1 + ranks.rank)))
    torch.save(found, folder / f"{ranks.rank}.pt")
    raise RuntimeError("a bug")


def be_late(ranks, folder):
    """The collectives of a step time out after 3 s here; waiting for rank 0 does not."""
    ranks.on_rank_zero(time.sleep, 5)
    (folder / f"{ranks.rank} waited").touch()
    if ranks.rank == 1:
        time.sleep(5)
    ranks.mean({"a": torch.zeros(())})


def process(rank, port, job, folder):
    """The body of each process: run a job, and end as `main.py` does, or with 3 where it would raise a bug again."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    if job is be_late:
        distributed.STEP_TIMEOUT = timedelta(seconds=3)  # of the rendezvous too, so both ranks should be there
        (folder / f"{rank} started").touch()
        while not (folder / f"{1 - rank} started").exists():
            time.sleep(0.01)
    code = 0
    try:
        with process_group("cpu") as ranks:
            job(ranks, folder)
    except Exception as error:
        code = 3 if str(error) == "a bug" else exit_code(error)
    sys.stdout.flush()
    os._exit(code)


def run_two(job, folder):
    """Run a job as two processes. Returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [get_context("spawn").Process(target=process, args=(rank, port, job, folder)) for rank in (0, 1)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(250)
        each.kill()  # where it has not ended
    return [each.exitcode for each in processes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder of runs of two ranks, and their results."""
    pytest.importorskip("torch_fidelity")
    folder = tmp_path_factory.mktemp("pair")
    assert run_two(compute, folder) == [3, 3]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_gradients_equal_those_of_one_process(pair, tmp_path):
    """Relative to those of their block: of a bias before BatchNorm, they are 0 but for rounding."""
    _, found = pair
    expected, blocks = gradients(tmp_path), defaultdict(list)
    for key, value in expected.items():
        assert torch.equal(found[0]["gradients"][key], found[1]["gradients"][key]), key
        blocks[key.partition(".")[0]].append((found[0]["gradients"][key].flatten(), value.flatten()))
    # Sums of up to 8 * 64 * 64 terms, of random signs, which their errors, of a unit roundoff, may not have; the errors
    # of some 40 operations, one after the other, add up like random numbers.
    limit = 2**-24 * (8 * 64 * 64 * 40) ** 0.5
    for name, tensors in blocks.items():
        actual, reference = (torch.cat(each) for each in zip(*tensors, strict=True))
        assert (actual - reference).norm() < limit * reference.norm(), name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_see_the_shards_of_the_global_batch(pair, tmp_path, small_extractor, no_report, name):
    """Real images, labels, latents and all other random numbers; they log what one process does, and stay the same."""
    folder, found = pair
    one = make(tmp_path, name)
    one.train()
    for mine, first, second in zip(one.seen, *(each[name] for each in found), strict=True):
        assert all(torch.equal(whole, torch.cat(shards)) for whole, *shards in zip(mine, first, second, strict=True))
    actual, expected = (log(path / "log_path" / name) for path in (folder / "two", tmp_path))
    if name == "critic":
        assert actual[-1]["fid"] == pytest.approx(expected[-1]["fid"], rel=1e-2)
    if name == "run":  # the others log a second update of D, after one of Adam
        for key in ("d_loss", "d_penalty", "d_real"):
            assert actual[0][key] == pytest.approx(expected[0][key], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(*(each[f"{name} weights"] for each in found), rtol=0, atol=0)  # with buffers and the EMA


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_norm_equals_that_of_one_process(pair, dtype, tolerance):
    shards = zip(*(each[dtype] for each in pair[1]), strict=True)
    for expected, (first, second) in zip(batch_norm(nn.BatchNorm2d(5), slice(4), dtype), shards, strict=True):
        actual = torch.cat([first, second]) if first.ndim == 4 else second
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("std", SMALL_STDS)
def test_batch_norm_of_channels_far_from_zero(pair, std):
    """Squares in float32 would lose the variance. Inputs are rounded by up to 2**-19, and then divided by the std."""
    expected = batch_norm(nn.BatchNorm2d(5), slice(4), torch.float32, 33.3, std)[0]
    actual = torch.cat([each[std][0] for each in pair[1]])
    assert (actual - expected).abs().max() < 4 * 2**-19 / (std**2 + 1e-5) ** 0.5


def test_an_error_or_a_signal_of_one_rank_ends_all_at_the_same_step(pair):
    folder, (first, second) = pair
    assert first["errors"] == ["UserError", "PeerFailed", "UserError", "NonFiniteError", "UserError", "UserError"]
    assert second["errors"] == ["PeerFailed", "UserError", "UserError", "PeerFailed", "PeerFailed", "PeerFailed"]
    number, step = first["stopped"]
    assert first["stopped"] == second["stopped"] and number == signal.SIGTERM and 4 <= step <= 20
    assert (folder / f"two/model_save_path/stopped/{step}_state.pth").exists()


def test_rank_zero_is_first_and_machines_have_caches_of_their_own_and_one_writes(pair):
    folder, (first, second) = pair
    assert first["turn"] < second["turn"]
    assert (folder / "machine 0/model_save_path/machines/2_state.pth").exists()
    assert [path.name for path in (folder / "machine 1").iterdir()] == ["cache_path"]


@pytest.fixture
def environment(monkeypatch):
    """A function that sets these variables and no others of a launcher."""

    def set_variables(variables):
        for name in (*TORCHRUN, *LOCAL_RANKS, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("variables, expected", [
    ({}, Ranks()), ({"LOCAL_RANK": "2", "RANK": "x"}, Ranks()), ({"WORLD_SIZE": "1", "RANK": "3"}, Ranks()),
    *(({local if name == "LOCAL_RANK" else name: value for name, value in TORCHRUN.items()}, Ranks(3, 4, 1))
      for local in LOCAL_RANKS),
])  # fmt: skip
def test_the_variables_of_launchers(environment, variables, expected):
    environment(variables)
    assert read_launch() == expected


@pytest.mark.parametrize("name, value", [
    ("RANK", ""), ("LOCAL_RANK", ""), ("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("WORLD_SIZE", ""),
    ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "4"), ("RANK", "x"), ("LOCAL_RANK", "9"),
    ("MASTER_PORT", "http"), ("MASTER_PORT", "99999"),
])  # fmt: skip
def test_a_missing_or_wrong_variable_is_an_error_that_shows_it(environment, name, value):
    environment(TORCHRUN | {name: value})
    with pytest.raises(UserError, match=f"{name}='{value}'.*torchrun"):
        read_launch()


@pytest.mark.parametrize("device, train, given, expected", [
    ("auto", True, {}, 4), ("cuda", True, {}, 4), ("cpu", True, {}, 1), ("cuda:1", True, {}, 1), ("auto", False, {}, 1),
    ("auto", True, TORCHRUN, 1), ("auto", True, dict(WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none"), 1),
])  # fmt: skip
def test_parallel_starts_a_process_per_gpu(environment, monkeypatch, capsys, device, train, given, expected):
    environment(given)  # of a launcher
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes_to_start(device, train) == expected
    assert capsys.readouterr().out.count("--parallel") == (expected == 1 and not given)


@pytest.mark.slow
def test_a_step_times_out_where_waiting_for_rank_zero_does_not(tmp_path, capfd):
    assert run_two(be_late, tmp_path) == [1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"0 started", "1 started", "0 waited", "1 waited"}
    assert "error: rank 0" in capfd.readouterr().err


def pid_of(launcher, rank):
    """The newest process of that rank that this launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"RANK={rank}".encode() in
                Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in Linux's /proc")
def test_a_killed_rank_is_restarted_the_run_resumes_and_one_rank_evaluates(tmp_path, start_process):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1", *MAIN,
               "--device", "cpu", "--total_step", "60", "--pretrained_model", "auto", "--model_save_step", "0.5",
               "--sample_step", "1000"]  # fmt: skip
    launcher = start_process(command, tmp_path)
    wait_for((tmp_path / MODELS / "10_state.pth").exists, launcher)
    os.kill(pid_of(launcher, 1), signal.SIGKILL)
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert err.count("error: rank 0") == 1
    assert 'main.py", line' not in err
    assert out.count("resuming from step") == 1
    assert [line["step"] for line in log(tmp_path / LOGS, "d_loss")] == list(range(1, 61))

    launcher = start_process([*command, "--train", "false", "--num_samples", "4"], tmp_path)
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert (tmp_path / "samples/sagan_celeb/test_60/grid.png").exists()
    assert out.count("results in") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_parallel_stops_all_ranks_at_a_signal_and_ignores_what_nohup_ignores(tmp_path, start_process):
    """As if there were two GPUs, though the ranks find none."""
    words = [*MAIN, "--parallel", "true", "--total_step", "100000", "--save_minutes", "0", "--model_save_step", "1e6"]
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
