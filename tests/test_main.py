"""The program as users run it: a whole run in a process of its own, and the mistakes that users make."""

import ast
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import log_lines, train_in, wait_for
from PIL import Image

import main
from errors import stop_signals
from sagan_models import Discriminator, Generator
from trainer import Trainer

ROOT = Path(__file__).parent.parent
LOGS = "logs/sagan_celeb"
SIGNALS = stop_signals()
SMALL = shlex.split("--imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --batch_size 4 --num_workers 0 --device cpu")
TOY = [*SMALL, "--dataset", "toy", "--toy_num", "20"]


@pytest.fixture
def start(tmp_path, start_process):
    """A function that starts the program in `tmp_path`."""
    return lambda *words: start_process([sys.executable, str(ROOT / "main.py"), *words], tmp_path)


@pytest.fixture
def run(start):
    """A function that runs the program in `tmp_path` to its end."""

    def run(*words):
        process = start(*words)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err

    return run


@pytest.mark.slow
def test_a_run_from_images_to_samples_and_resumed(tmp_path, run):
    """A folder of images, the real networks, two worker processes, then one more step and an evaluation."""
    for number in range(300):
        path = tmp_path / "data" / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (number % 256, 100, 50)).save(path)
    (tmp_path / "data" / "bad.jpg").write_text("no image")
    words = ["--dataset", "folder", "--batch_size", "4", "--total_step", "2", "--sample_step", "1", "--log_step", "1",
             "--use_tensorboard", "true", "--device", "cpu"]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    assert "imsize=64" in out
    assert "skipped_images.txt" in err
    for path in ("samples/sagan_celeb/real.png", "samples/sagan_celeb/2_fake.png", "samples/sagan_celeb/2_ema.png",
                 "attn/sagan_celeb/2_G_attn2.png", "attn/sagan_celeb/2_D_attn1.png", "models/sagan_celeb/2_G.pth",
                 "models/sagan_celeb/2_D.pth", "models/sagan_celeb/2_state.pth", "logs/sagan_celeb/config.json",
                 "logs/sagan_celeb/metrics.jsonl", "logs/sagan_celeb/skipped_images.txt"):  # fmt: skip
        assert (tmp_path / path).stat().st_size > 0, path
    Generator().load_state_dict(torch.load(tmp_path / "models/sagan_celeb/2_G.pth", weights_only=True), strict=True)
    Discriminator().load_state_dict(torch.load(tmp_path / "models/sagan_celeb/2_D.pth", weights_only=True), strict=True)

    code, out, err = run(*words, "--total_step", "3", "--pretrained_model", "latest")
    assert code == 0, err
    assert "decoding" not in err  # the cache was opened
    lines = (tmp_path / "logs/sagan_celeb/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3]  # of losses and of samples

    code, out, err = run("--train", "false", "--device", "cpu")
    assert code == 0, err
    assert (tmp_path / "samples/sagan_celeb/test_3/grid.png").exists()


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@needs_signals
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_with_figures_and_ends_the_run(tmp_path, monkeypatch, capfd, number):
    """In this process, which sends the signal to itself; the next test signals one from outside."""

    def train_step(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return take_step(trainer)

    take_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", *TOY, "--log_step", "1", "--total_step", "9"])
    assert main.main() == 128 + number
    step = json.loads(log_lines(tmp_path / LOGS)[-1])["step"]
    assert step == 3  # the step is finished first
    assert f"--pretrained_model {step}" in capfd.readouterr().out
    for path in ("models/sagan_celeb/{}_state.pth", "models/sagan_celeb/{}_G.pth", "attn/sagan_celeb/{}_explorer.html",
                 "attn/sagan_celeb/{}_G_attn1.png", "attn/sagan_celeb/{}_D_attn2.png"):  # fmt: skip
        assert (tmp_path / path.format(step)).exists(), path
    report = (tmp_path / LOGS / "report.html").read_text()
    assert "stopped" in report and f"step {step:,} of" in report and "<li>ETA" not in report


@needs_signals
def test_lines_appear_at_once_and_a_run_under_nohup_outlives_its_terminal_and_their_reader(tmp_path, start_process):
    """In a pipe, without carriage returns; SIGTERM ends it with a checkpoint."""
    command = shlex.join([sys.executable, str(ROOT / "main.py"), *TOY, "--log_step", "1"])
    process = start_process(["sh", "-c", f'trap "" HUP; exec {command}'], tmp_path)
    assert process.stdout.readline().startswith("Network")
    progress = next(line for line in process.stderr if line.startswith("step "))
    assert process.poll() is None  # it had not ended, which would have flushed them
    os.kill(process.pid, signal.SIGHUP)
    process.stdout.close()
    process.stderr.close()
    steps = len(log_lines(tmp_path / LOGS))
    wait_for(lambda: len(log_lines(tmp_path / LOGS)) >= steps + 3, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / f"models/sagan_celeb/{len(log_lines(tmp_path / LOGS))}_state.pth").exists()
    assert "img/s" in progress and "\r" not in progress


@pytest.mark.parametrize("script", ["main.py", "export.py"])
def test_python_need_not_add_the_script_s_folder_to_its_path(tmp_path, script):
    subprocess.run([sys.executable, "-I", str(ROOT / script), "--help"], cwd=tmp_path, check=True, capture_output=True)


def test_a_notebook_s_streams_are_enough(tmp_path, monkeypatch, no_report):
    """They have neither `reconfigure` nor a terminal; `%run main.py` calls `main` like this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", *TOY, "--total_step", "2"])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        handlers = [signal.getsignal(number) for number in SIGNALS]
        assert main.main() == 0
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert "training finished" in out.getvalue()
    assert "step 2/2" in err.getvalue() and "\r" not in err.getvalue()


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 9, 1)])
def test_an_old_python_is_one_line(version):
    source = (ROOT / "main.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=version[:2])
    code = (
        f"import runpy, sys; sys.version_info = {version}; sys.modules['errors'] = None; "
        f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Python 3.10" in done.stderr


@pytest.fixture
def fail(tmp_path, monkeypatch, capfd):
    """A function that runs `main` and returns its one error line; the run may warn and write a cache, nothing else."""
    monkeypatch.chdir(tmp_path)

    def written():
        return sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)

    def fail(*words):
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        before = written()
        assert main.main() == 2
        *others, error = capfd.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert all("decoding" in line or line.startswith("warning: ") or not line for line in others)
        assert written() == before, "something was written"
        return error

    return fail


def test_the_options_of_the_images_reach_the_loader(tmp_path, make_config):
    """The middle of each image is red on the left and blue on the right, its frame is black; every other one smiles."""
    folder = tmp_path / "data" / "CelebA"
    folder.mkdir(parents=True)
    image = Image.new("RGB", (178, 218))
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
    assert (loader.images[:, :, 0] == torch.tensor([255, 0, 0])).all()
    assert (loader.images[:, :, -1] == torch.tensor([0, 0, 255])).all()
    batch = torch.cat([loader.batch(index)[0] for index in range(4)])
    assert {*batch[:, 0, 0, 0].tolist()} == {-1, 1}  # flipped ones are blue there
    assert (loader.seed, loader.holdout, len(loader)) == (3, 0.2, 2)


def test_training_images_in_a_result_folder_are_refused_and_left_alone(fail, tmp_path):
    """`fail` checks that nothing was removed or written."""
    for number in range(16):
        path = tmp_path / "samples/cats" / f"{number}_fake.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(path)
    words = [*SMALL, "--dataset", "folder", "--image_path", "samples/cats", "--overwrite", "true"]
    assert "samples/cats" in fail(*words, "--version", "cats")


def test_results_beside_the_images_are_not_trained_on(tmp_path, monkeypatch, capfd, no_report):
    """`cd pictures; main.py --image_path .`, three times."""
    monkeypatch.chdir(tmp_path)
    for number in range(16):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}_ema.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["main.py", *SMALL, "--dataset", "folder", "--image_path", ".", "--total_step", "2"]
    for options in ([], ["--overwrite", "true"], ["--version", "other"]):
        monkeypatch.setattr(sys, "argv", [*words, *options])
        assert main.main() == 0
        assert "16 images" in capfd.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("words, token", [
    ("", "--dataset toy, which needs no data"), ("", "celeba/img_align_celeba"),
    ("--dataset folder", "folder of images"),
    ("--dataset folder --image_path .", "no image"), ("--dataset toy --toy_num 3", "3 images"),
    ("--dataset toy --log_path " + 300 * "v", "vvv"), ("--dataset toy --pretrained_model 7", "--pretrained_model 7"),
    pytest.param("--dataset toy --sample_path /proc/samples", "/proc/samples",
                 marks=pytest.mark.skipif(not os.path.isdir("/proc"), reason="no folder that even root cannot write")),
    pytest.param("--dataset toy --device cuda", "--device auto",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")),
])  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(fail, words, token):
    assert token in fail(*SMALL, *words.split())


@pytest.mark.parametrize("option", ["sample_path", "attn_path", "model_save_path", "log_path", "cache_path"])
def test_a_path_that_is_a_file(fail, tmp_path, option):
    (tmp_path / "file").touch()
    token = "--cache_path" if option == "cache_path" else str(tmp_path / "file")
    assert token in fail(*TOY, f"--{option}", "file")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    train_in(folder, *TOY, "--total_step", "2")
    return folder


@pytest.fixture
def trained(finished, tmp_path):
    """The folder of the checkpoint of a finished run of two steps, all of whose files are copies."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "models" / "sagan_celeb"


@pytest.mark.parametrize("words, token", [
    ("", "--overwrite true"), ("--pretrained_model 7", ": 2"), ("--pretrained_model latest --z_dim 8", "--z_dim 16"),
    ("--train false --pretrained_model best", "--pretrained_model best"),
    ("--train false --metrics faces --dataset celeb", "no CelebA"),
])  # fmt: skip
def test_a_mistake_beside_earlier_results_is_one_line(trained, fail, words, token):
    assert token in fail(*TOY, *words.split())


@pytest.mark.parametrize("name, is_group", [("SIGINT", True), ("SIGTERM", False)])
@needs_signals
def test_a_signal_while_decoding_ends_the_run_and_leaves_no_files(tmp_path, start, name, is_group):
    """A terminal signals the whole process group, the workers too; test_decoding.py has the other signals."""
    number = signal.Signals[name]
    process = start(*SMALL, "--dataset", "toy", "--toy_num", "500000", "--num_workers", "4")
    wait_for(lambda: [*tmp_path.glob("cache/*.building-*/images.bin")], process)
    time.sleep(1)
    os.killpg(process.pid, number) if is_group else os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert not list((tmp_path / "cache").iterdir())


def test_the_weights_of_a_run_depend_on_its_seed(tmp_path):
    weights = {}
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        (tmp_path / name).mkdir()
        train_in(tmp_path / name, *TOY, "--seed", seed, "--total_step", "1")
        weights[name] = torch.load(tmp_path / name / "models/sagan_celeb/1_G.pth", weights_only=True)["last.0.weight"]
    assert torch.equal(weights["first"], weights["again"]) and not torch.equal(weights["first"], weights["other"])


def test_precision_and_determinism_are_those_of_the_options(tmp_path, capfd):
    try:
        train_in(tmp_path, *TOY, "--total_step", "1", "--precision", "bf16", "--deterministic", "true")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "on cpu in bf16" in capfd.readouterr().out
    assert torch.load(tmp_path / "models/sagan_celeb/1_state.pth", weights_only=True)["config"]["precision"] == "bf16"


def test_auto_starts_or_resumes(tmp_path, monkeypatch, capfd, no_report):
    monkeypatch.chdir(tmp_path)
    for steps in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["main.py", *TOY, "--total_step", steps, "--pretrained_model", "auto"])
        assert main.main() == 0
        assert ("resuming from step 1" in capfd.readouterr().out) == (steps == "2")
    assert (tmp_path / "models/sagan_celeb/2_state.pth").exists()


def test_a_run_that_diverges_saves_nothing(fail, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", *TOY, "--total_step", "2", "--d_lr", "1e38"])
    monkeypatch.chdir(tmp_path)
    assert main.main() == 2
    assert not list(tmp_path.rglob("*.pth"))


def test_evaluating_a_checkpoint_without_images_and_with_metrics(trained, tmp_path, monkeypatch, capfd):
    """Most results need no training images; the face rate needs neither a download nor weights."""
    monkeypatch.setattr("tester.SUMMARY_IMAGES", 32)
    monkeypatch.setattr("visuals.playground.MAX_SIDE", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", *SMALL, "--train", "false", "--dataset", "folder"])
    assert main.main() == 0
    out, err = capfd.readouterr()
    assert "warning: " in err and "nearest.png" in err
    assert "test_2" in out
    folder = tmp_path / "samples/sagan_celeb/test_2"
    assert not (folder / "nearest.png").exists()
    words = ["--train", "false", "--metrics", "faces", "--metric_num", "12", "--pretrained_model", "2"]
    monkeypatch.setattr(sys, "argv", ["main.py", *TOY, *words])
    assert main.main() == 0
    assert "faces" in capfd.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["images"] == 12
    assert (folder / "nearest.png").exists()


def test_metrics_need_images_and_best_needs_a_best_checkpoint(trained, fail):
    assert "no CelebA" in fail(*SMALL, "--train", "false", "--metrics", "faces", "--dataset", "celeb")
    assert "--pretrained_model best" in fail(*TOY, "--train", "false", "--pretrained_model", "best")
