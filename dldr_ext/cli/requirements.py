"""What a command needs beyond the package, and how to install it."""

from __future__ import annotations

from importlib.util import find_spec


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "dldr_ext[{extra}]"'


def missing(*modules: str) -> str | None:
    """Say in one line what to install; None if all ``modules`` can be imported."""
    absent = [name for name in modules if find_spec(name) is None]
    if not absent:
        return None
    return (
        f"dldr: not installed: {', '.join(absent)}. To get what is missing: {install('demo')}; "
        'in the folder of the source: pip install --no-build-isolation ".[demo]"'
    )
