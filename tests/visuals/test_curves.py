import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visuals.curves import COLORS, GRAY, NAMED, line_chart, read_curves

SVG = "{http://www.w3.org/2000/svg}"
POINTS = np.array([(10, 1.0), (20, 2.5), (30, -1.5)])
NOISE = np.stack([np.arange(100_000), np.random.default_rng(0).normal(size=100_000)], axis=1)


def parse(text):
    return ElementTree.fromstring(text.encode())


def texts_of(text):
    return ["".join(element.itertext()) for element in parse(text).iter(SVG + "text")]


def lines_of(text):
    """The data lines of a chart as (n, 2) points, in the order of drawing; the legend's are not clipped to the plot."""
    paths = [path for path in parse(text).iter(SVG + "path") if path.get("clip-path")]
    paths = [path for path in paths if any(f"stroke: {color}" in path.get("style") for color in COLORS)]
    return [np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d")), float) for path in paths]


def test_curves_are_read_up_to_a_step_without_damaged_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "a": 1.5, "gamma/G": 2}\n{"step": 20, "a": NaN, "gamma/G": 3}\nno json\n[1]\n7\n{"a": 1}\n'
        '{"step": 25, "a": "text", "gamma/G": null}\n{"step": null, "a": 1}\n'
        '{"step": 30, "a": 2.5, "fid": 99.5, "gamma/G": 4}\n{"step": 35, "a": -Infinity, "gamma/G": 5}\n'
        '{"step": 50, "a": 7}\n{"step": 40, "a": 3'
    )
    curves = {name: points.tolist() for name, points in read_curves(tmp_path, 35).items()}
    gamma = [[10, 2], [20, 3], [30, 4], [35, 5]]
    assert curves == {"a": [[10, 1.5], [30, 2.5]], "gamma/G": gamma, "fid": [[30, 99.5]]}
    assert read_curves(tmp_path / "missing", 35) == {}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(), min_size=1), max_size=30))
