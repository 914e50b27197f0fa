import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import UserError
from sagan_models import SelfAttention
from training import checkpoint

LOSSES = {"d_loss_real", "d_loss_fake", "d_loss", "d_real", "d_fake"}


def weights_of(trainer):
    networks = {"G": trainer.G, "D": trainer.D, "ema": trainer.ema.network}
    return {f"{name}/{key}": value.clone() for name, network in networks.items()
            for key, value in network.state_dict().items()}  # fmt: skip


def assert_same_weights(first, second):
    for key, value in weights_of(first).items():
        assert torch.equal(value, weights_of(second)[key]), key


def test_d_step_updates_d_alone_and_g_step_g_alone(make_trainer):
    trainer = make_trainer()
    real, z = trainer.loader.batch(0), torch.randn(4, 16)

    def changed_by(step):
        before = {name: {key: value.clone() for key, value in network.named_parameters()}
                  for name, network in (("G", trainer.G), ("D", trainer.D))}  # fmt: skip
        stats = step()
        assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())
        moved = {name for name, values in before.items() for key, value in values.items()
                 if not torch.equal(value, getattr(trainer, name).get_parameter(key))}  # fmt: skip
        return moved, set(stats)

    assert changed_by(lambda: trainer.d_step(real, z)) == ({"D"}, LOSSES)
    assert changed_by(lambda: trainer.g_step(z)) == ({"G"}, {"g_loss"})
    assert all(parameter.requires_grad for parameter in trainer.D.parameters())


def test_the_step_is_the_textbook_s(make_trainer):
    """Against the same two updates written out with plain Adam."""
    ours, plain = make_trainer(), make_trainer()
    real, z, z2 = ours.loader.batch(0), *torch.randn(2, 4, 16)
    stats = ours.d_step(real, z) | ours.g_step(z2)

    d_optimizer = torch.optim.Adam(plain.D.parameters(), 4e-4, (0.0, 0.9))
    g_optimizer = torch.optim.Adam(plain.G.parameters(), 1e-4, (0.0, 0.9))
    fake = plain.G(z).detach()
    d_loss_real = torch.relu(1 - plain.D(real)).mean()
    d_loss_fake = torch.relu(1 + plain.D(fake)).mean()
    (d_loss_real + d_loss_fake).backward()
    d_optimizer.step()
    g_loss = -plain.D(plain.G(z2)).mean()
    g_loss.backward()
    g_optimizer.step()

    assert stats["d_loss_real"].item() == pytest.approx(d_loss_real.item(), rel=1e-5)
    assert stats["d_loss_fake"].item() == pytest.approx(d_loss_fake.item(), rel=1e-5)
    assert stats["g_loss"].item() == pytest.approx(g_loss.item(), rel=1e-4)
    without_gradient = ("module.bias", "key_conv.bias")  # rounding noise, which Adam blows up
    for name in ("G", "D"):
        for key, value in getattr(ours, name).named_parameters():
            if not (key.endswith(without_gradient) or value.numel() == 1):
                torch.testing.assert_close(value, getattr(plain, name).get_parameter(key), rtol=1e-3, atol=2e-5)


