"""No rows any more: their memory has become a basis."""

from __future__ import annotations

from typing import Any, NoReturn

from .base import Store


class SpentStore(Store):
    """Of a trajectory that gave its snapshots up: whatever is asked of it is an error."""

    def __init__(self) -> None:
        pass

    def snapshots(self) -> NoReturn:
        raise _spent()

    def gram(self) -> NoReturn:
        raise _spent()

    def _append(self, *_: Any) -> NoReturn:
        raise _spent()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks, to copy it for instance
            raise AttributeError(name)
        raise _spent()


def _spent() -> ValueError:
    return ValueError(
        "the trajectory is spent: into_subspace() has overwritten its snapshots with the basis; "
        "record another one, or keep the snapshots with subspace()"
    )
