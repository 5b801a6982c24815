"""docs/architecture.md and its picture against the source tree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_picture_has_the_floors_of_the_contract() -> None:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    wanted = [set(re.findall(r"(?<![\w(])\w+", layer)) for layer in layers if layer != "__main__"]
    drawn: dict[int, set[str]] = {}
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    for y, names in re.findall(r'class="folder".*? y="(\d+)">([\w, ]+)<', picture):
        drawn.setdefault(int(y), set()).update(names.split(", "))
    for names in drawn.values():
        names.discard("__init__")  # above all that it imports; no folder
    assert [drawn[y] for y in sorted(drawn)] == wanted


def test_the_files_that_the_page_names_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text):
        assert (ROOT / name).exists() or (ROOT / "dldr_ext" / name).exists(), name
