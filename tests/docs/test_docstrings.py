"""Docstrings of the public names: their examples run, and they have the sections they need."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dldr_ext

PUBLIC = [
    "averaging", "checkpoints", "distributed", "ops", "optim", "plan", "subspace", "trajectory",
]  # fmt: skip
# What a reader looks up first: it shows how it is called.
SHOWN = {
    "GroupedSubspace", "InSubspace", "PBFGS", "PSGD", "Series", "Subspace", "Trajectory",
    "form_basis", "gram", "gram_append_", "greedy_soup", "layer_groups", "plan", "project",
    "reconstruct", "reconstruct_", "uniform_soup", "weight_averaging_subspace",
}  # fmt: skip
# TEMPORARY: packages whose docstrings are on the way. Take one out when it passes.
ON_THE_WAY: set[str] = set()


def modules() -> Iterator[ModuleType]:
    """Every module of the package that has examples."""
    for folder in map(Path, dldr_ext.__path__):
        for path in sorted(folder.rglob("*.py")):
            if ">>>" in path.read_text():
                parts = path.relative_to(folder.parent).with_suffix("").parts
                yield importlib.import_module(".".join(parts).removesuffix(".__init__"))


FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = {
    example.name: example
    for module in modules()
    for example in FINDER.find(module)
    if example.examples
}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the names of their module, with seed 0, and files in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    printed: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[name], out=printed.append)
    assert not result.failed, "".join(printed)


def public() -> dict[str, Any]:
    """Classes and functions that users import, by the name of where they are defined."""
    packages = [dldr_ext, *(importlib.import_module(f"dldr_ext.{name}") for name in PUBLIC)]
    values = [getattr(package, name) for package in packages for name in package.__all__]
    return {
        f"{value.__module__}.{value.__qualname__}": value
        for value in values
        if inspect.isclass(value) or inspect.isfunction(value)
    }


def documented() -> dict[str, list[Any]]:
    """These, and their public methods, each with what it overrides; not what is torch's."""
    found = {name: [value] for name, value in public().items()}
    for value in public().values():
        for method in dir(value) if inspect.isclass(value) else ():
            classes = [base for base in value.__mro__ if method in vars(base)]
            own = [getattr(vars(base)[method], "__func__", vars(base)[method]) for base in classes]
            if not method.startswith("_") and all(map(ours, own)):
                found[f"{own[0].__module__}.{own[0].__qualname__}"] = own
    return found


def ours(value: Any) -> bool:
    return inspect.isfunction(value) and value.__module__.split(".")[0] == "dldr_ext"


def missing(value: Any) -> set[str]:
    """Sections that a docstring lacks."""
    if not value.__doc__:
        return {"Docstring"}
    wanted = {"Examples": "Examples"} if value.__qualname__ in SHOWN else {}
    signature = inspect.signature(value)
    if set(signature.parameters) - {"self", "cls"} and not issubclass_of(value, Enum):
        wanted["Parameters"] = "Parameters|Attributes"
    if not inspect.isclass(value) and signature.return_annotation not in ("None", None):
        wanted["Returns"] = "Returns|Yields"
    text = inspect.cleandoc(value.__doc__)
    return {name for name, one in wanted.items() if not re.search(rf"^({one})\n-+$", text, re.M)}


def issubclass_of(value: Any, kind: type) -> bool:
    return inspect.isclass(value) and issubclass(value, kind)


DOCUMENTED = documented()


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_public_docstrings_have_their_sections(name: str) -> None:
    """Parameters where there are any, Returns where something is returned, Examples where shown.

    A method that overrides another may leave out what the docstring of that one has.
    """
    own, *overridden = map(missing, DOCUMENTED[name])
    lacks = own.intersection(*overridden)
    if lacks and name.split(".")[1] in ON_THE_WAY:
        pytest.xfail(f"on the way: {', '.join(sorted(lacks))}")
    assert not lacks, f"{name} lacks {', '.join(sorted(lacks))}"


def test_everything_that_is_shown_is_there() -> None:
    assert {value.__name__ for value in public().values()} >= SHOWN
