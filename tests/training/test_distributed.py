"""Two processes that talk through gloo, against one: the same gradients, data, files and endings."""

import os
import shutil
import signal
import time
from multiprocessing import get_context

import pytest
import torch
from conftest import SMALL, free_port, log
from torch import nn

from data_loader import Loader
from datasets.sources import find_source
from errors import PeerFailed, UserError
from networks.sync_batchnorm import SyncBatchNorm2d
from parameter import Config
from sagan_models import SelfAttention
from trainer import Trainer
from training.distributed import RankLost, Ranks, SyncSchedule, process_group, processes_to_start

PATHS = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
LOSSES = {"hinge": {}, "wgan-gp": {"adv_loss": "wgan-gp"}}
RUN = dict(total_step=6, log_step=1, model_save_step=0.2, keep_checkpoints=0, hflip=True, adv_loss="wgan-gp")
CRITIC = dict(version="critic", total_step=2, n_critic=2, metrics="fid", metric_num=16, log_step=1)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def make(folder, ranks=Ranks(), **changes):  # noqa: B008
    """A trainer of a small run, which notes what its updates are given; its gammas are not at 0."""
    config = Config(**(SMALL | {"device": "cpu"} | {name: str(folder / name) for name in PATHS} | changes))
    torch.manual_seed(config.seed)
    source = find_source("toy", toy_num=config.toy_num)
    loader = Loader(source, config.imsize, config.batch_size, cache_path=config.cache_path, num_workers=0,
                        hflip=config.hflip).open()  # fmt: skip
    trainer = Trainer(loader, config, ranks)
    for layer in (*trainer.G.modules(), *trainer.D.modules()):
        if isinstance(layer, SelfAttention) and trainer.step == 0:
            nn.init.constant_(layer.gamma, 0.5)
    trainer.seen = []
    run_updates = trainer.run_updates
    trainer.run_updates = lambda reals, noises: trainer.seen.append([*reals, *noises]) or run_updates(reals, noises)
    return trainer


def gradients(folder, ranks=Ranks()):  # noqa: B008
    """Those of a G step and a D step at the same weights, of each loss."""
    found = {}
    for name, options in LOSSES.items():
        trainer = make(folder, ranks, batch_size=8, **options)
        z = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))[trainer.part]
        trainer.random.manual_seed(2)
        trainer.d_step(trainer.loader.batch(0, trainer.part), z)
        found |= {f"{name} D {key}": value.grad.clone() for key, value in trainer.D.named_parameters()}
        trainer = make(folder, ranks, batch_size=8, **options)
        trainer.g_step(z)
        found |= {f"{name} G {key}": value.grad.clone() for key, value in trainer.G.named_parameters()}
    return found


def state_of(trainer):
    return {"G": trainer.G.state_dict(), "D": trainer.D.state_dict(), "ema": trainer.ema.network.state_dict()}


def batch_norm(layer, x):
    """What a layer makes of x: output, gradients, statistics."""
    layer.train()
    layer.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    x.requires_grad_()
    out = layer(x)
    (out.sin() * torch.arange(len(out)).view(-1, 1, 1, 1)).sum().backward()
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var


def example():
    return 3 + torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(3))


def talk(ranks):
    """What the methods of a ranks say, on each of two processes."""
    said = {
        "mean": ranks.mean({"a": torch.tensor(float(ranks.rank))})["a"].item(),
        "largest": ranks.max(ranks.rank),
    }
    said["first"] = ranks.on_rank_zero(lambda: f"from {ranks.rank}")
    order = []
    ranks.rank_zero_first(lambda: order.append(time.monotonic()))
    said["turn"] = order[0]
    for broken in (0, 1):
        try:
            with ranks.raise_together():
                if ranks.rank == broken:
                    raise UserError("mine")
        except (UserError, PeerFailed) as error:
            said[f"error of {broken}"] = type(error).__name__
    return said


def join(rank, port):
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)


