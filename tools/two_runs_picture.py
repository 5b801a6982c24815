"""Draw docs/two_runs.svg: two runs on digits, as `dldr analyze --compare --loss` shows them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from dldr_ext.analysis.analysis import Analysis
from dldr_ext.analysis.comparison import compare
from dldr_ext.analysis.loss import Loss, on_plane
from dldr_ext.analysis.plots import drawings
from dldr_ext.checkpoints import Series
from dldr_ext.reporting.figures import PALETTE, svg

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "two_runs.svg"
RATES = {"rate 0.05": 0.05, "rate 0.2": 0.2}
STYLE = (
    "<style>:root {{ {} }} @media (prefers-color-scheme: dark) {{ :root {{ {} }} }} "
    ".page {{ fill: var(--paper) }} text {{ font-family: system-ui, 'DejaVu Sans', sans-serif; "
    "paint-order: stroke; stroke: var(--paper); stroke-width: 2.4px }}</style>"
    '<rect class="page" width="100%" height="100%" rx="8"/>'
)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(folder: Path, rate: float, x: Tensor, y: Tensor) -> None:
    """Leave a checkpoint behind after every fifth step."""
    folder.mkdir()
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    torch.save(model.state_dict(), folder / "step 0.pt")
    batches = [batch for _ in range(6) for batch in torch.randperm(1500).split(100)]
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step % 5 == 0:
            torch.save(model.state_dict(), folder / f"step {step}.pt")


def draw(folder: Path) -> str:
    """The picture, of runs that are trained into a folder."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    for name, rate in RATES.items():
        train(folder / name, rate, x, y)
    model = network()

    @torch.no_grad()
    def loss(state: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(state)
        return functional.cross_entropy(model(x[:500]), y[:500])

    runs = [Series(folder / name) for name in RATES]
    results = Analysis(runs[0], folder / "analysis", keep_basis=False).run()
    results["other"], results["comparison"] = compare(runs[0], runs[1], results["kept"])
    plane, function = results["comparison"]["path"], Loss(loss, "loss")
    points = plane["coefficients"], plane["coordinates"]
    results["loss"] = {
        "along": [function.along(run, lambda *_: None) for run in runs],
        "plane": on_plane(function, runs, *points, lambda *_: None),
    }
    text = str(svg(drawings(results)[0]))
    colours = [" ".join(f"--{n}: {c[i]};" for n, c in PALETTE.items()) for i in (0, 1)]
    at = text.index("</desc>") + len("</desc>")
    return text[:at] + STYLE.format(*colours) + text[at:] + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        PICTURE.write_text(draw(Path(path)))
