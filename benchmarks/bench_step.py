"""A whole P-BFGS step without its closure, against the published algorithm in plain torch."""

from __future__ import annotations

import pytest
import torch
from measure import Objective, Spread, resnet18_sizes, seconds
from published import PUBLISHED, PublishedPBFGS

from dldr_ext import PBFGS, Subspace

D, N = 40, 270_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["published", "default"])
def test_step(dtype, options, note, request):
    sizes = resnet18_sizes(N)
    basis = torch.linalg.qr(torch.randn(N, D))[0].T.contiguous()
    ours, theirs = ([torch.zeros(size, requires_grad=True) for size in sizes] for _ in range(2))
    chosen = PUBLISHED if options == "published" else {}
    optimizer = PBFGS(ours, Subspace(basis.to(dtype), torch.zeros(N)), **chosen)
    published = PublishedPBFGS(theirs, basis.T.contiguous())
    own, other = Objective(ours), Objective(theirs)

    ratios, times = [], []
    for turn in range(10 * request.config.getoption("--rounds")):
        fast = seconds(lambda: optimizer.step(own.closure))
        slow = seconds(lambda: published.step(other.forward))
        if turn >= 5:
            ratios.append(slow / fast)
            times.append(fast)
    assert published.trials == 1 and optimizer.status.moved
    note(
        {
            "case": f"PBFGS step {str(dtype)[6:]}, {options} options",
            "against_torch": vars(Spread.of(ratios)),
            "seconds": vars(Spread.of(times)),
            "peer": "published algorithm, float32",
        }
    )
