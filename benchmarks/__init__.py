"""Programs that measure the package; README.md has the list and how to run them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What benchmarks share with tests (the published algorithm, peers, the wire) is there.
sys.path.insert(0, str(ROOT / "tests" / "support"))
