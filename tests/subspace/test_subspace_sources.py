"""Where subspaces come from: random bases and raw snapshots, and bad input to both."""

from __future__ import annotations

import warnings

import pytest
import torch
from samples import FLOATS, wide
from sklearn.decomposition import PCA
from subspace_kinds import flat
from torch import nn

from dldr_ext import Subspace, Trajectory


def gram_of(basis):
    return basis.double() @ basis.double().T


# Random bases


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (40, 40), (41, 40), (3000, 40), (9001, 3)])
def test_random_is_orthonormal_at_the_current_weights(n, dim, dtype):
    params = [torch.randn(n, dtype=wide(dtype))]
    space = Subspace.random(params, dim, dtype=dtype)
    assert torch.equal(space.origin, params[0]) and space.shapes == [(n,)]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert (gram_of(space.basis) - torch.eye(dim)).abs().max() < tolerance


def test_random_obeys_its_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return Subspace.random(params, 5, generator=generator).basis

    params = [torch.ones(9), torch.ones(5, 3)]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_random_has_no_preferred_direction(threads):
    """Each column of an orthonormal d x n basis has squared length d / n on average."""
    threads(1)
    torch.manual_seed(7)
    squares = torch.stack(
        [Subspace.random([torch.zeros(30)], 6).basis.square().sum(0) for _ in range(200)]
    ).mean(0)
    assert (squares - 6 / 30).abs().max() < 0.05


def test_random_bad_arguments():
    model = nn.Linear(2, 3)
    assert Subspace.random(model.named_parameters(), 9).names == ["weight", "bias"]
    for dim, got in ((10, "10"), (0, "0")):
        with pytest.raises(ValueError, match=rf"1 <= dim <= 9 \(the parameters .* 9 .* got {got}"):
            Subspace.random(model.parameters(), dim)
    with pytest.raises(ValueError, match="1 <= dim <= 1024"):
        Subspace.random([torch.zeros(2000)], 1025)
    with pytest.raises(ValueError, match=r"got torch.int8"):
        Subspace.random(model.parameters(), 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="meta"):
        Subspace.random([torch.ones(9, device="meta")], 2)


# Raw snapshots


def raw(count=7, n=500, dtype=torch.float32, spread=1e-2):
    """Weights of one run: close together, far from zero."""
    return (torch.randn(n) + spread * torch.randn(count, n).cumsum(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_snapshots_pca(dtype, spread):
    weights = raw(dtype=dtype, spread=spread)
    before = weights.clone()
    space = Subspace.from_snapshots(weights, 4)
    assert torch.equal(weights, before) and torch.equal(space.origin, weights[0])
    pca = PCA(4, svd_solver="full").fit(weights.double().numpy())
    overlap = space.basis.double() @ torch.from_numpy(pca.components_).T
    assert (overlap.abs() - torch.eye(4)).abs().max() < 1e-5
    ratio = torch.from_numpy(pca.explained_variance_ratio_)
    torch.testing.assert_close(space.explained_variance_ratio, ratio, rtol=1e-6, atol=0)


def test_snapshots_pca_of_weights_far_from_zero():
    """Their own Gram matrix would hold nothing of differences this small."""
    deltas = 1e-5 * torch.randn(7, 500, dtype=torch.float64).cumsum(0)
    space = Subspace.from_snapshots(1e4 * torch.randn(500, dtype=torch.float64) + deltas, 4)
    pca = PCA(4, svd_solver="full").fit(deltas.numpy())
    overlap = space.basis @ torch.from_numpy(pca.components_).T
    assert (overlap.abs() - torch.eye(4)).abs().max() < 1e-5
    singular = torch.from_numpy(pca.singular_values_)
    torch.testing.assert_close(space.singular_values, singular, rtol=1e-5, atol=0)


def test_snapshots_pca_is_that_of_a_trajectory():
    weights = raw()
    param = torch.zeros(500)
    trajectory = Trajectory([param], capacity=7, dtype=torch.float32)
    for row in weights:
        param.copy_(row)
        trajectory.record()
    one, other = trajectory.subspace(5), Subspace.from_snapshots(weights, 5)
    torch.testing.assert_close(one.basis, other.basis, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.origin, other.origin)


@pytest.mark.parametrize(
    ("dtype", "spread"),
    [
        *((d, s) for d in (torch.float32, torch.float64) for s in (1.0, 1e-2, 1e-4)),
        (torch.float64, 1e-6),
    ],
)
@pytest.mark.parametrize("dim", [7, 4])
def test_snapshots_qr_takes_in_the_snapshots_and_their_averages(dtype, spread, dim):
    weights = raw(dtype=dtype, spread=spread)
    space = Subspace.from_snapshots(weights, dim, "qr")
    assert space.dim == dim and not space.origin.any()
    assert (gram_of(space.basis) - torch.eye(dim)).abs().max() < 1e-6
    average = weights[:dim].mean(0)
    for point in (*weights[:dim], average):
        rebuilt = space.reconstruct(space.coordinates(point))
        torch.testing.assert_close(rebuilt, point, rtol=1e-5, atol=1e-5)
    # The first `dim` snapshots in order, as Gram and Schmidt would have it.
    reference = torch.linalg.qr(weights.double().T).Q.T[:dim]
    overlap = (space.basis.double() @ reference.T).abs()
    assert (overlap - torch.eye(dim)).abs().max() < 1e-7 / spread + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snapshots_qr_leaves_out_what_is_new_by_rounding_alone(dtype):
    base = torch.randn(2, 500, dtype=torch.float64)
    weights = torch.stack([base[0], base[1], 0.3 * base[0] + 0.7 * base[1]]).to(dtype)
    with pytest.warns(UserWarning, match="kept 2"):
        assert Subspace.from_snapshots(weights, 3, "qr").dim == 2


def test_snapshots_as_lists_and_dicts():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 4))
    points, dicts, lists = [], [], []
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        points.append(flat(model.parameters()))
        dicts.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        lists.append([p.detach().clone() for p in model.parameters()])
    expected = Subspace.from_snapshots(torch.stack(points), 3)
    for given_snapshots in (dicts, lists):
        space = Subspace.from_snapshots(given_snapshots, 3)
        assert torch.equal(space.basis, expected.basis)
        assert space.shapes == [tuple(p.shape) for p in model.parameters()]
    assert Subspace.from_snapshots(dicts, 3).names == list(dicts[0])
    assert space.names is None


