"""What trajectories and subspaces show of themselves: `plot()`, and in notebooks."""

from __future__ import annotations

import re

import pytest
import torch
from accessibility import Page

from dldr_ext import GroupedSubspace, IdentitySubspace, Subspace, Trajectory
from dldr_ext.reporting import figures, notebook


def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def recorded(count=6, named=True, **options):
    net = model()
    trajectory = Trajectory(net.named_parameters() if named else net.parameters(), 9, **options)
    for _ in range(count):
        trajectory.record()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
    return trajectory


def drawings(shown, at_once=False):
    return [drawing.name for drawing in shown._view(at_once).drawings]


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    trajectory = recorded(dtype=torch.float32)
    subspace = trajectory.subspace(3)
    for shown, names in (
        (trajectory, ["path", "spectrum", "drift"]),
        (subspace, ["spectrum", "layers"]),
        (trajectory.subspace(3, materialize=False), ["spectrum", "layers"]),
        (recorded(named=False).subspace(2), ["spectrum"]),
        (Subspace.random(model().named_parameters(), 3), ["layers"]),
        (GroupedSubspace.random(list(model().named_parameters()), 2, [2, 2]), ["layers"]),
        (IdentitySubspace(model().named_parameters()), ["layers"]),
    ):
        assert drawings(shown) == drawings(shown, True) == names
        figure = shown.plot()
        assert len(figure.subfigs) == len(names)
        figure.savefig(tmp_path / "plot.png")
        text = shown._repr_html_()
        assert text.count("<svg") == len(names) and type(shown).__name__ in text
    facts = trajectory._view(True).facts
    assert facts["snapshots"] == "6 of 9" and facts["stored as"] == "float32, device"
    assert facts["directions for 99 %"] <= 5
    share = 100 * float(subspace.explained_variance_ratio.sum())
    assert subspace._view(True).facts["explained"] == f"{share:.2f} % of the variance"


def test_the_layers_are_the_parts_of_the_directions():
    subspace = recorded().subspace(2)
    alt = subspace._view(True).drawings[1].alt
    part = torch.stack([subspace.direction(i)[:15] for i in (0, 1)]).double().norm(dim=1)
    assert f"0 ({float(part.sum()):.3g})" in alt and "2 layers, 2 directions" in alt


def test_ids_in_a_notebook_are_never_the_same():
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    trajectory = recorded()
    text = trajectory._repr_html_() + trajectory._repr_html_() + trajectory.subspace()._repr_html_()
    ids = [a["id"] for _, a, _ in Page(text).elements if "id" in a]
    assert len(ids) == len(set(ids)) > 8
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(ids)


def test_nothing_is_read_for_a_notebook(tmp_path):
    """The Gram matrix of a trajectory on disk may wait: a notebook does not ask for it."""
    trajectory = recorded(storage="disk", path=tmp_path / "t")
    assert drawings(trajectory, at_once=True) == []
    assert drawings(trajectory) == ["path", "spectrum", "drift"]
    assert "6 of 9" in trajectory._repr_html_()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recorded(1), "plot: expected at least two snapshots, the trajectory holds 1"),
        (
            lambda: Subspace(torch.tensor([[0.6, 0.8]]), torch.zeros(2)),
            "plot: expected directions whose explained variance or names .* got a Subspace that",
        ),
    ],
)
def test_nothing_to_draw(make, message):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    shown = make()
    assert "<table" in shown._repr_html_()
    with pytest.raises(ValueError, match=message):
        shown.plot()


def test_all_snapshots_the_same():
    trajectory = Trajectory(model().named_parameters(), 3)
    trajectory.record(), trajectory.record()
    assert "2 of 3" in trajectory._repr_html_()
    assert trajectory._view(False).missing == "snapshots that differ"


def test_a_consumed_trajectory():
    trajectory = recorded()
    trajectory.into_subspace(2)
    assert "consumed" in trajectory._repr_html_()


def test_without_matplotlib(monkeypatch):
    trajectory = recorded()
    for module in (figures, notebook):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    text = trajectory._repr_html_()
    assert "6 of 9" in text and "<svg" not in text
    for shown in (trajectory, trajectory.subspace()):
        with pytest.raises(
            ModuleNotFoundError, match=r'pip install "dldr_ext\[demo\]"; in the fol'
        ):
            shown.plot()