@settings(max_examples=50, deadline=None)
def test_curves_equal_what_was_logged(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("log")
    rows = [{"step": step} | entry for step, entry in enumerate(entries)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = read_curves(folder, len(rows))
    for name in "abc":
        expected = [[row["step"], row[name]] for row in rows if np.isfinite(row.get(name, np.nan))]
        assert curves[name].tolist() == expected if expected else name not in curves


def test_matplotlib_is_imported_late_without_a_backend_and_its_settings_stay():
    code = """import sys, visuals.report, numpy; from visuals.curves import RC, line_chart
assert 'matplotlib' not in sys.modules
line_chart('t', {'a': numpy.eye(2)})
import matplotlib
assert all(matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key] for key in RC)
assert 'matplotlib.pyplot' not in sys.modules"""
    environment = os.environ | {"MPLBACKEND": "module://no_such.backend", "MPLCONFIGDIR": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_chart_is_a_file_of_its_own_that_fits_into_any_page():
    text = line_chart("gamma", {"G": POINTS})
    root = parse(text)
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>")
    assert root.get("width") is None and len(root.get("viewBox").split()) == 4  # scales to the space there is
    assert not list(root.iter(SVG + "metadata"))
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    fills = {fill for element in root.iter() for fill in re.findall(r"fill: ([^;]*)", element.get("style", ""))}
    assert fills == {"none", "currentColor", COLORS[0]}  # a transparent background


@pytest.mark.browser
def test_a_file_of_its_own_follows_the_color_scheme(browser, tmp_path):
    (tmp_path / "gamma.svg").write_text(line_chart("gamma", {"G": POINTS}), encoding="utf-8")
    for scheme, color in (("light", "rgb(0, 0, 0)"), ("dark", "rgb(255, 255, 255)")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((tmp_path / "gamma.svg").as_uri())
        assert browser.execute_script("return getComputedStyle(document.querySelector('text')).fill") == color


def test_title_names_latest_values_and_plain_numbers_are_shown():
    series = {"G attn1": POINTS * [1000, 1], "D attn1": POINTS[:1] * [1000, 0.000012]}
    texts = texts_of(line_chart("Gamma", series, y_label="gamma"))
    assert {"Gamma", "gamma", "step", "G attn1  −1.5", "D attn1  0.000012", "20,000"} <= set(texts)


@pytest.mark.parametrize("name", ["$x$", "a_b^c", "<b>", "a & b", 'id="x"', r"\frac{1}{2}", "ä π"])
def test_names_and_titles_are_shown_as_they_are(name):
    text = line_chart(name, {name: POINTS, "other": POINTS}, y_label=name)
    assert [shown.partition("  ")[0] for shown in texts_of(text)].count(name) == 3
    assert parse(text).find(SVG + "title").text == name


@pytest.mark.parametrize("index, spike", [(0, 50), (61_234, -50), (99_999, 50)])
def test_a_spike_in_a_long_series_is_drawn(index, spike):
    points = NOISE.copy()
    points[index, 1] = spike
    text = line_chart("loss", {"D": points})
    assert len(text) < 40_000
    heights = np.unique(lines_of(text)[0][:, 1])  # y grows downwards
    gap = heights[1] - heights[0] if spike > 0 else heights[-1] - heights[-2]
    assert gap > 100


def test_noise_has_a_running_mean_on_top_and_a_smooth_line_has_none():
    x = np.arange(1000)
    assert len(lines_of(line_chart("gamma", {"G": np.stack([x, np.sin(x / 300)], axis=1)}))) == 1
    slope = NOISE + NOISE[:, :1] * [0, 2e-5]
    noise, mean = lines_of(line_chart("loss", {"D": slope}))
    fit = np.polyval(np.polyfit(*noise.T, 1), mean[:, 0])
    assert np.abs(mean[:, 1] - fit).max() < 0.05 * np.ptp(noise[:, 1])
    assert np.ptp(mean[:, 0]) > 0.95 * np.ptp(noise[:, 0])


@pytest.mark.parametrize("value", [0.0, 1e-7, -7.0, 1e8])
def test_one_point_and_constants_are_drawn(value):
    one = line_chart("rate", {"lr": np.array([(10, value)])})
    assert any("use" in element.tag for element in parse(one).iter())  # a dot
    (line,) = lines_of(line_chart("rate", {"lr": np.array([(10 * step, value) for step in range(50)])}))
    assert np.ptp(line[:, 1]) == 0


def test_ids_are_unique_on_a_page_and_references_resolve():
    charts = [line_chart(title, {"a": POINTS, "b": NOISE[:1000]}) for title in ("one", "two")]
    charts.append(line_chart("one", {"a": POINTS * 2, "b": NOISE[:1000]}))
    ids = [re.findall(r'\bid="([^"]*)"', chart) for chart in charts]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 0
    for chart, own in zip(charts, ids, strict=True):
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', chart)
        assert used and {first or second for first, second in used} <= {*own}


def test_of_many_series_those_that_change_most_are_named_and_some_dashed():
    series = {f"l{index}": POINTS * [1, 1 + index * 7 % 20] for index in range(20)}
    changes = {name: np.ptp(points[:, 1]) for name, points in series.items()}
    named = sorted(changes, key=changes.get)[-NAMED:]
    text = line_chart("sigma", series)
    shown = [text.partition(" ")[0] for text in texts_of(text)]
    assert [name for name in shown if name in series] == [name for name in series if name in named]
    assert "12 others" in texts_of(text)
    styles = [path.get("style", "") for path in parse(text).iter(SVG + "path")]
    assert sum(GRAY in style for style in styles) == 12 + 1  # and the legend's
    assert sum("stroke-dasharray" in style for style in styles) == 2 * (NAMED - len(COLORS))


def test_a_step_is_marked():
    marked, plain = (line_chart("fid", {"fid": POINTS}, mark=mark).count(GRAY) for mark in (20, None))
    assert marked == plain + 1


def test_colors_stand_out_from_light_and_dark_backgrounds():
    def luminance(color):
        parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for color in COLORS:  # WCAG: 3:1 for graphics
        assert 1.05 / (luminance(color) + 0.05) >= 3
        assert (luminance(color) + 0.05) / (luminance("#171b21") + 0.05) >= 3