def test_wgan_gp_penalty_is_part_of_the_loss_and_finite_over_steps(make_trainer):
    trainer = make_trainer(adv_loss="wgan-gp", total_step=4, lambda_gp=5.0)
    for layer in trainer.D.modules():
        if isinstance(layer, SelfAttention):
            nn.init.constant_(layer.gamma, 0.5)
    stats = trainer.d_step(trainer.loader.batch(0), torch.randn(4, 16))
    total = stats["d_loss_real"] + stats["d_loss_fake"] + 5 * stats["d_penalty"]
    assert stats["d_loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert trainer.train() == 0
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("options", [{}, dict(adv_loss="wgan-gp", n_critic=2), dict(hflip=True, lr_schedule="linear"),
                                     dict(imsize=64, g_conv_dim=16)])  # fmt: skip
def test_three_steps_continued_to_six_are_six_steps(make_trainer, options):
    """Bit for bit: weights, average, optimizers, samples and the log."""
    whole = make_trainer(version="whole", total_step=6, log_step=1, sample_step=6, **options)
    whole.train()
    schedule = {"total_step": 6} if "lr_schedule" in options else {"total_step": 3}
    first = make_trainer(version="parts", log_step=1, sample_step=6, model_save_step=0.2, keep_checkpoints=0,
                         **schedule, **options)  # fmt: skip
    first.train()
    continued = make_trainer(version="parts", total_step=6, log_step=1, sample_step=6, pretrained_model="3", **options)
    assert continued.step == 3
    continued.train()

    assert_same_weights(whole, continued)
    assert torch.equal(whole.fixed_z, continued.fixed_z)
    for name in ("g_optimizer", "d_optimizer"):
        states = [getattr(trainer, name).state_dict()["state"] for trainer in (whole, continued)]
        for index, state in states[0].items():
            assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())
    for kind in ("fake", "ema"):
        samples = [trainer.config.sample_folder / f"6_{kind}.png" for trainer in (whole, continued)]
        assert samples[0].read_bytes() == samples[1].read_bytes()
    assert metrics_of(whole) == metrics_of(continued)


def metrics_of(trainer):
    lines = (trainer.config.log_folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in ("images_per_s", "memory_mib")}
            for line in lines]  # fmt: skip


def test_a_run_leaves_what_it_promises(make_trainer):
    trainer = make_trainer(total_step=5, log_step=2, sample_step=2, attn_step=4, model_save_step=0.4,
                           use_tensorboard=True)  # fmt: skip
    assert trainer.train() == 0  # five batches an epoch: a checkpoint every second step
    config = trainer.config
    figures = {f"{step}_{layer}.png" for step in (4, 5) for layer in ("G_attn1", "G_attn2", "D_attn1", "D_attn2")}
    assert {path.name for path in config.attn_folder.glob("*.png")} == figures
    samples = {f"{step}_{kind}.png" for step in (2, 4, 5) for kind in ("fake", "ema")} | {"real.png"}
    assert {path.name for path in config.sample_folder.glob("*.png")} == samples
    saved = {f"{step}_{part}.pth" for step in (2, 4, 5) for part in ("G", "D", "state")}
    assert {path.name for path in config.model_folder.glob("*.pth")} == saved

    lines = metrics_of(trainer)
    assert [line["step"] for line in lines] == [2, 4, 5]
    sigmas = {f"sigma/{network}_l{layer}" for network in "GD" for layer in (1, 2, 3)}
    gammas = {f"gamma/{network}_attn{layer}" for network in "GD" for layer in (1, 2)}
    assert set(lines[0]) == LOSSES | sigmas | gammas | {"step", "g_loss", "lr/g", "lr/d"}
    (events,) = config.log_folder.glob("events.out.tfevents.*")
    for tag in ("d_loss", "gamma/G_attn1", "sigma/D_l1", "samples/ema", "attention/D_attn2", "memory_mib"):
        assert tag.encode() in events.read_bytes()
    assert json.loads((config.log_folder / "config.json").read_text())["total_step"] == 5


def test_sampling_and_logging_leave_training_unchanged(make_trainer):
    quiet = make_trainer(version="quiet", total_step=4, log_step=100, sample_step=100, attn_step=100)
    busy = make_trainer(version="busy", total_step=4, log_step=1, sample_step=1, attn_step=1, model_save_step=0.2)
    quiet.train()
    busy.train()
    assert_same_weights(quiet, busy)


def test_ema_leaves_training_unchanged(make_trainer):
    first, second = make_trainer(version="a", ema_decay=0.0), make_trainer(version="b", ema_decay=0.999)
    first.train()
    second.train()
    assert all(torch.equal(value, second.G.state_dict()[key]) for key, value in first.G.state_dict().items())
    for key, value in first.ema.network.state_dict().items():  # no averaging at all: the newest weights
        torch.testing.assert_close(value, first.G.state_dict()[key])


