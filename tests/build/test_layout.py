"""The layout of the package: few files a folder, short files, no lazy imports, no circles.

Which folder may import from which is in pyproject.toml (import-linter, in `make lint`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dldr_ext"
MOST_AT_THE_ROOT, MOST_IN_A_FOLDER, MOST_LINES = 5, 12, 700
# Third parties that are slow or optional. A module that needs one may be imported late.
OPTIONAL = {"lightning", "matplotlib", "mlxtend", "rich", "sklearn", "transformers", "typer"}


class Import(NamedTuple):
    """Of one module by another, anywhere in its text."""

    by: str
    of: str
    late: bool  # in a function
    typed: bool  # for the type checker alone


def files() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imports(name: str, node: ast.AST, late: bool = False, typed: bool = False) -> Iterator[Import]:
    """What a module imports below a node of its text."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, late, typed) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = source(name, child)
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, inner if inner in FILES else base, late, typed)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from imports(name, child, late or function, typed or checked)


def source(name: str, node: ast.ImportFrom) -> str:
    """The module that names are imported from."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    if FILES[name].name != "__init__.py":
        parts = parts[:-1]
    return ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))


IMPORTS = [entry for name in FILES for entry in imports(name, ast.parse(FILES[name].read_text()))]


def needed(name: str, seen: set[str]) -> set[str]:
    """The optional third parties without which a module cannot be imported."""
    if name in seen:
        return set()
    seen.add(name)
    parties = set()
    for entry in IMPORTS:
        if entry.by == name and not entry.late and not entry.typed:
            top = entry.of.partition(".")[0]
            parties |= {top} & OPTIONAL
            parties |= needed(entry.of, seen) if entry.of in FILES else set()
    return parties


def test_folders_hold_few_files() -> None:
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        names = sorted(path.name for path in folder.glob("*.py"))
        most = MOST_AT_THE_ROOT if folder == PACKAGE else MOST_IN_A_FOLDER
        assert len(names) <= most, f"{folder.relative_to(ROOT)}: at most {most} files, got {names}"


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"at most {MOST_LINES} lines a file; split by idea: {long}"


def test_own_modules_are_imported_at_the_top() -> None:
    """But for those that need an optional third party which their importer does not need."""
    late = {
        f"{entry.of} from {entry.by}"
        for entry in IMPORTS
        if entry.late and entry.of in FILES
        if not needed(entry.of, set()) - needed(entry.by, set())
    }
    assert not late, f"imported in a function: {sorted(late)}"


def test_no_circle_of_imports() -> None:
    """Late imports count; those for the type checker do not."""
    below = {
        name: {
            entry.of
            for entry in IMPORTS
            if entry.by == name and entry.of in FILES and not entry.typed
        }
        for name in FILES
    }
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")
