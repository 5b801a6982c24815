"""The report of an analysis: what it shows is escaped, and a section without lines is left out."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="the figures need matplotlib")

from accessibility import problems
from safetensors.torch import load_file

from dldr_ext.analysis import plots, report

RESULTS = {
    "checkpoints": ["<b>0.pt", "1.pt", "2&.pt"],
    "skipped": [],
    "notes": ["left out: <script>"],
    "numel": 1234,
    "tensors": 2,
    "dtype": "float32",
    "bytes": 100,
    "norm_of_first": 1.5,
    "seconds": 0.25,
    "effective_dimension": {"participation_ratio": 1.5, "0.9": 1, "0.95": 2, "0.99": 2},
    "drift": {"from_first": [0.0, 1.0, 2.0], "steps": [1.0, 1.5]},
    "cosines": {"successive": [-0.25], "steps": [[1.0, -0.25], [-0.25, 1.0]]},
    "near_duplicates": [[0, 2, 0.0]],
    "subspace": None,
    "report": {"kept": "2 of 2 directions"},
    "explained_variance_ratio": [0.8, 0.2],
    "path": {"coordinates": [[0, 0], [1, 0], [2, 1]], "explained": [0.8, 0.2]},
    "layers": {"names": ["<i>a", "b"], "numel": [1000, 234], "steps": [[1.0, 2.0], [0.5, 0.0]]},
    "gram": [[0.0] * 3] * 3,
}
VERSIONS = {"dldr_ext": "1.2.3", "torch": "2.0"}


def page(tmp_path, **changed):
    results = {**RESULTS, **changed}
    return report.write(results, plots.drawings(results), VERSIONS, tmp_path).read_text()


def test_what_is_shown_is_escaped(tmp_path):
    text = page(tmp_path)
    assert '<th scope="row">&lt;b&gt;0.pt</th>' in text and "2&amp;.pt</th>" in text
    assert "<li>left out: &lt;script&gt;</li>" in text
    assert "<li>&lt;b&gt;0.pt and 2&amp;.pt are the same</li>" in text
    assert "<b>0.pt" not in text and "<script>" not in text
    assert "dldr_ext 1.2.3; torch 2.0" in text and problems(text) == []


def test_only_what_there_is_has_a_heading(tmp_path):
    text = page(tmp_path)
    assert "<h2>Notes</h2>" in text and "<h2>Left out</h2>" not in text
    assert text.count('class="card best"') == 0  # no subspace was kept
    kept = {"path": "x", "dim": 2, "explained_variance": 0.9}
    text = page(tmp_path, skipped=["3.pt: not found"], notes=[], subspace=kept)
    assert "<h2>Left out</h2>" in text and "<h2>Notes</h2>" not in text
    assert "<b>90.00 %</b><span>of the variance in 2 directions</span>" in text


def test_a_report_of_many_checkpoints_stays_small(tmp_path):
    count = 2000
    steps = [[float(s == t) for s in range(count - 1)] for t in range(count - 1)]
    text = page(
        tmp_path,
        checkpoints=[
            f"/a/rather/long/path/of/a/run/checkpoint-{t}.safetensors" for t in range(count)
        ],
        skipped=["left.pt: empty"] * 500,
        explained_variance_ratio=[2.0**-k for k in range(1, 40)],
        drift={"from_first": [float(t) for t in range(count)], "steps": [1.0] * (count - 1)},
        cosines={"successive": [0.0] * (count - 2), "steps": steps},
        path={"coordinates": [[t, t % 7] for t in range(count)], "explained": [0.9, 0.05]},
        layers={
            "names": [f"block.{i}.of.a.network" for i in range(500)],
            "numel": [100] * 500,
            "steps": [[1.0 + i] * (count - 1) for i in range(500)],
        },
    )
    assert problems(text) == []
    assert "Checkpoints, 286 of 2000" in text and "and 400 more" in text
    assert len(re.findall("checkpoint-\\d+.safetensors</th>", text)) == 286


def test_the_loss_and_a_second_run(tmp_path):
    other = {**RESULTS, "checkpoints": ["/x/a/1.pt", "/x/a/2.pt", "/x/a/3.pt"]}
    plane = {"coordinates": [[t, t * t] for t in range(6)], "explained": [0.7, 0.3]}
    results = {
        "checkpoints": ["/x/<b>/1.pt", "/x/<b>/2.pt", "/x/<b>/3.pt"],
        "other": other,
        "comparison": {
            "path": plane, "kept": 2, "distance_of_first": 0.5, "distance_of_last": 7.25,
            "second_in_first": 0.125, "first_in_second": 0.75,
        },
        "loss": {
            "function": "m:f",
            "along": [[3.0, 1.5, 2.0], [4.0, 5.0, 0.25]],
            "plane": {"x": [0.0, 5.0], "y": [-1.0, 1.0], "loss": [[1.0, None], [3.0, 4.5]]},
        },
    }  # fmt: skip
    text = page(tmp_path, **results)
    assert problems(text) == [] and text.count("<svg") == 8
    assert "<title>Two runs</title>" in text and "&lt;b&gt;: 3 checkpoints" in text
    assert '<th scope="col">&lt;b&gt;</th><th scope="col">a</th>' in text
    row = "variance along 2 directions of the other</th><td>75.00 %</td><td>12.50 %</td>"
    assert row in text and "<td>7.25</td>" in text
    assert '<tr class="best"><th scope="row">2</th><td>1</td><td>1.5</td></tr>' in text
    assert '<th scope="row">-1</th><td>1</td><td>-</td></tr>' in text
    assert "<span>a: participation</span><b>1.5</b>" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {f"{one}-title" for one in ("path", "layers", "other-layers", "loss")} <= set(ids)


def test_large_matrices_are_beside_the_json(tmp_path):
    many = {**RESULTS, "layers": {**RESULTS["layers"], "steps": [[0.0] * 6000] * 2}}
    written = report.write_json({**RESULTS, "other": many}, tmp_path)
    assert written["layers"] == RESULTS["layers"] and written["other"]["layers"]["steps"] is None
    assert load_file(written["matrices"])["other_layers"].shape == (2, 6000)
    assert report.write_json(RESULTS, tmp_path)["matrices"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.json"}
