"""Two gloo ranks against a single process: the same gradients, data, files and endings."""

import dataclasses
import os
import signal
import sys
import time
from collections import defaultdict
from datetime import timedelta
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, build_trainer, free_port, log, use_small_extractor
from torch import nn
from torch.utils._pytree import tree_leaves

from errors import PeerFailed, UserError, exit_code
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from parameter import Config
from training import distributed, recorder
from training.distributed import (
    LOCAL_RANKS,
    STEP_TIMEOUT,
    Ranks,
    process_group,
    processes_to_start,
    read_launch,
)
from training.guards import NonFiniteError

PATHS = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
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
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


def prepare(patch):
    """Make runs of this process fast."""
    use_small_extractor(patch)
    patch.setattr(recorder, "report_page", lambda *_: "")


@pytest.fixture
def prepared(monkeypatch):
    pytest.importorskip("torch_fidelity")
    prepare(monkeypatch)


def make(folder, name, ranks=Ranks(), **changes):  # noqa: B008
    """Return a trainer of a small run that records the inputs of its updates; its gammas are not 0."""
    options = SMALL | {path: str(folder / path) for path in PATHS} | {"log_step": 1} | RUNS.get(name, {}) | changes
    trainer = build_trainer(Config(device="cpu", version=name, **options), ranks)
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


def error_of(function, *arguments):
    """Return the type and the message of what a function raises for the user."""
    try:
        function(*arguments)
    except (UserError, NonFiniteError, PeerFailed) as error:
        return type(error).__name__, str(error)


def exchanged(ranks):
    """Return the results of the methods of `Ranks` on this rank."""

    def fail(broken):
        with ranks.raise_together():
            if ranks.rank == broken:
                raise UserError("mine")

    return {
        "mean": ranks.mean({"a": torch.tensor(float(ranks.rank))})["a"].item(),
        "max": ranks.max(ranks.rank),
        "equal": (ranks.all_equal(7), ranks.all_equal(ranks.rank)),
        "on rank zero": ranks.on_rank_zero(lambda: f"from {ranks.rank}"),
        "first": ranks.rank_zero_first(time.monotonic),
        "errors": [error_of(fail, broken)[0] for broken in (0, 1)],
    }


def stopped_by_a_signal(folder, ranks):
    """Return the signal number and the step of a run in which rank 1 alone receives SIGTERM in the fourth step."""
    trainer = make(folder, "stopped", ranks, total_step=100)
    updates = trainer.updates

    def interrupted(inputs):
        if ranks.rank == 1 and trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return updates(inputs)

    trainer.updates = interrupted
    return trainer.train(), trainer.step


def compute(ranks, folder):
    """Save everything that the tests of two healthy ranks compare."""
    two = folder / "two"
    found = {
        "gradients": gradients(two, ranks),
        "exchanged": exchanged(ranks),
        "batch norm": batch_norm(CpuSyncBatchNorm2d(5), example().chunk(2)[ranks.rank]),
        "batch norm bf16": batch_norm(CpuSyncBatchNorm2d(5), example().bfloat16().chunk(2)[ranks.rank]),
    }
    for name in RUNS:
        trainer = make(two, name, ranks)
        assert trainer.train() == 0
        found[name] = trainer.seen
        networks = {"G": trainer.G, "D": trainer.D, "ema": trainer.ema.network}
        found[f"{name} state"] = {part: network.state_dict() for part, network in networks.items()}
    resumed = make(folder / "one", "run", ranks, pretrained_model="3")
    resumed.train()
    found["resumed"] = resumed.seen
    found["stopped"] = stopped_by_a_signal(two, ranks)
    found["diverged"] = error_of(make(two, "diverges", ranks, d_lr=1e38, total_step=5).train)
    mine, machines = folder / f"machine {ranks.rank}", dataclasses.replace(ranks, local_rank=0)
    make(mine, "machines", machines, total_step=2).train()
    found["other images"] = error_of(lambda: make(mine, "others", machines, toy_num=20 + 4 * ranks.rank))
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


