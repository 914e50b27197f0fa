"""Shared by the tests: small networks, toy runs in a temporary folder, a browser."""

import base64
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import main
import tester
from data_loader import Loader
from datasets.sources import find_source
from errors import STOP_SIGNALS, Tolerate, stop_signals
from exporting.files import safetensors_bytes
from metrics.scores import compute_scores
from parameter import Config
from spectral import fold_spectral_norm
from trainer import Trainer
from training import recorder
from training.distributed import Ranks
from training.models import MODELS
from utils import set_backends, setup_device
from visuals import playground

torch.set_num_threads(1)  # the networks are small: a second thread costs more than it saves
Tolerate.tolerated = OSError  # so that a bug in what draws and reports fails a test
for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup; the programs that tests start would inherit it
        signal.signal(number, lambda *_: None)
SMALL = dict(imsize=32, z_dim=16, g_conv_dim=8, d_conv_dim=8, batch_size=4, dataset="toy", toy_num=20, num_workers=0,
             min_save_step=1)  # fmt: skip
WORDS = [*(f"--{name}={value}" for name, value in SMALL.items()), "--device=cpu"]  # the same on the command line
ROOT = Path(__file__).parent.parent
D_STATS = {"d_loss_real", "d_loss_fake", "d_loss", "d_real", "d_fake", "d_sign"}  # of an update of D
BROWSER_FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1280,1050")  # fmt: skip


def use_small_extractor(patch: pytest.MonkeyPatch) -> None:
    """In place of Inception and VGG16, which are downloads: 16 features of color and edges, of fixed random weights."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from metrics import extractors

    class SmallExtractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.filters = torch.nn.Conv2d(3, 16, 3, 2, bias=False)
            self.filters.weight.data = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0))

        get_provided_features_list = staticmethod(lambda: ("features",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "features")

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.relu(self.filters(images.float() / 255)).mean((2, 3)),)

    for name in ("inception-v3-compat", "vgg16"):
        patch.setitem(FEATURE_EXTRACTORS_REGISTRY, name, SmallExtractor)
    patch.setattr(extractors, "fetch_weights", lambda names: None)


@pytest.fixture
def small_extractor(monkeypatch):
    """See `use_small_extractor`."""
    pytest.importorskip("torch_fidelity")
    use_small_extractor(monkeypatch)


def generator_of(images: torch.Tensor):
    """A generator that returns these images (N, S, S, 3) uint8."""
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return lambda start, count: floats[start : start + count]


@pytest.fixture
def compute(tmp_path):
    """`compute_scores` of a generator and real images, with a cache in a temporary folder."""

    def run(generate, real, names, fingerprint="real", **changes) -> dict[str, float]:
        options = {"metric_num": 64, "batch_size": 16, "cache_path": str(tmp_path / "cache")} | changes
        loader = Namespace(images=real, device=torch.device("cpu"), source=Namespace(name="", fingerprint=fingerprint))
        return compute_scores(Namespace(metrics=",".join(names), **options), generate, loader)

    return run


def toy_config(folder: Path, **changes) -> Config:
    """The configuration of a small toy run of three steps, which writes below a folder."""
    paths = {f"{name}_path": str(folder / f"{name}_path") for name in ("cache", "sample", "attn", "model_save", "log")}
    return Config(**(SMALL | {"device": "cpu", "total_step": 3} | paths | changes))


@pytest.fixture
def make_config(tmp_path):
    """A function that makes configurations of small toy runs, which write below a temporary folder."""
    return lambda **changes: toy_config(tmp_path, **changes)


@pytest.fixture
def no_report(monkeypatch):
    """Leave the report empty: drawing its curves takes half of a small run's time."""
    monkeypatch.setattr(recorder, "report_page", lambda *_: "")


@pytest.fixture
def make_trainer(make_config, no_report):
    """A function that makes trainers of small toy runs, whose report is empty."""
    return lambda **changes: build_trainer(make_config(**changes))


@pytest.fixture
def train(make_trainer):
    """A function that takes a small run to its end, and returns its trainer."""

    def train(**changes):
        trainer = make_trainer(**changes)
        assert trainer.train() == 0
        return trainer

    return train


def build_trainer(config: Config, ranks: Ranks = Ranks()) -> Trainer:  # noqa: B008  it is immutable
    """As `main.run` does."""
    device = setup_device(config.device)
    precision = set_backends(device, config.precision, config.deterministic)
    torch.manual_seed(config.seed)
    return main.make_trainer(config, device, precision, ranks)


def run_main(folder: Path, *words: str, program=main) -> tuple[int, str, str]:
    """Run main.py or another program in a folder, in this process; return its exit code, its output and its errors.

    As in a notebook: the streams have neither `reconfigure` nor a terminal.
    """
    out, err = io.StringIO(), io.StringIO()
    handlers = [signal.getsignal(name) for name in stop_signals()]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *words])
        try:
            code = program.main()
        except SystemExit as error:
            code = error.code
    assert [signal.getsignal(name) for name in stop_signals()] == handlers
    return code, out.getvalue(), err.getvalue()


