"""Figures as parts of a page: text, ids, colours, words; matplotlib named where it is missing."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="the figures need matplotlib")

from accessibility import contrast

from dldr_ext.reporting import figures, views
from dldr_ext.reporting.figures import LIGHT, PALETTE, Drawing

RATIO = [0.7, 0.2, 0.06, 0.04]


def simple(name="one", title="A <title>", alt='Says "all" & more'):
    def draw(figure):
        axes = figure.add_subplot()
        axes.plot([1, 2, 3], [0.1, 0.5, 0.2], "o-", color=LIGHT["blue"], label="a <b> & c")
        axes.annotate("half", (2, 0.5), fontweight="bold")
        axes.legend()

    return Drawing(name, title, alt, draw)


def test_text_is_text_and_is_escaped():
    text = str(figures.svg(simple()))
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert "a &lt;b&gt; &amp; c" in shown and "half" in shown
    assert '<title id="one-title">A &lt;title&gt;</title>' in text
    assert '<desc id="one-alt">Says &#34;all&#34; &amp; more</desc>' in text
    assert 'role="img" aria-labelledby="one-title one-alt"' in text
    assert re.search(r"<text[^>]*font-weight: (700|bold)[^>]*>half", text)
    assert "font-family" not in text and "DejaVu" not in text


def test_two_figures_share_no_id():
    one, two = str(figures.svg(simple())), str(figures.svg(simple("two")))
    ids = re.findall(r' id="([^"]+)"', one + two)
    assert len(ids) == len(set(ids)) > 4
    for text in (one, two):
        used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
        assert used and set(used) <= set(re.findall(r' id="([^"]+)"', text))
    same = str(figures.svg(simple(), prefix="again-"))
    assert not set(re.findall(r' id="([^"]+)"', same)) & set(ids)


def test_colours_are_those_of_the_page():
    text = str(figures.svg(simple()))
    assert "var(--blue)" in text and "var(--soft)" in text
    assert not re.findall(r"(?:fill|stroke): #\w+", text)
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("name", sorted(set(PALETTE) - {"paper", "line"}))
def test_each_colour_is_told_from_the_paper(name):
    for paper, colour in zip(PALETTE["paper"], PALETTE[name], strict=True):
        assert contrast(colour, paper) >= 4.5


def test_drawn_twice_it_is_the_same():
    assert figures.svg(simple()) == figures.svg(simple())


def test_png(tmp_path):
    from matplotlib.image import imread

    (path,) = figures.save_figures([simple()], tmp_path)
    picture = imread(path)
    assert path.name == "one.png" and picture.shape[1] > 800
    assert 0.01 < (picture[..., :3].min(axis=2) < 0.98).mean() < 0.9


def test_words_have_the_numbers():
    assert "first direction has 70.0 %" in views.spectrum({"run": RATIO}).alt
    assert "2 are kept, with 90.000 %" in views.spectrum({"run": RATIO}, 2).alt
    drift = {"from_first": [0.0, 1.0, 1.5], "steps": [1.0, 0.75]}
    assert "1.5 from the first to the last" in views.distances({"run": drift}).alt
    two = views.distances({"a": drift, "b": drift}).alt
    assert "a: 1.5" in two and "b: 1.5" in two
    tracks = [views.Track("SGD", [(0, 0), (1, 2)], LIGHT["ink"])]
    contours = views.Contours([0, 1], [0, 2], [[1.0, 0.5], [float("nan"), 2.0]], "loss")
    alt = views.plane(tracks, ("a", "b"), contours).alt
    assert "2 points from (0, 0) to (1, 2)" in alt and "0.5 to 2, lowest at (1, 0)" in alt
    assert "b (4)" in views.layers(["a", "b"], [[0.5, 0.5], [2, 2]]).alt
    assert "lowest 1 at checkpoint 1" in views.losses({"run": [3.0, 1.0, 2.0]}).alt


@pytest.mark.parametrize(
    "drawing",
    [
        views.spectrum({"a": RATIO, "b": RATIO[:2]}, 3),
        views.spectrum({"a": [1.0]}, 1),
        views.cosines([[1.0, -0.5], [-0.5, 1.0]]),
        views.cosines([[1.0]]),
        views.layers(["a" * 40, "b"], [[0.0, 0.0], [0.0, 0.0]]),
        views.layers(["a"], [[1.0, 0.0, 1e-9]]),
        views.plane(
            [views.Track("run", [(0, 0), (0, 0)], LIGHT["blue"], ["1", "2"])],
            ("x", "y"),
            views.Contours([0, 1], [0, 1], [[1.0, 1.0], [1.0, 1.0]], "loss"),
        ),
        views.plane(
            [views.Track("run", [(t, t % 3) for t in range(300)], LIGHT["blue"], ["n"] * 300)],
            ("x", "y"),
            views.Contours([0, 1], [0, 1], [[float("nan")] * 2] * 2, "loss"),
        ),
        views.losses({"a": [1.0, 0.001], "b": [-1.0]}),
    ],
    ids=lambda drawing: drawing.title,
)
def test_views_draw_what_there_is(drawing):
    text = str(figures.svg(drawing))
    assert text.count("<text") > 3 and len(text) < 60_000


def test_no_axis_of_percentages_goes_beyond_all():
    text = str(figures.svg(views.spectrum({"run": [1.0]}, 1)))
    shown = [float(t) for t in re.findall(r">([\d.]+) %<", text)]
    assert shown and max(shown) <= 100


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    message = r'plot\(\) needs matplotlib.*pip install "dldr_ext\[demo\]".*--no-build-isolation'
    with pytest.raises(ModuleNotFoundError, match=message):
        figures.require_matplotlib("plot()")
