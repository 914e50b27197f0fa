"""The report of a run: made from a real one, from hostile ones, and looked at in a real browser."""

import dataclasses
import html
import json
import math
import re
import shutil
from datetime import datetime
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import main
from parameter import Config, option_groups
from training.log import read_curves
from visuals import report
from visuals.report import Run, picture, report_page

NOW = datetime(2026, 11, 24, 14, 40)
PATHS = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
HOSTILE = "</script><b>\"'&\udcff\x1b $data ${x}"


def run_of(config) -> Run:
    groups = {title: {field.name: getattr(config, field.name) for field in fields}
              for title, fields in option_groups().items()}  # fmt: skip
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    folders = (config.log_folder, config.sample_folder, config.attn_folder)
    sizes = (config.total_step, config.imsize, config.batch_size)
    return Run(config.version, *sizes, "cpu in fp32", *folders, groups, defaults)


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Config:
    """The configuration of a real run of 6 steps, which has left its results."""
    root = tmp_path_factory.mktemp("run")
    paths = {name: str(root / name) for name in PATHS}
    steps = {"total_step": 6, "log_step": 1, "sample_step": 2, "attn_step": 3}
    config = Config(**SMALL, **paths, **steps, device="cpu", tune_malloc=False)
    assert main.run(config) == 0
    return config


@pytest.fixture
def toy_run(left, tmp_path) -> Run:
    """What that run has left, in folders that a test may change."""
    for name in PATHS:
        shutil.copytree(getattr(left, name), tmp_path / name)
    return run_of(dataclasses.replace(left, **{name: str(tmp_path / name) for name in PATHS}))


@pytest.fixture
def empty_run(make_config) -> Run:
    """A run that has left nothing yet."""
    run = run_of(make_config(total_step=100))
    for folder in (run.log_folder, run.sample_folder, run.attn_folder):
        folder.mkdir(parents=True)
    return run


def data_of(page):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def titles_of(page):
    return re.findall('role="img"[^>]*><title>(.*?)</title>', page)


