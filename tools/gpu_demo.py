"""The demo as a check: `gpu_demo.py DEVICE FOLDER JSON [EPOCHS]`. Needs scikit-learn alone; with
matplotlib it draws the report, too."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dldr_ext.demo.report import save
from dldr_ext.demo.run import Config, run
from dldr_ext.demo.summary import summarize


def main() -> None:
    device, folder, path, *more = sys.argv[1:]
    epochs = int(more[0]) if more else None
    config = Config("digits", dim=8 if more else 40, epochs=epochs, device=device)
    results, plane = run(config, lambda *_: None)
    Path(path).write_text(json.dumps(results, indent=1) + "\n")
    if find_spec("matplotlib"):
        save(results, plane, Path(folder))
    rows = {row.method: row for row in summarize(results)}
    for method, row in rows.items():
        print(f"{method}: test accuracy {row.test_accuracy:.3f}, {row.seconds:.1f} s")
    if epochs is None and rows["pbfgs"].test_accuracy < 0.9:
        sys.exit(f"P-BFGS came to {rows['pbfgs'].test_accuracy:.3f} only; 0.9 is usual")


if __name__ == "__main__":
    main()
