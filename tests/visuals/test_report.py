"""The report of a run: of a real one, of hostile ones, and in a real browser."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from conftest import SMALL, log
from page_tools import BrowserPage, Keys
from PIL import Image

import main
from parameter import Config
from training import recorder
from visuals.curves import GRAY
from visuals.report import FIGURE_SIZE, FRAMES, SAMPLE_SIZE, picture, report_page

PATHS = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
NOW = datetime(2026, 11, 24, 14, 40)
VERSION = "<b>\"'& $data ${x}"
HOSTILE = "</script><b>\"'&\udcff $data ${x}"
NOISE = np.random.default_rng(0).integers(0, 256, (946, 768, 3), np.uint8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Config]:
    """The folder of a real run of 6 steps, and its options."""
    root = tmp_path_factory.mktemp("run")
    paths = {name: str(root / name) for name in PATHS}
    steps = {"total_step": 6, "log_step": 1, "sample_step": 2, "attn_step": 3}
    config = Config(**SMALL, **paths, **steps, device="cpu", tune_malloc=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "report_page", lambda *_: "")
        assert main.run(config) == 0
    return root, config


@pytest.fixture
def empty_run(finished, tmp_path) -> Config:
    """That run of 100 steps before it has results."""
    config = dataclasses.replace(finished[1], total_step=100, **{name: str(tmp_path / name) for name in PATHS})
    for folder in config.folders.values():
        folder.mkdir(parents=True)
    return config


@pytest.fixture
def toy_run(finished, empty_run, tmp_path) -> Config:
    """That run, with a copy of its results that a test may change."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(empty_run, total_step=6)


def page_of(config: Config, step: int, command: str = "command", machine: str = "cpu in fp32", **options) -> str:
    return report_page(config, machine, (), step, command, NOW, **options)


def data_of(page):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def titles_of(page):
    return re.findall(r"<svg[^>]*>\s*<title>(.*?)</title>", page)


def figures_of(page):
    return re.findall(r'href="[^"]*/(\d+_\w+)\.png"', page)


