import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from visuals.curves import COLORS, GRAY, NAMED, line_chart, read_curves

SVG = "{http://www.w3.org/2000/svg}"
POINTS = np.array([(10, 1.0), (20, 2.5), (30, -1.5)])
NOISE = np.stack([np.arange(100_000), np.random.default_rng(0).normal(size=100_000)], axis=1)


def elements_of(text, name):
    return ElementTree.fromstring(text.encode()).iter(SVG + name)


def texts_of(text):
    return ["".join(element.itertext()) for element in elements_of(text, "text")]


def lines_of(text):
    """The data lines of a chart as (n, 2) points, in the order of drawing; the legend's are not clipped to the plot."""
    paths = [path for path in elements_of(text, "path") if path.get("clip-path")]
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


def test_charts_are_files_of_their_own_that_fit_into_one_page():
    charts = [line_chart(title, {"a": POINTS * scale, "b": NOISE[:1000]}) for title, scale in
              (("one", 1), ("two", 1), ("one", 2))]  # fmt: skip
    ids = [re.findall(r'\bid="([^"]*)"', chart) for chart in charts]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 0
    for chart, own in zip(charts, ids, strict=True):
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', chart)
        assert used and {first or second for first, second in used} <= {*own}
    text, (root,) = charts[0], elements_of(charts[0], "svg")
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>") and "<metadata" not in text
    assert root.get("width") is None and len(root.get("viewBox").split()) == 4  # scales to the space there is
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    fills = set(re.findall(r"fill: ([^;\"]*)", text))
    assert fills == {"none", "currentColor", COLORS[0]}  # a transparent background
    ticks = texts_of(line_chart("one step", {"a": np.array([[3, 0.5]])}))
    assert {"2", "3", "4"} <= {*ticks} and not {"2.5", "2.9", "3.1", "3.5"} & {*ticks}


@pytest.mark.parametrize("name", ["$x$", "a_b^c", "<b>", "a & b", 'id="x"', r"\frac{1}{2}", "ä π"])
def test_texts_are_shown_as_they_are(name):
    text = line_chart(name, {name: POINTS * [1000, 1], "other": POINTS[:1] * [1000, 0.000012]}, y_label=name)
    texts = [*texts_of(text), *(title.text for title in elements_of(text, "title"))]
    assert texts.count(name) == 3 and {"step", f"{name}  −1.5", "other  0.000012", "20,000"} <= set(texts)


@pytest.mark.parametrize("index, spike", [(0, 50), (61_234, -50), (99_999, 50)])
def test_a_spike_in_a_long_series_is_drawn(index, spike):
    points = NOISE.copy()
    points[index, 1] = spike
    text = line_chart("loss", {"D": points})
    heights = np.unique(lines_of(text)[0][:, 1])  # y grows downwards
    gap = heights[1] - heights[0] if spike > 0 else heights[-1] - heights[-2]
    assert gap > 100 and len(text) < 40_000


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
    assert list(elements_of(line_chart("rate", {"lr": np.array([(10, value)])}), "use"))  # a dot
    (line,) = lines_of(line_chart("rate", {"lr": np.array([(10 * step, value) for step in range(50)])}))
    assert np.ptp(line[:, 1]) == 0


def test_of_many_series_those_that_change_most_are_named_and_some_dashed():
    series = {f"l{index}": POINTS * [1, 1 + index * 7 % 20] for index in range(20)}
    named = sorted(series, key=lambda name: np.ptp(series[name][:, 1]))[-NAMED:]
    text = line_chart("sigma", series)
    shown = [text.partition(" ")[0] for text in texts_of(text)]
    assert [name for name in shown if name in series] == [name for name in series if name in named]
    assert "12 others" in texts_of(text)
    styles = [path.get("style", "") for path in elements_of(text, "path")]
    assert sum(GRAY in style for style in styles) == 12 + 1  # and the legend's
    assert sum("stroke-dasharray" in style for style in styles) == 2 * (NAMED - len(COLORS))


def test_colors_stand_out_from_light_and_dark_backgrounds():
    rgb = np.array([list(bytes.fromhex(color[1:])) for color in (*COLORS, "#171b21", "#ffffff")]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    *lines, dark, light = linear @ [0.2126, 0.7152, 0.0722] + 0.05
    assert 3 * dark <= min(lines) and 3 * max(lines) <= light  # WCAG: 3:1 for graphics
