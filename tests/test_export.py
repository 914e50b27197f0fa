"""export.py as users run it, on small runs: what it writes, what it refuses, and that the card's code works."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import export_metadata, train_in
from PIL import Image

import export
from exporting.safetensors_file import read_generator, read_metadata
from parameter import get_parameters
from training.models import checksum

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --batch_size 4 --num_workers 0 --device cpu --dataset toy --toy_num 20"
)
RUNS = {
    "plain": ["--imsize", "32", "--holdout", "0.2"],
    "classes": ["--imsize", "64", "--model", "paper", "--conditional", "true"],
    "no_maps": ["--imsize", "32", "--attention", "none"],
}
NETWORKS = {"plain": ("sagan", 32), "classes": ("paper", 64, 3)}  # the same, for `export_metadata`
FILES = ("generator.safetensors", "generator.onnx", "model_card.md", "samples.png")  # of the default formats
PLAIN = ["--version", "plain", "--format", "safetensors"]


@pytest.fixture(autouse=True, scope="module")
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tester.SUMMARY_IMAGES", 4)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two steps of each of `RUNS`."""
    folder = tmp_path_factory.mktemp("runs")
    for version, options in RUNS.items():
        train_in(folder, *SMALL, *options, "--total_step", "2", "--version", version)
    return folder


@pytest.fixture(scope="module")
def scores(trained):
    """The content of metrics.json of the run "plain", which is where the tests put it."""
    train_in(trained, "--train", "false", "--version", "plain", "--metrics", "hog", "--metric_num", "12")
    path = trained / "samples/plain/test_2/metrics.json"
    text = path.read_text()
    path.unlink()
    return text


@pytest.fixture
def run(trained, tmp_path, monkeypatch, capfd):
    """A function that runs export.py in this process, with results in a folder of the test; code, output and errors."""
    monkeypatch.chdir(trained)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", "--export_path", str(tmp_path / "exports"), *words])
        capfd.readouterr()
        try:
            code = export.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def fail(run):
    """A function that runs export.py, which must fail with one line, and returns it."""

    def fail(*words):
        code, _, err = run(*words)
        assert code == 2
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err

    return fail


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("version, options", [("plain", ["--maps", "true"]), ("classes", ["--pretrained_model", "2"])])
def test_the_files_and_the_code_of_the_card(run, tmp_path, monkeypatch, version, options):
    code, out, err = run("--version", version, *options)
    folder = tmp_path / "exports" / version / "2"
    assert (code, err) == (0, "") and all(name in out for name in (*FILES, str(folder)))
    assert {*contents(folder)} == {*FILES}
    monkeypatch.chdir(folder)
    results = []
    for block in re.findall(r"^```python\n(.*?)^```$", Path("model_card.md").read_text("utf-8"), re.M | re.S):
        block = block.replace('"OWNER/REPOSITORY"', repr(str(ROOT))).replace('source="github"', 'source="local"')
        Path("block.py").write_text(block)
        results.append(runpy.run_path("block.py"))
    numpy_only, hub = results
    size = 64 if version == "classes" else 32
    assert Image.open("images.png").size == (16 * size, size) and hub["images"].shape == (16, 3, size, size)
    labels = torch.arange(16) % 3 if version == "classes" else None
    with torch.no_grad():
        expected = read_generator("generator.safetensors")(torch.from_numpy(numpy_only["z"]), labels, True)
    found = numpy_only["session"].run(None, numpy_only["inputs"])
    assert len(found) == (1 if version == "classes" else 3)
    for ours, theirs in zip(expected, found, strict=version == "plain"):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(numpy_only["images"], found[0])


