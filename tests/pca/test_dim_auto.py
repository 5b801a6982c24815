"""dim="auto" on planted directions, on walks and on noise; what a subspace says of the choice."""

from __future__ import annotations

import math
import os
import re
import warnings

import pytest
import torch

from dldr_ext import GroupedSubspace, Subspace, Trajectory
from dldr_ext.files.artifacts import Reader, save
from dldr_ext.pca.random_walk import left_over, supported, walk_spectrum

N = 4000
EVERY = os.environ.get("DLDR_EVERY_CASE") == "1"


def numbers(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def recorded(points, dtype=torch.float32):
    param = torch.nn.Parameter(points[0].clone())
    trajectory = Trajectory([param], capacity=len(points), dtype=dtype)
    for point in points:
        param.data.copy_(point)
        trajectory.record()
    return trajectory


def planted(seed, kind, rank, length, noise, size):
    """Points in ``rank`` orthonormal directions, and noise in all of them."""
    time = torch.linspace(0, 1, length)[:, None]
    order = torch.arange(1, rank + 1)
    found = {
        "smooth": torch.cos(math.pi * time * order) / order,
        "even": torch.cos(math.pi * time * order),
        "independent": numbers(seed, length, rank),
        "walk": numbers(seed, length, rank).cumsum(0) / 2,
    }[kind]
    directions = torch.linalg.qr(numbers(seed + 1000, N, rank))[0].T
    rest = numbers(seed + 2000, length, N) * size
    return math.sqrt(N) * found @ directions + (rest if noise == "white" else rest.cumsum(0) / 10)


def counted(points):
    """What "auto" makes of points, from the spectrum alone."""
    points = points.double() - points.double().mean(0)
    values = torch.linalg.eigvalsh(points @ points.T).flip(0)[:-1].clamp_min(0)
    return supported(values, int((values > 1e-11 * values[0]).sum()))[0]


@pytest.mark.parametrize("length", [2, 3, 10, 60])
def test_spectrum_of_a_walk_is_that_of_orthogonal_steps(length):
    points = torch.ones(length, length, dtype=torch.float64).tril(-1)  # sums of the steps so far
    points = points - points.mean(0)
    found = torch.linalg.eigvalsh(points @ points.T).flip(0)[: length - 1]
    torch.testing.assert_close(walk_spectrum(length), found, rtol=1e-9, atol=1e-12)


def test_spectrum_of_a_walk_is_that_of_a_simulated_one():
    ratio = recorded(numbers(0, 60, N).cumsum(0)).explained_variance_ratio()
    torch.testing.assert_close(1 - ratio.cumsum(0), left_over(walk_spectrum(60)), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3] if EVERY else [0.1, 0.3])
@pytest.mark.parametrize("noise", ["white", "walk"])
@pytest.mark.parametrize("rank", [1, 3, 6, 10])
@pytest.mark.parametrize("kind", ["smooth", "even", "independent", "walk"])
def test_planted_directions_are_counted(kind, rank, noise, size):
    """To the number, but that noise which walks has a direction of its own or two."""
    for length in (20, 40, 80) if EVERY else (40,):
        if rank > (length - 1) // 3:
            continue
        for seed in range(5 if EVERY else 1):
            found = counted(planted(seed, kind, rank, length, noise, size))
            assert rank <= found <= rank + 2 * (noise == "walk"), (length, seed)


@pytest.mark.parametrize("length", [40, 80, 160])
@pytest.mark.parametrize("directions", [100, N])
def test_a_walk_has_as_many_as_any_other(length, directions):
    found = counted(numbers(length, length, directions).cumsum(0))
    assert found == {40: 11, 80: 12, 160: 12}[length]


def test_short_walks_have_fewer():
    assert [counted(numbers(9, length, N).cumsum(0)) for length in (8, 12, 20)] == [3, 4, 8]


def test_one_large_direction_is_not_all():
    """A first direction far above a walk's, and a walk: as real trainings are."""
    walk = numbers(0, 60, N).cumsum(0) / 10
    drift = torch.linspace(0, 1, 60)[:, None] * numbers(1, 1, N)
    points = walk / walk.norm() * 0.35 + (drift - drift.mean(0)) / drift.norm()
    ratio = recorded(points).explained_variance_ratio()
    assert ratio[0] > 0.75 and ratio[0] > 10 * ratio[1]
    assert counted(points) >= 5


def test_noise_is_warned_about():
    with pytest.warns(UserWarning, match="no direction stands out from noise, kept the first"):
        subspace = recorded(numbers(0, 40, N)).subspace(dim="auto")
    assert subspace.dim == 1
    assert "no direction stands out from noise" in subspace.report()


def test_exact_rank_and_no_warning():
    points = planted(0, "even", 3, 40, "white", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace = recorded(points.double(), torch.float64).subspace("auto")
    assert subspace.dim == 3
    assert subspace.choice["rank"] == 3
    assert "36 directions that rounding made: dropped" in subspace.report()


def test_basis_is_that_of_the_same_number():
    trajectory = recorded(planted(0, "smooth", 3, 40, "white", 0.1))
    assert torch.equal(trajectory.subspace("auto").basis, trajectory.subspace(3).basis)


def test_each_group_has_its_own():
    points = torch.cat(
        [planted(0, "even", rank, 40, "white", 0.1) for rank in (2, 5)]
        + [torch.linspace(0, 1, 40)[:, None]],
        1,
    )
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (N, N, 1)]
    trajectory = Trajectory(params, 40, torch.float32)
    for point in points:
        for param, piece in zip(params, point.split([N, N, 1]), strict=True):
            param.data.copy_(piece)
        trajectory.record()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped = trajectory.grouped_subspace([1, 1, 1], "auto")
    assert [one.dim for one in grouped.subspaces] == [2, 5, 1]
    assert grouped.report().count('dim = "auto"') == 3 and "group 2" in grouped.report()


