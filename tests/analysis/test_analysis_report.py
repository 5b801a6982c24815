"""The report of an analysis: what it shows is escaped, and a section without lines is left out."""

from __future__ import annotations

from dldr_ext.analysis import report

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
    "cosines": {"successive": [-0.25]},
    "near_duplicates": [[0, 2, 0.0]],
    "subspace": None,
    "report": {"kept": "2 of 2 directions"},
}


def page(tmp_path, **changed):
    images = [tmp_path / name for name in ("spectrum.png", "drift.png", "cosine.png")]
    for image in images:
        image.write_bytes(b"picture")
    return report.write({**RESULTS, **changed}, images, tmp_path).read_text()


def test_what_is_shown_is_escaped(tmp_path):
    text = page(tmp_path)
    assert "<td>&lt;b&gt;0.pt</td>" in text and "<td>2&amp;.pt</td>" in text
    assert "<li>left out: &lt;script&gt;</li>" in text
    assert "<li>&lt;b&gt;0.pt and 2&amp;.pt are the same</li>" in text
    assert "<b>0.pt" not in text and "<script>" not in text


def test_only_what_there_is_has_a_heading(tmp_path):
    text = page(tmp_path)
    assert "<h2>Notes</h2>" in text and "<h2>Left out</h2>" not in text
    assert text.count('class="card best"') == 0  # no subspace was kept
    kept = {"path": "x", "dim": 2, "explained_variance": 0.9}
    text = page(tmp_path, skipped=["3.pt: not found"], notes=[], subspace=kept)
    assert "<h2>Left out</h2>" in text and "<h2>Notes</h2>" not in text
    assert "<b>90.00 %</b><span>of the variance in 2 directions</span>" in text