def write_log(run, rows):
    (run.log_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run(toy_run):
    page = page_of(toy_run, 6, "python main.py --version 'a b'")
    for fact in ("step 6 of 6 (100%)", "32×32", "batch 4", "on cpu in fp32", "updated 2026-11-24 14:40"):
        assert f"<li>{fact}</li>" in page
    assert ">finished<" in page
    data = data_of(page)
    assert [frame["step"] for frame in data["frames"]] == [2, 4, 6]
    assert all(frame["fake"].startswith("data:image/jpeg") and frame["ema"] for frame in data["frames"])
    assert data["real"]
    first = ["Losses", "Logits of D", "Sign of D on training images", "Spread of the samples",
             "Gamma of the attention layers", "Spectral norms of G", "Spectral norms of D"]  # fmt: skip
    assert titles_of(page) == [*first, "Speed", "Memory", "Learning rates"]
    assert figures_of(page) == ["6_G_attn1", "6_G_attn2", "6_D_attn1", "6_D_attn2"]
    assert html.escape("python main.py --version 'a b'") in page
    assert "<div class=changed><dt>batch_size</dt><dd>4<small>default 64</small></dd>" in page
    assert "<div><dt>beta2</dt><dd>0.9</dd>" in page

    links = re.findall('(?:src|href)="([^"]*)"', page)  # none needs the network
    assert links and all(link.startswith(("data:", "../", "#")) for link in links)
    assert "connect-src" not in page and "default-src 'none'" in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 10


def test_results_of_later_steps_are_ignored(toy_run):
    page = page_of(toy_run, 4)
    assert [frame["step"] for frame in data_of(page)["frames"]] == [2, 4]
    assert figures_of(page)[0] == "3_G_attn1" and "6_G_attn1" not in page
    row = log(toy_run.log_folder, "d_loss")[3]
    assert f"d_loss  {row['d_loss']:.4g}".replace("-", "\N{MINUS SIGN}") in page
    assert "(66.6%)" in page


def test_only_a_running_run_has_an_eta(empty_run):
    run = dataclasses.replace(empty_run, total_step=10**6)  # with batches of 4
    write_log(run, [{"step": step, "images_per_s": 40.0} for step in (1, 2)])
    assert "<li>ETA 1 day, 3:47:00</li>" in page_of(run, 2)
    stopped = page_of(run, 2, state="stopped")
    assert ">stopped<" in stopped and "<li>ETA" not in stopped
    assert "<li>ETA" not in page_of(run, 10**6)


def test_a_run_without_results(empty_run):
    for remove in (lambda _: None, lambda folder: folder.rmdir()):
        for folder in (empty_run.log_folder, empty_run.sample_folder, empty_run.attn_folder):
            remove(folder)
        page = page_of(empty_run, 0, "python main.py")
        assert data_of(page) == {"frames": [], "real": "", "folder": "../../sample_path/sagan_celeb"}
        assert "Attention maps" not in page and not titles_of(page)
        assert "step 0 of 100 (0%)" in page and "python main.py" in page


def test_damaged_and_incomplete_images_are_left_out(toy_run):
    whole = (toy_run.sample_folder / "4_fake.png").read_bytes()
    (toy_run.sample_folder / "2_fake.png").write_bytes(b"")
    (toy_run.sample_folder / "2_ema.png").unlink()
    (toy_run.sample_folder / "4_fake.png").write_bytes(whole[: len(whole) // 2])
    (toy_run.sample_folder / "6_ema.png").write_bytes(whole.replace(b"IDAT", b"IDAX"))
    (toy_run.attn_folder / "6_G_attn1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = page_of(toy_run, 6)
    shown = [{kind for kind in ("ema", "fake") if frame.get(kind)} for frame in data_of(page)["frames"]]
    assert shown == [{"ema"}, {"fake"}]
    assert figures_of(page) == ["6_G_attn2", "6_D_attn1", "6_D_attn2"]


def test_the_newest_figure_of_each_layer_is_shown(toy_run):
    for name in ("5_G_attn3", "9_G_attn4", "3_D_attn1_small"):
        shutil.copy(toy_run.attn_folder / "6_G_attn1.png", toy_run.attn_folder / f"{name}.png")
    (toy_run.attn_folder / "6_D_attn2.png").unlink()
    names = ["6_G_attn1", "6_G_attn2", "5_G_attn3", "6_D_attn1", "3_D_attn1_small", "3_D_attn2"]
    assert figures_of(page_of(toy_run, 6)) == names


def test_charts_of_a_log(empty_run):
    """Names that no chart knows have charts by prefix; the step of the best checkpoint is marked."""
    row = {"step": 10, "fid": 80.0, "d_loss_real": 1, "faces": 0.5}
    row |= {"reach/G_attn1": 0.3, "reach/G_attn2": 0.4, "new": 1}
    write_log(empty_run, [row, row | {"step": 20}])
    page = page_of(empty_run, 20, best={"step": 10, "metric": "fid", "score": 80})
    assert titles_of(page) == ["FID", "Face rate", "reach", "new"]
    assert "G_attn2  0.4" in page
    assert "<li>best checkpoint: step 10, fid 80</li>" in page
    assert page.count(GRAY) == 1 and "best checkpoint" not in page_of(empty_run, 20)


@pytest.mark.parametrize("size, shown", [((1120, 560), (560, 280)), ((64, 64), (64, 64)), ((60, 70_000), (1, 560))])
def test_pictures_keep_their_aspect_and_fit(size, shown, tmp_path):
    """The last one is taller than a JPEG can be."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    uri = picture(tmp_path / "a.png", (560, 560))
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == shown
    assert picture(tmp_path / "missing.png", (560, 560)) == ""


@pytest.mark.slow
def test_a_page_of_pure_noise_stays_below_8_mb(empty_run):
    Image.fromarray(NOISE[: SAMPLE_SIZE[1], : SAMPLE_SIZE[0]]).save(empty_run.sample_folder / "real.png")
    Image.fromarray(NOISE[:, : FIGURE_SIZE[0]]).save(empty_run.attn_folder / "200_G_attn1.png")
    for step in range(100, 4100, 100):
        for kind in ("fake", "ema"):
            (empty_run.sample_folder / f"{step}_{kind}.png").symlink_to(empty_run.sample_folder / "real.png")
    for name in ("G_attn2", "D_attn1", "D_attn2"):
        (empty_run.attn_folder / f"200_{name}.png").symlink_to(empty_run.attn_folder / "200_G_attn1.png")
    random = np.random.default_rng(0)
    names = ["d_loss", "g_loss", *(f"sigma/{network}_{index}" for network in "GD" for index in range(15))]
    write_log(empty_run, [{"step": step} | {name: random.normal() for name in names} for step in range(1, 1001)])
    page = page_of(empty_run, 4000)
    frames = data_of(page)["frames"]
    assert len(frames) == FRAMES and len(figures_of(page)) == 4
    assert (frames[0]["step"], frames[-1]["step"]) == (100, 4000)
    gaps = np.diff([frame["step"] for frame in frames])
    assert gaps.min() >= 100 and gaps.max() <= 200
    assert len(page.encode()) < 8e6


def test_hostile_names(empty_run, tmp_path):
    run = dataclasses.replace(empty_run, version=VERSION, image_path=HOSTILE, sample_path=str(tmp_path / HOSTILE))
    run.log_folder.mkdir(parents=True)
    run.attn_folder.mkdir(parents=True)
    (run.attn_folder / "1_explorer.html").touch()
    write_log(run, [{"step": 1, "<b>$x$": 1.0}])
    page = page_of(run, 1, HOSTILE, HOSTILE, state=HOSTILE)
    page.encode()
    assert page.count("</script>") == 2 and "<b>" not in page
    assert page.count(html.escape(HOSTILE.replace("\udcff", "?"))) == 5  # machine, state, path, path, command
    assert html.escape(VERSION) in page and '/1_explorer.html"' in page
    assert HOSTILE in unquote(data_of(page)["folder"], errors="surrogateescape")


@pytest.fixture
def open_page(quiet_browser) -> Callable[..., BrowserPage]:
    """A function that opens a page of a run."""

    def show(run: Config, page: str, width: int = 1280, scheme: str = "light") -> BrowserPage:
        path = run.log_folder / "report.html"
        path.write_text(page, encoding="utf-8")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        quiet_browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shown = BrowserPage(quiet_browser, path.as_uri(), "slider")
        shown.resize(width)
        return shown

    return show


@pytest.mark.browser
def test_the_slider(open_page, toy_run):
    text = page_of(toy_run, 6, "python main.py --version 'a b'")
    page, frames = open_page(toy_run, text), {frame["step"]: frame for frame in data_of(text)["frames"]}
    sample, ema, generator, real = page.find("#sample"), *page.find_all("#kinds button")

    def assert_shown(step: int, kind: str) -> None:
        assert (page.find("#shown").text, sample.get_attribute("src")) == (f"step {step}", frames[step][kind])

    assert_shown(6, "ema")
    assert int(sample.get_property("naturalWidth")) > 0
    for key, step in ((Keys.ARROW_LEFT, 4), (Keys.HOME, 2)):
        page.pointable.send_keys(key)
        assert_shown(step, "ema")
    page.point(0.5, 0.5)
    page.click()
    assert_shown(4, "ema")
    generator.click()
    assert_shown(4, "fake")
    assert generator.get_attribute("aria-pressed") == "true"
    path = urlparse(page.find("#original").get_attribute("href")).path
    assert unquote(path) == str(toy_run.sample_folder / "4_fake.png")
    real.click()
    assert sample.get_attribute("src") == data_of(text)["real"] and page.find("#shown").text == "real images"
    ema.click()
    page.find("#play").click()
    page.wait_for(lambda: page.find("#shown").text == "step 6" and page.find("#play").text == "▶")


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(320, "dark"), (1280, "light")])
def test_nothing_overflows_and_text_contrasts(open_page, toy_run, width, scheme):
    (toy_run.log_folder.parent / ("w" * 100)).symlink_to(toy_run.log_folder)
    long = dataclasses.replace(toy_run, version="w" * 100, image_path="p" * 200)
    text = page_of(long, 4, "python main.py --version " + "w" * 300, "m" * 60, state="stopped by SIGTERM")
    page = open_page(toy_run, text, width, scheme)
    page.assert_fits(width)
    boxes = page.browser.execute_script(
        "return [...document.querySelectorAll('.chart text, #kinds button')].map(item => {"
        "const inner = item.getBoundingClientRect(), card = item.closest('svg, .card').getBoundingClientRect();"
        "return [inner.left - card.left, card.right - inner.right]; })"
    )
    assert len(boxes) > 50 and np.min(boxes) >= 0
    assert page.find("#command").text.endswith("w" * 300)

    def brightness(selector, name):
        script = f"return getComputedStyle(document.querySelector('{selector}'))['{name}']"
        return np.mean([int(number) for number in re.findall(r"\d+", page.browser.execute_script(script))[:3]])

    for text, name, background in (("h1", "color", "body"), (".chart text", "fill", ".chart")):
        difference = brightness(text, name) - brightness(background, "backgroundColor")
        assert difference > 150 if scheme == "dark" else difference < -150


@pytest.mark.browser
def test_hostile_names_are_shown_and_the_command_is_copied(open_page, empty_run):
    run = dataclasses.replace(empty_run, image_path=HOSTILE)
    write_log(run, [{"step": 1, "<b>$x$": 1.0}])
    page = open_page(run, page_of(run, 1, HOSTILE))
    assert page.find("#command").get_property("textContent") == HOSTILE.replace("\udcff", "?")
    page.find("#copy").click()
    page.wait_for(lambda: page.find("#copy").text in ("Copied", "Press Ctrl-C to copy"))
    assert not page.find_all("b")
