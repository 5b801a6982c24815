"""Every op on small inputs: `compute-sanitizer python3 tests/support/small_ops.py`.

Sizes around packs, scale blocks and tiles, lists inside and beyond a kernel's arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from all_ops import AllOps, assert_same, pieces_of
from samples import STORAGE

CASES = ((1, 1, "one"), (257, 3, "strided"), (2_049, 9, "mixed"), (6_151, 42, "cut"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(options.device):
        for dtype in STORAGE:
            for n, d, kind in CASES:
                case = AllOps(dtype, n, d, kind)
                first = case.now()
                assert_same(case.now(), first, f"{dtype} n={n}")
            case.tensors = pieces_of(torch.randn(6_151), range(7, 6_151, 23))
            assert len(case.tensors) > 216
            case.now()
            print(f"{dtype}: every op ran", flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
