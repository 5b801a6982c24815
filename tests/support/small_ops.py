"""Every op on small inputs: `compute-sanitizer python3 tests/support/small_ops.py`.

Sizes around packs, scale blocks and tiles, lists inside and beyond a kernel's arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import reference
from all_ops import AllOps, assert_same, pieces_of
from samples import STORAGE

CASES = ((1, 1, "one"), (257, 3, "strided"), (2_049, 9, "mixed"), (6_151, 42, "cut"))


def compare_with_float64(case: AllOps, found: dict[str, torch.Tensor]) -> None:
    """A first look at every op: orders of magnitude above rounding, below any mistake."""
    basis, scale, rows = case.basis, case.scale, case.rows
    lists, origin = [case.tensors, case.other] * 2, case.origin.double()
    direction = reference.reconstruct(None, basis, case.theta, scale)
    stored = reference.gram(rows, case.row_scale)
    exact = {
        "project": reference.project(basis, case.tensors, scale),
        "project_many": torch.stack([reference.project(basis, one, scale) for one in lists]),
        "reconstruct": origin + direction,
        "reconstruct_": origin + direction,
        "direction": direction,
        "residual": reference.flat(case.tensors)
        - reference.reconstruct(None, basis, case.coordinates, scale),
        "trial_": origin + 0.3 * case.direction.double(),
        "gram": reference.gram(basis, scale),
        "gram_block_": stored,
        "form_basis": reference.form_basis(basis, case.coefficients, scale),
    }
    for name, right in exact.items():
        error = (found[name].double() - right).abs().max()
        # what is written in 16 bits is rounded to 2^-9 of itself
        rounded = name in ("reconstruct_", "trial_", "form_basis")
        allowed = (2.0**-7 if rounded else 1e-4) * right.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--exact", action="store_true", help="compare with float64")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(options.device):
        for dtype in STORAGE:
            for n, d, kind in CASES:
                case = AllOps(dtype, n, d, kind)
                first = case.now()
                if options.exact:
                    compare_with_float64(case, first)
                assert_same(case.now(), first, f"{dtype} n={n}")
            case.tensors = pieces_of(torch.randn(6_151), range(7, 6_151, 23))
            assert len(case.tensors) > 216
            case.now()
            print(f"{dtype}: every op ran", flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
