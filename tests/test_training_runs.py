"""Whole runs: their files, resuming, checkpoints, and what the options of a run do."""

import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import D_STATS, ROOT, assert_same, assert_same_weights, log, page_data, wait_for, weights_of
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
    "augment": dict(augment="color,translation,cutout"),
    "no attention": dict(attention="none"),
    "bf16": dict(precision="bf16"),
    "paper": PAPER,
    "classes": PAPER | dict(adv_loss="wgan-gp", conditional=True, n_critic=2),
}


def metrics_of(trainer):
    """The lines of a run's log, without what depends on the machine."""
    lines = log(trainer.config.log_folder)
    return [{key: value for key, value in line.items() if key not in ("images_per_s", "memory_mib")} for line in lines]


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_two_steps_resumed_to_four_equal_four_steps(make_trainer, train, options):
    """Bit for bit: weights, EMA, fixed z, optimizers, samples and the log."""
    options = dict(total_step=4, log_step=1, sample_step=2) | options
    whole = train(version="whole", **options)
    assert next(iter(whole.d_optimizer.state.values()))["step"] == 4 * whole.config.n_critic
    first = options | ({} if "lr_schedule" in options else {"total_step": 2})  # its rates depend on total_step
    train(version="parts", model_save_step=0.2, keep_checkpoints=0, **first)
    resumed = make_trainer(version="parts", pretrained_model="2", overwrite=first["total_step"] > 2, **options)
    assert resumed.step == 2
    resumed.train()
    assert_same(*(trainer.state.state_dict() for trainer in (whole, resumed)))
    for kind in ("fake", "ema"):
        samples = [trainer.config.sample_folder / f"4_{kind}.png" for trainer in (whole, resumed)]
        assert samples[0].read_bytes() == samples[1].read_bytes()
    assert metrics_of(whole) == metrics_of(resumed)


def test_moments_are_resumed_in_the_memory_format_of_the_parameters(make_trainer):
    """Fused Adam on a CPU does not look at strides, and that on CUDA refuses different ones."""
    trainer = make_trainer()
    trainer.train_step()
    saved = copy.deepcopy(trainer.d_optimizer.state_dict())
    for moments in saved["state"].values():
        moments |= {key: moment.contiguous() for key, moment in moments.items()}
    trainer.d_optimizer.load_state_dict(saved)
    states = [*trainer.d_optimizer.state.items()]
    assert sum(not parameter.is_contiguous() for parameter, _ in states) > 2
    for (parameter, moments), given in zip(states, saved["state"].values(), strict=True):
        assert_same(moments, given)
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()


def test_a_run_without_attention_has_no_figures_of_it(train, make_trainer, make_config, capsys):
    trainer = train(attention="none", total_step=1, log_step=1)
    config = trainer.config
    assert [path.name for path in config.attn_folder.iterdir()] == [".lock"]
    main.print_outcome(config, 1, 0)
    assert "explorer" not in capsys.readouterr().out
    assert not any(name.startswith("gamma") for line in metrics_of(trainer) for name in line)
    with pytest.raises(UserError, match=r"--attention none \(not full\)"):
        make_trainer(pretrained_model="latest")
    saved, tested = load_test_checkpoint(make_config(), set())
    tester.Tester(tested, trainer.loader, saved, trainer.device).test()
    results = {path.name for path in config.test_folder(1).iterdir()}
    assert {"grid.png", "playground.html"} <= results and not {"attention.json", "G_attn1.png"} & results


