import email.message
import hashlib
import io
import socket
import sys
import urllib.error

import pytest
import torch

from errors import UserError
from metrics.scores import check_metrics
from parameter import Config
from utils import progress

pytest.importorskip("torch_fidelity")


def check(names: str) -> None:
    check_metrics(Config(metrics=names), torch.device("cpu"))


def test_image_source_starts_again_for_the_next_extractor():
    from metrics.extractors import ImageSource  # imported late: needs torch-fidelity

    images = torch.arange(10)
    with progress(None, "test", "img", total=0) as bar:
        source = ImageSource(lambda start, count: images[start : start + count], 10, bar)
        for _ in range(2):
            assert torch.cat([source(torch.zeros(size, 1)) for size in (4, 4, 2)]).equal(images)
        assert bar.total == bar.n == 20


@pytest.mark.parametrize("module, missing, names, package", [
    ("metrics.extractors", ("torch_fidelity", "torch_fidelity.metric_prc.KEY_METRIC_PRECISION"), "kid,isc",
     "torch-fidelity>=0.4"),
    ("metrics.opencv", ("cv2", "cv2.CascadeClassifier"), "faces,hog", "opencv-python-headless<5"),
])  # fmt: skip
def test_a_library_that_is_missing_or_of_another_version(module, missing, names, package, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.delitem(sys.modules, module, raising=False)
    library, attribute = missing
    for remove in (lambda: monkeypatch.delattr(attribute), lambda: monkeypatch.setitem(sys.modules, library, None)):
        remove()
        with pytest.raises(UserError, match=f"--metrics {names} needs {package}"):
            check(names)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The path of Inception weights that are not there, and a function that sets what their download gives."""
    content = b"weights"
    name = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("metrics.extractors.URL_INCEPTION_V3", f"https://example.org/a/{name}")

    def respond(size: int | None) -> None:
        def urlopen(_):
            assert 0 < socket.getdefaulttimeout() <= 30
            if size is None:
                raise urllib.error.URLError(OSError("no route to host"))
            response = io.BytesIO(content[:size])
            response.info = email.message.Message
            return response

        monkeypatch.setattr("torch.hub.urlopen", urlopen)

    return tmp_path / "torch" / "hub" / "checkpoints" / name, respond


def test_a_failed_download_says_which_file_to_put_where(weights):
    path, respond = weights
    respond(None)
    with pytest.raises(UserError) as error:
        check("fid,kid")
    for token in ("--metrics fid,kid", "no route to host", f"https://example.org/a/{path.name}", str(path)):
        assert token in str(error.value)
    assert socket.getdefaulttimeout() is None


def test_weights_are_downloaded_once_and_whole(weights):
    path, respond = weights
    respond(3)
    with pytest.raises(UserError, match=path.name):
        check("fid")
    assert not list(path.parent.iterdir())
    respond(7)
    check("fid")
    assert path.read_bytes() == b"weights"
    respond(None)
    check("fid")
    path.write_bytes(b"wei")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check("fid")
