"""export.py as users run it, on small runs: what it writes, what it refuses, and that the card's code works."""

import json
import os
import re
import runpy
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, assert_same, contents, export_metadata, run_main, train_in
from PIL import Image

import export
from parameter import get_parameters
from training.checkpoint import read_export
from training.models import checksum

RUNS = {"plain": "--holdout 0.2", "classes": "--imsize 64 --model paper --conditional true",
        "no_maps": "--attention none"}  # fmt: skip
FILES = ("generator.safetensors", "generator.onnx", "model_card.md", "samples.png")  # of the default formats
PLAIN = ["--version", "plain", "--format", "safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two steps of each of `RUNS`; tests write few images."""
    folder = tmp_path_factory.mktemp("runs")
    for version, options in RUNS.items():
        train_in(folder, *WORDS, *options.split(), "--total_step", "2", "--version", version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tester.SUMMARY_IMAGES", 4)
        yield folder


@pytest.fixture
def run(trained, tmp_path, capfd):
    """A function that runs export.py in this process, with results in a folder of the test, and returns its output."""

    def run(*words, code=0):
        capfd.readouterr()
        found, out, err = run_main(trained, "--export_path", str(tmp_path / "exports"), *words, program=export)
        of_libraries = capfd.readouterr()  # their loggers have streams of their own
        out, err = out + of_libraries.out, err + of_libraries.err
        assert found == code and (code == 0 or re.fullmatch(r"error: [^\n]+\n", err)), err
        return out + err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("version, size, options", [("plain", 32, ["--maps", "true"]),
                                                    ("classes", 64, ["--pretrained_model", "2"])])  # fmt: skip
def test_the_files_and_the_code_of_the_card(run, tmp_path, monkeypatch, version, size, options):
    """The code without the program and that of torch.hub give the same images."""
    out, folder = run("--version", version, *options), tmp_path / "exports" / version / "2"
    assert all(name in out for name in (*FILES, str(folder))) and {*contents(folder)} == {*FILES}
    monkeypatch.chdir(folder)
    results = []
    for block in re.findall(r"^```python\n(.*?)^```$", Path("model_card.md").read_text("utf-8"), re.M | re.S):
        block = block.replace('"OWNER/REPOSITORY"', repr(str(ROOT))).replace('source="github"', 'source="local"')
        Path("block.py").write_text(block)
        results.append(runpy.run_path("block.py"))
    onnx, hub = results
    assert Image.open("images.png").size == (16 * size, size) and hub["images"].shape == (16, 3, size, size)
    assert len(onnx["session"].get_outputs()) == (3 if version == "plain" else 1)
    with torch.no_grad():
        expected = hub["G"](*map(torch.from_numpy, onnx["inputs"].values()))
    np.testing.assert_allclose(onnx["images"], expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("version, options", [
    ("plain", ["--seed", "3"]), ("plain", ["--use_ema", "false"]), ("classes", []),
])  # fmt: skip
def test_metadata_weights_and_grid_are_those_of_train_false(run, tmp_path, trained, version, options):
    """Also of the export of an export, and of its test."""
    words = ["--version", version, "--num_samples", "4", "--device", "cpu", *options]
    out = run(*words, "--format", "safetensors", "--train", "true", "--attribute", "Smiling")
    path = tmp_path / "exports" / version / "2" / "generator.safetensors"
    part = "G" if "--use_ema" in options else "ema"
    assert ("EMA" in out) == (part == "ema") == ("no EMA" not in path.with_name("model_card.md").read_text("utf-8"))
    saved = torch.load(trained / "models" / version / "2_state.pth")
    assert read_export(path)[1] == export_metadata(*("paper", 64, 3) if version == "classes" else ()) | {
        "step": "2", "checksum": str(checksum(saved[part])), "ema": str(part == "ema").lower(),
        "classes": json.dumps(saved["classes"]), "format": "pt",  # for Hugging Face's loaders
    }  # fmt: skip
    train_in(trained, "--train", "false", *words)
    train_in(tmp_path, "--train", "false", *words, "--pretrained_model", str(path), "--dataset", "folder")
    for folder in (trained, tmp_path):
        grid = folder / "samples" / version / "test_2" / "grid.png"
        assert grid.read_bytes() == path.with_name("samples.png").read_bytes()
    run("--pretrained_model", str(path), "--format", "safetensors", "--export_path", str(tmp_path / "again"))
    copied = tmp_path / "again" / version / "2" / "generator.safetensors"
    (weights, metadata), (expected, metadata_before) = read_export(copied), read_export(path)
    assert metadata == metadata_before
    assert_same(weights, expected)


def test_files_of_an_export_change_on_request_only(run, tmp_path, monkeypatch):
    folder = tmp_path / "exports" / "plain" / "2"
    onnx = [*PLAIN[:-1], "onnx"]
    run(*onnx, "--maps", "true")
    (folder / "notes.txt").touch()
    written = contents(folder)
    for words in (PLAIN, onnx):
        assert "already has generator.onnx, model_card.md, samples.png: " in run(*words, code=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        assert "No space left" in run(*PLAIN, "--overwrite", "true", code=2)
    assert contents(folder) == written
    run(*PLAIN, "--overwrite", "true")
    assert {*contents(folder)} == {*FILES, "notes.txt"} - {"generator.onnx"}
    card = (folder / "model_card.md").read_text("utf-8")
    assert "onnxruntime" not in card and "torch.hub.load" in card


def test_metrics_are_those_of_the_same_generator_on_its_training_images(run, tmp_path, trained):
    train_in(trained, "--train", "false", "--version", "plain", "--metrics", "hog", "--metric_num", "12")
    path, card = trained / "samples/plain/test_2/metrics.json", tmp_path / "exports/plain/2/model_card.md"
    scores = path.read_text()
    result = json.loads(scores)
    other_images = json.dumps(result | {"data": result["data"] | {"checksum": 1}})
    unused = [(text, "true") for text in (other_images, '{"hog": 1}', "[1]", "{", None)]
    for text, use_ema in [(scores, "true"), (scores, "false"), *unused]:
        path.write_text(text) if text else path.unlink()
        out, is_used = run(*PLAIN, "--use_ema", use_ema, "--overwrite", "true"), (text, use_ema) == (scores, "true")
        assert ("metrics.json is not used" in out) == (text is not None and not is_used)
        assert ("| hog |" in card.read_text("utf-8")) == is_used != ("Not computed" in card.read_text("utf-8"))
        if not is_used:
            command = re.search("no metrics: compute them by python main.py (.*), then", out)[1]
            config = get_parameters(shlex.split(command))
            assert (config.train, config.version, config.pretrained_model) == (False, "plain", "2")
            assert config.metrics and config.use_ema == (use_ema == "true")
    assert "(16 images)" in card.read_text("utf-8")  # the others are held out


def test_weights_that_somebody_shares(run, tmp_path, trained):
    """Nothing is claimed of data that is not known, unless the command line says what it is. The name is no UTF-8."""
    version = os.fsdecode(b"v\xe9")
    (trained / "models" / version).mkdir()
    (trained / "models" / version / "2_G.pth").write_bytes((trained / "models/plain/2_G.pth").read_bytes())
    card = tmp_path / "exports" / version / "2" / "model_card.md"
    words = ["--version", version, "--format", " safetensors"]
    assert "compute them" not in run(*words, "--use_ema", "false")
    assert all(word in card.read_text("utf-8") for word in ("# v\\\\xe9\n", "unknown images", "Not computed."))
    run(*words, "--dataset", "toy", "--overwrite", "true")
    assert "faces drawn by" in card.read_text("utf-8")


@pytest.mark.parametrize("words, message", [
    (["--form", "onnx"], "unrecognized arguments: --form onnx"),
    (["--format", "pickle"], "--format must be one or more of safetensors, onnx"),
    (["--maps", "true", "--format", "safetensors"], "--maps true is for --format onnx"),
    (["--maps", "true", "--version", "no_maps"], "has no attention layers"),
    (["--version", "plain", "--metrics", "faces"], "main.py --train false"),
    (["--version", "plain", "--project", "me.jpg"], "--project is for main.py --train false"),
])  # fmt: skip
def test_mistakes_are_one_line(run, words, message):
    assert message in (line := run(*words, code=2)) and "main.py --help" not in line


@pytest.mark.parametrize("package", export.ONNX_PACKAGES)
def test_a_package_that_cannot_be_imported_is_one_line_for_its_format(run, monkeypatch, tmp_path, package):
    assert package in (ROOT / "requirements-export.txt").read_text()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{package}.py").write_text(r"raise TypeError('protobuf does not fit\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    message = run("--version", "plain", "--format", "onnx", code=2)
    assert f"needs {package}: pip install -r" in message and "does not fit" in message
    assert "no checkpoint" in run("--version", "none", "--format", "safetensors,weights", code=2)


def test_an_interrupted_export_says_so(tmp_path, monkeypatch):
    """Whatever torch.onnx makes of the KeyboardInterrupt, which arrives while it imports its modules."""

    def swallow(*_):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("Create an issue in the PyTorch GitHub repository")

    monkeypatch.setattr("exporting.files.export", swallow)
    assert run_main(tmp_path, program=export)[::2] == (130, "interrupted\n")
