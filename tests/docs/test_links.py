"""What the pages name is there: files behind links, and programs behind commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]

FOLDERS = ("benchmarks", "csrc", "dldr_ext", "docs", "examples", "tests", "tools")
# By the build, and by `make gpu`.
MADE = {
    "benchmarks/results/cuda.json",
    "dldr_ext/_C.so",
    "dldr_ext/_C_cuda.so",
    "dldr_ext/_build.json",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, _ = target.partition("#")
        assert re.match(r"https?:|mailto:", target) or (page.parent / file).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_are_there(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"\bbenchmarks(?:\.\w+)+", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for file in re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w/.-]+\w", text):
        assert (ROOT / file).exists() or file in MADE, file
