import errno
import io
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import generator_of
from torch import Tensor

from errors import UserError

registry = pytest.importorskip("torch_fidelity.registry")
frechet_distance = pytest.importorskip("metrics.opencv").frechet_distance  # tested in test_opencv.py
pytestmark = pytest.mark.usefixtures("small_extractor")
SIZE, COUNT = 16, 64
ALL = ["fid", "kid", "isc", "prc"]


def images_of(seed: int, shift: float = 0) -> Tensor:
    """Random images (COUNT, SIZE, SIZE, 3) uint8 of 4x4 blocks, brighter by `shift`."""
    noise = np.random.default_rng(seed).normal(110 + shift, 40, (COUNT, 4, 4, 3))
    return torch.from_numpy(noise.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2).clip(0, 255).astype(np.uint8))


def features_of(images: Tensor) -> np.ndarray:
    extractor = registry.FEATURE_EXTRACTORS_REGISTRY["vgg16"]("vgg16", ("features",))
    with torch.no_grad():
        return extractor(images.permute(0, 3, 1, 2))[0].double().numpy()


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID of features (N, F): the unbiased squared MMD under (xy / F + 1)^3."""
    aa, bb, ab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    pairs = len(a) * (len(a) - 1)
    return (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / pairs - 2 * ab.mean()


def share_within(a: np.ndarray, b: np.ndarray) -> float:
    """Precision of features a for b, or recall for a of b: the share nearer to some b than its third neighbor."""
    among, between = (np.linalg.norm(x[:, None] - b, axis=2) for x in (b, a))
    return (between <= np.sort(among)[:, 3]).any(1).mean()


def test_scores_equal_their_formulas(compute, capfd, recwarn):
    fake, real = images_of(1, 20), images_of(0)
    scores = compute(generator_of(fake), real, ALL)
    assert not recwarn.list and not "".join(capfd.readouterr()).strip()
    assert list(scores) == ["fid", "kid", "isc", "isc_std", "precision", "recall", "f_score"]
    a, b = features_of(fake), features_of(real)
    assert scores["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert scores["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    precision, recall = share_within(a, b), share_within(b, a)
    assert 1 > precision != recall and (scores["precision"], scores["recall"]) == pytest.approx((precision, recall))
    assert scores["f_score"] == pytest.approx(2 / (1 / precision + 1 / recall)) and 1 < scores["isc"] < 16
    assert compute(generator_of(fake), real[:40], ["kid"])["kid_std"] > 0  # over subsets that differ
    again = compute(generator_of(fake), real, ALL, batch_size=7, fingerprint="again")
    assert again == pytest.approx(scores, rel=1e-4, abs=1e-5)


def test_number_of_images(compute):
    """One cache holds the features of each number."""
    fake, real = images_of(1), images_of(0)
    a, b = features_of(fake), features_of(real)
    for count in (COUNT, 20, 40):  # of both; the real ones are evenly spaced over all 64
        few = compute(generator_of(fake), real, ["fid", "kid"], metric_num=count)
        chosen = b[[index * COUNT // count for index in range(count)]]
        assert few["fid"] == pytest.approx(frechet_distance(a[:count], chosen), rel=1e-4)
    fewer_real = compute(generator_of(fake), real[:40], ["fid", "kid", "prc"])  # 64 against all 40
    assert fewer_real["fid"] == pytest.approx(frechet_distance(a, b[:40]), rel=1e-4)
    for images, count in ((real, 9), (real[:9], COUNT)):
        with pytest.raises(UserError, match="10 training images"):
            compute(generator_of(fake), images, ["fid"], metric_num=count)


def test_features_of_real_images_are_cached_or_a_warning_says_that_they_cannot_be(compute, tmp_path, capsys):
    fake, names = generator_of(images_of(1)), ["fid", "kid", "prc"]
    first = compute(fake, images_of(0), names)
    black = torch.zeros(COUNT, SIZE, SIZE, 3, dtype=torch.uint8)
    assert compute(fake, black, names) == first
    assert compute(fake, black, names, fingerprint="other") != first != compute(fake, black[:, ::2, ::2], names)
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert compute(fake, images_of(0), names, cache_path=str(tmp_path / "file")) == first
    assert capsys.readouterr().err.count("warning") == 1


def test_rng_state_and_backend_flags_are_restored(compute, monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = (cudnn, "benchmark"), (cudnn, "allow_tf32"), (matmul, "allow_tf32")

    def generate(start, count):
        assert not any((*(getattr(*flag) for flag in flags), torch.is_grad_enabled(), not cudnn.deterministic))
        return torch.rand(count, 3, SIZE, SIZE) * 2 - 1

    def state() -> list:
        settings = [*(getattr(*flag) for flag in flags), cudnn.enabled, cudnn.deterministic, torch.is_grad_enabled()]
        return [settings, warnings.filters[:], torch.get_rng_state().tolist(), str(np.random.get_state()),
                random.getstate()]  # fmt: skip

    for setting in (True, False):
        monkeypatch.setattr(cudnn, "benchmark", setting)
        monkeypatch.setattr(cudnn, "allow_tf32", setting)
        matmul.allow_tf32 = setting  # at last False, the default
        before = state()
        compute(generate, images_of(0), ALL)
        with pytest.raises(ZeroDivisionError):
            compute(lambda start, count: 1 / 0, images_of(0), ["fid"])
        assert state() == before


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() > 500:
            raise OSError(errno.ENOSPC, "full")
        return super().write(data)


def test_what_a_user_can_mend_is_one_line(compute, monkeypatch):
    with pytest.raises(UserError, match="NaN"):
        compute(lambda start, count: torch.full((count, 3, SIZE, SIZE), torch.nan), images_of(0), ["fid"])
    monkeypatch.setattr("torch_fidelity.utils.torch_atomic_save", lambda features, _: torch.save(features, FullDisk()))
    with pytest.raises(UserError, match="--cache_path"):
        compute(generator_of(images_of(1)), images_of(0), ["fid", "kid"])