def have_a_bug(ranks, folder):
    raise RuntimeError("a bug")


JOBS = {
    "compute": compute,
    "mean": die_while(lambda ranks: ranks.mean({"a": torch.zeros(())})),
    "max": die_while(lambda ranks: ranks.max(1)),  # the collective of all other methods
    "late": be_late,
    "bug": have_a_bug,
}


def process(rank, port, name, folder):
    """The body of each process: run a job, and end as `main.py` does."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    if name == "compute":
        prepare(pytest.MonkeyPatch())
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
def pair(tmp_path_factory):
    """The folder of a single process's run of three steps, and the results of two ranks."""
    pytest.importorskip("torch_fidelity")
    folder = tmp_path_factory.mktemp("pair")
    make(folder / "one", "run", total_step=3).train()
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


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_see_the_shards_of_the_global_batch(pair, tmp_path, prepared, name):
    """Real images with their flips, labels, latents and all other random numbers; and log what one process does."""
    folder, found = pair
    one = make(tmp_path, name)
    one.train()
    for mine, first, second in zip(one.seen, *(each[name] for each in found), strict=True):
        assert all(torch.equal(whole, torch.cat(shards)) for whole, *shards in zip(mine, first, second, strict=True))
    actual, expected = (log(path / "log_path" / name) for path in (folder / "two", tmp_path))
    assert actual[-1].get("fid", 0) == pytest.approx(expected[-1].get("fid", 0), rel=1e-2)
    if name == "run":  # the others log a second update of D, after one of Adam
        for key in ("d_loss", "d_penalty", "d_real"):
            assert actual[0][key] == pytest.approx(expected[0][key], rel=1e-5, abs=1e-5)
        check_weights(*(path / "model_save_path" / name for path in (folder / "two", tmp_path)))


def check_weights(actual, expected):
    """Those after a step are equal but for rounding noise, which Adam amplifies.

    The sign of gradients near 0 is chance, and Adam's first update is of the size of the learning rate: in layers whose
    loss has no gradient (the last two because the losses cancel in what is linear in D), and here and there in others.
    """
    without_gradient = ("module.bias", "key_conv.bias", "last.0.bias", "attn2.value_conv.bias")
    for part in ("G", "D"):
        weights, reference = (torch.load(path / f"1_{part}.pth", weights_only=True) for path in (actual, expected))
        assert list(weights) == list(reference)
        close = [torch.isclose(weights[key], value, rtol=1e-5, atol=1e-5).flatten()
                 for key, value in reference.items() if not key.endswith(without_gradient)]  # fmt: skip
        assert torch.cat(close).float().mean() > 0.999


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_hold_the_same_networks(pair, name):
    """Bit for bit, including spectral norm's vectors, running statistics and the EMA."""
    first, second = (each[f"{name} state"] for each in pair[1])
    for network, state in first.items():
        for key, value in state.items():
            assert torch.equal(value, second[network][key]), (network, key)
            assert not key.startswith("module.")


def test_a_run_resumes_with_another_world_size(pair, prepared):
    folder, found = pair
    one = make(folder / "two", "run", pretrained_model="3", overwrite=True)
    assert one.step == 3
    one.train()
    for seen in (found[0]["run"][3:], found[0]["resumed"]):
        for mine, first in zip(one.seen, seen, strict=True):
            assert all(torch.equal(whole[:2], shard) for whole, shard in zip(mine, first, strict=True))


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


def test_exchanged_values_and_errors(pair):
    found = [each["exchanged"] for each in pair[1]]
    for each in found:
        assert each["mean"] == 0.5 and each["max"] == 1 and each["equal"] == (True, False)
        assert each["on rank zero"] == "from 0"
    assert found[0]["first"] < found[1]["first"]
    assert [each["errors"] for each in found] == [["UserError", "PeerFailed"], ["PeerFailed", "UserError"]]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(pair):
    folder, (first, second) = pair
    assert first["stopped"] == second["stopped"]
    number, step = first["stopped"]
    assert number == signal.SIGTERM and 4 <= step <= 20
    assert (folder / f"two/model_save_path/stopped/{step}_state.pth").exists()


