"""export.py as users run it, on small runs: what it writes, what it refuses, and that the card's code works."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import describe, train_in
from PIL import Image

import export
import main
from errors import UserError
from exporting.safetensors_file import read_generator, read_metadata
from parameter import get_parameters
from sagan_models import Generator
from training import checkpoint

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --batch_size 4 --num_workers 0 --device cpu --dataset toy --toy_num 20"
)
RUNS = {
    "plain": ["--imsize", "32", "--holdout", "0.2"],
    "classes": ["--imsize", "64", "--model", "paper", "--conditional", "true"],
}
FILES = {*export.FILES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two steps of each of `RUNS`."""
    folder = tmp_path_factory.mktemp("runs")
    for version, options in RUNS.items():
        train_in(folder, *SMALL, *options, "--total_step", "2", "--version", version)
    return folder


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


def code_blocks(card: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.read_text(encoding="utf-8"), re.M | re.S)


def run_card(folder, monkeypatch):
    """Run the code of an export's card, and return the names that each block leaves."""
    monkeypatch.chdir(folder)
    results = []
    for block in code_blocks(folder / "model_card.md"):
        assert len(block.splitlines()) <= 10
        block = block.replace('"OWNER/REPOSITORY"', repr(str(ROOT))).replace('source="github"', 'source="local"')
        (folder / "block.py").write_text(block)
        torch.manual_seed(0)
        results.append(runpy.run_path("block.py"))
    return results


