"""Installs a built wheel in a clean environment as the README says, and runs what it shows there.

Nothing of the source tree is in reach of what runs: the folder of the work has the wheel alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CHECKPOINTS = """
import torch, dldr_ext
assert "site-packages" in dldr_ext.__file__, dldr_ext.__file__
from pathlib import Path
Path("runs/checkpoints").mkdir(parents=True)
for step in range(4):
    torch.save(torch.nn.Linear(8, 3).state_dict(), f"runs/checkpoints/{step}.pt")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "clean-install")
    parser.add_argument(
        "--torch", help="release that is there beforehand; without it pip takes the newest, 6 GB"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    (work / "dist").mkdir(parents=True)
    shutil.copy(options.wheel, work / "dist")
    venv.create(work / "venv", with_pip=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"PATH": f"{work / 'venv' / 'bin'}:{os.environ['PATH']}"}

    def run(command: str, *rest: str) -> str:
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            ["bash", "-c", command, *rest],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    typed = re.findall(r"^\$ ([^#\n]*[^#\s])", readme, re.MULTILINE)
    (install,) = [line for line in typed if "dist/*.whl" in line]
    if options.torch:
        run(f"pip install --quiet torch=={options.torch}")
    run(install)
    version = options.wheel.name.split("-")[1].partition("+")[0]
    found = run("dldr --version")
    assert found == f"dldr_ext {version}\n", f"expected {version}, as the wheel says, got {found}"
    run("dldr info")
    run(f"python -c '{_CHECKPOINTS}'")
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    losses = [float(line) for line in run('python -c "$0"', program).split()]
    assert losses[-1] < losses[0] / 2, losses
    for line in typed:
        if line.startswith("dldr ") and line != "dldr demo":  # which takes minutes
            run(line)
    print(f"{options.wheel.name}: installed and run as the README says")


if __name__ == "__main__":
    main()