def test_divergence_ends_both(pair):
    assert [each["diverged"][0] for each in pair[1]] == ["NonFiniteError", "PeerFailed"]


def test_machines_have_caches_of_their_own_and_one_writes(pair):
    folder, _ = pair
    assert (folder / "machine 0/model_save_path/machines/2_state.pth").exists()
    assert [path.name for path in (folder / "machine 1").iterdir()] == ["cache_path"]


def test_machines_with_different_images_are_an_error_of_one_line(pair):
    (kind, message), (other, _) = (each["other images"] for each in pair[1])
    assert (kind, other) == ("UserError", "PeerFailed") and "--cache_path" in message


@pytest.fixture
def environment(monkeypatch):
    """A function that sets these variables and no others of a launcher."""

    def set_variables(**variables):
        for name in (*TORCHRUN, *LOCAL_RANKS, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_a_single_process_changes_nothing(environment):
    ranks, network, values = Ranks(), nn.BatchNorm2d(3), {"a": torch.ones(())}
    assert ranks.convert_sync_batchnorm(network, torch.device("cpu")) is network and ranks.wrap_ddp(network) is network
    assert list(range(8))[ranks.shard(8)] == list(range(8))
    assert ranks.mean(values) is values and ranks.max(-3) == -3 and ranks.all_equal(-3)
    assert ranks.on_rank_zero(int, "7") == ranks.rank_zero_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError), ranks.raise_together():
        raise ZeroDivisionError
    environment()
    with process_group("cpu") as ranks:
        assert ranks == Ranks()


def test_shards_cover_the_batch_and_uneven_ones_are_rejected():
    assert [list(range(9))[Ranks(rank, 3).shard(9)] for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(UserError, match=r"--batch_size 8 .* 9$"):
        Ranks(0, 3).shard(8)


@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": "2", "RANK": "x"}, {"WORLD_SIZE": "1", "RANK": "3"}])
def test_without_a_world_size_it_is_a_single_process(environment, variables):
    environment(**variables)
    assert read_launch() == Ranks(0, 1, 0)


@pytest.mark.parametrize("local", LOCAL_RANKS)
def test_torchrun_and_other_launchers(environment, local):
    environment(**{local if name == "LOCAL_RANK" else name: value for name, value in TORCHRUN.items()})
    assert read_launch() == Ranks(3, 4, 1)


@pytest.mark.parametrize("name, value", [
    ("RANK", ""), ("LOCAL_RANK", ""), ("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("WORLD_SIZE", ""),
    ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "4"), ("RANK", "x"), ("LOCAL_RANK", "9"),
    ("MASTER_PORT", "http"), ("MASTER_PORT", "99999"),
])  # fmt: skip
def test_a_missing_or_wrong_variable_is_an_error_that_shows_it(environment, name, value):
    environment(**TORCHRUN | {name: value})
    with pytest.raises(UserError, match=f"{name}='{value}'.*torchrun"):
        read_launch()


@pytest.mark.parametrize("device, train, variables, expected", [
    ("auto", True, {}, 4), ("cuda", True, {}, 4), ("cpu", True, {}, 1), ("cuda:1", True, {}, 1), ("auto", False, {}, 1),
    ("auto", True, TORCHRUN, 1), ("auto", True, dict(WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none"), 1),
])  # fmt: skip
def test_parallel_starts_a_process_per_gpu_unless_a_launcher_did(
    environment, monkeypatch, capsys, device, train, variables, expected
):
    environment(**variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes_to_start(device, train) == expected
    assert capsys.readouterr().out.count("--parallel") == (expected == 1 and not variables)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process as POSIX does")
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


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path, capfd):
    run_two("bug", tmp_path)
    err = capfd.readouterr().err
    assert err.count("RuntimeError: a bug") == 2 and "lost connection" not in err