@pytest.mark.parametrize("version, options", [
    ("plain", ["--seed", "3"]), ("plain", ["--use_ema", "false", "--truncation", "0.5"]), ("classes", []),
])  # fmt: skip
def test_metadata_weights_and_grid_are_those_of_train_false(run, tmp_path, trained, version, options):
    """Also of the export of an export, and of its test."""
    words = ["--version", version, "--num_samples", "4", "--device", "cpu", *options]
    code, out, _ = run(*words, "--format", "safetensors")
    path = tmp_path / "exports" / version / "2" / "generator.safetensors"
    part = "G" if "--use_ema" in options else "ema"
    assert code == 0 and ("EMA" in out) == (part == "ema")
    assert ("no EMA" in (path.parent / "model_card.md").read_text("utf-8")) == (part == "G")
    saved = torch.load(trained / "models" / version / "2_state.pth")
    assert read_metadata(path) == export_metadata(*NETWORKS[version]) | {
        "step": "2", "checksum": str(checksum(saved[part])), "ema": str(part == "ema").lower(),
        "classes": json.dumps(saved["classes"]), "format": "pt",  # for Hugging Face's loaders
    }  # fmt: skip
    train_in(trained, "--train", "false", *words)
    train_in(tmp_path, "--train", "false", *words, "--pretrained_model", str(path), "--dataset", "folder")
    for folder in (trained, tmp_path):
        grid = folder / "samples" / version / "test_2" / "grid.png"
        assert grid.read_bytes() == (path.parent / "samples.png").read_bytes()
    again = ["--pretrained_model", str(path), "--format", "safetensors", "--export_path", str(tmp_path / "again")]
    assert run(*again)[0] == 0
    copied = tmp_path / "again" / version / "2" / "generator.safetensors"
    assert read_metadata(copied) == read_metadata(path)
    weights = read_generator(copied).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in read_generator(path).state_dict().items())


def test_an_export_is_replaced_on_request_and_other_files_stay(run, fail, tmp_path):
    folder = tmp_path / "exports" / "plain" / "2"
    folder.mkdir(parents=True)
    before = {name: b"before" for name in ("notes.txt", "generator.onnx", "model_card.md")}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    assert re.search(r"already has generator\.onnx, model_card\.md: .* --overwrite true$", fail(*PLAIN))
    assert contents(folder) == before
    assert run(*PLAIN, "--overwrite", "true")[0] == 0
    after = contents(folder)
    assert {*after} == {*FILES, "notes.txt"} - {"generator.onnx"}
    assert after["notes.txt"] == b"before" != after["model_card.md"]


def test_a_format_is_added_to_an_export_of_the_same_generator(run, fail, tmp_path):
    """And only there. Files that are there change only with --overwrite, which keeps what is of this generator."""
    folder = tmp_path / "exports" / "plain" / "2"
    card, onnx = folder / "model_card.md", [*PLAIN[:-1], "onnx"]
    assert run(*onnx, "--maps", "true")[0] == 0
    written = contents(folder)
    for words in ([*PLAIN, "--use_ema", "false"], onnx, [*PLAIN[:-1], "onnx,safetensors"]):
        assert "already has generator.onnx, model_card.md, samples.png: " in fail(*words)
        assert contents(folder) == written
    code, out, _ = run(*PLAIN, "--seed", "5")
    assert code == 0 and "model_card.md is left as it was" in out
    after = contents(folder)
    assert {*after} == {*FILES} and written.items() <= after.items()
    assert run(*PLAIN, "--overwrite", "true")[0] == 0
    assert {*contents(folder)} == {*FILES}
    assert all(word in card.read_text("utf-8") for word in ("attn1, attn2", "onnxruntime", "torch.hub.load"))
    code, out, _ = run(*PLAIN, "--overwrite", "true", "--use_ema", "false")
    assert code == 0 and f"removed {folder / 'generator.onnx'}" in out
    assert {*contents(folder)} == {*FILES} - {"generator.onnx"}


def test_metrics_are_those_of_the_same_generator_on_its_training_images(run, tmp_path, trained, scores):
    path, card = trained / "samples/plain/test_2/metrics.json", tmp_path / "exports/plain/2/model_card.md"
    result = json.loads(scores)
    other_images = result | {"data": result["data"] | {"checksum": 1}}
    for text, options, is_used in (
        (scores, [], True), (scores, ["--use_ema", "false"], False), (json.dumps(other_images), [], False),
        ('{"hog": 1}', [], False), ("[1]", [], False), ("{", [], False), (None, [], False),
    ):  # fmt: skip
        path.write_text(text) if text else path.unlink()
        code, out, err = run(*PLAIN, *options, "--overwrite", "true")
        assert code == 0 and ("metrics.json is not used" in err) == (text is not None and not is_used)
        assert ("| hog |" in card.read_text("utf-8")) == is_used != ("Not computed" in card.read_text("utf-8"))
        if not is_used:
            words = shlex.split(re.search("no metrics: compute them by python main.py (.*), then", out)[1])
            command = get_parameters(words)
            assert (command.train, command.version, command.pretrained_model) == (False, "plain", "2")
            assert command.metrics and command.use_ema != bool(options)
    assert "(16 images)" in card.read_text("utf-8")  # the others are held out


