"""The program as users run it: a whole run in a process of its own, and the mistakes that users make."""

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, WORDS, assert_untouched, log_lines, make_pictures, run_main, train_in, wait_for
from PIL import Image

import main
from errors import stop_signals
from metrics import projection
from sagan_models import Discriminator, Generator
from trainer import Trainer

LOGS = "logs/sagan_celeb"
MAIN = [sys.executable, str(ROOT / "main.py")]


@pytest.fixture
def run(tmp_path):
    """`run_main` in a temporary folder."""
    return partial(run_main, tmp_path)


@pytest.mark.slow
def test_a_run_from_images_to_samples_and_resumed(tmp_path):
    """A folder of images, the real networks, two worker processes, then one more step and an evaluation."""

    def run(*words):
        command = [*MAIN, *words, "--device", "cpu"]
        return subprocess.run(command, cwd=tmp_path, timeout=200, check=True, capture_output=True, text=True)

    make_pictures(tmp_path / "data", [f"{number % 3}/{number}.png" for number in range(40)])
    (tmp_path / "data" / "bad.jpg").write_text("no image")
    words = shlex.split("--dataset folder --batch_size 4 --sample_step 1 --log_step 1 --use_tensorboard true")
    first = run(*words, "--total_step", "2")
    assert "imsize=64" in first.stdout and "skipped_images.txt" in first.stderr
    for path in ("samples/sagan_celeb/2_ema.png", "attn/sagan_celeb/2_D_attn1.png", "logs/sagan_celeb/config.json",
                 "models/sagan_celeb/2_state.pth", "logs/sagan_celeb/skipped_images.txt"):  # fmt: skip
        assert (tmp_path / path).stat().st_size > 0, path
    for network, name in ((Generator(), "2_G.pth"), (Discriminator(), "2_D.pth")):
        network.load_state_dict(torch.load(tmp_path / "models/sagan_celeb" / name, weights_only=True), strict=True)

    (images,) = tmp_path.glob("cache/*/images.bin")
    built = images.stat().st_mtime_ns
    run(*words, "--total_step", "3", "--pretrained_model", "auto")
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/images.bin")] == [built]  # it was opened
    assert [json.loads(line)["step"] for line in log_lines(tmp_path / LOGS)] == [1, 1, 2, 2, 3, 3]  # and samples
    run("--train", "false")
    assert (tmp_path / "samples/sagan_celeb/test_3/grid.png").exists()


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@needs_signals
@pytest.mark.parametrize("number", stop_signals())
def test_a_signal_saves_a_checkpoint_with_figures_and_ends_the_run(tmp_path, monkeypatch, run, number):
    """In this process, which sends the signal to itself; the next test signals one from outside."""

    def train_step(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return take_step(trainer)

    take_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", train_step)
    # A checkpoint of step 3 is due by the clock too, but that one has no 3_G.pth.
    code, out, err = run(*WORDS, "--log_step", "1", "--total_step", "9", "--save_minutes", "1e-9")
    assert "step 1/9" in err and "\r" not in err
    assert code == 128 + number and "--pretrained_model 3" in out  # the step is finished first
    assert json.loads(log_lines(tmp_path / LOGS)[-1])["step"] == 3
    for path in ("models/sagan_celeb/3_state.pth", "models/sagan_celeb/3_G.pth", "attn/sagan_celeb/3_explorer.html",
                 "attn/sagan_celeb/3_G_attn1.png", "attn/sagan_celeb/3_D_attn2.png"):  # fmt: skip
        assert (tmp_path / path).exists(), path
    report = (tmp_path / LOGS / "report.html").read_text()
    assert "stopped" in report and "step 3 of" in report and "<li>ETA" not in report


@needs_signals
def test_lines_appear_at_once_and_a_run_under_nohup_outlives_its_terminal_and_their_reader(tmp_path, start_process):
    """In a pipe, without carriage returns; Ctrl-C ends it with a checkpoint, though shells let jobs ignore that."""
    command = shlex.join([*MAIN, *WORDS, "--log_step", "1"])
    process = start_process(["sh", "-c", f'trap "" HUP INT; exec {command}'], tmp_path)
    assert process.stdout.readline().startswith("Network")
    progress = next(line for line in process.stderr if line.startswith("step "))
    assert process.poll() is None  # it had not ended, which would have flushed them
    os.kill(process.pid, signal.SIGHUP)
    process.stdout.close()
    process.stderr.close()
    steps = len(log_lines(tmp_path / LOGS))
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= steps + 3, process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert (tmp_path / f"models/sagan_celeb/{len(log_lines(tmp_path / LOGS))}_state.pth").exists()
    assert "img/s" in progress and "\r" not in progress


def test_an_old_python_is_one_line():
    main_py = ROOT / "main.py"
    ast.parse(main_py.read_text(encoding="utf-8"), feature_version=(3, 8))
    code = "import runpy, sys; sys.version_info = (3, 9, 1); sys.modules['errors'] = None; "
    code += f"runpy.run_path({str(main_py)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Python 3.10" in done.stderr


@pytest.fixture
def fail(tmp_path, run):
    """A function that runs `main` and returns its one error line; the run may warn and write a cache, nothing else."""

    def written():
        return sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)

    def fail(*words):
        before = written()
        code, _, err = run(*words)
        assert code == 2 and written() == before
        *others, error = err.splitlines()
        assert error.startswith("error: ")
        assert all("decoding" in line or line.startswith("warning: ") or not line for line in others)
        return error

    return fail