def process(rank, port, folder):
    """The body of each of the two."""
    join(rank, port)
    with process_group("cpu") as ranks:
        found = {"gradients": gradients(folder / "two", ranks), "talk": talk(ranks)}
        shared = SyncBatchNorm2d(5)
        x = example().chunk(2)[rank]
        found["batch norm"] = batch_norm(shared, x)  # its loss weighs by the position in the part
        run = make(folder / "two", ranks, version="run", **RUN)
        found["code"] = run.train()
        found |= {
            "seen": run.seen,
            "state": state_of(run),
            "prefix": [name for name, _ in run.run_D.named_parameters()],
        }
        continued = make(folder / "one", ranks, version="run", pretrained_model="3", **RUN)
        continued.train()
        found["seen after 3"] = continued.seen
        critic = make(folder / "two", ranks, feature_extractor=str(folder / "small.pt"), **CRITIC)
        critic.train()
        found["critic seen"] = critic.seen
        try:
            make(folder / "two", ranks, version="diverges", d_lr=1e38, total_step=5, log_step=1).train()
        except (UserError, PeerFailed) as error:
            found["diverged"] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")


def blocked(rank, port, folder):
    """One of the two is killed while the other waits for something that does not notice it, such as a GPU."""
    join(rank, port)
    with process_group("cpu"):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)


def run_two(target, folder):
    """Runs it as two processes; returns their exit codes."""
    port = free_port()
    processes = [get_context("spawn").Process(target=target, args=(rank, port, folder)) for rank in (0, 1)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(250)
    return [each.exitcode for each in processes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, extractor):
    """The folder of one process's run of three steps, and what two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copy(extractor, folder)
    make(folder / "one", version="run", **(RUN | {"total_step": 3})).train()
    assert run_two(process, folder) == [0, 0]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_gradients_are_those_of_one_process(pair, tmp_path):
    _, found = pair
    expected = gradients(tmp_path)
    scale = {name: max(value.norm() for key, value in expected.items() if key.startswith(name)) for name in
             ("hinge D", "hinge G", "wgan-gp D", "wgan-gp G")}  # fmt: skip
    for key, value in expected.items():
        assert torch.equal(found[0]["gradients"][key], found[1]["gradients"][key]), key
        # Some are 0 but for rounding: a bias before BatchNorm, a bias of keys.
        of_all = (found[0]["gradients"][key] - value).norm() / scale[" ".join(key.split()[:2])]
        assert of_all < 1e-5, key
        assert of_all < 1e-6 or relative(found[0]["gradients"][key], value) < 1e-5, key


def test_two_processes_see_together_what_one_sees(pair, tmp_path):
    """Real images with their flips, noise, and the weights that come of it."""
    folder, found = pair
    one = make(tmp_path, version="run", **RUN)
    one.train()
    for mine, first, second in zip(one.seen, found[0]["seen"], found[1]["seen"], strict=True):
        for whole, *parts in zip(mine, first, second, strict=True):
            assert torch.equal(whole, torch.cat(parts))
    # Rounding noise, which Adam blows up; the last two because the losses cancel in what is linear in D.
    without_gradient = ("module.bias", "key_conv.bias", "last.0.bias", "attn2.value_conv.bias")
    for part in ("G", "D"):
        weights, expected = (torch.load(path / "model_save_path" / "run" / f"1_{part}.pth", weights_only=True)
                             for path in (folder / "two", tmp_path))  # fmt: skip
        assert list(weights) == list(expected)
        for key, value in expected.items():
            if not key.endswith(without_gradient):
                torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: key + m)
    logs = [log(path / "log_path/run") for path in (folder / "two", tmp_path)]
    for name in ("d_loss", "d_penalty", "d_real"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-5, abs=1e-5)


def test_all_processes_hold_the_same_networks(pair):
    """Spectral norm's vectors, running statistics and the average among them, to the bit."""
    _, (first, second) = pair
    assert first["code"] == second["code"] == 0
    for network, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["state"][network][key]), (network, key)
            assert not key.startswith("module.")


