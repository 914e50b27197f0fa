"""Generated bad options, folders, environment variables and errors of the file system.

Each ends in a run, or in one line and exit code 2, and no file of the user's is touched. 180 short runs. The inputs are
the same each time: a regression test, not a search for new ones.
"""

import errno
import itertools
import os
import pkgutil
import shutil
from unittest.mock import patch

import pytest
from conftest import WORDS, assert_untouched, make_pictures, run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parameter import Config
from training import recorder
from visuals import report

pytestmark = pytest.mark.slow

SMALL = [*WORDS, "--total_step=2", "--g_num=1"]
many = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
some = settings(many, max_examples=40)
PICTURES = [f"{number}.png" for number in range(4)]
# Left out: most of their values are legal, and take long.
SLOW = {"total_step", "toy_num", "num_workers", "imsize", "n_critic", "z_dim", "g_conv_dim", "d_conv_dim", "download"}


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the attention figures and the curves, which take half of a run's time."""
    monkeypatch.setattr(recorder, "attention_figures", lambda *_: {})
    monkeypatch.setattr(report, "line_chart", lambda *_, **__: "")


def run(folder, *words):
    """Run the program in a folder: its exit code is 0, or 2 with one line of error."""
    code, _, err = run_main(folder, *words)
    assert "Traceback" not in err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code in (0, 2) and len(lines) == (code == 2), err
    return code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, *SMALL, "--dataset", "toy", "--model_save_step", "0.2") == 0
    return folder


names = sorted(Config.__dataclass_fields__.keys() - SLOW)
odd_values = ["", "-1", "0", "nan", "inf", "1e400", "true", "None", "../..", "/dev/null", "a" * 300, "\0", "\udcff",
              "٣"]  # fmt: skip
values = st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(odd_values))


@many
@given(name=st.sampled_from(names), value=values)
def test_any_value_of_an_option_is_accepted_or_refused_in_one_line(no_figures, trained, tmp_path, name, value):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder)
    run(folder, *SMALL, "--dataset", "toy", "--overwrite", "true", f"--{name}={value}")


parts_of_names = (
    ["", "samples/v/", "samples/", "cache/", ".hidden/", "@eaDir/", "lost+found/", "ä ö/", "a/b/c/"],
    ["0_left", "5_fake", "100_ema", "real", "5_G_attn1", "5_explorer", "metrics", "-", "é", "x" * 90],
    [".png", ".PNG", ".jpg", ".webp", ".heic", ".mov", ".txt", ".html", ".pth", "", ".png.bak"],
)
file_names = st.lists(st.tuples(*map(st.sampled_from, parts_of_names)).map("".join), max_size=8)
folders = st.sampled_from([".", "..", "pics", "pics/samples", "pics/out", "./pics/../pics", "results/v", "/proc"])
options_of_paths = {f"--{name}_path": folders for name in ("sample", "attn", "model_save", "log", "cache")}


@some
@given(
    names=file_names,
    image_path=st.sampled_from([".", "pics", "pics/samples", "pics/samples/v", "results/v", "nowhere", "pics/-.txt"]),
    paths=st.fixed_dictionaries({}, optional=options_of_paths),
    is_inside=st.booleans(),
    overwrite=st.booleans(),
)
def test_images_are_untouched_wherever_results_go(no_figures, tmp_path, names, image_path, paths, is_inside, overwrite):
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    files = make_pictures(folder / "pics", [*PICTURES, *names]) | make_pictures(folder / "results" / "v", ["0.png"])
    words = [*SMALL, "--dataset", "folder", "--image_path", image_path, "--version", "v", "--total_step", "1"]
    words += [f"{name}={path}" for name, path in paths.items()]
    for _ in range(2):  # the second run finds the results of the first
        run(folder / "pics" if is_inside else folder, *words, f"--overwrite={overwrite}")
        assert_untouched(files)


variables = {
    **{name: ["", "0", "1", "7", "-1", "x"] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "SLURM_LOCALID")},
    **{name: ["", "0", "2", "x"] for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")},
    **{name: ["", "/nonexistent", "\udcff"] for name in ("HOME", "TMPDIR", "TORCH_HOME", "XDG_CACHE_HOME")},
    **{name: ["", "x", "0"] for name in ("COLUMNS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TERM", "LANG")},
    "WORLD_SIZE": ["1", "2", "0", "-1", "two", "", "1e3", "٣"], "MASTER_ADDR": ["localhost", "", "no host"],
    "MASTER_PORT": ["0", "x", "", "99999999"],  # no valid one: ranks would wait for each other
    "TORCHELASTIC_RUN_ID": ["", "none"],
}  # fmt: skip
environments = st.fixed_dictionaries({}, optional={name: st.sampled_from(variables[name]) for name in variables})


@some
@given(values=environments)
def test_any_environment_is_accepted_or_refused_in_one_line(no_figures, tmp_path, values):
    with patch.dict(os.environ, values):
        run(tmp_path, *SMALL, "--dataset", "toy", "--total_step", "1", "--overwrite", "true", "--parallel", "true")


calls = {  # of a run like the one below, about how many
    "builtins.open": 34, "os.open": 16, "os.replace": 8, "os.rename": 1, "os.fsync": 15, "os.scandir": 20,
    "os.stat": 100, "pathlib.Path.mkdir": 22, "pathlib.Path.iterdir": 8, "pathlib.Path.unlink": 10,
    "pathlib.Path.write_text": 4, "pathlib.Path.read_text": 3, "pathlib.Path.stat": 20, "fcntl.flock": 16,
    "numpy.memmap": 1, "shutil.disk_usage": 1, "tempfile.TemporaryFile": 4, "PIL.Image.Image.save": 11,
}  # fmt: skip
error_numbers = st.sampled_from(["ENOSPC", "EACCES", "EROFS", "EIO", "EINVAL", "ENOLCK", "ENOMEM", "ESTALE", "ENODEV"])


@some
@given(data=st.data(), name=st.sampled_from(sorted(calls)), number=error_numbers, is_lasting=st.booleans())
def test_an_error_of_the_file_system_is_one_line_or_a_warning(no_figures, tmp_path, data, name, number, is_lasting):
    """In one call of a function, or in all from there on."""
    failing = data.draw(st.integers(1, calls[name]))
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    files = make_pictures(tmp_path / "case" / "pics", PICTURES)
    owner, _, function = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original, count = getattr(owner, function), itertools.count(1)

    def call(*arguments, **options):
        call_number = next(count)
        if call_number == failing or (is_lasting and call_number > failing):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "file")
        return original(*arguments, **options)

    with patch.object(owner, function, call):
        words = ["--dataset", "folder", "--image_path", "pics", "--sample_step", "1", "--overwrite", "true"]
        run(tmp_path / "case", *SMALL, *words)
    assert_untouched(files)