def test_the_options_of_the_images_reach_the_loader(tmp_path, make_config):
    """The middle of each image is red on the left and blue on the right, its frame is black; every other one smiles."""
    folder, image = tmp_path / "data" / "CelebA", Image.new("RGB", (178, 218))
    folder.mkdir(parents=True)
    image.paste("red", (49, 69, 89, 149))
    image.paste("blue", (89, 69, 129, 149))
    for number in range(10):
        image.save(folder / f"{number}.png")
    rows = [f"{number}.jpg 1 {1 if number % 2 else -1}" for number in range(10)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["10", "Young Smiling", *rows]))
    config = make_config(dataset="celeb", image_path=str(tmp_path / "data"), crop_size=80, model="paper", imsize=64,
                         conditional=True, attribute="Smiling", hflip=True, holdout=0.2, seed=3)  # fmt: skip
    loader = main.make_loader(config, torch.device("cpu")).open()
    assert loader.classes == ("not_Smiling", "Smiling") and loader.labels.tolist() == [0, 1] * 5
    assert (loader.images[:, :, [0, -1]] == torch.tensor([[255, 0, 0], [0, 0, 255]])).all()
    batch = torch.cat([loader.batch(index)[0] for index in range(4)])
    assert {*batch[:, 0, 0, 0].tolist()} == {-1, 1}  # flipped ones are blue there
    assert (loader.seed, loader.holdout, len(loader)) == (3, 0.2, 2)


def test_training_images_in_a_result_folder_are_refused_and_left_alone(fail, tmp_path):
    """`fail` checks that nothing was removed or written."""
    make_pictures(tmp_path / "samples/cats", [f"{number}_fake.png" for number in range(16)])
    words = shlex.split("--dataset folder --image_path samples/cats --overwrite true --version cats")
    assert "samples/cats" in fail(*WORDS, *words)


def test_results_beside_the_images_are_not_trained_on(tmp_path, run, no_report):
    """`cd pictures; main.py --image_path .`, three times."""
    before = make_pictures(tmp_path, [f"{number}_ema.png" for number in range(16)])
    words = [*WORDS, "--dataset", "folder", "--image_path", ".", "--total_step", "2"]
    for options in ([], ["--overwrite", "true"], ["--version", "other"]):
        code, out, _ = run(*words, *options)
        assert code == 0 and "16 images" in out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert_untouched(before)


