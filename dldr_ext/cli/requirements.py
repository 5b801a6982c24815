"""What a command needs beyond the package, and how to install it."""

from __future__ import annotations

from importlib.util import find_spec

# Modules whose distribution has another name.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "pytest_benchmark": "pytest-benchmark"}


def absent(*modules: str) -> list[str]:
    """Return the distributions of those ``modules`` that cannot be imported."""
    return [_DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]


def install(distributions: list[str]) -> str:
    """Return the command that installs them, wherever this package is from."""
    return f"pip install {' '.join(distributions)}"


def missing(*modules: str) -> str | None:
    """Say in one line what to install; None if all ``modules`` can be imported."""
    names = absent(*modules)
    return f"dldr: not installed: {', '.join(names)}: {install(names)}" if names else None
