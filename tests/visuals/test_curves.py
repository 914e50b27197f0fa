import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visuals.curves import COLOURS, clean, format_number, line_chart, make_axis, running_average, thin

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(-1e100, 1e100) | st.floats(-1, 1) | st.sampled_from([0.0, 1e-300, math.nan, math.inf, -math.inf])
NOISE = np.stack([np.arange(100_000), np.random.default_rng(0).normal(size=100_000)], axis=1)


def parse(text):
    return ElementTree.fromstring(text.encode("utf-8"))


def lines_of(svg):
    """The drawn lines of a chart, in order: (class, points (n, 2)); without the legend's."""
    paths = [path for path in svg.iter(SVG + "path") if "line" in path.get("class") and "h14" not in path.get("d")]
    return [(path.get("class"), np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d")), float)) for path in paths]


def area_of(svg):
    return [float(number) for number in svg.get("data-plot").split()]


def texts_of(svg):
    return ["".join(text.itertext()) for text in svg.iter(SVG + "text")]


@given(st.dictionaries(st.text(max_size=12), st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), max_size=9))
@settings(max_examples=50, deadline=None)
def test_every_chart_is_well_formed_and_its_points_are_in_the_plot_area(series):
    svg = parse(line_chart("title", series))
    left, top, right, bottom, *_ = area_of(svg)
    assert 0 <= left < right <= 480
    drawn = lines_of(svg)
    assert bool(drawn) == any(math.isfinite(x) and math.isfinite(y) for points in series.values() for x, y in points)
    for _, points in drawn:
        assert (points >= [left - 0.06, top - 0.06]).all() and (points <= [right + 0.06, bottom + 0.06]).all()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
@settings(deadline=None)
def test_ticks_are_round_and_can_be_told_apart(low, span, to_ticks):
    axis = make_axis(np.array([low, low + span]), to_ticks)
    assert axis.low <= low and axis.high >= low + span
    assert 2 <= len(axis.ticks) <= 9
    assert len(set(axis.labels)) == len(axis.labels)
    step = axis.ticks[1] - axis.ticks[0]
    power = 10.0 ** math.floor(math.log10(step) + 1e-6)
    round_step = min((factor * power for factor in (1, 2, 5)), key=lambda candidate: abs(candidate - step))
    assert step == pytest.approx(round_step, rel=1e-3)
    for tick in axis.ticks:
        assert tick / round_step == pytest.approx(round(tick / round_step), abs=1e-3)


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.9, 0.7, ["−1.0", "−0.5", "0", "0.5", "1.0"]),
        (12_000, 99_000, ["0", "20k", "40k", "60k", "80k", "100k"]),
        (0, 1_500_000, ["0", "0.5M", "1.0M", "1.5M"]),
        (0, 4e-6, ["0", "1e−6", "2e−6", "3e−6", "4e−6"]),
        (-3e12, -2e12, ["−3.0e12", "−2.8e12", "−2.6e12", "−2.4e12", "−2.2e12", "−2.0e12"]),
    ],
)
def test_labels(low, high, labels):
    assert make_axis(np.array([low, high], float), to_ticks=True).labels == labels


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (-0.0, "0"), (0.01234, "0.0123"), (-1.5, "−1.5"), (123, "123"), (1234, "1234"), (20_000, "20k"),
     (1_500_000, "1.5M"), (999_999, "1000k"), (2e9, "2B"), (2e-7, "2e−7"), (-3e15, "−3e15"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize("index, spike", [(0, 50), (33_333, 50), (61_234, -50), (99_999, 50)])
def test_thinning_keeps_a_spike(index, spike):
    points = NOISE.copy()
    points[index, 1] = spike
    thinned = thin(points)
    assert len(thinned) <= 400
    assert [index, spike] in thinned.tolist()
    assert (np.diff(thinned[:, 0]) > 0).all() and thinned[[0, -1], 0].tolist() == [0, 99_999]
    text = line_chart("loss", {"D": points})
    assert len(text) < 30_000
    svg = parse(text)
    _, top, _, bottom, *_ = area_of(svg)
    extreme = min(lines_of(svg)[0][1][:, 1]) - top if spike > 0 else bottom - max(lines_of(svg)[0][1][:, 1])
    assert extreme < 0.2 * (bottom - top)


def test_few_points_are_not_thinned():
    assert np.array_equal(thin(NOISE[:400]), NOISE[:400])


def test_noise_has_its_average_drawn_and_a_smooth_line_has_not():
    kinds = [kind for kind, _ in lines_of(parse(line_chart("loss", {"D": NOISE, "G": NOISE * [1, 2]})))]
    assert kinds == ["line rough s0", "line rough s1", "line average s0", "line average s1"]
    x = np.arange(1000)
    assert len(lines_of(parse(line_chart("gamma", {"G": np.stack([x, np.sin(x / 300)], axis=1)})))) == 1


def test_running_average():
    x = np.arange(1000.0)
    average = running_average(np.stack([x, 3 * x + np.resize([1, -1], 1000)], axis=1))
    assert average[[0, -1], 0].tolist() == [0, 999]
    inside = average[20:-20]
    assert np.abs(inside[:, 1] - 3 * inside[:, 0]).max() < 0.2


def test_what_is_not_finite_is_left_out():
    bad = [(15, math.nan), (math.nan, 3), (17, math.inf), (math.inf, 5), (18, -math.inf)]
    good = [(10, 1.0), (20, 2.0), (30, 1.5)]
    assert line_chart("t", {"a": bad + good}) == line_chart("t", {"a": good})
    assert np.array_equal(clean([(30, 1.5), (10, 1.0), (20, 2.0)]), good)  # by growing x


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": np.empty((0, 2))}, {"a": [(1, math.nan)]}])
def test_no_points(series):
    svg = parse(line_chart("loss", series))
    assert "nothing yet" in texts_of(svg)
    assert not lines_of(svg)


def test_one_point_is_a_dot():
    (_, line), (kind, dot) = lines_of(parse(line_chart("loss", {"a": [(10, 3.2)]})))
    assert "dots" in kind
    assert np.array_equal(line, dot)


@pytest.mark.parametrize("value", [0.0, 1e-4, -7.0, 1e8])
def test_a_constant_lies_between_ticks_that_can_be_told_apart(value):
    svg = parse(line_chart("rate", {"lr": [(10, value), (20, value)]}))
    _, top, _, bottom, *_ = area_of(svg)
    heights = lines_of(svg)[0][1][:, 1]
    assert heights[0] == heights[1] and top + 10 < heights[0] < bottom - 10


def test_names_and_latest_values_are_in_the_legend():
    svg = parse(line_chart("Gamma", {"G attn1": [(1, 0.0), (2, 0.125)], "D attn1": [(1, -2)]}, y_label="gamma"))
    assert {"Gamma", "gamma", "step", "G attn1 0.125", "D attn1 −2"} <= set(texts_of(svg))


@given(st.text(max_size=20) | st.sampled_from(["</title><script>", "a & b", 'quo"te', "it's", "\udcff", "\0\x1b"]))
@settings(deadline=None)
def test_any_name_and_title(name):
    text = line_chart(name, {name: [(1, 2)]}, x_label=name, y_label=name)
    shown = parse(text).find(SVG + "title").text or ""
    assert len(shown) == len(name.replace("\r\n", "\n"))  # a parser's line ends; all else is there or U+FFFD
    assert "<script" not in text


def test_long_names_stay_in_the_chart():
    svg = parse(line_chart("t" * 200, {f"{index}" * 60: [(1, index)] for index in range(12)}, y_label="y" * 90))
    assert max(map(len, texts_of(svg))) < 50
    assert lines_of(svg)[8 * 2][0] == "line  s0 more"  # a ninth line: the first colour, dashed


def test_a_chart_stands_alone():
    text = line_chart("gamma", {"G": [(1, 2)]})
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and 'role="img"' in text
    assert "<style>" in text and "prefers-color-scheme:dark" in text and 'class="paper"' in text
    assert len(re.findall(r"https?:", text)) == 1  # the namespace


def test_colours_stand_out_from_the_paper():
    def luminance(colour):
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for light, dark in COLOURS:
        assert 1.05 / (luminance(light) + 0.05) >= 3
        assert (luminance(dark) + 0.05) / (luminance("#171b21") + 0.05) >= 3
