"""The files that a demo leaves behind, and the sentence on what came out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from accessibility import problems

from dldr_ext.demo import methods, report, run, summary


@pytest.fixture(scope="module")
def folder(outcome, tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    report.save(*outcome, folder)
    return folder


def test_files(folder, outcome):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "results.json",
        "report.html",
        "accuracy.png",
        "spectrum.png",
        "trajectory.png",
    }
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(outcome[0]))


@pytest.mark.parametrize("name", ["accuracy.png", "spectrum.png", "trajectory.png"])
def test_plots_are_pictures_of_something(folder, name):
    from matplotlib.image import imread

    picture = imread(folder / name)
    height, width, _ = picture.shape
    assert height > 400
    assert width > 800
    ink = (picture[..., :3].min(axis=2) < 0.98).mean()
    assert 0.01 < ink < 0.9


def test_report_holds_the_numbers_and_is_accessible(folder):
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert problems(text) == []
    assert not any(mark in text for mark in ("$", "{{", "{%"))
    assert text.count("<svg") == 3 and f"torch {results['versions']['torch']}" in text
    for path in folder.glob("*.[pj]*"):
        assert f'<a href="{path.name}">' in text
    table = text.partition('<table id="results"')[2].partition("</table>")[0]
    rows = {row[0]: row[1:] for row in map(cells, table.split("<tr")[2:])}
    assert list(rows) == list(methods.NAMES.values())
    for method, name in methods.NAMES.items():
        runs = [entry for entry in results["runs"] if entry["method"] == method]
        mean = sum(entry["test_accuracy"] for entry in runs) / len(runs)
        assert rows[name][0].startswith(f"{100 * mean:.2f} ± ")
        passes = sum(entry["data_passes"] for entry in runs) / len(runs)
        sampling = sum(entry["sampling_passes"] for entry in runs) / len(runs)
        assert rows[name][1:3] == [f"{passes + sampling:.1f}", f"{passes:.1f}"]
        assert rows[name][5] == ("22,698" if method.startswith("sgd") else "6")
        if method in ("sgd", "pbfgs", "one_pass", "random"):
            assert f"test accuracy after {passes + sampling:.1f} passes in all" in text


def cells(row: str) -> list[str]:
    return re.findall(r"<t[hd][^>]*>([^<]*)<", row)


def test_the_dimension_may_be_chosen_by_the_trajectory(tmp_path):
    config = run.Config("digits", dim="auto", epochs=2, threads=1)
    results, plane = run.run(config, lambda *_: None)
    dims = {entry["dim"] for entry in results["runs"]}
    assert len(dims) == 1 and dims <= set(range(2, 25))
    page = report.save(results, plane, tmp_path)[0].read_text()
    assert f"the {dims.pop()} principal" in page and '"auto"' in json.dumps(results["config"])


def test_spread_is_the_sample_standard_deviation(outcome):
    results = outcome[0]
    row = summary.summarize(results)[0]
    a, b = (e["test_accuracy"] for e in results["runs"] if e["method"] == row.method)
    assert row.test_accuracy == pytest.approx((a + b) / 2)
    assert row.spread == pytest.approx(abs(a - b) / 2**0.5)
    single = dict(results, runs=results["runs"][: len(methods.NAMES)])
    assert summary.summarize(single)[0].spread is None


@pytest.mark.parametrize(("gap", "says"), [(0.01, "1.00 points more than SGD"), (0, "the same as")])
def test_verdict_says_what_came_out(outcome, gap, says):
    results = json.loads(json.dumps(outcome[0]))
    for entry in results["runs"]:
        entry["test_accuracy"] = {"pbfgs": 0.9 + gap, "random": 0.5}.get(entry["method"], 0.9)
    assert says in summary.verdict(results)
    assert f"{100 * (0.4 + gap):.2f} points more than P-BFGS in a random" in summary.verdict(
        results
    )
    row = {row.method: row for row in summary.summarize(results)}["pbfgs"]
    whole = row.passes + row.sampling_passes
    assert row.sampling_passes > 0 and f" in {whole:.1f} passes (" in summary.verdict(results)
    for entry in results["runs"]:
        if entry["method"] == "pbfgs":
            entry["test_accuracy"] = 0.4
    assert "50.00 points less than SGD" in summary.verdict(results)
    assert "10.00 points less than P-BFGS in a random subspace" in summary.verdict(results)
