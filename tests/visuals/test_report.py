"""The report of a run: of a real one, of hostile ones, and in a real browser."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import SMALL, WORDS, log, make_folders, train_in
from page_tools import BrowserPage, Keys
from PIL import Image

from parameter import Config
from visuals.curves import GRAY, line_chart
from visuals.report import FIGURE_SIZE, FRAMES, SAMPLE_SIZE, picture, report_page

VERSION = "<b>\"'& $data ${x}"
HOSTILE = "</script><b>\"'&\udcff $data ${x}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a real run of 6 steps."""
    folder, words = tmp_path_factory.mktemp("run"), "--total_step 6 --log_step 1 --sample_step 2 --attn_step 3"
    train_in(folder, *WORDS, *words.split())
    return folder


@pytest.fixture
def empty_run(tmp_path, monkeypatch) -> Config:
    """That run of 100 steps before it has results."""
    monkeypatch.chdir(tmp_path)
    return make_folders(Config(**SMALL, total_step=100))


@pytest.fixture
def toy_run(finished, empty_run, tmp_path) -> Config:
    """That run, with a copy of its results that a test may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(empty_run, total_step=6)


def page_of(config: Config, step: int, machine: str = "cpu in fp32", state: str = "running", best=()) -> str:
    """The page, without the marks around options."""
    page = report_page(config, machine, (), step, state, dict(best))
    return re.sub('<span class="option">(.*?)</span>', r"\1", page)


def parts_of(page):
    """What the slider shows, the titles of the charts and the names of the attention figures."""
    data = json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    titles = re.findall(r"<svg[^>]*>\s*<title>(.*?)</title>", page)
    return data, titles, re.findall(r'href="[^"]*/(\d+_\w+)\.png"', page)


def write_log(run, rows):
    (run.log_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run(toy_run):
    page = page_of(toy_run, 6)
    facts = ("step 6 of 6 (100%)", "32×32", "batch 4", "on cpu in fp32", f"updated {datetime.now():%Y-%m-%d}")
    assert all(f"<li>{fact}" in page for fact in facts) and ">finished<" in page
    data, titles, figures = parts_of(page)
    assert [frame["step"] for frame in data["frames"]] == [2, 4, 6] and data["real"]
    assert all(frame["fake"].startswith("data:image/jpeg") and frame["ema"] for frame in data["frames"])
    assert titles == ["Losses", "Logits of D", "Sign of D on training images", "Spread of the samples",
                      "Gamma of the attention layers", "Spectral norms of G", "Spectral norms of D",
                      "Speed", "Memory", "Learning rates"]  # fmt: skip
    assert figures == ["6_G_attn1", "6_G_attn2", "6_D_attn1", "6_D_attn2"]
    assert html.escape(toy_run.command_line(pretrained_model="6")) in page and "<div><dt>beta2</dt><dd>0.9</dd>" in page
    assert "<div class=changed><dt>batch_size</dt><dd>4<small>default 64</small></dd>" in page

    links = re.findall('(?:src|href)="([^"]*)"', page)  # none needs the network
    assert links and all(link.startswith(("data:", "../", "#")) for link in links) and "default-src 'none'" in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 10

    page = page_of(toy_run, 4)  # results of later steps are ignored
    data, _, figures = parts_of(page)
    assert [frame["step"] for frame in data["frames"]] == [2, 4]
    assert figures[0] == "3_G_attn1" and "6_G_attn1" not in page
    row = log(toy_run.log_folder, "d_loss")[3]
    assert f"d_loss  {row['d_loss']:.4g}".replace("-", "\N{MINUS SIGN}") in page
    assert "(66.6%)" in page


def test_a_run_without_results_and_the_eta_of_a_running_run(empty_run):
    for remove in (lambda _: None, lambda folder: folder.rmdir()):
        for folder in (empty_run.sample_folder, empty_run.attn_folder, empty_run.log_folder):
            remove(folder)
        page = page_of(empty_run, 0)
        assert parts_of(page) == ({"frames": [], "real": "", "folder": "../../samples/sagan_celeb"}, [], [])
        assert "Attention maps" not in page and "step 0 of 100 (0%)" in page
    empty_run.log_folder.mkdir()
    run = dataclasses.replace(empty_run, total_step=10**6)  # with batches of 4
    write_log(run, [{"step": step, "images_per_s": 40.0} for step in (1, 2)])
    assert "<li>ETA 1 day, 3:47:00</li>" in page_of(run, 2)
    stopped = page_of(run, 2, state="stopped")
    assert ">stopped<" in stopped and "<li>ETA" not in stopped
    assert "<li>ETA" not in page_of(run, 10**6)


def test_damaged_and_incomplete_images_are_left_out_and_the_newest_figure_of_each_layer_is_shown(toy_run):
    samples, figures = toy_run.sample_folder, toy_run.attn_folder
    whole = (samples / "4_fake.png").read_bytes()
    (samples / "2_fake.png").write_bytes(b"")
    (samples / "2_ema.png").unlink()
    (samples / "4_fake.png").write_bytes(whole[: len(whole) // 2])
    (samples / "6_ema.png").write_bytes(whole.replace(b"IDAT", b"IDAX"))
    for name in ("5_G_attn3", "9_G_attn4", "3_D_attn1_small"):
        shutil.copy(figures / "6_G_attn1.png", figures / f"{name}.png")
    (figures / "6_G_attn1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (figures / "6_D_attn2.png").unlink()
    data, _, shown = parts_of(page_of(toy_run, 6))
    kinds = [{kind for kind in ("ema", "fake") if frame.get(kind)} for frame in data["frames"]]
    assert kinds == [{"ema"}, {"fake"}]
    assert shown == ["6_G_attn2", "5_G_attn3", "6_D_attn1", "3_D_attn1_small", "3_D_attn2"]


def test_charts_of_a_log(empty_run):
    """Names that no chart knows have charts by prefix; the step of the best checkpoint is marked."""
    row = {"step": 10, "fid": 80.0, "d_loss_real": 1, "faces": 1, "reach/G_attn1": 0, "reach/G_attn2": 0.4, "new": 1}
    write_log(empty_run, [row, row | {"step": 20}])
    page = page_of(empty_run, 20, best={"step": 10, "metric": "fid", "score": 80})
    assert parts_of(page)[1] == ["FID", "Face rate", "reach", "new"] and "G_attn2  0.4" in page
    assert "<li>best checkpoint: step 10, fid 80</li>" in page
    assert page.count(GRAY) == 1 and "best checkpoint" not in page_of(empty_run, 20)
    later = page_of(empty_run, 20, best={"step": 30, "metric": "fid", "score": 70})  # before it was resumed
    assert GRAY not in later and "best checkpoint" not in later and "--pretrained_model latest" in later
    assert "--pretrained_model 20" in page_of(empty_run, 20, state="stopped")


@pytest.mark.parametrize("size, shown", [((1120, 560), (560, 280)), ((64, 64), (64, 64)), ((60, 70_000), (1, 560))])
def test_pictures_keep_their_aspect_and_fit(size, shown, tmp_path):
    """The last one is taller than a JPEG can be."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    uri = picture(tmp_path / "a.png", (560, 560))
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == shown
    assert picture(tmp_path / "missing.png", (560, 560)) == ""