@pytest.mark.slow
def test_from_the_shell_with_maps(trained, tmp_path, monkeypatch):
    """Then the card's code is run."""
    command = [sys.executable, str(ROOT / "export.py"), "--version", "plain", "--maps", "true"]
    command += ["--export_path", str(tmp_path / "exports")]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True)
    folder = tmp_path / "exports" / "plain" / "2"
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.iterdir()} == FILES
    assert all(name in done.stdout for name in (*FILES, str(folder)))

    numpy_only, hub = run_card(folder, monkeypatch)
    assert Image.open(folder / "images.png").size == (16 * 32, 32)
    G = read_generator(folder / "generator.safetensors")
    with torch.no_grad():
        expected = G(torch.from_numpy(numpy_only["z"]), return_attention=True)
    np.testing.assert_allclose(numpy_only["images"], expected[0].numpy(), rtol=0, atol=1e-4)
    assert hub["images"].shape == (16, 3, 32, 32)
    maps = numpy_only["session"].run(["attn1", "attn2"], numpy_only["inputs"])
    for ours, theirs in zip(expected[1:], maps, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_conditional_generator(run, tmp_path, monkeypatch, trained):
    code, _, err = run("--version", "classes", "--pretrained_model", "2")
    assert (code, err) == (0, "")
    folder = tmp_path / "exports" / "classes" / "2"
    model = onnx.load(folder / "generator.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["short", "medium", "long"]
    assert [output.name for output in model.graph.output] == ["images"]
    numpy_only, hub = run_card(folder, monkeypatch)
    G = read_generator(folder / "generator.safetensors")
    with torch.no_grad():
        expected = G(torch.from_numpy(numpy_only["z"]), torch.arange(16) % 3)
    np.testing.assert_allclose(numpy_only["images"], expected.numpy(), rtol=0, atol=1e-4)
    assert hub["images"].shape == (16, 3, 64, 64)


def test_numpy_pillow_and_onnxruntime_are_all_that_the_first_way_needs():
    from exporting.model_card import model_card

    (block,) = re.findall(r"```python\n(.*?)```", model_card("v", describe(), None, "", ["onnx"]), re.S)
    assert {*re.findall(r"^(?:import|from) (\w+)", block, re.M)} == {"numpy", "onnxruntime", "PIL"}


def test_an_export_is_replaced_on_request_and_other_files_stay(run, fail, tmp_path):
    folder = tmp_path / "exports" / "plain" / "2"
    folder.mkdir(parents=True)
    for name in ("notes.txt", "generator.onnx", "model_card.md"):
        (folder / name).write_text("before")
    words = ["--version", "plain", "--format", "safetensors"]
    assert re.search(r"already has generator\.onnx, model_card\.md.* --overwrite true$", fail(*words))
    assert (folder / "model_card.md").read_text() == "before"
    assert run(*words, "--overwrite", "true")[0] == 0
    assert {path.name for path in folder.iterdir()} == FILES - {"generator.onnx"} | {"notes.txt"}
    assert (folder / "notes.txt").read_text() == "before" != (folder / "model_card.md").read_text()


def test_the_weights_and_the_grid_are_those_of_train_false(run, tmp_path, trained, monkeypatch):
    """With the options of main.py: the EMA generator or not, which z."""
    monkeypatch.setattr("tester.SUMMARY_IMAGES", 4)
    saved = torch.load(trained / "models/plain/2_state.pth", weights_only=True)
    for number, options in enumerate((["--seed", "3"], ["--use_ema", "false", "--truncation", "0.5"])):
        words = ["--version", "plain", *options]
        code, out, _ = run(*words, "--format", "safetensors", "--overwrite", "true")
        assert code == 0 and ("EMA" in out) == (number == 0)
        folder = tmp_path / "exports" / "plain" / "2"
        monkeypatch.setattr(sys, "argv", ["main.py", "--train", "false", *words])
        assert main.main() == 0
        assert (folder / "samples.png").read_bytes() == (trained / "samples/plain/test_2/grid.png").read_bytes()
        G = Generator(32, 16, 8).eval()
        G.load_state_dict(saved["G" if number else "ema"])
        z = torch.randn(2, 16)
        with torch.no_grad():
            torch.testing.assert_close(read_generator(folder / "generator.safetensors")(z), G(z), rtol=0, atol=1e-6)
        assert ("no EMA" in (folder / "model_card.md").read_text()) == bool(number)


def test_weights_that_somebody_shares(run, tmp_path, trained):
    """Nothing is claimed of data that is not known, unless the command line says what it is."""
    folder = trained / "models" / "shared"
    folder.mkdir()
    (folder / "5_G.pth").write_bytes((trained / "models/plain/2_G.pth").read_bytes())
    card = tmp_path / "exports" / "shared" / "5" / "model_card.md"
    words = ["--version", "shared", "--format", " safetensors"]
    assert run(*words)[0] == 0
    assert "unknown images" in card.read_text() and "batch size" not in card.read_text()
    assert run(*words, "--dataset", "toy", "--batch_size", "4", "--overwrite", "true")[0] == 0
    assert "faces drawn by" in card.read_text() and "at batch size 4" in card.read_text()


def test_a_format_is_added_to_an_export_of_the_same_generator(run, fail, tmp_path, trained, monkeypatch):
    """And only there: not where another generator is, nor over a card that somebody edited."""
    folder = tmp_path / "exports" / "plain" / "2"
    card, words = folder / "model_card.md", ["--version", "plain", "--format"]
    assert run(*words, "onnx", "--maps", "true")[0] == 0
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "already has" in fail(*words, "safetensors", "--use_ema", "false")
    text = card.read_text()
    assert "was changed" not in fail(*words, "onnx") and "--format" not in fail(*words, "onnx")
    assert "--format safetensors adds" in fail(*words, "onnx,safetensors")
    for edited in (text + "mine", text.replace("Not computed.", "My own FID is 12.")):
        card.write_text(edited)
        assert "model_card.md was changed" in fail(*words, "safetensors")
        assert card.read_text() == edited
    card.write_text(text)
    monkeypatch.setattr("tester.SUMMARY_IMAGES", 4)
    train_in(trained, "--train", "false", "--version", "plain", "--metrics", "hog", "--metric_num", "12")
    assert run(*words, "safetensors", "--seed", "5")[0] == 0 and "Fréchet" in card.read_text(encoding="utf-8")
    (trained / "samples/plain/test_2/metrics.json").unlink()
    assert {path.name for path in folder.iterdir()} == FILES
    assert all((folder / name).read_bytes() == written[name] for name in ("generator.onnx", "samples.png"))
    assert all(word in card.read_text() for word in ("attn1, attn2", "onnxruntime", "torch.hub.load"))
    assert run(*words, "safetensors", "--overwrite", "true")[0] == 0
    assert {path.name for path in folder.iterdir()} == FILES
    code, out, _ = run(*words, "safetensors", "--overwrite", "true", "--use_ema", "false")
    assert code == 0 and f"removed {folder / 'generator.onnx'}" in out
    assert {path.name for path in folder.iterdir()} == FILES - {"generator.onnx"}


def test_metrics_are_those_of_the_same_generator_on_its_training_images(run, tmp_path, trained, monkeypatch):
    """Of metrics of other weights or images, or of an older version, a warning says why the card has none."""
    monkeypatch.setattr("tester.SUMMARY_IMAGES", 4)
    path, card = trained / "samples/plain/test_2/metrics.json", tmp_path / "exports/plain/2/model_card.md"
    words = ["--version", "plain", "--format", "safetensors", "--overwrite", "true"]
    tests = {}
    for images in ("20", "16"):
        options = ["--metrics", "hog", "--metric_num", "12", "--toy_num", images]
        monkeypatch.setattr(sys, "argv", ["main.py", "--train", "false", "--version", "plain", *options])
        assert main.main() == 0
        tests[images] = path.read_text()
    older = {key: value for key, value in json.loads(tests["20"]).items() if key not in ("checksum", "data")}
    for text, options, reason in (
        (tests["20"], [], ""), (tests["16"], [], "other images"),
        (tests["20"], ["--use_ema", "false"], "other weights"),
        (json.dumps(older), [], "older version"), ("[1]", [], "damaged"), ("{", [], "damaged"),
    ):  # fmt: skip
        path.write_text(text)
        code, _, err = run(*words, *options)
        assert code == 0 and bool(reason) == bool(err) and reason in err
        assert ("python main.py --train false --version plain" in err) == bool(reason)
        assert ("| Fréchet distance" in card.read_text()) == (not reason) == ("Not computed" not in card.read_text())
    assert "(16 images)" in card.read_text()  # the others are held out
    path.unlink()


def test_names_that_are_no_utf_8(trained, run, tmp_path):
    """Of class folders and of the version: text in the files, as bytes that are none."""
    folder = trained / "pictures"
    for name in ("a", os.fsdecode(b"caf\xe9")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (80 * number,) * 3).save(folder / name / f"{number}.png")
    version = os.fsdecode(b"v\xe9")
    images = ["--dataset", "folder", "--image_path", str(folder), "--version", version, "--total_step", "1"]
    train_in(trained, *SMALL[:-4], *RUNS["classes"], *images)
    assert run("--version", version, "--format", "safetensors")[0] == 0
    export = tmp_path / "exports" / version / "1"
    assert r"(0: a, 1: caf\\xe9)" in (export / "model_card.md").read_text(encoding="utf-8")
    copy = tmp_path / "copy.safetensors"  # the library opens no path that is no UTF-8
    copy.write_bytes((export / "generator.safetensors").read_bytes())
    assert json.loads(read_metadata(copy)["classes"]) == ["a", r"caf\xe9"]


def test_a_failed_export_leaves_nothing(fail, tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left" in fail("--version", "plain", "--format", "safetensors")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("words, message", [
    (["--form", "onnx"], "unrecognized arguments: --form onnx"),
    (["--format", "pickle"], "--format must be one or more of safetensors, onnx"),
    (["--format", ""], "--format must be"),
    (["--format"], "--format: expected one argument"),
    (["--maps", "perhaps"], "must be true or false"),
    (["--maps", "true", "--format", "safetensors"], "--maps true is for --format onnx"),
    (["--version", "none"], "no checkpoint in models/none"),
    (["--version", "plain", "--pretrained_model", "5"], "newest there: 2"),
    (["--version", "plain", "--imsize", "64"], "another architecture"),
    (["--version", "plain", "--metrics", "faces"], "main.py --train false"),
])  # fmt: skip
def test_mistakes_are_one_line(fail, words, message):
    assert message in (line := fail(*words)) and "main.py --help" not in line


def test_maps_of_a_generator_without_attention(trained, fail):
    train_in(trained, *SMALL, "--imsize", "32", "--attention", "none", "--total_step", "1", "--version", "none_of_them")
    assert "has no attention layers" in fail("--version", "none_of_them", "--maps", "true")


@pytest.mark.parametrize("package, missing_for", [("safetensors", "safetensors"), ("onnx", "onnx"),
                                                  ("onnxscript", "onnx"), ("onnxruntime", "onnx")])  # fmt: skip
def test_missing_packages_are_one_line_for_the_formats_that_need_them(
    fail, monkeypatch, tmp_path, package, missing_for
):
    """And those that cannot be imported, for whatever reason."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{package}.py").write_text(r"raise TypeError('protobuf does not fit\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    message = fail("--version", "plain", "--format", missing_for)
    assert f"needs {package}" in message and "pip install -r" in message and "does not fit" in message
    other = {"safetensors": "onnx", "onnx": "safetensors"}[missing_for]
    assert "no checkpoint" in fail("--version", "none", "--format", other)


def test_main_py_s_options_are_those_of_train_false():
    _, arguments = export.parse(["--attribute", "Smiling", "--train", "true", "--maps", "true"])
    config = get_parameters(arguments)
    assert (config.train, config.attribute) == (False, "Smiling")


def test_help_says_that_the_options_of_main_py_apply():
    """And loads nothing heavy for it."""
    code = "import sys, export; sys.argv = ['export.py', '--help']\ntry: export.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'onnx'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "All options of main.py" in done.stdout and all(
        f"--{name} " in done.stdout for name in ("format", "maps", "export_path")
    )


def test_the_optional_packages_are_those_of_requirements_export():
    listed = re.findall(r"^\w+", (ROOT / "requirements-export.txt").read_text(), re.M)
    assert sorted(listed) == sorted(name for names in export.PACKAGES.values() for name in names)


@pytest.mark.parametrize("version", RUNS)
def test_an_export_is_tested_and_exported_as_the_checkpoint_it_is_of(run, trained, tmp_path, version, capfd):
    assert run("--version", version, "--format", "safetensors")[0] == 0
    path = tmp_path / "exports" / version / "2" / "generator.safetensors"
    shown = ("--num_samples", "4", "--num_workers", "0", "--device", "cpu", "--image_path", "none")
    train_in(trained, "--train", "false", "--version", version, *shown)
    expected = (trained / "samples" / version / "test_2" / "grid.png").read_bytes()
    train_in(tmp_path, "--train", "false", "--pretrained_model", str(path), "--dataset", "folder", *shown)
    assert (tmp_path / "samples" / version / "test_2" / "grid.png").read_bytes() == expected
    again = tmp_path / "again"
    assert run("--pretrained_model", str(path), "--format", "safetensors", "--export_path", str(again))[0] == 0
    copied = again / version / "2" / "generator.safetensors"
    assert read_metadata(copied) == read_metadata(path)
    weights = read_generator(copied).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in read_generator(path).state_dict().items())
    with pytest.raises(UserError, match="no discriminator"):
        checkpoint.load(trained, path)
