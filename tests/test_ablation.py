"""benchmarks/ablation.py: what it runs, what it refuses, what it writes, and that it can be stopped and continued."""

import itertools
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import ablation
import pytest
import torch
from ablation import make_runs
from conftest import build_trainer, log, log_lines, make_folders, train_in, wait_for

import main
from errors import UserError
from training.run_folders import lock_folders

ATTENTION = ["attention", "full", "none"]
NARROW = ["--dataset=toy", "--toy_num=24", "--imsize=32", "--z_dim=16", "--d_conv_dim=8", "--device=cpu",
          "--num_workers=0", "--log_step=1", "--batch_size=4"]  # fmt: skip
SMALL = [*NARROW, "--g_conv_dim=8"]


def test_every_combination_is_a_run_of_each_seed():
    vary = [ATTENTION, ["augment", "none", "color,cutout"]]
    configs = [run.config for run in make_runs(vary, [0, 7, 0], "out", ["--total_step", "300", "--holdout", "0.2"])]
    assert [(config.seed, config.attention, config.augment) for config in configs] == [
        *itertools.product((0, 7), ("full", "none"), ("none", "color,cutout"))]  # fmt: skip
    assert configs[1].model_folder == Path("out/models/attention=full,augment=color,cutout,seed=0")
    for config in configs:
        assert (config.total_step, config.metric_step, config.sample_step, config.holdout) == (300, 30, 30, 0.2)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """A function that runs the ablation in an empty folder; training fails with code 7."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "train", lambda run: 7)

    def run(vary, *words):
        varied = [word for values in vary for word in ("--vary", *values)]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *varied, "--seeds", "0", "1", "--out", "out", *words])
        return ablation.main()

    return run


@pytest.mark.parametrize("vary, words, message", [
    (["attention", "full"], [], "two or more"), (["g_lr", "0.1", "0.10"], [], "two or more"),
    (["seed", "0", "1"], [], "--vary seed"), (["image_path", "a" * 100, "c"], [], "--vary image_path"),
    (ATTENTION, ["--attention", "none"], "--vary attention"), (ATTENTION, ["--seed", "1"], "--seeds"),
    (["attention", "full", "some"], [], "--attention must be .*some .see python benchmarks/ablation.py --help.$"),
    (["atention", "a", "b"], [], "--vary atention: there is no such option"),
    (["g_lr+d_lr", "1e-4+4e-4", "1e-4"], [], "1e-4 must have 2 values"),
    (["g_lr+d_lr", "1e-4+4e-4", "0.0001+0.0004"], [], "two or more"),
    (ATTENTION, ["--minutes", "1", "--total_step", "5"], "exclude"),
    (["total_step", "5", "9"], ["--minutes", "1"], "exclude"), (ATTENTION, ["--minutes", "nan"], "--minutes must"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_line(vary, words, message, run_main, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        run_main([vary], *words)
    caught.value.args = (capsys.readouterr().err.strip() or str(caught.value),)
    assert caught.match(message) and "\n" not in str(caught.value)


def finish(**data):
    """Write what is read of runs to step 4 in ./out; those without attention have no d_sign. Returns the runs."""
    runs = make_runs([ATTENTION], [0, 1], "out", [*SMALL, "--total_step=4"])
    for config in (make_folders(run.config) for run in runs):
        lines = [{"step": step, "images_per_s": 1 if step == 3 else 8} for step in range(1, 5)]
        for line in lines if config.has_attention else []:
            line["d_sign"] = line["step"]
        lines[-1] |= {"faces": 1 + config.seed, "hog": 8}
        (config.log_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        images = data or main.make_loader(config, torch.device("cpu")).open().fingerprint
        contents = {"step": 4, "config": vars(config), "G": {}, "D": {}, "data": images}
        torch.save(contents, config.model_folder / "4_state.pth")
    return runs


@pytest.mark.parametrize("words, outcome", [
    (["--total_step=4"], 0), (["--total_step=9"], 7), (["--total_step=3"], "is at step 4"),
    (["--total_step=9", "--lr_schedule=linear"], "--total_step 9 .was 4.*--lr_schedule linear"),
    (["--total_step=4", "--g_lr=0.01"], "attention=full,seed=0 in --out .*: --g_lr 0.01 .was 0.0001.$"),
    (["--total_step=4", "--dataset=folder", "--image_path=dogs"], "--image_path dogs"),
])  # fmt: skip
def test_finished_runs_are_kept_made_longer_or_refused_by_name(words, outcome, run_main, monkeypatch):
    finish()
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    monkeypatch.setattr(ablation, "share_weights", lambda runs: None)  # those of `finish` are empty
    with nullcontext() if isinstance(outcome, int) else pytest.raises(UserError, match=outcome):
        assert run_main([ATTENTION], *SMALL, *words) == outcome
    assert all(path.read_bytes() == content for path, content in before.items())
    if outcome == 0:
        written = Path("out/ablation_attention.md").read_text()
        same, speed = "0, 1 | 1.5 (1 to 2) | 8", "500"
        assert f"| attention=full | {same} | 4 | {speed} |" in written  # r: of the last tenth; ms: a median
        assert f"| attention=none | {same} | \N{EN DASH} | {speed} |" in written
        assert "4 runs, all with model sagan, imsize 32," in written and " attention " not in written.splitlines()[2]
        assert Path("out/ablation_attention.png").stat().st_size > 10_000


def test_runs_of_other_images_in_use_or_without_their_log_are_refused(run_main):
    run, *_ = finish(images=24, checksum=1)
    with pytest.raises(UserError, match="attention=full,seed=0 in --out was trained on other images"):
        run_main([ATTENTION], *SMALL, "--total_step=4")
    with lock_folders(run.config), pytest.raises(UserError, match=r"another run is writing.*another --out$"):
        run_main([ATTENTION], *SMALL, "--total_step=4")
    (run.config.log_folder / "metrics.jsonl").write_text('{"step": 4, "images_per_s": 8, "faces": 8}')
    with pytest.raises(UserError, match=r"attention=full,seed=0/metrics.jsonl has no hog of step 4"):
        ablation.read_run(run)


def test_runs_of_a_seed_start_from_the_same_weights(run_main, make_config):
    """Where shapes allow it; those of the first are those of main.py. Variants can be added in any order."""
    assert run_main([["g_conv_dim", "16", "8"], ATTENTION], *NARROW) == 7
    assert run_main([["g_conv_dim", "24", "8"], ["attention", "none", "full"]], *NARROW) == 7
    trainer = build_trainer(make_config(g_conv_dim=16))
    for part, network in (("G", trainer.G), ("D", trainer.D)):
        weights = {path.parent.name: torch.load(path) for path in Path("out/models").glob(f"*/0_{part}.pth")}
        first = weights["g_conv_dim=16,attention=full,seed=0"]
        assert all(torch.equal(first[key], value) for key, value in network.state_dict().items())
        assert len(weights) == 6 and len({len(own) for own in weights.values()}) == 2
        for one, other in itertools.combinations(weights.values(), 2):
            for key in one.keys() & other.keys():
                assert one[key].shape != other[key].shape or torch.equal(one[key], other[key]), key

    path = Path("out/models/g_conv_dim=8,attention=full,seed=0/0_D.pth")  # those of a run that is started stay
    torch.save({key: value * 0 for key, value in first.items()}, path)
    before = path.read_bytes()
    assert run_main([["g_conv_dim", "8", "32"], ["attention", "none", "full"]], *NARROW) == 7
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no CPU time of other processes")
def test_the_cpu_time_of_a_step(tmp_path, monkeypatch):
    """In place of main.py: 0.2 s, and 10 ms for each step, in a child of the training."""
    (tmp_path / "main.py").write_text(
        "import subprocess, sys, time\n"
        "for word, value in zip(sys.argv, sys.argv[1:]):\n"
        "    if word == '--total_step':\n"
        "        subprocess.run([sys.executable, __file__, value])\n"
        "while sys.argv[1:] and sys.argv[1].isdecimal() and time.process_time() < 0.2 + 0.01 * int(sys.argv[1]): pass"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "MAIN", "main.py")
    run, *_ = make_runs([ATTENTION], [0], "out", SMALL)
    assert ablation.seconds_per_step(run, 0.3, Path("out")) == pytest.approx(0.01, rel=0.3)


@pytest.mark.skipif(sys.platform == "win32", reason="no CPU time of other processes")
def test_variants_of_the_same_cpu_time(run_main, monkeypatch, tmp_path):
    """What was measured is kept, also for variants of the same cost."""
    pytest.importorskip("cv2")
    monkeypatch.setattr(ablation, "train", lambda run: train_in(tmp_path, *run.arguments))
    monkeypatch.setattr(ablation, "cpu_seconds", lambda run, steps: 7 + steps * run.config.batch_size * 0.075)
    words = [*SMALL, "--attention=none", "--metric_num=10", "--metric_step=1000", "--seeds", "0", "--minutes=0.1"]
    words.remove("--batch_size=4")
    vary = ["batch_size+g_lr", "4+1e-4", "8+3e-4"]
    assert run_main([vary], *words) == 0
    written = Path("out/ablation_batch_size_g_lr.md").read_text()
    assert "2 runs of 0.1 CPU minutes each" in written and "| steps | images per CPU second |" in written
    assert "| 20 | 13.3 |" in written and "| 10 | 13.3 |" in written
    monkeypatch.setattr(ablation, "cpu_seconds", None)
    with pytest.raises(UserError, match=r"batch_size=4,g_lr=1e-4 in --out has other options.*: --n_critic 2"):
        run_main([vary], *words, "--n_critic=2")
    runs = make_runs([["beta1", "0", "0.5"]], [0], "out", [*SMALL, "--attention=none"])
    runs = ablation.limit_minutes(runs, 0.2, Path("out"), set())
    assert {run.config.total_step for run in runs} == {40} and {run.config.sample_step for run in runs} == {4}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell that a process was killed")
def test_a_killed_ablation_ends_its_run(start_process, tmp_path):
    (tmp_path / "main.py").write_text("import signal, sys; from pathlib import Path\n"
                                      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path('ended').touch()))\n"
                                      "Path('started').touch(); signal.pause()")  # fmt: skip
    code = "import ablation; ablation.MAIN = 'main.py'; ablation.train(ablation.Run('', 0, [], None))"
    path = os.pathsep.join([str(Path(ablation.__file__).parent), str(Path(main.__file__).parent)])
    process = start_process([sys.executable, "-c", code], tmp_path, env=os.environ | {"PYTHONPATH": path})
    wait_for((tmp_path / "started").exists, process)
    process.kill()
    wait_for((tmp_path / "ended").exists, start_process(["sleep", "60"], tmp_path), seconds=30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_stopped_and_continued(tmp_path, start_process, monkeypatch, capfd, run_main):
    """Ctrl-C saves a checkpoint; the same command, here with fewer steps and in this process, goes on from there."""
    pytest.importorskip("cv2")
    options = [*SMALL, "--metric_num=12", "--metric_step=1000"]
    words = [sys.executable, ablation.__file__, "--vary", *ATTENTION, "--seeds", "0", "--out", "out", *options]
    process = start_process([*words, "--total_step=100000"], tmp_path)
    wait_for(lambda: log_lines(tmp_path / "out/logs/attention=full,seed=0"), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on from here" in output
    (saved,) = Path("out/models/attention=full,seed=0").glob("*_state.pth")
    total = int(saved.name.partition("_")[0]) + 2
    monkeypatch.setattr(ablation, "train", lambda run: train_in(tmp_path, *run.arguments))
    assert run_main([ATTENTION], "--seeds", "0", *options, f"--total_step={total}") == 0
    printed = capfd.readouterr().out
    full, none = (log(Path(f"out/logs/attention={name},seed=0"), "d_loss") for name in ("full", "none"))
    assert [entry["step"] for entry in full] == [entry["step"] for entry in none] == [*range(1, total + 1)]
    assert full[0]["d_loss"] == none[0]["d_loss"]  # attention begins with gamma 0
    written = Path("out/ablation_attention.md").read_text()
    assert f"resuming from step {total - 2}" in printed and written.strip() in printed
    assert f"total_step {total}" in written and "HOG distance of halves of the real images" in written