@pytest.mark.slow
def test_a_page_of_pure_noise_stays_below_8_mb(empty_run):
    random, samples = np.random.default_rng(0), empty_run.sample_folder
    noise = random.integers(0, 256, (946, 768, 3), np.uint8)
    Image.fromarray(noise[: SAMPLE_SIZE[1], : SAMPLE_SIZE[0]]).save(samples / "real.png")
    for step in range(100, 4100, 100):
        for kind in ("fake", "ema"):
            (samples / f"{step}_{kind}.png").symlink_to("real.png")
    for name in ("G_attn1", "G_attn2", "D_attn1", "D_attn2"):
        Image.fromarray(noise[:, : FIGURE_SIZE[0]]).save(empty_run.attn_folder / f"200_{name}.png")
    names = ["d_loss", "g_loss", *(f"sigma/{network}_{index}" for network in "GD" for index in range(15))]
    write_log(empty_run, [{"step": step} | {name: random.normal() for name in names} for step in range(1, 1001)])
    data, _, figures = parts_of(page := page_of(empty_run, 4000))
    steps = [frame["step"] for frame in data["frames"]]
    assert len(steps) == FRAMES and (steps[0], steps[-1]) == (100, 4000) and set(np.diff(steps)) == {100, 200}
    assert len(figures) == 4 and len(page.encode()) < 8e6


