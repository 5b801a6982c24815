"""What is accepted, what resets and what goes back: functions of numbers and statuses."""

from __future__ import annotations

import math

import pytest
import torch

from dldr_ext import Status
from dldr_ext.optim.step import policy
from dldr_ext.optim.step.restore_point import RestorePoint


def test_at_start() -> None:
    assert policy.at_start(1.0, 0.0) is None
    assert policy.at_start(0.0, 0.0) is Status.CONVERGED
    assert policy.at_start(1e-3, 1e-3) is Status.CONVERGED
    assert policy.at_start(1.01e-3, 1e-3) is None
    for bad in (math.nan, math.inf):
        assert policy.at_start(bad, 1.0) is Status.NON_FINITE_GRADIENT


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_after_search(bad: float) -> None:
    assert policy.after_search(1.0, -1.0) is None
    assert policy.after_search(bad, -1.0) is Status.LINE_SEARCH_FAILED
    assert policy.after_search(1.0, bad) is Status.NON_FINITE_GRADIENT


def test_every_failure_forgets_and_nothing_else_does() -> None:
    keeps = {
        *(Status.INITIAL, Status.ACCEPTED, Status.DECREASED),
        *(Status.CONVERGED, Status.NO_GRADIENT),
    }
    for status in Status:
        assert policy.forgets(status) is (status not in keeps)
        assert "H reset" in status.value or not policy.forgets(status)


def test_goes_back_only_from_what_was_never_seen_finite() -> None:
    good = torch.ones(2)
    for status in Status:
        for loss in (True, False):
            for gradient in (True, False):
                point = RestorePoint()
                point.see(good, loss=True, gradient=True)
                point.see(good, loss, gradient)
                expected = (status is Status.NON_FINITE_LOSS and not loss) or (
                    status is Status.NON_FINITE_GRADIENT and not gradient
                )
                assert (point.instead(status) is not None) is expected


def test_moved() -> None:
    assert [s for s in Status if s.moved] == [Status.ACCEPTED, Status.DECREASED, Status.RESTORED]
