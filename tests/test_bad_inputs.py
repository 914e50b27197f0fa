"""Generated bad options, images, caches and checkpoints: each ends in a run, or in one line and exit code 2.

240 short runs. The inputs are the same each time: a regression test, not a search for new ones.
"""

import contextlib
import io
import os
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from parameter import Config, option_groups
from training import recorder

pytestmark = pytest.mark.slow

SMALL = shlex.split(
    "--imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --batch_size 4 --num_workers 0 --device cpu --total_step 2 "
    "--toy_num 20 --g_num 1"
)
many = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Left out: most of their values are legal, and take long.
SLOW = {"total_step", "toy_num", "num_workers", "imsize", "n_critic", "z_dim", "g_conv_dim", "d_conv_dim", "download"}
damages = st.tuples(
    st.sampled_from(["flip", "cut", "replace", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=40)
)


@contextlib.contextmanager
def working_in(folder):
    """Do what contextlib.chdir does, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the attention figures and the report, which take half of a run's time and depend on no input here."""
    monkeypatch.setattr(recorder, "attention_figures", lambda *_: {})
    monkeypatch.setattr(recorder, "write_explorer", lambda *_: None)
    monkeypatch.setattr(recorder, "report_page", lambda *_: "")


def run(folder, *words):
    """Run the program in a folder and return its exit code: 0, or 2 with one line of error."""
    err = io.StringIO()
    with (
        working_in(folder),
        patch.object(sys, "argv", ["main.py", *words]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
        patch.object(sys.stdout, "reconfigure", create=True),
        patch.object(sys.stderr, "reconfigure", create=True),
    ):
        try:
            code = main.main()
        except SystemExit as error:
            code = error.code
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code in (0, 2)
    assert len(lines) == (code == 2), err.getvalue()
    return code


def damage(path, how):
    kind, where, content = how
    whole = path.read_bytes()
    at = int(where * max(0, len(whole) - 1))
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ content[0] or 1]) + whole[at + 1 :] if whole else b"",
        "cut": whole[:at],
        "replace": content,
        "insert": whole[:at] + content + whole[at:],
    }
    path.write_bytes(changed[kind])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, *SMALL, "--dataset", "toy", "--model_save_step", "0.2") == 0
    return folder


def fresh_copy(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


names = sorted({field.name for fields in option_groups().values() for field in fields} - SLOW)
values = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "-1", "0", "nan", "inf", "1e400", "true", "None", "../..", "/dev/null", "a" * 300, "\0", "\udcff", "٣"]
    ),
)


@many
@given(name=st.sampled_from(names), value=values)
def test_any_value_of_an_option_is_accepted_or_refused_in_one_line(trained, tmp_path, name, value):
    run(fresh_copy(trained, tmp_path), *SMALL, "--dataset", "toy", "--overwrite", "true", f"--{name}={value}")


@many
@given(how=damages, format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
def test_a_damaged_image_is_skipped(no_figures, tmp_path, how, format):
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    (tmp_path / "data").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 50), (number * 50, 20, 99)).save(tmp_path / "data" / f"{number}.png", format)
    damage(tmp_path / "data" / "0.png", how)
    words = [*SMALL, "--dataset", "folder", "--total_step", "1", "--overwrite", "true"]
    assert run(tmp_path, *words) == 0


@many
@given(how=damages, name=st.sampled_from(["info.json", "images.bin"]))
def test_a_damaged_cache_is_built_again(no_figures, trained, tmp_path, how, name):
    folder = fresh_copy(trained, tmp_path)
    damage(next(folder.glob(f"cache/*/{name}")), how)
    assert run(folder, *SMALL, "--dataset", "toy", "--overwrite", "true", "--total_step", "1") == 0


@many
@given(
    how=damages,
    part=st.sampled_from(["state", "G", "D"]),
    wanted=st.sampled_from(["latest", "auto", "2"]),
    weights_only=st.booleans(),
)
def test_a_damaged_checkpoint_is_refused_or_the_one_before_is_used(
    no_figures, trained, tmp_path, how, part, wanted, weights_only
):
    folder = fresh_copy(trained, tmp_path)
    models = folder / "models" / "sagan_celeb"
    damage(models / f"2_{part}.pth", how)
    if weights_only:
        for path in models.glob("*_state.pth"):
            path.unlink()
    code = run(folder, *SMALL, "--dataset", "toy", "--pretrained_model", wanted, "--total_step", "3")
    is_read = (part == "state") != weights_only
    assert code == 0 or (wanted == "2" and is_read)


def test_every_option_is_tried_or_left_out_as_slow():
    assert set(names) | SLOW == set(Config.__dataclass_fields__)
