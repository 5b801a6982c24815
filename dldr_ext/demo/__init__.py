"""A real network trained by SGD, and again in a subspace of a few dozen variables: `dldr demo`."""

from __future__ import annotations