def test_weights_that_somebody_shares(run, tmp_path, trained, scores):
    """Nothing is claimed of data that is not known, unless the command line says what it is."""
    for path, content in (("models/shared/2_G.pth", (trained / "models/plain/2_G.pth").read_bytes()),
                          ("samples/shared/test_2/metrics.json", scores.encode())):  # fmt: skip
        (trained / path).parent.mkdir(parents=True)
        (trained / path).write_bytes(content)
    card = tmp_path / "exports" / "shared" / "2" / "model_card.md"
    words = ["--version", "shared", "--format", " safetensors"]
    code, out, err = run(*words, "--use_ema", "false")
    assert code == 0 and "metrics.json is not used" in err and "compute them" not in out
    assert "unknown images" in card.read_text("utf-8") and "Not computed." in card.read_text("utf-8")
    assert run(*words, "--dataset", "toy", "--overwrite", "true")[0] == 0
    assert "faces drawn by" in card.read_text("utf-8")


def test_a_version_that_is_no_utf_8(trained, run, tmp_path):
    """Text in the files, as bytes that are none. (Names of classes become text where they are read.)"""
    version = os.fsdecode(b"v\xe9")
    shutil.copytree(trained / "models/plain", trained / "models" / version)
    assert run("--version", version, "--format", "safetensors")[0] == 0
    assert "# v\\\\xe9\n" in (tmp_path / "exports" / version / "2" / "model_card.md").read_text("utf-8")


def test_a_failed_export_leaves_nothing(fail, tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left" in fail(*PLAIN)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("words, message", [
    (["--form", "onnx"], "unrecognized arguments: --form onnx"),
    (["--format", "pickle"], "--format must be one or more of safetensors, onnx"),
    (["--format", ""], "--format must be"),
    (["--format"], "--format: expected one argument"),
    (["--maps", "perhaps"], "must be true or false"),
    (["--maps", "true", "--format", "safetensors"], "--maps true is for --format onnx"),
    (["--maps", "true", "--version", "no_maps"], "has no attention layers"),
    (["--version", "none"], "no checkpoint in models/none"),
    (["--version", "plain", "--pretrained_model", "5"], "newest there: 2"),
    (["--version", "plain", "--imsize", "64"], "another architecture"),
    (["--version", "plain", "--metrics", "faces"], "main.py --train false"),
])  # fmt: skip
def test_mistakes_are_one_line(fail, words, message):
    assert message in (line := fail(*words)) and "main.py --help" not in line


@pytest.mark.parametrize("package, format", [(name, format) for format in export.PACKAGES
                                             for name in export.PACKAGES[format]])  # fmt: skip
def test_a_package_that_cannot_be_imported_is_one_line_for_its_format(fail, monkeypatch, tmp_path, package, format):
    assert package in (ROOT / "requirements-export.txt").read_text()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{package}.py").write_text(r"raise TypeError('protobuf does not fit\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    message = fail("--version", "plain", "--format", format)
    assert f"needs {package}" in message and "pip install -r" in message and "does not fit" in message
    assert "no checkpoint" in fail("--version", "none", "--format", "safetensors,weights")


def test_main_py_s_options_are_those_of_train_false():
    _, arguments = export.parse(["--attribute", "Smiling", "--train", "true", "--maps", "true"])
    config = get_parameters(arguments)
    assert (config.train, config.attribute) == (False, "Smiling")


def test_help_loads_nothing_heavy():
    code = "import sys, export; sys.argv = ['export.py', '--help']\ntry: export.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'onnx'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("All options of main.py", "--format ", "--maps ", "--export_path "))