@pytest.mark.parametrize("options", [{}, dict(model="paper", conditional=True, imsize=64)])
def test_d_is_compared_on_held_out_and_training_images(make_trainer, options):
    """A D that has learned the training images alone has other logits on the held-out ones."""
    trainer = make_trainer(holdout=0.3, log_step=3, total_step=1, n_critic=2, **options)
    before = weights_of(trainer)
    means = trainer.previews.scalars(6)
    assert_same(weights_of(trainer), before)  # spectral norm's vectors too
    trainer.D.eval()
    for name, images in (("d_train", trainer.loader.batch(12)), ("d_holdout", trainer.loader.held_out(2, 4))):
        assert means[name].item() == pytest.approx(trainer.D(*images).mean().item(), rel=1e-5, abs=1e-6)
    trainer.D.train()
    trainer.train()
    assert {"d_train", "d_holdout"} <= metrics_of(trainer)[0].keys()


@pytest.mark.parametrize("loss, checked", [("hinge", [2, 4, 5]), ("wgan-gp", [])])
def test_r_is_watched_where_logits_have_a_zero(train, monkeypatch, loss, checked):
    seen = []
    watch = lambda *options: SimpleNamespace(add=lambda step, r: seen.append((options, step, r)))  # noqa: E731
    monkeypatch.setattr("training.recorder.OverfittingCheck", watch)
    trainer = train(adv_loss=loss, total_step=5, log_step=2, n_critic=2, augment="cutout")  # 5 batches an epoch
    logged = {entry["step"]: entry["d_sign"] for entry in log(trainer.config.log_folder, "d_sign")}
    assert seen == [((2, False, True), step, pytest.approx(logged[step])) for step in checked]


