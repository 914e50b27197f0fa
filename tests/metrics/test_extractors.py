import hashlib
import socket
import sys

import pytest
import torch

from errors import UserError
from metrics.scores import check_metrics
from parameter import Config

pytest.importorskip("torch_fidelity")


def check(names: str) -> None:
    check_metrics(Config(metrics=names), torch.device("cpu"))


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


def test_weights_are_downloaded_once_and_whole_or_an_error_says_where_to_put_them(tmp_path, monkeypatch):
    name = f"weights-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    source, path = tmp_path / name, tmp_path / "torch" / "hub" / "checkpoints" / name
    urlopen = torch.hub.urlopen

    def urlopen_with_timeout(request):
        assert 0 < socket.getdefaulttimeout() <= 30
        return urlopen(request)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("metrics.extractors.URL_INCEPTION_V3", source.as_uri())
    monkeypatch.setattr("torch.hub.urlopen", urlopen_with_timeout)
    for prepare, cause in ((lambda: None, "No such file"), (lambda: source.write_bytes(b"wei"), "hash")):  # cut off
        prepare()
        with pytest.raises(UserError) as error:
            check("fid,kid")
        for token in ("--metrics fid,kid", cause, source.as_uri(), str(path)):
            assert token in str(error.value)
        assert not list(path.parent.iterdir())
    source.write_bytes(b"weights")
    check("fid")
    source.unlink()
    check("fid")
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"wei")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check("fid")
    assert socket.getdefaulttimeout() is None
