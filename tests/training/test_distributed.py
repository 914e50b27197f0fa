"""Two gloo ranks against a single process: the same gradients, data, files and endings."""

import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from datetime import timedelta
from itertools import chain, pairwise
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, free_port, log
from torch import nn

import main
from errors import PeerFailed, RankLost, UserError, exit_code
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from parameter import Config
from trainer import Trainer
from training import distributed
from training.distributed import STEP_TIMEOUT, Ranks, SyncSchedule, process_group, processes_to_start

PATHS = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
CLASSES = dict(model="paper", imsize=64, conditional=True)
# Kinks amplify rounding: an input near 0 has another slope.
SMOOTH = dict(relu=F.silu, leaky_relu=lambda x, *_: F.silu(x), max_pool2d=F.avg_pool2d)
LOSSES = {"hinge": {}, "wgan-gp": {"adv_loss": "wgan-gp"}, "classes": CLASSES | {"adv_loss": "wgan-gp"}}
RUN = dict(total_step=6, log_step=1, model_save_step=0.2, keep_checkpoints=0, hflip=True, adv_loss="wgan-gp")
CRITIC = dict(
    version="critic",
    augment="color,translation,cutout",
    total_step=2,
    n_critic=2,
    metrics="fid",
    metric_num=16,
    log_step=1,
)
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process as POSIX does")


def make(folder, ranks=Ranks(), **changes):  # noqa: B008
    """Return a trainer of a small run that records the inputs of its updates; its gammas are not 0."""
    config = Config(**(SMALL | {"device": "cpu"} | {name: str(folder / name) for name in PATHS} | changes))
    torch.manual_seed(config.seed)
    trainer = Trainer(main.make_loader(config, torch.device("cpu")).open(), config, ranks)
    for layer in (*trainer.G.modules(), *trainer.D.modules()):
        if hasattr(layer, "gamma") and trainer.step == 0:
            nn.init.constant_(layer.gamma, 0.5)
    trainer.seen = []
    updates = trainer.updates
    trainer.updates = lambda *inputs: trainer.seen.append([*chain(*inputs)]) or updates(*inputs)
    return trainer


def gradients(folder, ranks=Ranks()):  # noqa: B008
    """Return the gradients of a D step and of a G step at the same weights, for each loss, of smooth networks."""
    found = {}
    random = torch.Generator().manual_seed(1)
    z, mix = torch.randn(8, 16, generator=random), torch.rand(8, 1, 1, 1, generator=random)
    for name, options in LOSSES.items():
        with mock.patch.multiple(F, **SMOOTH):
            trainer = make(folder, ranks, batch_size=8, **options)
            shard = trainer.shard
            labels = [trainer.loader.batch_labels(0, shard), torch.arange(8)[shard] % 3] if trainer.classes else []
            trainer.d_step(trainer.loader.batch(0, shard), z[shard], mix[shard], *labels)
            found |= {f"{name} D {key}": value.grad.clone() for key, value in trainer.D.named_parameters()}
            trainer = make(folder, ranks, batch_size=8, **options)
            trainer.g_step(z[shard], *labels[1:])
            found |= {f"{name} G {key}": value.grad.clone() for key, value in trainer.G.named_parameters()}
    return found


def state_of(trainer):
    return {"G": trainer.G.state_dict(), "D": trainer.D.state_dict(), "ema": trainer.ema.network.state_dict()}


def example():
    return 3 + torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(3))


