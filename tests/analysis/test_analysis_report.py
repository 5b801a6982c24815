"""The report of an analysis: what it shows is escaped, and a section without lines is left out."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="the figures need matplotlib")

from accessibility import problems

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
    )
    assert problems(text) == []
    assert "286 of 2000 checkpoints" in text and "and 400 more" in text
    assert len(re.findall("checkpoint-\\d+.safetensors</th>", text)) == 286
