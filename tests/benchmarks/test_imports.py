"""Benchmarks use what a user can import, and are run in one way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# Packages with names of their own, and what the demo, `dldr analyze` and reports are made of.
PUBLIC = (
    "averaging", "batch_norm", "checkpoints", "distributed", "ops", "optim", "performance", "plan",
    "subspace", "trajectory", "analysis.analysis", "demo", "reporting",
)  # fmt: skip
IMPORT = re.compile(r"(?:from|import) dldr_ext\b\.?([\w.]*)(?: import (.+))?")
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are in the source tree only", allow_module_level=True)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_public_modules_and_names_only(path: Path) -> None:
    for module, names in IMPORT.findall(path.read_text()):
        inside = not module or any(f"{module}.".startswith(f"{name}.") for name in PUBLIC)
        assert inside and not re.search(r"\b_", f"{module} {names}"), f"{module}: {names}"


def test_one_place_changes_the_path_of_imports() -> None:
    changed = [path for path in FOLDER.rglob("*.py") if "sys.path" in path.read_text()]
    assert changed == [FOLDER / "__init__.py"]
