"""What a command needs beyond the package, and how to install it."""

from __future__ import annotations

from importlib.util import find_spec

#: Where each optional module comes from.
_INSTALL = 'pip install "dldr_ext[demo]"'


def missing(*modules: str) -> str | None:
    """One line that says what to install, or None if all `modules` can be imported."""
    absent = [name for name in modules if find_spec(name) is None]
    if not absent:
        return None
    return f"dldr: not installed: {', '.join(absent)}. To get what is missing: {_INSTALL}"
