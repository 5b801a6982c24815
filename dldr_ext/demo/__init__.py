"""`dldr demo`: a real network trained by SGD, and again in a subspace of a few dozen variables."""

from __future__ import annotations