def test_a_run_writes_all_its_files(train, capsys):
    """Of five batches an epoch: a checkpoint every second step. The last lines name those to open first."""
    trainer = train(total_step=5, log_step=2, sample_step=2, attn_step=4, model_save_step=0.4, use_tensorboard=True,
                    augment="cutout", g_num=3)  # fmt: skip
    config = trainer.config
    figures = {f"{step}_{layer}.png" for step in (4, 5) for layer in ("G_attn1", "G_attn2", "D_attn1", "D_attn2")}
    assert {path.name for path in config.attn_folder.glob("*.png")} == figures
    samples = {f"{step}_{kind}.png" for step in (2, 4, 5) for kind in ("fake", "ema")} | {"real.png", "augmented.png"}
    assert {path.name for path in config.sample_folder.glob("*.png")} == samples
    real, augmented = (Image.open(config.sample_folder / f"{name}.png") for name in ("real", "augmented"))
    assert real.size == augmented.size and real.tobytes() != augmented.tobytes()
    assert len(page_data(config.attn_folder / "5_explorer.html")["images"]) == 2 * 3  # generated and real: g_num each
    saved = {f"{step}_{part}.pth" for step in (2, 4, 5) for part in ("G", "D", "state")}
    assert {path.name for path in config.model_folder.glob("*.pth")} == saved

    lines = log(config.log_folder, "d_loss")
    assert [line["step"] for line in lines] == [2, 4, 5]
    spreads, real = log(config.log_folder, "spread"), trainer.loader.batch(0)[0]
    assert [line["step"] for line in spreads] == [2, 4, 5] and {*spreads[0]} == {"step", "spread", "spread_real"}
    assert spreads[-1]["spread"] == pytest.approx(image_spread(trainer.previews.samples()["ema"]))
    assert spreads[-1]["spread_real"] == pytest.approx(image_spread(real))
    sigmas = {f"sigma/{network}_l{layer}" for network in "GD" for layer in (1, 2, 3)}
    gammas = {f"gamma/{network}_attn{layer}" for network in "GD" for layer in (1, 2)}
    assert set(lines[0]) == D_STATS | sigmas | gammas | {"step", "g_loss", "lr/g", "lr/d", "images_per_s", "memory_mib"}
    page = (ROOT / "docs" / "reading_the_report.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in {*lines[0], *spreads[0]} - sigmas - gammas)
    assert lines[-1]["gamma/G_attn1"] == pytest.approx(trainer.G.attn1.gamma.item())  # not that of the EMA
    main.print_outcome(config, 5, 0)
    paths = [Path(line.strip()) for line in capsys.readouterr().out.splitlines()[-3:]]
    explorer, grid = config.attn_folder / "5_explorer.html", config.sample_folder / "5_ema.png"
    assert paths == [config.log_folder / "report.html", explorer, grid] and all(path.exists() for path in paths)
    (events,) = config.log_folder.glob("events.out.tfevents.*")
    tags = {*lines[0], *spreads[0], "samples/ema", "attention/D_attn2"} - {"step"}
    assert all(tag.encode() in events.read_bytes() for tag in tags)
    assert json.loads((config.log_folder / "config.json").read_text())["total_step"] == 5


def test_the_learning_rate_and_the_fixed_z_go_on_when_the_data_or_the_batch_changes(train, capsys):
    """After 7 steps, of which 5 are an epoch, one has 20 steps: the rates halve again after step 20."""
    options = dict(lr_schedule="exponential", lr_decay=0.5, log_step=1)
    first = train(**options, total_step=7)
    options |= dict(toy_num=40, batch_size=2, g_num=2, pretrained_model="latest")
    for total_step in (10, 40):  # continued twice
        capsys.readouterr()
        resumed = train(**options, total_step=total_step)
        assert ("has 40 images; it had 20" in capsys.readouterr().err) == (total_step == 10)
    assert torch.equal(resumed.state.fixed_z, first.state.fixed_z)
    factors = [(entry["lr/g"] + entry["lr/d"]) / 5e-4 for entry in log(resumed.config.log_folder, "lr/g")]
    assert factors == pytest.approx([1] * 5 + [0.5] * 15 + [0.25] * 20)


@pytest.mark.parametrize("step, schedule, factors", [
    ("2", "linear", [1 / 2, 3 / 8, 1 / 4, 1 / 8]), ("4", "linear", [1, 1 / 2]), ("2", "constant", [1] * 4),
])  # fmt: skip
def test_a_linear_schedule_goes_on_to_another_last_step_and_another_one_starts_anew(train, step, schedule, factors):
    """From step 2 of 4, where the factor is 1/2, to step 6; the schedule had come to its end at step 4."""
    options = dict(log_step=1, model_save_step=0.2, keep_checkpoints=0)
    train(lr_schedule="linear", total_step=4, **options)
    resumed = train(lr_schedule=schedule, total_step=6, pretrained_model=step, overwrite=True, **options)
    rates = [entry["lr/d"] / resumed.config.d_lr for entry in log(resumed.config.log_folder, "lr/d")]
    assert rates[int(step) :] == pytest.approx(factors)


def test_a_finished_run_resumes_without_a_step_and_from_weights_alone_with_a_warning(train, make_trainer, capsys):
    first = train()
    (grid := first.config.sample_folder / "3_ema.png").unlink()  # as if it was killed before it wrote this
    assert_same_weights(first, train(pretrained_model="latest"))
    (first.config.model_folder / "3_state.pth").unlink()
    assert grid.exists() and "nothing to train" in capsys.readouterr().err
    resumed = make_trainer(pretrained_model="latest", total_step=4)
    assert "optimizers" in capsys.readouterr().err
    for network in (resumed.G, resumed.ema.network):
        assert torch.equal(network.last[0].weight, first.G.last[0].weight)
    (first.config.sample_folder / "real.png").unlink()  # as if the weights came from elsewhere
    assert resumed.train() == 0
    assert (first.config.sample_folder / "real.png").exists()


@pytest.mark.parametrize("options, states, exports", [
    (dict(model_save_step=0.2, min_save_step=3, keep_checkpoints=0), [3, 6, 9], [3, 6, 9]),
    (dict(model_save_step=2.0, n_critic=2), [5, 9], [5, 9]),  # 20 images are 5 batches, of which a step takes n_critic
    (dict(model_save_step=0.2), [8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (dict(model_save_step=100, save_minutes=1e-9), [8, 9], [9]),  # by the clock: for resuming only, they do not stay
])  # fmt: skip
def test_results_are_written_and_thinned_as_the_options_say(train, options, states, exports):
    given = dict(total_step=9, keep_checkpoints=2, sample_step=1, attn_step=2, keep_samples=3) | options
    config = train(**given).config
    models, samples, figures = config.model_folder, config.sample_folder, config.attn_folder
    assert list(files_by_step(models, "state.pth")) == states
    assert list(files_by_step(models, "G.pth")) == list(files_by_step(models, "D.pth")) == exports
    assert list(files_by_step(samples, "ema.png")) == list(files_by_step(figures, "G_attn1.png")) == [4, 8, 9]


def test_non_finite_weights_are_never_saved(make_trainer, monkeypatch):
    trainer = make_trainer(model_save_step=0.2, total_step=9)
    bias = trainer.ema.network.last[0].bias
    monkeypatch.setattr(trainer.ema, "update", lambda step: step < 4 or bias.data.fill_(float("nan")))  # in the fifth
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert checkpoint.list_steps(trainer.config.model_folder)[0] == 4


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_memory_and_open_files_stay_flat(make_trainer, monkeypatch):
    trainer = make_trainer(total_step=1000, sample_step=25, attn_step=100, model_save_step=10, log_step=5)
    seen, train_step = [], trainer.train_step

    def watched():
        if trainer.step % 250 == 1 and trainer.step > 1:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((memory, len(os.listdir("/proc/self/fd"))))
        return train_step()

    monkeypatch.setattr(trainer, "train_step", watched)
    trainer.train()
    memory, files = zip(*seen, strict=True)
    assert max(memory) - memory[0] < 10, memory  # MiB
    assert max(files) - files[0] <= 2, files  # an image that is being written


def test_the_best_checkpoint_is_kept_and_training_is_unchanged(make_trainer, train, monkeypatch, capsys):
    """The second of four evaluations has the lowest distance; the last one fails. They are of the EMA or of G."""
    options = dict(metrics="isc,kid,fid", metric_step=1, metric_num=12, version="measured", log_step=1, sample_step=1,
                   attn_step=1)  # fmt: skip
    scores, trainers = [9.0, 3.0, 5.0, UserError("the disk is full")], []

    def compute_metrics(config, G, *_):
        trainer, score = trainers[-1], scores.pop(0)
        assert config is trainer.config and not G.training
        assert G is (trainer.ema.network if config.use_ema else trainer.G)
        G(torch.randn(4, config.z_dim))
        if isinstance(score, UserError):
            raise score
        return {"fid": -score if len(trainers) == 1 else score, "kid": score}

    def best_after(step, *given, **changes):
        """The step of the best checkpoint after evaluations with these scores, which end with that of this step."""
        scores.extend(given)
        trainers.append(make_trainer(**options | changes, total_step=step))
        trainers[-1].train()
        options.update(changes, metric_step=step + 1, pretrained_model="latest")
        return checkpoint.load(trainers[-1].config.model_folder, "best").step

    monkeypatch.setattr("trainer.compute_metrics", compute_metrics)
    monkeypatch.setattr("metrics.scores.check_metrics", lambda *_: None)
    assert best_after(4) == 2
    measured = trainers[0]
    assert_same_weights(measured, train(total_step=4, version="plain", log_step=100, sample_step=100))
    logged = [(entry["step"], entry["kid"]) for entry in log(measured.config.log_folder, "kid")]
    assert logged == [(1, 9.0), (2, 3.0), (3, 5.0)]
    assert "the disk is full" in capsys.readouterr().err
    assert checkpoint.list_steps(measured.config.model_folder) == [4]  # `latest` does not find the best one
    assert best_after(5, 4.0) == 2  # lower than the last, not than the lowest before the stop
    assert best_after(6, 4.0, metric_num=11) == 6  # of fewer images: not comparable
    assert best_after(7, 5.0) == 6
    assert best_after(8, 6.0, use_ema=False) == 8
    assert best_after(9, 7.0, metrics="fid") == 9
    assert best_after(10, 8.0, toy_num=99) == 10
    assert best_after(11, float("nan")) == 10
    train(**options | {"total_step": 6, "pretrained_model": "best", "overwrite": True})


def test_a_run_goes_on_from_its_best_checkpoint_which_is_made_again_if_it_was_lost(train, monkeypatch):
    """Even if it is killed before it saves another one: "latest" finds it. A kill may leave scores without theirs."""
    scores = [3.0, 5.0, 3.0, 3.0]
    monkeypatch.setattr("trainer.compute_metrics", lambda *_: {"hog": scores.pop(0)})
    monkeypatch.setattr("metrics.scores.check_metrics", lambda *_: None)
    options = dict(metrics="hog", metric_step=2, model_save_step=9)
    config = train(**options, total_step=4).config
    folder = config.model_folder
    train(**options, total_step=2, pretrained_model="best", overwrite=True)
    assert [path.name for path in sorted(folder.glob("[0-9]*"))] == ["2_state.pth"]
    for path in folder.glob("best_*"):
        path.unlink()
    train(**options, total_step=2, pretrained_model="latest")
    assert checkpoint.load(folder, "best").step == 2 and not scores
    assert [entry["step"] for entry in log(config.log_folder, "hog")] == [2]


def test_a_checkpoint_is_saved_before_what_takes_time(make_trainer, monkeypatch):
    """A signal comes while metrics are computed; another one after a step without a checkpoint, before maps fail."""
    options = dict(metrics="hog", metric_num=12, metric_step=2, total_step=4, model_save_step=0.4)

    def stopped(config, *arguments):
        wait_for((config.model_folder / "2_state.pth").exists)
        signal.raise_signal(signal.SIGTERM)
        return compute_metrics(config, *arguments)

    def out_of_memory():
        wait_for((folder / "3_state.pth").exists)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.compute_metrics", stopped)
        assert make_trainer(**options).train() == signal.SIGTERM
    trainer = make_trainer(pretrained_model="latest", **options)
    folder, train_step = trainer.config.model_folder, trainer.train_step
    assert not log(trainer.config.log_folder, "hog")
    monkeypatch.setattr(trainer, "train_step", lambda: train_step() | {"signal": signal.raise_signal(signal.SIGTERM)})
    monkeypatch.setattr(trainer.previews, "attention", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    make_trainer(pretrained_model="latest", **options).train()
    assert [entry["step"] for entry in log(trainer.config.log_folder, "hog")] == [2, 4]


def test_a_signal_before_the_first_step_leaves_nothing_to_resume_from(make_trainer, monkeypatch, capsys):
    trainer = make_trainer()
    real_images = trainer.previews.real_images
    monkeypatch.setattr(trainer.previews, "real_images", lambda: signal.raise_signal(signal.SIGTERM) or real_images())
    main.print_outcome(trainer.config, 0, trainer.train())
    assert capsys.readouterr().out.splitlines()[-1] == "SIGTERM before the first step"
    make_trainer().train()


def test_a_checkpoint_of_another_folder_is_resumed_exactly(train):
    options = dict(total_step=6, log_step=1, attn_step=3, model_save_step=0.1, keep_checkpoints=0)
    whole = train(version="whole", **options)
    state = whole.config.model_folder / "3_state.pth"
    branch = train(version="branch", pretrained_model=str(state), **options)
    assert_same_weights(whole, branch)
    assert [entry["step"] for entry in log(branch.config.log_folder, "d_loss")] == [4, 5, 6]
    assert checkpoint.list_steps(branch.config.model_folder)[-1] == 3  # it can go on before the first one of its own
    folders = branch.config.sample_folder, branch.config.attn_folder
    assert (folders[0] / "3_ema.png").exists() and (folders[1] / "3_G_attn1.png").exists()
