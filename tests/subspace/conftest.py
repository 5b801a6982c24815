"""Fixtures of the tests of subspaces."""

from __future__ import annotations

import pytest
from subspace_kinds import KINDS


@pytest.fixture(params=[kind for kind in KINDS if kind.startswith("dense")])
def any_dense(request):
    """A `Subspace` in each of its storage formats."""
    return KINDS[request.param]()
