"""The site has every page and every public name; `make docs` looks at its links."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dldr_ext"
SHOWN = [
    name
    for page in ROOT.glob("docs/api/*.md")
    for name in re.findall(r"^::: (dldr_ext\.\S+)$", page.read_text(), re.MULTILINE)
]
PUBLIC = [
    "averaging", "batch_norm", "callbacks", "checkpoints", "dcp", "distributed", "ops", "optim",
    "plan", "subspace", "trajectory",
]  # fmt: skip


def value(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", ["dldr_ext", *(f"dldr_ext.{name}" for name in PUBLIC)])
def test_every_public_name_is_on_a_page(module: str) -> None:
    shown = [value(name) for name in SHOWN if ".integrations." not in name]
    package = importlib.import_module(module)
    names = getattr(package, "__all__", [name for name in vars(package) if name[0] != "_"])
    assert names
    for name in set(names) - {"ops"}:  # a module
        assert any(getattr(package, name) is one for one in shown), f"{module}.{name}"


def test_every_integration_is_on_a_page() -> None:
    """Read without the frameworks that they need."""
    for path in (PACKAGE / "integrations").glob("[!_]*.py"):
        nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
        assert nodes
        for node in nodes:
            assert f"dldr_ext.integrations.{path.stem}.{node.name}" in SHOWN


def test_the_picture_of_the_readme_is_that_of_the_results() -> None:
    names = runpy.run_path(str(ROOT / "tools" / "wrong_labels_picture.py"))
    assert names["PICTURE"].read_text() == names["draw"]()


def test_no_name_is_shown_twice() -> None:
    assert len(SHOWN) == len(set(SHOWN))


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        assert page.relative_to(ROOT).as_posix() in navigation, page


def messages() -> str:
    """All strings of the package, one a line: what is filled in is a hole."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    titles = re.findall(r"^## `(.*)`$", page, re.MULTILINE)
    assert len(titles) >= 15
    ours = messages()
    for title in titles:
        for part in title.split("..."):
            assert part.strip() in ours, title
