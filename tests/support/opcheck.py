"""torch's own checks of an op."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def check(op, args, kwargs=None):
    pytest.importorskip("expecttest")  # opcheck needs it
    # torch's schema check multiplies its inputs, which float8 cannot
    float8 = any(getattr(a, "dtype", None) == torch.float8_e4m3fn for a in args)
    checks = [c for c in CHECKS if not (float8 and c == "test_schema")]
    outcome = opcheck(op, args, kwargs or {}, test_utils=checks)
    assert all(value == "SUCCESS" for value in outcome.values()), outcome