def batch_norm(layer, x):
    """Return a layer's output on x, the gradients of a loss, its running statistics, and its output in eval mode."""
    layer.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    x.requires_grad_()
    out = layer(x)
    (out.float().sin() * torch.arange(2).repeat(len(out) // 2).view(-1, 1, 1, 1)).sum().backward()
    found = [out.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    return [*found, layer.eval()(x).detach()]


def exchanged(ranks):
    """Return the results of the methods of `Ranks` on this rank."""
    found = {
        "mean": ranks.mean({"a": torch.tensor(float(ranks.rank))})["a"].item(),
        "max": ranks.max(ranks.rank),
        "equal": (ranks.all_equal(7), ranks.all_equal(ranks.rank)),
        "on rank zero": ranks.on_rank_zero(lambda: f"from {ranks.rank}"),
        "first": ranks.rank_zero_first(time.monotonic),
    }
    for broken in (0, 1):
        try:
            with ranks.raise_together():
                if ranks.rank == broken:
                    raise UserError("mine")
        except (UserError, PeerFailed) as error:
            found[f"error of {broken}"] = type(error).__name__
    return found


def compute(ranks, folder):
    """Save everything that the tests of two healthy ranks compare."""
    found = {
        "gradients": gradients(folder / "two", ranks),
        "exchanged": exchanged(ranks),
        "batch norm": batch_norm(CpuSyncBatchNorm2d(5), example().chunk(2)[ranks.rank]),
        "batch norm bf16": batch_norm(CpuSyncBatchNorm2d(5), example().bfloat16().chunk(2)[ranks.rank]),
    }
    run = make(folder / "two", ranks, version="run", **RUN)
    found["code"] = run.train()
    found |= {"seen": run.seen, "state": state_of(run)}
    resumed = make(folder / "one", ranks, version="run", pretrained_model="3", **RUN)
    resumed.train()
    found["seen after 3"] = resumed.seen
    critic = make(folder / "two", ranks, feature_extractor=str(folder / "small.pt"), **CRITIC)
    critic.train()
    found["critic seen"] = critic.seen
    classes = make(folder / "two", ranks, version="classes", total_step=2, n_critic=2, **CLASSES)
    classes.train()
    found["classes seen"] = classes.seen
    try:
        make(folder / "two", ranks, version="diverges", d_lr=1e38, total_step=5, log_step=1).train()
    except (UserError, PeerFailed) as error:
        found["diverged"] = type(error).__name__
    try:  # on two machines, each with its own cache
        make(folder / f"machine {ranks.rank}", ranks, toy_num=20 + 4 * ranks.rank).train()
    except (UserError, PeerFailed) as error:
        found["other images"] = type(error).__name__, str(error)
    torch.save(found, folder / f"{ranks.rank}.pt")


def die_while(wait):
    """Return a job in which rank 1 is killed while rank 0 waits for it."""

    def job(ranks, folder):
        if ranks.rank == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        wait(ranks)

    return job


def be_late(ranks, folder):
    """The collectives of a step time out after 3 s here; waiting for rank 0 does not."""
    ranks.on_rank_zero(time.sleep, 5)
    (folder / f"{ranks.rank} waited").touch()
    if ranks.rank == 1:
        time.sleep(5)
    ranks.mean({"a": torch.zeros(())})


JOBS = {
    "compute": compute,
    "mean": die_while(lambda ranks: ranks.mean({"a": torch.zeros(())})),
    "max": die_while(lambda ranks: ranks.max(1)),  # the collective of all other methods
    "late": be_late,
}


def process(rank, port, name, folder):
    """The body of each process: run a job, and end as `main.py` does."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    if name == "late":
        distributed.STEP_TIMEOUT = timedelta(seconds=3)  # of the rendezvous too, so both ranks should be there
        (folder / f"{rank} started").touch()
        while not (folder / f"{1 - rank} started").exists():
            time.sleep(0.01)
    code = 0
    try:
        with process_group("cpu") as ranks:
            JOBS[name](ranks, folder)
    except Exception as error:
        code = exit_code(error)
    sys.stdout.flush()
    os._exit(code)


def run_two(name, folder):
    """Run a job as two processes. Returns their exit codes."""
    port = free_port()
    processes = [get_context("spawn").Process(target=process, args=(rank, port, name, folder)) for rank in (0, 1)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(250)
        each.kill()  # where it has not ended
    return [each.exitcode for each in processes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, extractor):
    """The folder of a single process's run of three steps, and the results of two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copy(extractor, folder)
    make(folder / "one", version="run", **(RUN | {"total_step": 3})).train()
    assert run_two("compute", folder) == [0, 0]
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


def test_two_ranks_see_the_shards_of_the_global_batch(pair, tmp_path):
    """Real images with their flips, latents and interpolation coefficients, and the weights that result."""
    folder, found = pair
    one = make(tmp_path, version="run", **RUN)
    one.train()
    for mine, first, second in zip(one.seen, found[0]["seen"], found[1]["seen"], strict=True):
        for whole, *shards in zip(mine, first, second, strict=True):
            assert torch.equal(whole, torch.cat(shards))
    # Rounding noise, which Adam amplifies; the last two because the losses cancel in what is linear in D. The sign of
    # a few other gradients near 0 is chance too, and Adam's first update is of the size of the learning rate.
    without_gradient = ("module.bias", "key_conv.bias", "last.0.bias", "attn2.value_conv.bias")
    for part in ("G", "D"):
        weights, expected = (torch.load(path / "model_save_path" / "run" / f"1_{part}.pth", weights_only=True)
                             for path in (folder / "two", tmp_path))  # fmt: skip
        assert list(weights) == list(expected)
        close = [torch.isclose(weights[key], value, rtol=1e-5, atol=1e-5).flatten()
                 for key, value in expected.items() if not key.endswith(without_gradient)]  # fmt: skip
        assert torch.cat(close).float().mean() > 0.999
    logs = [log(path / "log_path/run") for path in (folder / "two", tmp_path)]
    for name in ("d_loss", "d_penalty", "d_real"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-5, abs=1e-5)


def test_all_ranks_hold_the_same_networks(pair):
    """Bit for bit, including spectral norm's vectors, running statistics and the EMA."""
    _, (first, second) = pair
    assert first["code"] == second["code"] == 0
    for network, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["state"][network][key]), (network, key)
            assert not key.startswith("module.")


def test_a_run_resumes_with_another_world_size(pair):
    folder, found = pair
    one = make(folder / "two", version="run", pretrained_model="3", overwrite=True, **RUN)
    assert one.step == 3
    saved = torch.load(folder / "two/model_save_path/run/3_state.pth", weights_only=True)
    other = torch.load(folder / "one/model_save_path/run/3_state.pth", weights_only=True)
    assert saved.keys() == other.keys() and saved["config"] | {"x": 0} == other["config"] | {"x": 0} | {
        name: saved["config"][name] for name in (*PATHS, "total_step")
    }
    one.train()
    for seen in (found[0]["seen"][3:], found[0]["seen after 3"]):
        for mine, first in zip(one.seen, seen, strict=True):
            assert all(torch.equal(whole[:2], shard) for whole, shard in zip(mine, first, strict=True))


def test_several_d_updates_and_metrics_equal_those_of_one_process(pair, tmp_path):
    folder, found = pair
    one = make(tmp_path, feature_extractor=str(folder / "small.pt"), **CRITIC)
    one.train()
    for mine, first, second in zip(one.seen, *(each["critic seen"] for each in found), strict=True):
        assert len(mine) == 8  # two batches of real images, three of z, three of the augmentation's random numbers
        assert all(torch.equal(whole, torch.cat(shards)) for whole, *shards in zip(mine, first, second, strict=True))
    last, expected = (log(path / "log_path/critic")[-1] for path in (folder / "two", tmp_path))
    assert last["step"] == 2 and last["fid"] == pytest.approx(expected["fid"], rel=1e-2)


def test_labels_equal_those_of_one_process(pair, tmp_path):
    one = make(tmp_path, version="classes", total_step=2, n_critic=2, **CLASSES)
    one.train()
    for mine, first, second in zip(one.seen, *(each["classes seen"] for each in pair[1]), strict=True):
        assert [tensor.dtype for tensor in mine] == [torch.float32] * 5 + [torch.int64] * 5
        assert all(torch.equal(whole, torch.cat(shards)) for whole, *shards in zip(mine, first, second, strict=True))


@pytest.mark.parametrize("name, dtype, tolerance", [("batch norm", torch.float32, 1e-5),
                                                    ("batch norm bf16", torch.bfloat16, 2e-2)])  # fmt: skip
def test_batch_norm_equals_that_of_one_process(pair, name, dtype, tolerance):
    """bf16 inputs are normalized in float32."""
    shards = [each[name] for each in pair[1]]
    # Both shards weigh their images 0, 1, and so does the whole.
    out, grad, weight_grad, bias_grad, mean, variance, evaluated = batch_norm(nn.BatchNorm2d(5), example().to(dtype))
    close = dict(rtol=tolerance, atol=tolerance)
    for index, expected in ((0, out), (1, grad), (6, evaluated)):
        assert shards[0][index].dtype == dtype
        torch.testing.assert_close(torch.cat([shard[index] for shard in shards]), expected, **close)
    close["atol"] *= (4 * 6 * 7) ** 0.5  # sums of so many terms
    for index, expected in ((2, weight_grad), (3, bias_grad)):
        torch.testing.assert_close(shards[0][index] + shards[1][index], expected, **close)
    for index, expected in ((4, mean), (5, variance)):
        torch.testing.assert_close(shards[1][index], expected, rtol=1e-5, atol=1e-5)


def test_divergence_ends_both(pair):
    assert [each["diverged"] for each in pair[1]] == ["UserError", "PeerFailed"]


def test_machines_with_different_images_are_an_error_of_one_line(pair):
    (kind, message), (other, _) = (each["other images"] for each in pair[1])
    assert (kind, other) == ("UserError", "PeerFailed") and "--cache_path" in message


def test_exchanged_values_and_errors(pair):
    found = [each["exchanged"] for each in pair[1]]
    for each in found:
        assert each["mean"] == 0.5 and each["max"] == 1 and each["equal"] == (True, False)
        assert each["on rank zero"] == "from 0"
    assert found[0]["first"] < found[1]["first"]
    assert [each["error of 0"] for each in found] == ["UserError", "PeerFailed"]
    assert [each["error of 1"] for each in found] == ["PeerFailed", "UserError"]


def test_a_single_process_changes_nothing(monkeypatch):
    ranks, network, values = Ranks(), nn.BatchNorm2d(3), {"a": torch.ones(())}
    assert ranks.convert_sync_batchnorm(network, torch.device("cpu")) is network and ranks.wrap_ddp(network) is network
    assert list(range(8))[ranks.shard(8)] == list(range(8))
    assert ranks.mean(values) is values and ranks.max(-3) == -3 and ranks.all_equal(-3)
    assert ranks.on_rank_zero(int, "7") == ranks.rank_zero_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError), ranks.raise_together():
        raise ZeroDivisionError
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as ranks:
        assert ranks == Ranks()


@pytest.fixture
def fake_group(monkeypatch):
    """Connect to a group of two ranks that is none. Returns the backends that were asked for."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    used, dist = [], torch.distributed
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: used.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return used


@pytest.mark.parametrize("device, has_nccl, expected", [("cuda", True, "nccl"), ("cuda", False, "gloo"),
                                                        ("cpu", True, "gloo")])  # fmt: skip
def test_gpus_without_nccl_use_gloo(fake_group, monkeypatch, device, has_nccl, expected):
    """There is no NCCL on Windows."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    with process_group(device) as ranks:
        assert (ranks, fake_group) == (Ranks(0, 2, 0), [expected])


def test_a_bug_keeps_its_traceback_and_an_error_of_gloo_is_a_lost_rank(fake_group):
    """`exit_code` raises the first and prints a line of the second."""
    with pytest.raises(RuntimeError, match="a bug") as bug, process_group("cpu"):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        exit_code(bug.value)
    with pytest.raises(RankLost, match=r"rank 0.*closed"), process_group("cpu"):
        raise RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer\nand more")


def test_shards_cover_the_batch_and_uneven_ones_are_rejected():
    assert [list(range(9))[Ranks(rank, 3).shard(9)] for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(UserError, match=r"--batch_size 8 .* 9$"):
        Ranks(0, 3).shard(8)


def test_parallel_starts_a_process_per_gpu(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes_to_start("auto", train=True) == processes_to_start("cuda", train=True) == 4
    assert processes_to_start("cpu", train=True) == processes_to_start("cuda:1", train=True) == 1
    assert processes_to_start("auto", train=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "--train false" in lines[-1] and all("--parallel" in line for line in lines) and len(lines) == 5


@pytest.mark.parametrize("variables", [
    dict(WORLD_SIZE="4", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500"),
    dict(WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none"),
])  # fmt: skip
def test_parallel_starts_nothing_in_a_process_that_a_launcher_started(monkeypatch, variables):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes_to_start("auto", train=True) == 1


@pytest.mark.parametrize("steps_per_second", [0.2, 3, 100, 5000])
def test_ranks_sync_about_once_a_second(monkeypatch, steps_per_second):
    """One step takes 10 s longer. In other words: at least half a second or one step, and at most two seconds."""
    now, times = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(Ranks, "max", lambda self, number: number)
    schedule = SyncSchedule(Ranks(size=2), step=500)
    for step in range(501, 501 + round(30 * steps_per_second)):
        now += 1 / steps_per_second + (10 if step == 500 + round(15 * steps_per_second) else 0)
        if schedule.is_due(step):
            schedule.done(step)
            times.append(now)
    assert times[0] == pytest.approx(1 / steps_per_second)  # after the first step
    gaps = [after - before for before, after in pairwise(times)]
    slow = max(range(len(gaps)), key=gaps.__getitem__)
    assert 10 <= gaps[slow] <= 12 + 1 / steps_per_second
    gaps = gaps[:slow] + gaps[slow + 2 :]  # the sync after the slow step comes early
    assert all(min(0.5, 1 / steps_per_second) * 0.99 <= gap <= max(2, 1 / steps_per_second) * 1.01 for gap in gaps)


def test_a_single_process_syncs_after_each_step():
    schedule = SyncSchedule(Ranks(), step=0)
    assert all(schedule.is_due(step) for step in range(5))


@needs_sigkill
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "max"])
def test_a_lost_rank_is_one_line_and_exit_code_1(tmp_path, capfd, name):
    began = time.monotonic()
    assert run_two(name, tmp_path) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < STEP_TIMEOUT.total_seconds()  # nobody waited for it
    err = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("error: rank 0") for line in err) == 1
    assert not any("Traceback" in line for line in err)


@pytest.mark.slow
def test_a_step_times_out_where_waiting_for_rank_zero_does_not(tmp_path, capfd):
    assert run_two("late", tmp_path) == [1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"0 started", "1 started", "0 waited", "1 waited"}
    assert "error: rank 0" in capfd.readouterr().err