def test_saved_on_two_continues_on_one_and_the_other_way_round(pair):
    folder, found = pair
    one = make(folder / "two", version="run", pretrained_model="3", **RUN)
    assert one.step == 3
    saved = torch.load(folder / "two/model_save_path/run/3_state.pth", weights_only=True)
    other = torch.load(folder / "one/model_save_path/run/3_state.pth", weights_only=True)
    assert saved.keys() == other.keys() and saved["config"] | {"x": 0} == other["config"] | {"x": 0} | {
        name: saved["config"][name] for name in (*PATHS, "total_step")
    }
    one.train()
    for seen in (found[0]["seen"][3:], found[0]["seen after 3"]):
        for mine, first in zip(one.seen, seen, strict=True):
            assert all(torch.equal(whole[:2], part) for whole, part in zip(mine, first, strict=True))


def test_several_updates_of_d_and_metrics_are_those_of_one_process(pair, tmp_path):
    folder, found = pair
    one = make(tmp_path, feature_extractor=str(folder / "small.pt"), **CRITIC)
    one.train()
    for mine, first, second in zip(one.seen, *(each["critic seen"] for each in found), strict=True):
        assert len(mine) == 5  # two real batches, three of noise
        assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(mine, first, second, strict=True))
    last, expected = (log(path / "log_path/critic")[-1] for path in (folder / "two", tmp_path))
    assert last["step"] == 2 and last["fid"] == pytest.approx(expected["fid"], rel=1e-2)


def test_batch_norm_is_that_of_one_process(pair):
    _, found = pair
    whole, x = nn.BatchNorm2d(5), example().requires_grad_()
    whole.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    out = whole(x)
    (out.sin() * torch.arange(2).repeat(2).view(-1, 1, 1, 1)).sum().backward()
    parts = [each["batch norm"] for each in found]
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out, **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad, **close)
    for index, expected in ((2, whole.weight.grad), (3, whole.bias.grad)):
        torch.testing.assert_close(parts[0][index] + parts[1][index], expected, **close)
    for index, expected in ((4, whole.running_mean), (5, whole.running_var)):
        torch.testing.assert_close(parts[1][index], expected, **close)


def test_divergence_ends_both(pair):
    _, (first, second) = pair
    assert first["diverged"].startswith("UserError: the run diverged")
    assert second["diverged"].startswith("PeerFailed")


def test_what_they_tell_each_other(pair):
    said = [each["talk"] for each in pair[1]]
    for each in said:
        assert each["mean"] == 0.5 and each["largest"] == 1 and each["first"] == "from 0"
    assert said[0]["turn"] < said[1]["turn"]
    assert [each["error of 0"] for each in said] == ["UserError", "PeerFailed"]
    assert [each["error of 1"] for each in said] == ["PeerFailed", "UserError"]


def test_a_world_of_one_changes_nothing(monkeypatch, capsys):
    ranks, network = Ranks(), nn.BatchNorm2d(3)
    assert ranks.convert_sync_batchnorm(network, torch.device("cpu")) is network and ranks.wrap_ddp(network) is network
    assert list(range(8))[ranks.shard(8)] == list(range(8))
    with pytest.raises(UserError, match="multiple of 3, such as 9"):
        Ranks(0, 3).shard(8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes_to_start("auto") == 4
    assert processes_to_start("cpu") == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_to_start("auto") == 1
    assert "starts 4 processes" in capsys.readouterr().out


def test_processes_meet_about_once_a_second_and_a_process_alone_looks_up_after_each_step(monkeypatch):
    """At 100 steps a second, but for a step that takes 10 s."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(Ranks, "max", lambda self, number: number)
    meetings, held = SyncSchedule(Ranks(size=2), step=500), []
    for step in range(501, 1001):
        now += 10 if step == 750 else 0.01
        if meetings.is_due(step):
            meetings.synced(step)
            held.append(step)
    assert held == [501, 601, 701, 801, 810, 910]
    alone = SyncSchedule(Ranks(), step=0)
    assert all(alone.is_due(step) for step in range(5))


def test_a_lost_process_is_one_line(monkeypatch):
    with pytest.raises(ZeroDivisionError), process_group("cpu"):
        raise ZeroDivisionError
    assert issubclass(RankLost, Exception) and not issubclass(RankLost, UserError)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process as POSIX does")
def test_a_process_that_waits_for_something_else_ends_too(tmp_path, capfd):
    began = time.monotonic()
    assert run_two(blocked, tmp_path) == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err.count("error: process 1: another process of the run is gone") == 1
