import email.message
import hashlib
import io
import random
import socket
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallExtractor, save_script
from PIL import Image

from errors import UserError
from metrics.scores import check_requirements as prepare
from metrics.scores import compute_scores as evaluate
from utils import eval_mode
from visuals.figures import to_pixels

pytest.importorskip("torch_fidelity")
CPU = torch.device("cpu")
SIZE, COUNT = 16, 64


class NotFeatures(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class Fails(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() @ torch.zeros(7, 7)


class NotFinite(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1) / 0


def pictures(seed: int, shift: float = 0) -> np.ndarray:
    """Soft random pictures (COUNT, SIZE, SIZE, 3) uint8, brighter by `shift`."""
    noise = np.random.default_rng(seed).normal(110 + shift, 40, (COUNT, 4, 4, 3))
    return noise.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2).clip(0, 255).astype(np.uint8)


def generator(images: np.ndarray):
    """A generator that makes these images."""
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return lambda start, count: floats[start : start + count]


@pytest.fixture
def measure(tmp_path, extractor):
    """`evaluate` with the small extractor and a cache in a temporary folder."""

    def run(generate, real, names, **changes) -> dict[str, float]:
        options = dict(
            num_images=COUNT,
            batch_size=16,
            device=CPU,
            cache_path=tmp_path / "cache",
            real_name="real",
            feature_extractor=extractor,
        )
        return evaluate(generate, real, names, **(options | changes))

    return run


def features_of(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return SmallExtractor()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID of features (N, F), by the eigenvalues of a symmetric matrix."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID of features (N, F): the unbiased squared MMD under (xy / F + 1)^3."""
    aa, bb, ab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    pairs = len(a) * (len(a) - 1)
    return (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / pairs - 2 * ab.mean()


def test_values_are_those_of_the_formulas(measure):
    fake, real = pictures(1, 20), pictures(0)
    scores = measure(generator(fake), real, ["fid", "kid", "isc", "prc"])
    assert list(scores) == ["fid", "kid", "kid_std", "isc", "isc_std", "precision", "recall", "f_score"]
    a, b = features_of(fake), features_of(real)
    assert scores["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert scores["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    assert scores["kid_std"] < 1e-3 * scores["kid"]  # each subset is the whole set
    assert 1 < scores["isc"] < 16
    assert 0 < scores["precision"] < 1


def test_a_set_against_itself_and_one_that_comes_nearer(measure):
    real = pictures(0)
    same = measure(generator(real), real, ["fid", "kid", "prc"])
    assert abs(same["fid"]) < 1e-6
    assert same["kid"] < 1e-3
    assert same["precision"] == same["recall"] == 1
    far, near = (measure(generator(pictures(1, shift)), real, ["fid", "kid", "prc"]) for shift in (60, 15))
    assert far["fid"] > near["fid"] > same["fid"]
    assert far["kid"] > near["kid"]
    assert far["recall"] < near["recall"]


def test_batch_size_changes_nothing(measure):
    names = ["fid", "kid", "isc", "prc"]
    runs = [
        measure(generator(pictures(1)), pictures(0), names, batch_size=size, real_name=str(size)) for size in (7, 500)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-5)


def test_numbers_of_images(measure, extractor):
    fake, real = pictures(1), torch.from_numpy(pictures(0))
    few = measure(generator(fake), real, ["fid", "kid"], num_images=20)  # 20 of both, the real ones from all over
    a, b = features_of(fake), features_of(real.numpy())
    assert few["fid"] == pytest.approx(frechet_distance(a[:20], b[:60:3]), rel=1e-4)
    fewer_real = measure(generator(fake), real[:30], ["fid", "kid", "prc"])  # 64 against all 30
    assert fewer_real["fid"] == pytest.approx(frechet_distance(a, b[:30]), rel=1e-4)
    for arguments in ({"num_images": 9}, {"real": real[:9]}):
        with pytest.raises(UserError, match="needs 10 images at least, not 9"):
            measure(**({"generate": generator(fake), "real": real, "names": ["fid"]} | arguments))


def test_real_images_are_read_once(measure, tmp_path):
    fake, names = generator(pictures(1)), ["fid", "kid", "prc"]
    first = measure(fake, pictures(0), names)
    nothing = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8)  # would give other numbers
    assert measure(fake, nothing, names) == first
    assert measure(fake, nothing, names, real_name="other") != first
    for path in (tmp_path / "cache" / "metrics").iterdir():
        path.write_bytes(path.read_bytes()[:100])  # cut off: made anew
    assert measure(fake, pictures(0), names) == first


def test_cache_is_for_one_extractor_and_one_count(measure, tmp_path):
    fake, real = generator(pictures(1)), pictures(0)
    first = measure(fake, real, ["fid"])
    module = SmallExtractor()
    module.filters.weight.data *= 2
    assert measure(fake, real, ["fid"], feature_extractor=save_script(module, tmp_path / "other.pt")) != first
    assert measure(fake, real, ["fid"], num_images=30) != first


def test_images_are_rounded_as_samples_are(measure):
    images = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    scores = measure(lambda start, count: images[start : start + count], to_pixels(images), ["fid"])
    assert abs(scores["fid"]) < 1e-6


def state_of_everything() -> list:
    cudnn = torch.backends.cudnn
    switches = [cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
    numbers = [torch.rand(3).tolist(), np.random.random(), random.random()]
    return [*switches, torch.is_grad_enabled(), warnings.filters[:], *numbers]


@pytest.fixture(params=[False, True])
def switches(request):
    """cuDNN's search for algorithms and TF32, both off and both on."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = request.param
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_random_state_and_switches_are_as_before(measure, switches):
    def seed():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    def generate(start, count):
        assert not torch.backends.cudnn.benchmark and not torch.backends.cuda.matmul.allow_tf32
        np.random.random(), random.random()
        return torch.rand(count, 3, SIZE, SIZE) * 2 - 1

    seed()
    before = state_of_everything()
    seed()
    measure(generate, pictures(0), ["fid", "kid", "isc", "prc"])
    assert state_of_everything() == before
    with pytest.raises(ZeroDivisionError):
        measure(lambda start, count: 1 / 0, pictures(0), ["fid"])
    seed()
    assert state_of_everything() == before


def test_training_goes_on_as_if_nothing_had_happened(make_trainer, measure):
    z = torch.randn(COUNT, 16, generator=torch.Generator().manual_seed(0))
    real = torch.from_numpy(pictures(0).repeat(2, 1).repeat(2, 2))

    def train(evaluate_after: int | None) -> dict[str, float]:
        trainer = make_trainer()
        average = trainer.ema.network
        for step in range(3):
            stats = trainer._take_step()
            trainer.step += 1
            if step == evaluate_after:
                with eval_mode(average):
                    measure(lambda start, count: average(z[start : start + count]), real, ["fid", "prc"])
        return {name: float(value) for name, value in stats.items()}

    assert train(None) == train(1)


def test_missing_or_too_old_library(monkeypatch, tmp_path):
    needed = '--metrics kid,isc needs torch-fidelity>=0.4: pip install "torch-fidelity>=0.4"'
    monkeypatch.delattr("torch_fidelity.KEY_METRIC_PRECISION")
    with pytest.raises(UserError, match=needed):
        prepare(["kid", "isc"], image_size=SIZE, device=CPU, cache_path=tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=needed):
        prepare(["kid", "isc", "faces"], image_size=SIZE, device=CPU, cache_path=tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A machine without downloaded weights, on which the Inception weights are the file that is returned."""
    content = b"weights"
    digits = hashlib.sha256(content).hexdigest()[:8]
    module = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(f"{module}.URL_INCEPTION_V3", f"https://example.org/a/weights-{digits}.pth")
    return f"weights-{digits}.pth", content


def prepare_fid(tmp_path) -> None:
    prepare(["fid", "kid"], image_size=SIZE, device=CPU, cache_path=tmp_path / "cache")


class Response(io.BytesIO):
    def info(self):
        return email.message.Message()


def test_weights_without_a_network(hub, tmp_path, monkeypatch):
    def urlopen(request):
        assert 0 < socket.getdefaulttimeout() <= 30
        raise urllib.error.URLError(OSError("no route to host"))

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    with pytest.raises(UserError) as error:
        prepare_fid(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--metrics fid,kid", "no route to host", f"https://example.org/a/{hub[0]}", str(tmp_path / "cache")):
        assert part in message
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("cut", [3, 7])
def test_weights_are_downloaded_whole_or_not_at_all(hub, cut, tmp_path, monkeypatch):
    name, content = hub
    monkeypatch.setattr("torch.hub.urlopen", lambda request: Response(content[:cut]))
    if cut < len(content):
        with pytest.raises(UserError, match="cannot be downloaded"):
            prepare_fid(tmp_path)
        assert not list((tmp_path / "cache").iterdir())
        return
    prepare_fid(tmp_path)
    assert (tmp_path / "cache" / name).read_bytes() == content
    monkeypatch.setattr("torch.hub.urlopen", None)
    prepare_fid(tmp_path)  # from the cache


def test_weights_that_are_there(hub, tmp_path, monkeypatch):
    name, content = hub
    monkeypatch.setattr("torch.hub.urlopen", None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    prepare_fid(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).write_bytes(content[:4])  # this folder comes first
    with pytest.raises(UserError, match="is damaged"):
        prepare_fid(tmp_path)


def test_bad_extractors(measure, extractor, tmp_path):
    whole = extractor.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    cases = {"no file": None, "cut off": whole[: len(whole) // 2], "a text": b"hello", "flipped": bytes(flipped)}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    torch.save({"a": torch.zeros(2)}, tmp_path / "a state dict")
    save_script(NotFeatures(), tmp_path / "no features")
    save_script(Fails(), tmp_path / "fails")
    save_script(NotFinite(), tmp_path / "not finite")
    for name in (*cases, "a state dict", "no features", "fails", "not finite"):
        with pytest.raises(UserError) as error:
            measure(generator(pictures(1)), pictures(0), ["fid"], feature_extractor=tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_cache_that_cannot_be_written(measure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        measure(generator(pictures(1)), pictures(0), ["fid"], cache_path=tmp_path / "file")


def test_generator_that_diverged(measure):
    with pytest.raises(UserError, match="not finite"):
        measure(lambda start, count: torch.full((count, 3, SIZE, SIZE), torch.nan), pictures(0), ["fid"])


def test_silence(measure, capfd):
    measure(generator(pictures(1)), pictures(0), ["fid", "kid", "isc", "prc"])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.strip() == ""


class TestFaces:
    @pytest.fixture(autouse=True)
    def opencv(self):
        pytest.importorskip("cv2")

    def test_faces_are_found_in_faces_and_not_in_noise(self, tmp_path):
        grid = np.asarray(Image.open(Path(__file__).parents[2] / "docs" / "samples.png").convert("RGB"))
        faces = np.stack([grid[2 + 66 * r : 66 + 66 * r, 2 + 66 * c : 66 + 66 * c] for r in range(8) for c in range(8)])
        noise = np.random.default_rng(0).integers(0, 256, faces.shape, dtype=np.uint8)
        options = dict(num_images=64, batch_size=10, device=CPU, cache_path=tmp_path, real_name="noise")
        scores = evaluate(generator(faces), noise, ["faces"], **options)
        assert scores["faces"] >= 0.8
        assert scores["faces_real"] <= 0.05
        assert evaluate(generator(noise), faces, ["faces"], **options)["faces_real"] == scores["faces_real"]  # cached

    def test_missing_or_too_new_opencv(self, monkeypatch, tmp_path):
        monkeypatch.delattr("cv2.CascadeClassifier")
        needed = '--metrics faces needs opencv-python-headless<5: pip install "opencv-python-headless<5"'
        with pytest.raises(UserError, match=needed):
            prepare(["faces"], image_size=SIZE, device=CPU, cache_path=tmp_path)
        monkeypatch.setitem(sys.modules, "cv2", None)
        with pytest.raises(UserError, match=needed):
            prepare(["faces"], image_size=SIZE, device=CPU, cache_path=tmp_path)
