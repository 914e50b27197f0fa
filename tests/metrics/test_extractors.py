import email.message
import hashlib
import io
import socket
import sys
import urllib.error

import pytest
import torch
from conftest import save_script

from errors import UserError
from metrics.scores import check_requirements
from utils import progress

pytest.importorskip("torch_fidelity")
CPU = torch.device("cpu")
SIZE = 16


class NotAMatrix(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class Fails(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() @ torch.zeros(7, 7)


class Raises(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ValueError("wants other images")


class NotFinite(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1) / 0


def error_of(names: list[str], feature_extractor=None) -> str:
    """The message with which `check_requirements` refuses; one line."""
    with pytest.raises(UserError) as error:
        check_requirements(names, SIZE, CPU, feature_extractor)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_image_source_starts_again_for_the_next_extractor():
    from metrics.extractors import ImageSource  # imported late: needs torch-fidelity

    images = torch.arange(10)
    with progress(None, "test", "img", total=0) as bar:
        source = ImageSource(lambda start, count: images[start : start + count], 10, bar)
        for _ in range(2):
            assert torch.cat([source(torch.zeros(size, 1)) for size in (4, 4, 2)]).equal(images)
        assert bar.total == bar.n == 20


@pytest.mark.parametrize("module", [NotAMatrix, Fails, Raises, NotFinite])
def test_torchscript_files_without_usable_features_are_refused(module, tmp_path):
    path = save_script(module(), tmp_path / "script.pt")
    assert f"--feature_extractor {path}" in error_of(["fid"], path)


@pytest.mark.parametrize("content", ["none", "empty", "text", "truncated", "state dict"])
def test_files_that_are_not_torchscript_are_refused(content, extractor, tmp_path):
    path = tmp_path / "script.pt"
    if content == "state dict":
        torch.save({"a": torch.zeros(2)}, path)
    elif content != "none":
        whole = extractor.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2]}[content])
    assert str(path) in error_of(["fid"], path)


def test_missing_or_too_old_torch_fidelity(monkeypatch):
    monkeypatch.delitem(sys.modules, "metrics.extractors", raising=False)
    monkeypatch.delattr("torch_fidelity.metric_prc.KEY_METRIC_PRECISION")
    assert "torch-fidelity>=0.4" in error_of(["kid", "isc"])
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "torch-fidelity>=0.4" in error_of(["fid"])


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The path and the content of Inception weights that are not downloaded yet. No URL can be opened."""
    content = b"weights"
    name = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("metrics.extractors.URL_INCEPTION_V3", f"https://example.org/a/{name}")
    monkeypatch.setattr("torch.hub.urlopen", None)
    return tmp_path / "torch" / "hub" / "checkpoints" / name, content


class Response(io.BytesIO):
    def info(self):
        return email.message.Message()


def test_a_failed_download_says_which_file_to_put_where(weights, monkeypatch):
    def urlopen(request):
        assert 0 < socket.getdefaulttimeout() <= 30
        raise urllib.error.URLError(OSError("no route to host"))

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    path, _ = weights
    message = error_of(["fid", "kid"])
    for token in ("--metrics fid,kid", "no route to host", f"https://example.org/a/{path.name}", str(path.parent)):
        assert token in message
    assert socket.getdefaulttimeout() is None


def test_weights_are_downloaded_once(weights, monkeypatch):
    path, content = weights
    monkeypatch.setattr("torch.hub.urlopen", lambda request: Response(content))
    check_requirements(["fid"], SIZE, CPU)
    assert path.read_bytes() == content
    monkeypatch.setattr("torch.hub.urlopen", None)
    check_requirements(["fid"], SIZE, CPU)


def test_a_truncated_download_leaves_no_file(weights, monkeypatch):
    path, content = weights
    monkeypatch.setattr("torch.hub.urlopen", lambda request: Response(content[:3]))
    assert path.name in error_of(["fid"])
    assert not list(path.parent.iterdir())


def test_damaged_weights_are_refused(weights):
    path, content = weights
    path.parent.mkdir(parents=True)
    path.write_bytes(content[:4])
    assert str(path) in error_of(["fid"])