def test_hostile_names(empty_run, tmp_path):
    run = dataclasses.replace(empty_run, version=VERSION, image_path=HOSTILE, sample_path=str(tmp_path / HOSTILE))
    for folder in (run.log_folder, run.attn_folder):
        folder.mkdir(parents=True)
    (run.attn_folder / "1_explorer.html").touch()
    write_log(run, [{"step": 1, "<b>$x$": 1.0}])
    (page := page_of(run, 1, HOSTILE, HOSTILE)).encode()
    assert page.count("</script>") == 2 and "<b>" not in page
    assert page.count(html.escape(HOSTILE.replace("\udcff", "?"))) == 4  # machine, state, path, path
    assert html.escape(run.command_line(pretrained_model="1").replace("\udcff", "?")) in page
    assert html.escape(VERSION) in page and '/1_explorer.html"' in page
    assert HOSTILE in unquote(parts_of(page)[0]["folder"], errors="surrogateescape")


@pytest.mark.browser
def test_the_slider_and_the_command(quiet_browser, toy_run):
    run = dataclasses.replace(toy_run, image_path=HOSTILE)
    page = BrowserPage(quiet_browser, run.log_folder / "report.html", text := page_of(run, 6))
    data = parts_of(text)[0]
    frames = {frame["step"]: frame for frame in data["frames"]}
    sample, slider, (ema, generator, real) = page.find("#sample"), page.find("#slider"), page.find_all("#kinds button")

    def assert_shown(step: int, kind: str) -> None:
        assert (page.find("#shown").text, sample.get_attribute("src")) == (f"step {step}", frames[step][kind])

    assert_shown(6, "ema")
    for key, step in ((Keys.ARROW_LEFT, 4), (Keys.HOME, 2)):
        slider.send_keys(key)
        assert_shown(step, "ema")
    slider.click()  # in the middle
    assert_shown(4, "ema")
    generator.click()
    assert_shown(4, "fake")
    assert generator.get_attribute("aria-pressed") == "true"
    assert page.find("#original").get_attribute("href").endswith("/samples/sagan_celeb/4_fake.png")
    real.click()
    assert sample.get_attribute("src") == data["real"] and page.find("#shown").text == "real images"
    ema.click()
    page.find("#play").click()
    page.wait_for(lambda: page.find("#shown").text == "step 6" and page.find("#play").text == "▶")

    command = run.command_line(pretrained_model="6").replace("\udcff", "?")
    assert page.find("#command").get_property("textContent") == command
    page.find("#copy").click()
    page.wait_for(lambda: page.find("#copy").text in ("Copied", "Press Ctrl-C to copy"))


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(320, "dark"), (1280, "light")])
def test_nothing_overflows_and_text_contrasts(quiet_browser, toy_run, tmp_path, width, scheme):
    long = dataclasses.replace(toy_run, version="w" * 100, image_path="p" * 200)
    toy_run.log_folder.rename(long.log_folder)
    text = report_page(long, "m" * 60, (), 4, "stopped by SIGTERM", {})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    quiet_browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = BrowserPage(quiet_browser, long.log_folder / "report.html", text)
    page.assert_fits(width)
    lines = page.script("return [...document.querySelectorAll('.option')].map(option => option.offsetHeight)")
    assert len(lines) > 10 and 0 < max(lines) < 30  # not broken between dashes
    boxes = page.script(
        "return [...document.querySelectorAll('.chart text, #kinds button')].map(item => {"
        "const inner = item.getBoundingClientRect(), card = item.closest('svg, .card').getBoundingClientRect();"
        "return [inner.left - card.left, card.right - inner.right]; })"
    )
    assert len(boxes) > 50 and np.min(boxes) >= 0

    def brightness(selector, name):
        color = page.script(f"return getComputedStyle(document.querySelector('{selector}'))['{name}']")
        return np.mean([int(number) for number in re.findall(r"\d+", color)[:3]])

    for text, name, background in (("h1", "color", "body"), (".chart text", "fill", ".chart")):
        difference = brightness(text, name) - brightness(background, "backgroundColor")
        assert difference > 150 if scheme == "dark" else difference < -150
    page = BrowserPage(quiet_browser, tmp_path / "a.svg", line_chart("gamma", {"G": np.eye(2)}))  # of its own
    assert brightness("text", "fill") == (255 if scheme == "dark" else 0)
