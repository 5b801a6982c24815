"""Rules of accessible pages that need no browser: structure, names, contrast, size."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

MOST_BYTES = 600_000
LEAST_CONTRAST = 4.5
_VOID = {"meta", "br", "img", "link", "path", "use", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page: tag, attributes, text inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        inside: list[str] = []
        self.elements.append((tag, {k: v or "" for k, v in attributes}, inside))
        if tag not in _VOID:
            self._open.append((tag, inside))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {k: v or "" for k, v in attributes}, []))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for _, inside in self._open:
            inside.append(data)

    def all(self, *tags: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of each element of these kinds."""
        return [(a, "".join(inside).strip()) for tag, a, inside in self.elements if tag in tags]


def problems(text: str) -> list[str]:
    """What is wrong with a page; nothing, it is to be hoped."""
    page, found = Page(text), []
    size = len(text.encode())
    if size > MOST_BYTES:
        found.append(f"{size} bytes, at most {MOST_BYTES}")
    if not page.all("html")[0][0].get("lang"):
        found.append("html without lang")
    if not page.all("title")[0][1]:
        found.append("no title")
    if not any(a.get("name") == "viewport" for a, _ in page.all("meta")):
        found.append("no viewport")
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    if levels.count(1) != 1 or any(b > a + 1 for a, b in pairwise(levels)):
        found.append(f"levels of headings: {levels}")
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    found += [f"id {one} twice" for one in set(ids) if ids.count(one) > 1]
    named = " ".join(a.get("aria-labelledby", "") for _, a, _ in page.elements).split()
    named += re.findall(r'(?:url\(|href=")#([^")]+)', text)
    found += [f"no id {one}" for one in set(named) - set(ids)]
    found += [f"th without scope: {t}" for a, t in page.all("th") if not a.get("scope")]
    found += [f"empty th {a}" for a, t in page.all("th") if not t]
    found += ["table without th"] if page.all("table") and not page.all("th") else []
    found += [f"img without alt: {a}" for a, _ in page.all("img") if not a.get("alt")]
    found += [f"link without text: {a}" for a, t in page.all("a") if not t]
    texts = dict((a["id"], t) for a, t in page.all("title", "desc") if "id" in a)
    for attributes, _ in page.all("svg"):
        names = attributes.get("aria-labelledby", "").split()
        if attributes.get("role") != "img" or not names or not all(texts.get(n) for n in names):
            found.append(f"svg without a name: {attributes}")
    for attributes, _ in page.all("div"):
        if "scroll" in attributes.get("class", "").split() and "tabindex" not in attributes:
            found.append("a scrolled part that the keyboard does not reach")
    loaded = [a for tag, a, _ in page.elements if tag in ("script", "link", "iframe") or "src" in a]
    found += [f"loads {a}" for a in loaded]
    return found + _contrasts(text)


def _contrasts(text: str) -> list[str]:
    """Text colours against both backgrounds, in both schemes."""
    schemes = re.findall(r":root \{([^}]*)\}", text)
    if len(schemes) != 2:
        return [f"expected colours for light and dark, got {len(schemes)} sets"]
    used = set(re.findall(r"(?<!-)color: var\(--(\w+)\)", text))
    used |= set(re.findall(r"<text [^>]*fill: var\(--(\w+)\)", text))
    found = [f"text in {c}" for c in re.findall(r"<text [^>]*fill: (#\w+)", text)]
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for name in sorted(used):
            for behind in ("paper", "desk"):
                value = contrast(colours[name], colours[behind])
                if value < LEAST_CONTRAST:
                    found.append(f"{name} on {behind} {colours[behind]}: {value:.2f}:1")
    return found if len(used) >= 3 else [*found, f"text in {used} alone"]


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