def test_seeds_make_different_runs(make_trainer):
    first, second = make_trainer(seed=1), make_trainer(seed=2)
    assert not torch.equal(first.fixed_z, second.fixed_z)
    assert not torch.equal(first.G.last[0].weight, second.G.last[0].weight)


def test_n_critic_takes_a_fresh_batch_and_z_for_each_update(make_trainer, monkeypatch):
    trainer = make_trainer(n_critic=3, total_step=2)
    seen = []
    original = trainer.d_step
    monkeypatch.setattr(trainer, "d_step", lambda real, z: seen.append((real.clone(), z.clone())) or original(real, z))
    trainer.train()
    assert len(seen) == 6
    for index, (real, _) in enumerate(seen):
        assert torch.equal(real, trainer.loader.batch(index))
    assert len({z.numpy().tobytes() for _, z in seen}) == 6


@pytest.mark.parametrize("schedule, expected", [("constant", [1, 1, 1, 1]), ("linear", [1, 0.9, 0.8, 0.1]),
                                                ("exponential", [1, 1, 1, 0.5])])  # fmt: skip
def test_learning_rate_schedules(make_trainer, schedule, expected):
    trainer = make_trainer(lr_schedule=schedule, lr_decay=0.5, total_step=10)  # 20 images, batch 4: 5 steps an epoch
    factors = []
    for trainer.step in (0, 1, 2, 9):
        trainer._take_step()
        factors.append(trainer.d_optimizer.param_groups[0]["lr"] / 4e-4)
        assert trainer.g_optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * factors[-1])
    assert factors == pytest.approx(expected)


def test_weights_without_a_state_file_load_with_a_warning(make_trainer, capsys):
    first = make_trainer()
    first.train()
    (first.config.model_folder / "3_state.pth").unlink()
    capsys.readouterr()
    continued = make_trainer(pretrained_model="latest", total_step=4)
    assert "optimizers" in capsys.readouterr().err
    assert torch.equal(continued.G.last[0].weight, first.G.last[0].weight)
    assert torch.equal(continued.ema.network.last[0].weight, first.G.last[0].weight)
    (first.config.sample_folder / "real.png").unlink()  # as where the weights came from elsewhere
    assert continued.train() == 0
    assert (first.config.sample_folder / "real.png").exists()


def test_continuing_with_other_options_says_so_and_uses_them(make_trainer, capsys):
    make_trainer().train()
    capsys.readouterr()
    trainer = make_trainer(pretrained_model="3", total_step=4, g_lr=0.5)
    assert "--g_lr 0.5 (was 0.0001)" in capsys.readouterr().out
    trainer._take_step()
    assert trainer.g_optimizer.param_groups[0]["lr"] == 0.5


def test_a_finished_run_has_nothing_to_do(make_trainer):
    make_trainer().train()
    assert make_trainer(pretrained_model="latest").train() == 0


def test_a_checkpoint_by_the_clock(make_trainer):
    trainer = make_trainer(total_step=5, model_save_step=100, save_minutes=1e-9, keep_checkpoints=2, keep_weights=1)
    trainer.train()
    left = {path.name for path in trainer.config.model_folder.glob("*.pth")}
    assert left == {f"{step}_{part}.pth" for step in (4, 5) for part in ("G", "D", "state")} | {"3_G.pth", "3_D.pth"}


def test_weights_that_are_not_finite_are_never_saved(make_trainer):
    first = make_trainer(model_save_step=0.2)
    first.train()
    trainer = make_trainer(model_save_step=0.2, pretrained_model="latest", total_step=9)
    take_step = trainer._take_step

    def spoil():
        stats = take_step()
        if trainer.step == 4:
            trainer.ema.network.last[0].bias.data[0] = float("nan")
        return stats

    trainer._take_step = spoil
    with pytest.raises(UserError, match=r"after step 5 a weight was not finite.*--pretrained_model 4"):
        trainer.train()
    assert checkpoint.steps(first.config.model_folder)[0] == 4


