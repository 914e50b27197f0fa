import errno
import os
import shutil
from types import SimpleNamespace

import pytest
from torch import nn

from training.disk_usage import expected_bytes, report_disk_usage
from training.run_folders import lock_folders

CELEBA = dict(imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=64, total_step=1_000_000, log_step=10,
              sample_step=100, attn_step=1000, g_num=5, keep_checkpoints=3)  # fmt: skip
G, D = 15_400_000, 12_700_000  # bytes
WEIGHTS, STATE = G + D, 4 * G + 3 * D


def test_a_default_run_on_celeba(make_config):
    """Measured on such a run: 11.3 GB of samples, 2.0 GB of attention figures, 316 weights of 28.2 MB, 58 MB of log."""
    config = make_config(**CELEBA)
    config.sample_folder.mkdir(parents=True)
    (config.sample_folder / "real.png").write_bytes(bytes(565_000))
    expected = expected_bytes(config, 0, 3165, G, D)
    assert expected["samples"] == pytest.approx(11.3e9, rel=0.01)
    assert expected["attention"] == pytest.approx(2.0e9, rel=0.05)
    assert expected["checkpoints"] == pytest.approx(8.9e9 + 3 * STATE, rel=0.01)
    assert expected["logs"] == pytest.approx(60e6 + 14e6, rel=0.05)
    with_images = expected_bytes(make_config(**CELEBA, use_tensorboard=True), 0, 3165, G, D)
    assert with_images["logs"] == pytest.approx(13.7e9, rel=0.05)


def test_options_that_limit_it(make_config):
    config = make_config(**CELEBA)
    everything = expected_bytes(config, 0, 1000, G, D)
    limited = expected_bytes(make_config(**CELEBA, keep_samples=20, keep_weights=10), 0, 1000, G, D)
    assert limited["samples"] == everything["samples"] / 500
    assert limited["attention"] == everything["attention"] / 50
    assert limited["checkpoints"] == 13 * WEIGHTS + 3 * STATE


def test_only_the_attention_layers_that_there_are_have_figures(make_config):
    sagan, paper, none = (
        expected_bytes(make_config(**CELEBA, **options), 0, 1000, G, D)["attention"]
        for options in ({}, {"model": "paper"}, {"attention": "none"})
    )
    assert paper == sagan / 2 and none == 0


def test_a_resumed_run_counts_what_is_left_to_write(make_config):
    config = make_config(**(CELEBA | {"total_step": 1050}))
    whole, rest = (expected_bytes(config, step, 100, G, D)["samples"] for step in (0, 1000))
    assert whole == 11 * rest  # the last step has a grid too


@pytest.mark.parametrize("free, fits", [(10**12, True), (10**6, False)])
def test_one_line_says_what_is_needed_and_free_and_a_warning_if_it_does_not_fit(
    make_config, monkeypatch, capsys, free, fits
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    config = make_config(**CELEBA)
    with lock_folders(config):
        report_disk_usage(config, 0, 3165, [nn.Linear(1000, 3849), nn.Linear(1000, 3174)])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "checkpoints 9." in out and ("1.00TB" if fits else "1.00MB") in out
    assert err.count("warning") == (not fits)
    assert fits or "--keep_samples" in err


def test_a_file_system_that_does_not_tell_is_no_error(make_config, monkeypatch, capsys):
    def fail(_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(shutil, "disk_usage", fail)
    config = make_config()
    with lock_folders(config):
        report_disk_usage(config, 0, 10, [nn.Linear(2, 2), nn.Linear(2, 2)])
    assert capsys.readouterr() == ("", "")
