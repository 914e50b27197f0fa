"""Whole runs: their files, resuming, checkpoints, and what the options of a run do."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import D_STATS, assert_same_weights, build_trainer, log, metrics_of, wait_until, weights_of
from PIL import Image

import main
import tester
from errors import UserError
from metrics.scores import compute_metrics
from training import checkpoint
from training.guards import NonFiniteError, image_spread
from training.resuming import load_test_checkpoint
from utils import files_by_step

PAPER = dict(model="paper", imsize=64, batch_size=2, g_num=2)
RESUMED = {
    "hinge": {},
    "wgan-gp": dict(adv_loss="wgan-gp", n_critic=2),
    "linear": dict(hflip=True, lr_schedule="linear"),
    "wide": dict(imsize=64, g_conv_dim=16),
    "augment": dict(augment="color,translation,cutout"),
    "no attention": dict(attention="none"),
    "bf16": dict(precision="bf16"),
    "paper": PAPER,
    "classes": PAPER | dict(adv_loss="wgan-gp", conditional=True, n_critic=2),
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_two_steps_resumed_to_four_equal_four_steps(make_trainer, options):
    """Bit for bit: weights, EMA, fixed z, optimizers, samples and the log."""
    options = dict(total_step=4, log_step=1, sample_step=2) | options
    whole = make_trainer(version="whole", **options)
    whole.train()
    first = options | ({} if "lr_schedule" in options else {"total_step": 2})  # its rates depend on total_step
    make_trainer(version="parts", model_save_step=0.2, keep_checkpoints=0, **first).train()
    resumed = make_trainer(version="parts", pretrained_model="2", overwrite=True, **options)
    assert resumed.step == 2
    resumed.train()
    assert_same_weights(whole, resumed)
    assert torch.equal(whole.state.fixed_z, resumed.state.fixed_z)
    for name in ("g_optimizer", "d_optimizer"):
        states = [getattr(trainer, name).state_dict()["state"] for trainer in (whole, resumed)]
        for index, state in states[0].items():
            assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())
    for kind in ("fake", "ema"):
        samples = [trainer.config.sample_folder / f"4_{kind}.png" for trainer in (whole, resumed)]
        assert samples[0].read_bytes() == samples[1].read_bytes()
    assert metrics_of(whole) == metrics_of(resumed)


def test_moments_are_resumed_in_the_memory_format_of_the_parameters(make_trainer):
    """Fused Adam on a CPU does not look at strides, and that on CUDA refuses different ones."""
    make_trainer(total_step=2, version="whole").train()
    saved = make_trainer(total_step=2, version="other")
    saved.train()
    path = saved.config.model_folder / "2_state.pth"
    state = torch.load(path, weights_only=True)
    changed = 0
    for name in ("g_optimizer", "d_optimizer"):
        for moments in state[name]["state"].values():
            changed += not moments["exp_avg"].is_contiguous()
            moments |= {key: moment.contiguous() for key, moment in moments.items()}
    assert changed > 5
    torch.save(state, path)
    resumed = [make_trainer(total_step=4, version=name, pretrained_model="2") for name in ("whole", "other")]
    for trainer in resumed:
        trainer.train()
    assert_same_weights(*resumed)


def test_a_run_without_attention_has_no_figures_of_it(make_trainer, make_config, capsys):
    trainer = make_trainer(attention="none", total_step=1, log_step=1)
    trainer.train()
    config = trainer.config
    assert [path.name for path in config.attn_folder.iterdir() if path.name != ".lock"] == []
    out = capsys.readouterr()
    assert "explorer" not in out.out and "gamma" not in out.err
    assert not any(name.startswith("gamma") for line in metrics_of(trainer) for name in line)
    with pytest.raises(UserError, match=r"--attention none \(not full\)"):
        make_trainer(pretrained_model="latest")
    saved, tested = load_test_checkpoint(make_config(), set())
    tester.Tester(tested, trainer.loader, saved, trainer.device).test()
    results = {path.name for path in config.test_folder(1).iterdir()}
    assert {"grid.png", "playground.html"} <= results and not {"attention.json", "gamma.svg", "G_attn1.png"} & results


@pytest.mark.parametrize("options", [{}, dict(model="paper", conditional=True, imsize=64)])
def test_d_is_compared_on_held_out_and_training_images(make_trainer, capsys, options):
    """A D that has learned the training images alone has other logits on the held-out ones."""
    trainer = make_trainer(holdout=0.3, log_step=1, total_step=1, batch_size=4, **options)
    before = weights_of(trainer)
    means = trainer.previews.scalars(trainer.step)
    assert all(torch.equal(value, before[key]) for key, value in weights_of(trainer).items())  # spectral norm's too
    trainer.D.eval()
    held_out = trainer.loader.held_out(0, 4)
    assert means["d_holdout"].item() == pytest.approx(trainer.D(*held_out).mean().item(), rel=1e-5, abs=1e-6)
    assert means["d_train"].item() != means["d_holdout"].item()
    trainer.D.train()
    trainer.train()
    entry, _ = metrics_of(trainer)
    assert {"d_train", "d_holdout"} <= entry.keys()
    assert "at first" not in capsys.readouterr().err
    make_trainer(holdout=0.4, total_step=2, batch_size=4, pretrained_model="1", **options).train()
    assert "the gap of d_train and d_holdout means nothing at first" in capsys.readouterr().err


@pytest.mark.parametrize("loss, checked", [("hinge", [2, 4, 5]), ("wgan-gp", [])])
def test_r_is_watched_where_logits_have_a_zero(make_trainer, monkeypatch, loss, checked):
    seen = []
    watch = lambda *options: SimpleNamespace(add=lambda step, r: seen.append((options, step, r)))  # noqa: E731
    monkeypatch.setattr("training.recorder.OverfittingCheck", watch)
    trainer = make_trainer(adv_loss=loss, total_step=5, log_step=2, n_critic=2, augment="cutout")  # 5 batches an epoch
    trainer.train()
    logged = {entry["step"]: entry["d_sign"] for entry in log(trainer.config.log_folder, "d_sign")}
    assert seen == [((2, False, True), step, pytest.approx(logged[step])) for step in checked]


def test_augmented_images_are_shown_at_the_start(make_trainer):
    trainer = make_trainer(augment="cutout", total_step=1)
    trainer.train()
    real, augmented = (Image.open(trainer.config.sample_folder / f"{name}.png") for name in ("real", "augmented"))
    assert real.size == augmented.size and real.tobytes() != augmented.tobytes()
    make_trainer(total_step=1, overwrite=True).train()
    assert not (trainer.config.sample_folder / "augmented.png").exists()


def test_a_run_writes_all_its_files(make_trainer):
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

    lines = log(config.log_folder, "d_loss")
    assert [line["step"] for line in lines] == [2, 4, 5]
    spreads, real = log(config.log_folder, "spread"), trainer.loader.batch(0)[0]
    assert [(line["step"], set(line)) for line in spreads] == [
        (step, {"step", "spread", "spread_real"}) for step in (2, 4, 5)
    ]
    assert spreads[-1]["spread"] == pytest.approx(image_spread(trainer.previews.samples()["ema"]))
    assert spreads[-1]["spread_real"] == pytest.approx(image_spread(real))
    sigmas = {f"sigma/{network}_l{layer}" for network in "GD" for layer in (1, 2, 3)}
    gammas = {f"gamma/{network}_attn{layer}" for network in "GD" for layer in (1, 2)}
    assert set(lines[0]) == D_STATS | sigmas | gammas | {"step", "g_loss", "lr/g", "lr/d", "images_per_s", "memory_mib"}
    (events,) = config.log_folder.glob("events.out.tfevents.*")
    for tag in ("d_loss", "gamma/G_attn1", "sigma/D_l1", "samples/ema", "attention/D_attn2", "memory_mib"):
        assert tag.encode() in events.read_bytes()
    assert json.loads((config.log_folder / "config.json").read_text())["total_step"] == 5


def test_an_attention_figure_has_a_row_for_each_of_g_num_images(make_trainer):
    heights = []
    for count in (1, 2, 4):
        trainer = make_trainer(version=f"of_{count}", total_step=1, g_num=count)
        trainer.train()
        heights.append(Image.open(trainer.config.attn_folder / "1_G_attn1.png").height)
    assert 0 < 2 * (heights[1] - heights[0]) == heights[2] - heights[1]


def test_sampling_and_logging_leave_training_unchanged(make_trainer):
    quiet = make_trainer(version="quiet", total_step=4, log_step=100, sample_step=100, attn_step=100)
    busy = make_trainer(version="busy", total_step=4, log_step=1, sample_step=1, attn_step=1, model_save_step=0.2)
    quiet.train()
    busy.train()
    assert_same_weights(quiet, busy)


def test_the_learning_rate_does_not_jump_when_the_data_or_the_batch_changes(make_trainer, capsys):
    """After 7 steps of 5 an epoch, an epoch is 20 steps long: the rates halve again after 0.6 of it, at step 19."""
    options = dict(lr_schedule="exponential", lr_decay=0.5, log_step=1)
    make_trainer(**options, total_step=7).train()
    changed = dict(toy_num=40, batch_size=2, g_num=2)
    for total_step, pretrained_model in ((10, "7"), (40, "10")):  # continued twice
        capsys.readouterr()
        resumed = make_trainer(**options, **changed, total_step=total_step, pretrained_model=pretrained_model)
        resumed.train()
        assert ("has 40 images; it had 20" in capsys.readouterr().err) == (total_step == 10)
    factors = [entry["lr/g"] / 1e-4 for entry in log(resumed.config.log_folder, "lr/g")]
    assert factors == pytest.approx([1] * 5 + [0.5] * 14 + [0.25] * 20 + [0.125])


def test_weights_without_a_state_file_resume_with_a_warning(make_trainer, capsys):
    first = make_trainer()
    first.train()
    (first.config.model_folder / "3_state.pth").unlink()
    capsys.readouterr()
    resumed = make_trainer(pretrained_model="latest", total_step=4)
    assert "optimizers" in capsys.readouterr().err
    assert torch.equal(resumed.G.last[0].weight, first.G.last[0].weight)
    assert torch.equal(resumed.ema.network.last[0].weight, first.G.last[0].weight)
    (first.config.sample_folder / "real.png").unlink()  # as if the weights came from elsewhere
    assert resumed.train() == 0
    assert (first.config.sample_folder / "real.png").exists()


def test_resuming_with_other_options_names_and_uses_them(make_trainer, capsys):
    make_trainer().train()
    capsys.readouterr()
    trainer = make_trainer(pretrained_model="3", total_step=4, g_lr=0.5)
    assert "--g_lr 0.5 (was 0.0001)" in capsys.readouterr().out
    trainer.train_step()
    assert trainer.g_optimizer.param_groups[0]["lr"] == 0.5


def test_resuming_a_finished_run_takes_no_step(make_trainer):
    make_trainer().train()
    resumed = make_trainer(pretrained_model="latest")
    before = weights_of(resumed)
    assert resumed.train() == 0
    assert all(torch.equal(value, before[key]) for key, value in weights_of(resumed).items())


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_fixed_z_is_kept_when_the_batch_size_changes(make_trainer, batch_size):
    first = make_trainer()
    first.train()
    resumed = make_trainer(pretrained_model="latest", batch_size=batch_size, g_num=2, total_step=4, sample_step=4)
    assert torch.equal(resumed.state.fixed_z, first.state.fixed_z)
    resumed.train()
    samples = [Image.open(first.config.sample_folder / f"{step}_ema.png").size for step in (3, 4)]
    assert samples[0] == samples[1]


def test_save_minutes_saves_by_the_clock(make_trainer):
    """Checkpoints for resuming only, which do not stay; the last one has exports."""
    trainer = make_trainer(total_step=5, model_save_step=100, save_minutes=1e-9, keep_checkpoints=2)
    trainer.train()
    left = {path.name for path in trainer.config.model_folder.glob("*.pth")}
    assert left == {"4_state.pth", "5_state.pth", "5_G.pth", "5_D.pth"}


@pytest.mark.parametrize("options, saved", [
    (dict(model_save_step=0.2, min_save_step=3), [3, 6, 7]),
    (dict(model_save_step=2.0, n_critic=2), [5, 7]),  # 20 images are 5 batches, of which a step takes n_critic
    (dict(model_save_step=1.0), [5, 7]),
])  # fmt: skip
def test_steps_of_checkpoints(make_trainer, options, saved):
    trainer = make_trainer(total_step=7, keep_checkpoints=0, **options)
    trainer.train()
    assert list(files_by_step(trainer.config.model_folder, "state.pth")) == saved


def test_old_results_are_thinned_as_the_options_say(make_trainer):
    trainer = make_trainer(total_step=9, sample_step=1, attn_step=2, keep_samples=3, model_save_step=0.2,
                           keep_checkpoints=2)  # fmt: skip
    trainer.train()
    assert list(files_by_step(trainer.config.model_folder, "state.pth")) == [8, 9]
    assert list(files_by_step(trainer.config.model_folder, "G.pth")) == [*range(1, 10)]
    assert list(files_by_step(trainer.config.sample_folder, "ema.png")) == [4, 8, 9]
    assert list(files_by_step(trainer.config.attn_folder, "G_attn1.png")) == [4, 8, 9]


def test_non_finite_weights_are_never_saved(make_trainer, monkeypatch):
    first = make_trainer(model_save_step=0.2)
    first.train()
    trainer = make_trainer(model_save_step=0.2, pretrained_model="latest", total_step=9)
    train_step = trainer.train_step

    def spoil():
        stats = train_step()
        if trainer.step == 5:
            trainer.ema.network.last[0].bias.data[0] = float("nan")
        return stats

    monkeypatch.setattr(trainer, "train_step", spoil)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert checkpoint.list_steps(first.config.model_folder)[0] == 4


def test_resuming_a_checkpoint_of_another_version_lists_the_changed_options(make_trainer, capsys):
    first = make_trainer()
    first.train()
    path = first.config.model_folder / "3_state.pth"
    state = torch.load(path, weights_only=True)
    del state["config"]["save_minutes"], state["config"]["augment"]
    state["config"]["color"] = "blue"
    torch.save(state, path)
    make_trainer(pretrained_model="latest", total_step=4, save_minutes=5)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "resuming from step 3; changed options: --total_step 4 (was 3), --save_minutes 5 (was 10.0), "
        "color blue (no longer an option)"
    )


def test_bf16_stays_near_fp32(make_trainer):
    losses = [make_trainer(precision=name).train_step()["d_loss"].item() for name in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_memory_and_open_files_stay_flat(make_trainer, monkeypatch):
    trainer = make_trainer(total_step=1000, sample_step=25, attn_step=100, model_save_step=10, log_step=5)
    seen = []
    train_step = trainer.train_step

    def watched():
        if trainer.step % 250 == 1:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((memory, len(os.listdir("/proc/self/fd"))))
        return train_step()

    monkeypatch.setattr(trainer, "train_step", watched)
    trainer.train()
    seen = seen[1:]  # the first is of step 1
    memory, files = zip(*seen, strict=True)
    assert max(memory) - memory[0] < 10, memory  # MiB
    assert max(files) - files[0] <= 2, files  # an image that is being written


def evaluations(monkeypatch, *scores):
    """Let the metrics of a run be these dicts, or raise these errors, one after the other."""
    scores = iter(scores)

    def compute_metrics(config, G, *_):
        assert not G.training
        G(torch.randn(4, config.z_dim))
        score = next(scores)
        if isinstance(score, UserError):
            raise score
        return score

    monkeypatch.setattr("trainer.compute_metrics", compute_metrics)
    monkeypatch.setattr("metrics.scores.check_metrics", lambda *_: None)


def test_the_best_checkpoint_is_kept_and_training_is_unchanged(make_trainer, monkeypatch, capsys):
    """The second of four evaluations has the lowest distance; the last one fails."""
    options = dict(metrics="isc,kid,fid", metric_step=1, metric_num=12, version="measured")
    evaluations(monkeypatch, *({"fid": -kid, "kid": kid} for kid in (9.0, 3.0, 5.0)), UserError("the disk is full"))
    measured = make_trainer(total_step=4, **options)
    plain = make_trainer(total_step=4, version="plain")
    for trainer in (measured, plain):
        trainer.train()
    assert_same_weights(measured, plain)
    scores = [(entry["step"], entry["kid"]) for entry in log(measured.config.log_folder, "kid")]
    assert scores == [(1, 9.0), (2, 3.0), (3, 5.0)]
    assert "the disk is full" in capsys.readouterr().err
    best = checkpoint.load(measured.config.model_folder, "best")
    assert best.step == 2
    assert checkpoint.list_steps(measured.config.model_folder) == [4]  # `latest` does not find the best one

    def best_after(score, **changes):
        """The step of the best checkpoint after one more evaluation."""
        evaluations(monkeypatch, {"fid": score, "kid": score})
        step = max(checkpoint.list_steps(measured.config.model_folder)) + 1
        options.update(changes, metric_step=step, pretrained_model="latest")
        make_trainer(total_step=step, **options).train()
        return checkpoint.load(measured.config.model_folder, "best").step

    assert best_after(4.0) == 2  # lower than the last, not than the lowest before the stop
    assert best_after(4.0, metric_num=11) == 6  # of fewer images: not comparable
    assert best_after(5.0) == 6
    assert best_after(6.0, use_ema=False) == 8
    assert best_after(7.0, metrics="fid") == 9
    assert best_after(8.0, toy_num=99) == 10
    assert best_after(float("nan")) == 10
    evaluations(monkeypatch)
    make_trainer(**options | {"total_step": 6, "pretrained_model": "best", "overwrite": True}).train()


def test_a_checkpoint_is_saved_before_what_takes_time(make_trainer, monkeypatch):
    """A signal comes while metrics are computed; another one after a step without a checkpoint, before maps fail."""
    options = dict(metrics="hog", metric_num=12, metric_step=2, total_step=4, model_save_step=0.4)

    def stopped(config, *arguments):
        wait_until((config.model_folder / "2_state.pth").exists)
        signal.raise_signal(signal.SIGTERM)
        return compute_metrics(config, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.compute_metrics", stopped)
        assert make_trainer(**options).train() == signal.SIGTERM
    trainer = make_trainer(pretrained_model="latest", **options)
    folder, train_step = trainer.config.log_folder, trainer.train_step
    assert not log(folder, "hog")

    def out_of_memory():
        wait_until((trainer.config.model_folder / "3_state.pth").exists)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "train_step", lambda: train_step() | {"signal": signal.raise_signal(signal.SIGTERM)})
    monkeypatch.setattr(trainer.previews, "attention", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    make_trainer(pretrained_model="latest", **options).train()
    assert [entry["step"] for entry in log(folder, "hog")] == [2, 4]


def test_a_signal_before_the_first_step_leaves_nothing_to_resume_from(make_trainer, monkeypatch, capsys):
    trainer = make_trainer()
    real_images = trainer.previews.real_images
    monkeypatch.setattr(trainer.previews, "real_images", lambda: signal.raise_signal(signal.SIGTERM) or real_images())
    main.print_outcome(trainer.config, 0, trainer.train())
    assert capsys.readouterr().out.splitlines()[-1] == "SIGTERM before the first step"
    make_trainer().train()


def test_a_checkpoint_of_another_folder_is_resumed_exactly(make_trainer):
    options = dict(total_step=6, log_step=1, model_save_step=0.1, keep_checkpoints=0)
    whole = make_trainer(version="whole", **options)
    whole.train()
    state = whole.config.model_folder / "3_state.pth"
    branch = make_trainer(version="branch", pretrained_model=str(state), **options)
    branch.train()
    assert_same_weights(whole, branch)
    assert [entry["step"] for entry in log(branch.config.log_folder, "d_loss")] == [4, 5, 6]
    assert checkpoint.list_steps(branch.config.model_folder)[-1] == 3  # it can go on before the first one of its own
    assert (branch.config.sample_folder / "3_ema.png").exists()
    assert checkpoint.list_steps(whole.config.model_folder)[0] == 6
    with pytest.raises(UserError, match="--overwrite true"):
        make_trainer(version="branch", total_step=9, pretrained_model=str(state)).train()


@pytest.mark.parametrize("use_ema", [True, False])
def test_metrics_during_training_are_of_the_ema_generator_unless_switched_off(make_trainer, monkeypatch, use_ema):
    measured = []
    monkeypatch.setattr("trainer.compute_metrics", lambda config, G, *_: measured.append((config, G)) or {"hog": 1.0})
    trainer = make_trainer(metrics="hog", metric_num=11, use_ema=use_ema)
    trainer.train()
    assert measured == [(trainer.config, trainer.ema.network if use_ema else trainer.G)]


def test_the_last_lines_name_the_files_to_open_first(make_config, capsys):
    trainer = build_trainer(make_config(version="named"))
    config = trainer.config
    main.print_outcome(config, 3, trainer.train())
    lines = capsys.readouterr().out.splitlines()
    paths = [
        config.log_folder / "report.html",
        config.attn_folder / "3_explorer.html",
        config.sample_folder / "3_ema.png",
    ]
    assert [line.strip() for line in lines[-3:]] == [str(path) for path in paths]
    assert all(path.exists() for path in paths)
    report = (config.log_folder / "report.html").read_text(encoding="utf-8")
    assert "step 3 of 3" in report and "finished" in report
    assert f"../../attn_path/{config.version}/3_explorer.html" in report
    assert not list(config.log_folder.glob("*.tmp"))
