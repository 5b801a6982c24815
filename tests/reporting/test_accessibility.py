"""The rules themselves: each finds what it is for."""

from __future__ import annotations

import pytest
from accessibility import contrast, problems

GOOD = """<!doctype html><html lang="en"><head><title>t</title><meta name="viewport" content="w">
<style>:root { --ink: #000000; --soft: #333333; --blue: #00008b; --paper: #ffffff;
  --desk: #eeeeee; }
:root { --ink: #ffffff; --soft: #dddddd; --blue: #9999ff; --paper: #000000; --desk: #111111; }
p { color: var(--ink); } a { color: var(--blue); } i { color: var(--soft); }</style></head><body>
<h1>t</h1><h2>u</h2><table><tr><th scope="col">c</th></tr></table><img alt="a"><a href="x">y</a>
<svg role="img" aria-labelledby="a b"><title id="a">t</title><desc id="b">d</desc></svg>
</body></html>"""


def test_a_good_page():
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("what", "by", "problem"),
    [
        (' lang="en"', "", "html without lang"),
        ("<title>t", "<title>", "no title"),
        ("viewport", "other", "no viewport"),
        ("h2", "h3", "levels of headings"),
        (' scope="col"', "", "th without scope"),
        ('<img alt="a">', "<img>", "img without alt"),
        (">y</a>", "></a>", "link without text"),
        (' role="img"', "", "svg without a name"),
        ('<title id="a">t', '<title id="a">', "svg without a name"),
        ('id="b"', 'id="a"', "id a twice"),
        ('aria-labelledby="a b"', 'aria-labelledby="a c"', "no id c"),
        ("#333333", "#888888", "soft on paper #ffffff: 3.54:1"),
        ("<h2>u", '<h2><script src="http://x"></script>u', "loads"),
        ("<h2>u", '<div class="card scroll"></div><h2>u', "keyboard"),
        ("<h2>u", "<h2>" + "u" * 600_000, "bytes"),
    ],
)
def test_a_bad_page(what, by, problem):
    assert what in GOOD
    assert any(problem in one for one in problems(GOOD.replace(what, by)))


def test_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