@pytest.mark.parametrize("words, token", [
    ("--dataset celeb", "--dataset toy, which needs no data"), ("--dataset celeb", "celeba/img_align_celeba"),
    ("--dataset folder", "folder of images"), ("--dataset folder --image_path .", "no image"),
    ("--toy_num 3", "3 images"), ("--pretrained_model 7", "--pretrained_model 7"),
    *((f"--{name}_path {__file__}", __file__) for name in ("sample", "attn", "model_save", "log")),
    (f"--cache_path {__file__}", "--cache_path"), ("--log_path " + 300 * "v", "vvv"),
    pytest.param("--sample_path /proc/samples", "/proc/samples",
                 marks=pytest.mark.skipif(not os.path.isdir("/proc"), reason="no folder that even root cannot write")),
    pytest.param("--device cuda", "--device auto",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")),
])  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(fail, words, token):
    assert token in fail(*WORDS, *words.split())


@pytest.fixture
def trained(tmp_path):
    """The results of a finished run of two steps."""
    train_in(tmp_path, *WORDS, "--total_step", "2")


@pytest.mark.parametrize("words, token", [
    ("", "--overwrite true"), ("--pretrained_model 7", ": 2"), ("--pretrained_model latest --z_dim 8", "--z_dim 16"),
    ("--train false --pretrained_model best", "--pretrained_model best"),
    ("--train false --metrics faces --dataset celeb", "no CelebA"),
    ("--overwrite true --use_tensorboard true", "tensorboardX cannot be imported"),
])  # fmt: skip
def test_a_mistake_beside_earlier_results_is_one_line(trained, fail, monkeypatch, words, token):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # the import fails
    assert token in fail(*WORDS, *words.split())


@pytest.mark.parametrize("name, is_group", [("SIGINT", True), ("SIGTERM", False)])
@needs_signals
def test_a_signal_while_decoding_ends_the_run_and_leaves_no_files(tmp_path, start_process, name, is_group):
    """A terminal signals the whole process group, the workers too; test_decoding.py has the other signals."""
    number = signal.Signals[name]
    process = start_process([*MAIN, *WORDS, "--toy_num", "500000", "--num_workers", "4"], tmp_path)
    wait_for(lambda: [*tmp_path.glob("cache/*.building-*/images.bin")], process)
    time.sleep(1)
    os.killpg(process.pid, number) if is_group else os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert not list((tmp_path / "cache").iterdir())


def test_seed_precision_and_determinism_are_those_of_the_options(tmp_path, run, no_report):
    words, weights = shlex.split("--total_step 1 --overwrite true --precision bf16 --deterministic true"), []
    for seed in ("3", "3", "4"):
        code, out, _ = run(*WORDS, *words, "--seed", seed)
        assert code == 0 and "on cpu in bf16" in out and torch.are_deterministic_algorithms_enabled()
        weights.append(torch.load(tmp_path / "models/sagan_celeb/1_G.pth", weights_only=True)["last.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_run_that_diverges_saves_nothing(run, tmp_path):
    code, _, err = run(*WORDS, *shlex.split("--total_step 9 --log_step 1 --d_lr 1e38"))
    assert code == 2 and "loss at step 1 " in err and not log_lines(tmp_path / LOGS)
    assert not list(tmp_path.rglob("*.pth"))


def test_evaluating_a_checkpoint_without_images_and_with_metrics(trained, tmp_path, run, fewer_images, monkeypatch):
    """Most results need no training images; the face rate needs neither a download nor weights."""
    monkeypatch.setattr(projection, "SHOWN_STEPS", (0, 2))
    make_pictures(tmp_path, ["me.png"])
    code, out, err = run(*WORDS, "--train", "false", "--dataset", "folder")
    assert code == 0 and "test_2" in out and "warning: " in err and "nearest.png" in err
    folder = tmp_path / "samples/sagan_celeb/test_2"
    assert not (folder / "nearest.png").exists()
    words = "--train false --metrics faces --metric_num 12 --pretrained_model 2 --batch_size 30"  # of 20 images
    words += " --project me.png"
    code, out, _ = run(*WORDS, *words.split())
    assert code == 0 and "faces" in out
    assert json.loads((folder / "metrics.json").read_text())["images"] == 12
    assert (folder / "nearest.png").exists() and (folder / "projection.png").exists()