def test_a_checkpoint_of_another_version_of_the_program_shows_the_differences(make_trainer, capsys):
    first = make_trainer()
    first.train()
    path = first.config.model_folder / "3_state.pth"
    state = torch.load(path, weights_only=True)
    del state["config"]["save_minutes"]
    state["config"]["colour"] = "blue"
    torch.save(state, path)
    make_trainer(pretrained_model="latest", total_step=4)
    out = capsys.readouterr().out
    assert "colour blue (no longer an option)" in out and "--save_minutes 10.0 (new)" in out


def test_deterministic_takes_the_same_steps_on_a_cpu(make_trainer):
    plain, strict = make_trainer(version="plain"), make_trainer(version="strict", deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        strict.train()
    finally:
        torch.use_deterministic_algorithms(False)
    plain.train()
    assert_same_weights(plain, strict)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_memory_and_open_files_stay_flat(make_trainer):
    trainer = make_trainer(total_step=2000, sample_step=50, attn_step=200, model_save_step=20, log_step=5)
    seen = []
    maintain = trainer.maintain

    def watched(stats):
        maintain(stats)
        if trainer.step % 500 == 0:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((memory, len(os.listdir("/proc/self/fd"))))

    trainer.maintain = watched
    trainer.train()
    memory, files = zip(*seen, strict=True)
    assert max(memory) - memory[0] < 20, memory  # MiB
    assert max(files) - files[0] <= 2, files  # a picture that is being written


def test_the_best_by_fid_is_kept_and_the_run_goes_on_as_without_it(make_trainer, monkeypatch, capsys):
    """Scores that fall, rise and fail: the second evaluation is the best, and step 2 is what `best` loads."""
    scores = iter([9.0, 3.0, 5.0, UserError("the disk is full")])

    def measure(config, G, z, loader):
        assert not G.training and z.shape == (config.metric_num, config.z_dim)
        G(z[:4])
        score = next(scores)
        if isinstance(score, UserError):
            raise score
        return {"fid": score}

    monkeypatch.setattr("trainer.measure", measure)
    monkeypatch.setattr("trainer.check_metrics", lambda *_: None)
    measured = make_trainer(metrics="fid", metric_step=1, metric_num=12, total_step=4, version="measured")
    plain = make_trainer(total_step=4, version="plain")
    for trainer in (measured, plain):
        trainer.train()
    assert_same_weights(measured, plain)
    lines = (measured.config.log_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("fid") for line in lines] == [9.0, 3.0, 5.0, None]
    assert "no metrics of step 4: the disk is full" in capsys.readouterr().err
    best = checkpoint.load(measured.config.model_folder, "best", measured.config.architecture)
    assert best.step == 2
    assert checkpoint.steps(measured.config.model_folder) == [4]  # `latest` is not the best one

    scores = iter([4.0])  # better than the last, not than the best before the stop
    continued = make_trainer(metrics="fid", metric_step=5, metric_num=12, total_step=5, version="measured",
                             pretrained_model="latest")  # fmt: skip
    continued.train()
    assert checkpoint.load(measured.config.model_folder, "best", measured.config.architecture).step == 2
    make_trainer(metrics="fid", total_step=6, version="measured", pretrained_model="best", overwrite=True)


def test_a_run_leaves_a_report_and_an_explorer(make_trainer):
    config = make_trainer().config
    trainer = make_trainer()
    trainer.train()
    report = (config.log_folder / "report.html").read_text(encoding="utf-8")
    assert "step 3 of 3" in report and "finished" in report
    assert f"../../attn_path/{config.version}/3_explorer.html" in report
    assert (config.attn_folder / "3_explorer.html").exists()
    assert not list(config.log_folder.glob("*.tmp"))
