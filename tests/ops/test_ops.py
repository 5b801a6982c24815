"""Every op against the float64 reference, on every instruction-set path and CUDA."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import assert_close
from samples import DIMS, FLOATS, LISTS, QUANTIZED, SIZES, STORAGE, make_list, make_sample, wide

from dldr_ext import ops

pytestmark = pytest.mark.usefixtures("kernels")
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)


def check_project(s, dtype):
    c = ops.project(s.basis, s.tensors, scale=s.scale)
    assert c.dtype == wide(dtype)
    exact = reference.project(s.basis, s.tensors, s.scale)
    peer = reference.project(s.basis, s.tensors, s.scale, wide(dtype))
    assert_close(c, exact, peer, s.label, reference.terms(s.basis, s.tensors, s.scale))


def poisoned(tensors):
    """Copies filled with NaN, in the same memory format."""
    return [torch.full_like(t, torch.nan) for t in tensors]


@dtypes
def test_project(dtype):
    for n in SIZES:
        for d in DIMS:
            check_project(make_sample(dtype, n, d), dtype)


@dtypes
@pytest.mark.parametrize("kind", LISTS)
def test_project_lists(dtype, kind):
    check_project(make_sample(dtype, 9_001, 6, kind), dtype)


@dtypes
def test_reconstruct(dtype):
    for n in SIZES:
        for d in DIMS:
            s = make_sample(dtype, n, d)
            for origin in (s.origin, None):
                w = ops.reconstruct(origin, s.basis, s.theta, scale=s.scale)
                assert w.dtype == wide(dtype)
                exact = reference.reconstruct(origin, s.basis, s.theta, s.scale)
                peer = reference.reconstruct(origin, s.basis, s.theta, s.scale, wide(dtype))
                size = reference.moved(s.basis, s.theta, s.scale)
                assert_close(w, exact, peer, s.label, size)


@dtypes
@pytest.mark.parametrize("kind", [kind for kind in LISTS if kind != "constant"])
def test_reconstruct_in_place(dtype, kind):
    s = make_sample(dtype, 9_001, 7, kind)
    params = poisoned(s.tensors)
    ops.reconstruct_(params, s.origin, s.basis, s.theta, scale=s.scale)
    exact = reference.reconstruct(s.origin, s.basis, s.theta, s.scale)
    peer = reference.reconstruct(s.origin, s.basis, s.theta, s.scale, wide(dtype))
    size = reference.moved(s.basis, s.theta, s.scale)
    for (own, e), (_, q) in zip(
        reference.by_dtype(params, exact), reference.by_dtype(params, peer), strict=True
    ):
        assert_close(own, e, q.to(own.dtype), f"{s.label} {own.dtype}", size)
    for p, t in zip(params, s.tensors, strict=True):
        assert p.stride() == torch.empty_like(t).stride()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_written_values_are_rounded_once(dtype):
    """reconstruct_ into a low precision equals reconstruct rounded, bit for bit."""
    s = make_sample(torch.float32, 5_003, 5)
    params = [torch.full((5_003,), torch.nan, dtype=dtype)]
    ops.reconstruct_(params, s.origin, s.basis, s.theta)
    w = ops.reconstruct(s.origin, s.basis, s.theta)
    assert torch.equal(params[0], w.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_to_half_rounds_once(dtype):
    """Values whose float32 rounding is a tie of the half format: two roundings would go wrong."""
    bits = 8 if dtype == torch.bfloat16 else 11
    tie = 1.0 + 2.0**-bits
    values = torch.tensor([tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40], dtype=torch.float64)
    origin = values.repeat(7)
    params = [torch.zeros(21, dtype=dtype)]
    ops.reconstruct_(params, origin, torch.zeros(1, 21, dtype=torch.float64), torch.zeros(1))
    up, down = 1.0 + 2.0 ** (1 - bits), 1.0
    assert params[0].tolist() == [up, down, -up] * 7


@pytest.mark.parametrize("kind", [kind for kind in LISTS if kind != "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trial(dtype, kind):
    n = 9_001
    point, direction = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    params = poisoned(make_list(kind, n))
    ops.trial_(params, point, direction, 0.3)
    exact = point.double() + 0.3 * direction.double()
    peer = torch.add(point, direction, alpha=0.3)
    for (own, e), (_, q) in zip(
        reference.by_dtype(params, exact), reference.by_dtype(params, peer), strict=True
    ):
        assert_close(own, e, q.to(own.dtype), f"{dtype} {kind} {own.dtype}")


def test_trial_with_zero_alpha_writes_the_point_exactly():
    point = torch.randn(4_999)
    params = poisoned(make_list("cut", 4_999))
    ops.trial_(params, point, torch.randn(4_999), 0.0)
    assert torch.equal(reference.flat(params, torch.float32), point)


@dtypes
def test_gram(dtype):
    for n in (0, 1, 17, 257, 1023, 4097, 20_011):
        for t in (1, 2, 3, 4, 5, 11, 40):
            s = make_sample(dtype, n, t)
            k = ops.gram(s.basis, scale=s.scale)
            assert k.dtype == torch.float64
            assert torch.equal(k, k.T)
            exact = reference.gram(s.basis, s.scale)
            # the rows hold float32 products; torch's float32 Gram is the peer
            peer = reference.gram(s.basis, s.scale, wide(dtype))
            error, allowed = (k - exact).abs().max(), 2 * (peer.double() - exact).abs().max()
            size = exact.abs().max() * torch.finfo(wide(dtype)).eps
            assert error <= allowed + (256 if dtype == torch.float64 else 4) * size, s.label


@dtypes
@pytest.mark.parametrize("kind", LISTS)
def test_gram_append(dtype, kind):
    n, capacity = 9_001, 7
    snapshots = torch.zeros(capacity, n).to(dtype)
    scale = torch.zeros(capacity, -(-n // 256)) if dtype in QUANTIZED else None
    gram = torch.full((capacity, capacity), torch.nan, dtype=torch.float64)
    anchor = torch.randn(n, dtype=wide(dtype))
    for index in range(capacity - 1):
        tensors = make_list(kind, n)
        before = snapshots.clone(), gram.clone()
        ops.gram_append_(snapshots, gram, index, tensors, anchor, scale=scale)
        delta = reference.flat(tensors, wide(dtype)) - anchor
        stored = reference.decode(snapshots, scale)[: index + 1]
        if dtype in FLOATS:
            assert torch.equal(snapshots[index], delta.to(dtype)), "stored row"
        else:
            blocks = torch.nn.functional.pad(delta, (0, -n % 256)).view(-1, 256).abs().amax(1)
            largest = 127 if dtype == torch.int8 else 448
            torch.testing.assert_close(scale[index], blocks / largest, rtol=1e-6, atol=0)
            # half a step of int8; float8 has 4 significant bits
            step = blocks.repeat_interleave(256)[:n]
            bound = step / 127 * 0.51 if dtype == torch.int8 else step / 448 + delta.abs() / 15
            assert ((stored[index] - delta.double()).abs() <= bound).all()
        # nothing else was written
        others = [i for i in range(capacity) if i != index]
        assert torch.equal(snapshots[others].float(), before[0][others].float())
        outside = torch.ones_like(gram, dtype=torch.bool)
        outside[index, : index + 1] = outside[: index + 1, index] = False
        assert torch.equal(gram[outside].nan_to_num(7.0), before[1][outside].nan_to_num(7.0))
        exact = stored @ stored[index]
        assert torch.equal(gram[index, : index + 1], gram[: index + 1, index])
        size = (stored.abs() @ stored[index].abs()).max()
        error = (gram[index, : index + 1] - exact).abs().max()
        assert error <= 16 * torch.finfo(wide(dtype)).eps * size


@dtypes
def test_form_basis(dtype):
    for n in (0, 1, 17, 255, 257, 4_099):
        for t, d in ((1, 1), (3, 2), (5, 6), (12, 7), (40, 13)):
            s = make_sample(dtype, n, t)
            coefficients = torch.randn(d, t, dtype=torch.float64)
            exact = reference.form_basis(s.basis, coefficients, s.scale)
            for out in FLOATS:
                basis = ops.form_basis(s.basis, coefficients, scale=s.scale, dtype=out)
                assert basis.dtype == out
                assert_close(basis, exact, exact.to(out), f"{s.label} {out}")
            default = ops.form_basis(s.basis, coefficients, scale=s.scale)
            assert default.dtype == (torch.float32 if dtype in QUANTIZED else dtype)


@dtypes
def test_tuned_dims_and_many_chunks(dtype):
    """d up to 1024, and more elements than the largest number of chunks has tiles."""
    s = make_sample(dtype, 5_000, 1024)
    check_project(s, dtype)
    exact = reference.reconstruct(s.origin, s.basis, s.theta, s.scale)
    peer = reference.reconstruct(s.origin, s.basis, s.theta, s.scale, wide(dtype))
    w = ops.reconstruct(s.origin, s.basis, s.theta, scale=s.scale)
    # the peer sums 1024 rows in blocks, the op in order
    error, allowed = (w - exact).abs().max(), (peer - exact).abs().max()
    assert error <= 8 * allowed + 1024 * torch.finfo(wide(dtype)).eps

    n = 4096 * 1024 + 4097
    check_project(make_sample(dtype, n, 2, "one"), dtype)


def test_a_column_slice_is_a_basis():
    basis, tensors = torch.randn(5, 3_000), make_list("cut", 1_000)
    part = basis[:, 700:1_700]
    assert torch.equal(ops.project(part, tensors), ops.project(part.contiguous(), tensors))


@dtypes
def test_nan_and_inf_propagate(dtype):
    """As in BLAS: a zero coefficient never hides a NaN."""
    s = make_sample(dtype, 600, 5)
    s.tensors = [torch.randn(600)]
    s.tensors[0][300] = torch.nan
    assert ops.project(s.basis, s.tensors, scale=s.scale).isnan().all()
    theta = torch.zeros_like(s.theta)
    if dtype == torch.int8:
        s.scale[2, 1] = torch.nan
        bad = torch.arange(256, 512)
    else:
        s.basis[2, 300] = torch.nan
        bad = torch.tensor([300])
    w = ops.reconstruct(s.origin, s.basis, theta, scale=s.scale)
    assert w.isnan().nonzero().flatten().tolist() == bad.tolist()
    basis = ops.form_basis(s.basis, torch.zeros(2, 5), scale=s.scale)
    assert basis.float().isnan().all(0).nonzero().flatten().tolist() == bad.tolist()
    gram = ops.gram(s.basis, scale=s.scale)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2] = expected[:, 2] = True
    assert torch.equal(gram.isnan(), expected)
    if dtype in FLOATS:
        row = torch.randn(600)
        row[1] = torch.inf
        ops.trial_([s.tensors[0][:0], row], torch.full((600,), torch.inf), torch.ones(600), 1.0)
        assert row.isinf().all()


def test_list_of_nothing_but_empty_entries():
    basis = torch.randn(3, 0)
    empty = [torch.zeros(0), torch.zeros(2, 0)]
    assert ops.project(basis, empty).tolist() == [0, 0, 0]
    ops.reconstruct_(empty, None, basis, torch.ones(3))
    ops.trial_(empty, torch.zeros(0), torch.zeros(0), 1.0)
    assert ops.reconstruct(None, basis, torch.ones(3)).shape == (0,)
    gram = torch.full((2, 2), torch.nan, dtype=torch.float64)
    ops.gram_append_(torch.zeros(2, 0), gram, 0, [], torch.zeros(0))
    assert gram[0, 0] == 0


def test_none_counts_as_zeros():
    basis, a, b = torch.randn(4, 100), torch.randn(30), torch.randn(5, 4)
    zeros = torch.zeros(50)
    expected = ops.project(basis, [a, zeros, b])
    assert torch.equal(ops.project(basis, [a, None, b]), expected)
    assert torch.equal(ops.project(basis, [a, None, None, b]), expected)
    assert torch.equal(ops.project(basis, [None, None]), torch.zeros(4))
    stride0 = torch.zeros(()).expand(10, 5)
    assert torch.equal(ops.project(basis, [a, stride0, b]), expected)


@pytest.mark.parametrize("op", ["reconstruct_", "trial_"])
def test_leaves_that_need_a_gradient_are_written_outside_autograd(op):
    layer = torch.nn.Linear(7, 3)
    params = list(layer.parameters())
    loss = layer(torch.randn(2, 7, requires_grad=True)).sum()
    if op == "reconstruct_":
        ops.reconstruct_(params, None, torch.randn(2, 24), torch.ones(2))
    else:
        ops.trial_(params, torch.randn(24), torch.randn(24), 0.5)
    assert all(p.requires_grad and p.is_leaf for p in params)
    # autograd notices that a weight which it saved has changed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