def test_snapshots_kept_by_other_means():
    points = planted(0, "even", 4, 40, "white", 0.1)
    subspace = Subspace.from_snapshots(points, "auto")
    assert subspace.dim == 4
    assert subspace.report() == recorded(points).subspace("auto").report()
    for dim, kind, message in [
        ("auto", "qr", "dim: expected a number, for 'qr', got 'auto'"),
        ("most", "pca", "dim: expected a number or 'auto', got 'most'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Subspace.from_snapshots(points, dim, kind)
    with pytest.raises(ValueError, match=r"'auto' needs 8 snapshots or more .* got 7"):
        Subspace.from_snapshots(points[:7], "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": "most"}, "dim: expected a number or 'auto', got 'most'"),
        ({"dim": "auto", "center": False}, "dim: 'auto' compares centred spectra"),
        ({"dim": "auto", "explained": 0.9}, "expected dim or explained, got both"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recorded(numbers(0, 10, 50).cumsum(0)).subspace(**options)


def test_too_few_snapshots():
    with pytest.raises(ValueError, match=r"'auto' needs 8 snapshots or more .* got 7"):
        recorded(numbers(0, 7, 50).cumsum(0)).subspace("auto")


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"dim": "auto"}, ['asked for   dim = "auto"', "random walk of 60 snapshots, too, has 95"]),
        ({"dim": 5}, ["asked for   dim = 5", "kept        5 of 59 directions: as asked for"]),
        ({}, ["asked for   no number", "kept        40 of 59 directions: the default"]),
        ({"explained": 0.9}, ["asked for   explained = 0.9", "the fewest that explain this share"]),
        ({"dim": 2, "center": False}, ["from        60 snapshots\n", "kept        2 of "]),
    ],
)
def test_report_says_what_was_asked_for_and_why(options, lines):
    subspace = recorded(numbers(0, 60, N).cumsum(0)).subspace(**options)
    report = subspace.report()
    assert f"{subspace.dim} directions of 4,000 numbers each, float32" in report
    share = float(subspace.explained_variance_ratio.sum())
    assert f"explained   {100 * share:.2f} % of the variance" in report
    for line in lines:
        assert line in report
    walk = 1 - float(left_over(walk_spectrum(60))[subspace.dim - 1])
    centred = options.get("center", True)
    assert (f"of a random walk of 60 snapshots, {100 * walk:.2f} %" in report) == centred


def test_the_rank_guard_is_reported():
    points = planted(0, "even", 3, 40, "white", 0)
    with pytest.warns(UserWarning, match="kept 3"):
        report = recorded(points.double(), torch.float64).subspace(7).report()
    assert "asked for   dim = 7\n" in report
    assert "kept        3 of 3 directions: no more directions are above rounding" in report


def test_the_report_stays_with_the_subspace(tmp_path):
    subspace = recorded(numbers(0, 30, N).cumsum(0)).subspace("auto")
    report = subspace.report()
    path = tmp_path / "subspace.safetensors"
    subspace.save(path)
    moved = subspace.with_origin(torch.zeros(N))
    for same in (Subspace.load(path), moved, subspace.quantize("int8").to(dtype=torch.float32)):
        assert same.report() == report
    assert subspace.quantize("int8").report() == report.replace("float32", "int8")
    grouped = GroupedSubspace([subspace, subspace.to(dtype=torch.bfloat16)])
    grouped.save(path)
    assert GroupedSubspace.load(path).report() == grouped.report()


def test_what_is_not_known_is_not_told(tmp_path):
    subspace = Subspace.random([torch.zeros(50)], 1)
    expected = (
        "subspace    1 direction of 50 numbers each, float32\n"
        "kept        all of them; how they were chosen is not known"
    )
    assert subspace.report() == expected
    path = tmp_path / "subspace.safetensors"
    subspace.save(path)
    assert Subspace.load(path).report() == expected


def test_files_of_earlier_versions(tmp_path):
    path = tmp_path / "subspace.safetensors"
    recorded(numbers(0, 30, 50).cumsum(0)).subspace(2).save(path)
    with Reader(path, "subspace", 1) as file:
        tensors = {name: file.read(name) for name in file.names()}
        known = {key: value for key, value in file.metadata.items() if key != "choice"}
    save(path, "subspace", 1, tensors, known)
    subspace = Subspace.load(path)
    assert "how they were chosen is not known" in subspace.report()
    assert "explained" in subspace.report()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("auto", "choice: expected the fields"),
        ({"snapshots": 5}, "choice: expected the fields"),
        ({"snapshots": "5"}, "choice: snapshots: expected int, got '5'"),
        ({"walk": "much"}, "choice: walk: expected float or NoneType, got 'much'"),
    ],
)
def test_a_wrong_choice(wrong, message):
    right = {"snapshots": 9, "rank": 8, "asked": "dim = 1", "why": "as asked for", "walk": 0.6}
    if isinstance(wrong, dict) and message.count(":") > 1:
        wrong = right | wrong
    with pytest.raises(ValueError, match=message):
        Subspace(torch.ones(1, 3), torch.zeros(3), choice=wrong)
