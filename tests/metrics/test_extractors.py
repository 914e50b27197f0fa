import hashlib
import socket
import sys

import pytest
import torch

from errors import UserError
from metrics.scores import check_metrics
from parameter import Config
from utils import progress

pytest.importorskip("torch_fidelity")


def check(names: str) -> None:
    check_metrics(Config(metrics=names), torch.device("cpu"))


def test_each_extractor_reads_all_images_which_the_progress_bar_counts():
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
def test_a_library_that_is_missing_or_of_another_version(module, missing, names, package, monkeypatch, make_trainer):
    pytest.importorskip("cv2")
    monkeypatch.delitem(sys.modules, module, raising=False)
    library, attribute = missing
    for remove in (lambda: monkeypatch.delattr(attribute), lambda: monkeypatch.setitem(sys.modules, library, None)):
        remove()
        with pytest.raises(UserError, match=f"--metrics {names} needs {package}"):
            make_trainer(metrics=names)


def test_weights_are_downloaded_once_and_whole_or_an_error_says_where_to_put_them(tmp_path, monkeypatch):
    name = f"weights-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    source, path, urlopen = tmp_path / name, tmp_path / "torch" / "hub" / "checkpoints" / name, torch.hub.urlopen

    def urlopen_with_timeout(request):
        assert 0 < socket.getdefaulttimeout() <= 30
        return urlopen(request)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("metrics.extractors.URL_INCEPTION_V3", source.as_uri())
    monkeypatch.setattr("torch.hub.urlopen", urlopen_with_timeout)
    for content, cause in ((None, "No such file"), (b"wei", "hash")):  # cut off
        if content:
            source.write_bytes(content)
        with pytest.raises(UserError) as error:
            check("fid,kid")
        assert all(part in str(error.value) for part in ("--metrics fid,kid", cause, source.as_uri(), str(path)))
        assert not list(path.parent.iterdir())
    source.write_bytes(b"weights")
    check("fid")
    source.unlink()
    check("fid")
    assert path.read_bytes() == b"weights" and socket.getdefaulttimeout() is None
    path.write_bytes(b"wei")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check("fid")