@pytest.mark.parametrize("orthonormal", ["pca", "qr"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_snapshots_basis_dtype(orthonormal, dtype):
    assert Subspace.from_snapshots(raw(dtype=dtype), 3, orthonormal).dtype == dtype
    assert Subspace.from_snapshots(raw(), 3, orthonormal, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(("orthonormal", "kept"), [("pca", 2), ("qr", 3)])
def test_dependent_snapshots(orthonormal, kept):
    base = torch.randint(-9, 10, (3, 200)).float()
    weights = base[[0, 0, 1, 1, 2, 0]]
    with pytest.warns(UserWarning, match=f"dim = 5 is above .* the snapshots: kept {kept}") as seen:
        space = Subspace.from_snapshots(weights, 5, orthonormal)
    assert seen[0].filename == __file__
    assert space.dim == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Subspace.from_snapshots(weights, kept, orthonormal)
    torch.testing.assert_close(
        space.reconstruct(space.coordinates(base[2])), base[2], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 9), 2), ValueError, "snapshots: the 3 snapshots do not differ"),
        ((torch.zeros(3, 9), 2, "qr"), ValueError, "snapshots: the snapshots are all zero"),
        ((torch.randn(1, 9), 1), ValueError, "snapshots: expected at least two, got 1"),
        (([], 1), ValueError, "snapshots: expected at least two, got 0"),
        ((torch.randn(3, 9), 3), ValueError, r"1 <= dim <= 2 \(3 centred snapshots\), got 3"),
        ((torch.randn(3, 9), 4, "qr"), ValueError, r"1 <= dim <= 3 \(3 snapshots\), got 4"),
        ((torch.randn(3, 9), 1, "svd"), ValueError, "expected 'pca' or 'qr', got 'svd'"),
        ((torch.ones(9), 1), ValueError, r"snapshots: expected shape \(T, n\).* got \(9,\)"),
        ((torch.ones(3, 9).int(), 1), TypeError, "snapshots: expected .* got int32"),
        (({"a": torch.ones(3)}, 1), TypeError, "lists or dicts of tensors, got dict"),
        (([[torch.ones(3)], [torch.ones(4)]], 1), ValueError, r"snapshots\[1\]\[0\]: .* \(4,\)"),
        (([{"a": torch.ones(3)}, {"b": torch.ones(3)}], 1), ValueError, r"\['a'\], got \['b'\]"),
        (
            ([{"w": torch.ones(3), "num_batches_tracked": torch.tensor(3)}] * 2, 1),
            TypeError,
            r"snapshots\[0\]\[1\] \(num_batches_tracked\): expected a dtype of .* got int64",
        ),
        (
            (torch.tensor([[1.0, 2], [3, torch.nan]]), 1),
            ValueError,
            r"snapshots: expected finite values, got NaN or Inf in \[1\]",
        ),
    ],
)
def test_bad_snapshots(arguments, error, message):
    with pytest.raises(error, match=message):
        Subspace.from_snapshots(*arguments)