def write_log(run, rows):
    (run.log_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_real_run(toy_run):
    page = report_page(toy_run, 6, "python main.py --version 'a b'", NOW)
    assert "step 6 of 6 (100%)" in page and "32×32" in page and "batch 4" in page and "on cpu in fp32" in page
    assert "images/s" in page and "updated 2026-11-24 14:40" in page and ">finished</span>" in page
    data = data_of(page)
    assert [frame["step"] for frame in data["frames"]] == [2, 4, 6]
    assert all(frame["fake"].startswith("data:image/jpeg") and frame["ema"] for frame in data["frames"])
    assert data["real"]
    titles = "Losses, Logits of D, Gamma of the attention layers, Spectral norms of the generator, "
    assert ", ".join(titles_of(page)) == titles + "Spectral norms of the discriminator, Speed, Memory"
    rows = [json.loads(line) for line in (toy_run.log_folder / "metrics.jsonl").read_text().splitlines()]
    (name, steps, values), _ = data["charts"][0]
    assert (name, steps) == ("D", [1, 2, 3, 4, 5, 6])
    assert values == pytest.approx([row["d_loss"] for row in rows], rel=1e-6)
    assert re.findall(r'href="\.\./\.\./attn_path/sagan_celeb/6_(\w+)\.png"', page) == list(report.FIGURES)
    assert html.escape("python main.py --version 'a b'") in page
    assert "<div class=changed><dt>batch_size</dt><dd>4<small>default 64</small></dd>" in page
    assert "<div><dt>beta2</dt><dd>0.9</dd>" in page


def test_it_needs_nothing_from_elsewhere(toy_run):
    page = report_page(toy_run, 6, "command", NOW)
    assert set(re.findall(r"\w+://[^\s\"'<>]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert all(link.startswith(("data:", "../")) for link in re.findall('(?:src|href)="([^"]*)"', page))
    assert "connect-src" not in page and "default-src 'none'" in page


def test_only_what_was_there_at_that_step(toy_run):
    page = report_page(toy_run, 4, "command", NOW)
    data = data_of(page)
    assert [frame["step"] for frame in data["frames"]] == [2, 4]
    assert data["charts"][0][0][1] == [1, 2, 3, 4]
    assert "/3_G_attn1.png" in page and "/6_G_attn1.png" not in page
    assert "(66.6%)" in page and ">running</span>" in page and "to go" in page
    assert ">stopped</span>" in report_page(toy_run, 4, "command", NOW, state="stopped")


@pytest.mark.parametrize("made", [True, False])
def test_a_fresh_run(empty_run, made):
    if not made:
        for folder in (empty_run.log_folder, empty_run.sample_folder, empty_run.attn_folder):
            folder.rmdir()
    page = report_page(empty_run, 0, "python main.py", NOW)
    assert data_of(page) == {"frames": [], "real": "", "folder": "../../sample_path/sagan_celeb", "charts": []}
    assert 'class="card samples" hidden' in page
    assert "attention looks" not in page
    assert "step 0 of 100 (0%)" in page and "python main.py" in page


def test_damaged_and_unfinished_pictures_are_left_out(toy_run):
    whole = (toy_run.sample_folder / "4_fake.png").read_bytes()
    (toy_run.sample_folder / "4_fake.png").write_bytes(whole[: len(whole) // 2])
    (toy_run.sample_folder / "6_fake.png").write_bytes(b"")
    (toy_run.sample_folder / "6_ema.png").write_bytes(whole.replace(b"IDAT", b"IDAX"))
    (toy_run.attn_folder / "6_G_attn1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = report_page(toy_run, 6, "command", NOW)
    assert [sorted(frame) for frame in data_of(page)["frames"]] == [["ema", "fake", "step"], ["ema", "step"]]
    assert "/3_G_attn1.png" in page and "/6_G_attn2.png" in page  # the newest of each that can be read


def test_a_long_log_is_read_whole_and_drawn_small(empty_run):
    rows = [{"step": step, "d_loss": math.sin(step), "g_loss": 1.0} for step in range(1, 20_001)]
    rows[12_345]["g_loss"] = 77.0
    write_log(empty_run, rows)
    assert len(read_curves(empty_run.log_folder, 20_000)["d_loss"]) == 20_000
    page = report_page(empty_run, 20_000, "command", NOW)
    assert len(page) < 100_000
    noise, spike = data_of(page)["charts"][0]
    assert noise[0] == "D, average" and max(map(abs, noise[2])) < 0.2
    assert spike[0] == "G" and 77.0 in spike[2]


def test_curves_of_what_there_is(empty_run):
    first = {"step": 10, "fid": 80.0, "lr/g": 1e-4, "lr/d": 4e-4, "d_loss_real": 1, "reach/G_attn1": 0.3, "faces": 0.5}
    write_log(empty_run, [first, first | {"step": 20}])
    page = report_page(empty_run, 20, "command", NOW)
    assert titles_of(page) == ["FID", "reach", "faces"]  # learning rates that stay as they are say nothing
    write_log(empty_run, [first, first | {"step": 20, "lr/g": 5e-5}])
    page = report_page(empty_run, 20, "command", NOW)
    assert titles_of(page) == ["FID", "Learning rates", "reach", "faces"]
    assert [line[0] for chart in data_of(page)["charts"] for line in chart] == ["fid", "G", "D", "G attn1", "faces"]


def test_pictures_fit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert 1000 < len(picture(tmp_path / "noise.png", 560, 30_000)) < 40_100
    Image.new("RGB", (60, 70_000)).save(tmp_path / "tall.png")  # taller than a JPEG can be
    assert picture(tmp_path / "tall.png", 560, 30_000)
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    assert picture(tmp_path / "small.png", 560, 30_000) == picture(tmp_path / "small.png", 64, 30_000)  # not blown up


def test_a_page_of_a_long_run_is_below_8_mb(empty_run, monkeypatch):
    for step in range(100, 20_100, 100):
        for kind in ("fake", "ema"):
            (empty_run.sample_folder / f"{step}_{kind}.png").touch()
    (empty_run.attn_folder / "100_G_attn1.png").touch()
    for name in report.FIGURES:
        (empty_run.attn_folder / f"200_{name}.png").touch()
    random = np.random.default_rng(0)
    names = [f"sigma/G_{index}" for index in range(30)]
    write_log(
        empty_run, [{"step": step} | dict(zip(names, random.normal(size=30), strict=True)) for step in range(1, 1001)]
    )
    monkeypatch.setattr(report, "picture", lambda path, widest, most: "x" * (most * 4 // 3 + 30) if path else "")
    page = report_page(empty_run, 20_000, "command", NOW)
    frames = data_of(page)["frames"]
    assert len(frames) == 40
    assert (frames[0]["step"], frames[-1]["step"]) == (100, 20_000)
    gaps = np.diff([frame["step"] for frame in frames])
    assert gaps.min() >= 500 and gaps.max() <= 600
    assert len(page.encode()) < 8e6


def test_hostile_names(empty_run):
    (empty_run.attn_folder / "1_explorer.html").touch()
    options = {"options": {HOSTILE: {HOSTILE: HOSTILE}}, "defaults": {HOSTILE: None}}
    folder = empty_run.sample_folder / HOSTILE
    run = dataclasses.replace(empty_run, title=HOSTILE, machine=HOSTILE, sample_folder=folder, **options)
    write_log(run, [{"step": 1, HOSTILE: 1.0}])
    page = report_page(run, 1, HOSTILE, NOW, HOSTILE)
    page.encode()
    assert page.count("</script>") == 2 and "<b>" not in page
    assert html.escape("</script><b>\"'&\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} $data ${x}") in page
    assert 'href="../../attn_path/sagan_celeb/1_explorer.html"' in page
    assert unquote(data_of(page)["folder"], errors="surrogateescape").endswith(HOSTILE)


def open_page(browser, path, page, width=1280, height=1000):
    path.write_text(page, encoding="utf-8")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    return lambda name: browser.find_element(By.ID, name)


def errors_of(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_slider_in_a_browser(browser, toy_run):
    page = report_page(toy_run, 6, "python main.py --version 'a b'", NOW)
    element = open_page(browser, toy_run.log_folder / "report.html", page)
    frames = {frame["step"]: frame for frame in data_of(page)["frames"]}
    source = lambda: element("sample").get_attribute("src")  # noqa: E731
    assert element("shown").text == "step 6" and source() == frames[6]["ema"]
    assert int(element("sample").get_property("naturalWidth")) > 0
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT)
    assert element("shown").text == "step 4" and source() == frames[4]["ema"]
    element("slider").send_keys(Keys.HOME)
    assert element("shown").text == "step 2" and source() == frames[2]["ema"]
    ActionChains(browser).move_to_element(element("slider")).click().perform()  # its middle
    assert element("shown").text == "step 4"
    average, generator, real = element("switch").find_elements(By.TAG_NAME, "button")
    generator.click()
    assert source() == frames[4]["fake"] and generator.get_attribute("aria-pressed") == "true"
    path = urlparse(element("original").get_attribute("href")).path
    assert unquote(path) == str(toy_run.sample_folder / "4_fake.png")
    real.click()
    assert source() == data_of(page)["real"] and element("shown").text == "real images"
    average.click()
    element("play").click()
    WebDriverWait(browser, 10).until(lambda _: element("shown").text == "step 6")
    WebDriverWait(browser, 10).until(lambda _: element("play").text == "▶")
    assert not errors_of(browser)


def test_the_charts_in_a_browser(browser, toy_run):
    page = report_page(toy_run, 6, "command", NOW)
    open_page(browser, toy_run.log_folder / "report.html", page)
    losses = browser.find_element(By.CLASS_NAME, "chart")
    cover, tip = losses.find_element(By.CLASS_NAME, "cover"), losses.find_element(By.CLASS_NAME, "tip")
    assert not tip.is_displayed()
    left, _, right, _, low, high = (float(part) for part in re.search('data-plot="(.*?)"', page)[1].split())
    place = left + (right - left) * (4.3 - low) / (high - low) - 240  # from the middle of a chart 480 wide
    ActionChains(browser).move_to_element_with_offset(cover, round(place * cover.size["width"] / 480), 0).perform()
    assert tip.text.startswith("step 4")
    values = [float(value.text) for value in tip.find_elements(By.TAG_NAME, "b")]
    row = json.loads((toy_run.log_folder / "metrics.jsonl").read_text().splitlines()[3])
    assert values == pytest.approx([row["d_loss"], row["g_loss"]], rel=1e-3)
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    assert not errors_of(browser)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(browser, toy_run, width):
    long = dataclasses.replace(toy_run, title="w" * 100, machine="m" * 60, options={"Data": {"image_path": "p" * 200}})
    page = report_page(long, 4, "python main.py --version " + "w" * 300, NOW, state="stopped by SIGTERM")
    element = open_page(browser, toy_run.log_folder / "report.html", page, width, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert element("command").text.endswith("w" * 300)
    assert not errors_of(browser)


def test_hostile_names_in_a_browser(browser, empty_run):
    run = dataclasses.replace(empty_run, title=HOSTILE, options={HOSTILE: {HOSTILE: HOSTILE}})
    write_log(run, [{"step": 1, HOSTILE: 1.0}])
    element = open_page(browser, run.log_folder / "report.html", report_page(run, 1, HOSTILE, NOW))
    assert element("command").get_property("textContent") == re.sub("[\udcff\x1b]", "\ufffd", HOSTILE)
    element("copy").click()
    WebDriverWait(browser, 10).until(lambda _: element("copy").text in ("Copied", "Ctrl-C"))
    assert not browser.find_elements(By.TAG_NAME, "b")
    assert not errors_of(browser)
