"""A whole P-BFGS step without its closure, against the published algorithm in plain torch.

The published script writes the weights to a file in each step and reads them back after each trial;
"in memory" is the same algorithm without the file. Files are not flushed to the disk: both sides
of what is timed stay in the system's page cache.

Each side finds the caches as the peer's step left them, as it would after a closure of its own. So
do the two passes over the basis alone, without anything around them: no step can be faster.
"""

from __future__ import annotations

import pytest
import torch
from published import PUBLISHED, PublishedPBFGS

from benchmarks.measure import Objective
from dldr_ext import PBFGS, Subspace, ops
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread, seconds

D, N = 40, 270_000
WARM, TURNS = 3, 10  # steps that are not timed, and that are


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["published", "default"])
@pytest.mark.parametrize("keeps", ["in a file", "in memory"])
def test_step(dtype, options, keeps, note, request, tmp_path):
    sizes = resnet18_sizes(N)
    basis = torch.linalg.qr(torch.randn(N, D))[0].T.contiguous()
    chosen = PUBLISHED if options == "published" else {}
    file = tmp_path / "temporary.pt" if keeps == "in a file" else None

    rows = basis.to(dtype)
    direction, coordinates = torch.empty(N), torch.randn(D)

    def passes(gradients):
        ops.project(rows, gradients)
        ops.reconstruct_([direction], None, rows, coordinates)

    ratios, limits, times = [], [], []
    for _ in range(request.config.getoption("--rounds")):
        # Anew each time: from random gradients H grows without end.
        ours, theirs = ([torch.zeros(size, requires_grad=True) for size in sizes] for _ in range(2))
        optimizer = PBFGS(ours, Subspace(rows, torch.zeros(N)), **chosen)
        published = PublishedPBFGS(theirs, basis.T.contiguous(), file=file)
        own, other = Objective(ours), Objective(theirs)
        for turn in range(WARM + TURNS):
            fast = seconds(lambda: optimizer.step(own.closure))  # noqa: B023
            slow = seconds(lambda: published.step(other.forward))  # noqa: B023
            assert published.trials == 1 and optimizer.history[-1].trials == 1
            if turn >= WARM:
                ratios.append(slow / fast)
                times.append(fast)
        published = PublishedPBFGS(theirs, basis.T.contiguous(), file=file)
        for _ in range(TURNS):
            slow = seconds(lambda: published.step(other.forward))  # noqa: B023
            limits.append(slow / seconds(lambda: passes(own.sets[0])))  # noqa: B023
    note(
        {
            "case": f"PBFGS step {str(dtype)[6:]}, {options} options; peer {keeps}",
            "against_torch": vars(Spread.of(ratios)),
            "passes_alone_against_torch": vars(Spread.of(limits)),
            "seconds": vars(Spread.of(times)),
            "peer": f"published algorithm, float32, weights kept {keeps}",
        }
    )