def train_in(folder: Path, *words: str) -> None:
    """Run main.py with these words in a folder, in this process, to its end. The report is left empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "report_page", lambda *_: "")
        code, out, err = run_main(folder, *words)
    print(out)
    assert code == 0, err


@pytest.fixture(autouse=True)
def nondeterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fewer_images(monkeypatch):
    """An evaluation of few images."""
    monkeypatch.setattr(tester, "SUMMARY_IMAGES", 64)  # two batches
    monkeypatch.setattr(playground, "MAX_SIDE", 4)
    monkeypatch.setattr(playground, "MAX_STEPS", 1)


@pytest.fixture
def toy(tmp_path):
    """A function that opens a loader of 10 toy faces in batches of 4, so two batches per epoch."""
    return lambda **options: Loader(
        find_source("toy", toy_num=10), 32, 4, **(dict(cache_path=str(tmp_path / "cache"), num_workers=0) | options)
    ).open()


def random_generator(model: str, imsize: int, num_classes: int = 0, attention: str = "full") -> torch.nn.Module:
    """A small generator, z (B, 16), in evaluation mode, of which nothing is as it was initialized."""
    torch.manual_seed(0)
    G = MODELS[model].Generator(imsize, 16, 8, num_classes=num_classes, has_attention=attention == "full")
    with torch.no_grad():
        for name, parameter in G.named_parameters():  # gamma is 0 at first
            parameter.fill_(0.7) if "gamma" in name else parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for _ in range(3):  # power iterations, statistics of BatchNorm
            G(*generator_inputs(8, num_classes))
    return G.eval()


def generator_inputs(count: int, num_classes: int = 0) -> tuple[torch.Tensor, ...]:
    """z (count, 16) and, if there are classes, labels (count,)."""
    return torch.randn(count, 16), *((torch.arange(count) % num_classes,) if num_classes else ())


def export_metadata(
    model: str = "sagan", imsize: int = 32, num_classes: int = 0, attention: str = "full", **changes: str
) -> dict[str, str]:
    """The metadata of an exported `random_generator`, with the keys and values of every version of the program."""
    return {
        "content": "sagan-generator", "content_version": "1", "model": model, "image_size": str(imsize), "z_dim": "16",
        "conv_dim": "8", "num_classes": str(num_classes), "attention": attention,
        "classes": json.dumps([f"class {number}" for number in range(num_classes)]), "step": "7", "ema": "true",
        "checksum": "1", "images": "(B, 3, image_size, image_size), RGB, from -1 to 1", "dataset": "toy",
        "data": "faces drawn by the training program",
        "data_license": "They are drawn by a program under the MIT license.",
    } | changes  # fmt: skip


def write_export(path: Path, *network, **changes: str) -> torch.nn.Module:
    """Write generator.safetensors of a `random_generator`, with changed metadata; return that network."""
    G = random_generator(*network)
    metadata = export_metadata(*network) | changes
    path.write_bytes(safetensors_bytes(fold_spectral_norm(copy.deepcopy(G)).state_dict(), metadata))
    return G


def make_pictures(folder, names):
    """Write images, or files that are none, and return the content of all files by path."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".webp"):
            Image.new("RGB", (40, 50), (number * 20 % 256, 20, 99)).save(path)
        else:
            path.write_bytes(b"x")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_untouched(files):
    for path, content in files.items():
        assert path.read_bytes() == content, path


def make_folders(config):
    for folder in config.folders:
        folder.mkdir(parents=True)
    return config


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium or Chrome with its driver (Debian: chromium-driver), whose log can be read."""
    pytest.importorskip("selenium")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (binary or driver):
        pytest.skip("no browser: neither chromium nor google-chrome nor chromedriver is on the PATH")
    options = ChromeOptions()
    for flag in (*BROWSER_FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if binary:
        options.binary_location = binary
    with Chrome(options, Service(driver)) as chrome:
        chrome.get("about:blank")
        chrome.get_log("browser")  # of the browser's own first page, which wants the network
        yield chrome


@pytest.fixture
def quiet_browser(browser):
    """The browser. After the test, its page must have logged nothing and requested nothing."""
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


@pytest.fixture
def start_process():
    """A function that starts a program in a session of its own. What still runs of it after the test is ended."""
    started = []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start(command, folder, **options):
        started.append(subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # launchers pass it on to their processes, which are in sessions of their own
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=40)
        with suppress(ProcessLookupError):
            process.kill() if sys.platform == "win32" else os.killpg(process.pid, signal.SIGKILL)


def wait_for(happened, process=None, seconds=150):
    """Wait until something happened, in a process that goes on or in another thread."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_lines(folder):
    """The lines of a run's log that are written so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def log(folder, name="step"):
    """The entries of a run's log that have a value of this name."""
    return [entry for entry in map(json.loads, log_lines(folder)) if name in entry]


def weights_of(trainer):
    """Copies of all weights and buffers of G, D and the EMA."""
    return copy.deepcopy([network.state_dict() for network in (trainer.G, trainer.D, trainer.ema.network)])


def assert_same(first, second):
    """Numbers and tensors in dictionaries and lists, bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_same_weights(first, second):
    assert_same(weights_of(first), weights_of(second))


def inputs_of(trainer, steps):
    """What the updates of some steps are given, those of D and then that of G; they are not run."""
    seen, zero = [], torch.zeros(())
    trainer.updates = lambda inputs: seen.append(inputs) or {"d_loss": zero, "g_loss": zero}
    for _ in range(steps):
        trainer.train_step()
    return seen


def assert_same_inputs(first, second, names=("real", "z")):
    for one, other in zip(first, second, strict=True):
        assert_same(*([given[name] for name in names if name in one] for given in (one, other)))


def page_data(path):
    """What the script of an explorer or a playground reads."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])


def page_pixels(text: str, size: int) -> np.ndarray:
    """The images of a class in the data of a playground, (T, S, S, 3)."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(-1, size, size, 3).astype(int)
