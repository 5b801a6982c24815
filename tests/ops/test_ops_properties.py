"""What must hold for any input: adjointness, linearity, bitwise reproducibility, symmetry."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import CAPABILITIES, FLOATS, STORAGE, make_rows, make_sample, wide

from dldr_ext import ops

settings.register_profile("dldr_ext", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("dldr_ext")

sizes = st.integers(1, 9_000)
dims = st.integers(1, 9)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(STORAGE)
capabilities = st.sampled_from(CAPABILITIES)


@pytest.fixture(autouse=True)
def _restore_capability():
    before = torch.ops.dldr_ext._cpu_capability()
    yield
    torch.ops.dldr_ext._set_cpu_capability(before)


def use(capability: str, seed: int) -> None:
    torch.ops.dldr_ext._set_cpu_capability(capability)
    torch.manual_seed(seed)


@given(sizes, dims, dtypes, capabilities, seeds)
def test_adjoint(n, d, dtype, capability, seed):
    """<P theta, g> = <theta, P^T g>."""
    use(capability, seed)
    s = make_sample(dtype, n, d)
    g = reference.flat(s.tensors)
    left = (ops.reconstruct(None, s.basis, s.theta, scale=s.scale).double() * g).sum()
    right = (s.theta.double() * ops.project(s.basis, s.tensors, scale=s.scale)).sum()
    size = (s.theta.double().abs() @ reference.decode(s.basis, s.scale).abs() * g.abs()).sum()
    assert (left - right).abs() <= 16 * torch.finfo(wide(dtype)).eps * size + 1e-30


@given(sizes, dims, st.sampled_from(FLOATS), capabilities, seeds, st.floats(-4, 4))
def test_linear(n, d, dtype, capability, seed, factor):
    use(capability, seed)
    basis, _ = make_rows(d, n, dtype)
    a, b = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    eps = torch.finfo(wide(dtype)).eps
    size = basis.double().abs() @ (a.abs() + abs(factor) * b.abs())
    together = ops.project(basis, [a + factor * b]).double()
    apart = ops.project(basis, [a]).double() + factor * ops.project(basis, [b]).double()
    assert ((together - apart).abs() <= 16 * eps * size).all()
    t, u = torch.randn(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    size = (t.abs() + abs(factor) * u.abs()) @ basis.double().abs()
    together = ops.reconstruct(None, basis, t + factor * u).double()
    apart = (
        ops.reconstruct(None, basis, t).double() + factor * ops.reconstruct(None, basis, u).double()
    )
    assert ((together - apart).abs() <= 16 * eps * size).all()


@given(sizes, dims, dtypes, capabilities, seeds, st.lists(st.floats(0, 1), max_size=30))
def test_any_cut_gives_the_same_bits(n, d, dtype, capability, seed, edges):
    use(capability, seed)
    s = make_sample(dtype, n, d, "one")
    (g,) = s.tensors
    places = sorted(int(edge * n) for edge in edges)
    pieces = list(g.tensor_split(places))
    assert torch.equal(
        ops.project(s.basis, [g], scale=s.scale), ops.project(s.basis, pieces, scale=s.scale)
    )
    whole = torch.empty(n)
    ops.reconstruct_([whole], s.origin, s.basis, s.theta, scale=s.scale)
    parts = list(torch.empty(n).tensor_split(places))
    ops.reconstruct_(parts, s.origin, s.basis, s.theta, scale=s.scale)
    assert torch.equal(whole, torch.cat(parts))


@given(sizes, dims, dtypes, capabilities, seeds)
def test_gram_is_symmetric_and_positive_semi_definite(n, d, dtype, capability, seed):
    use(capability, seed)
    rows, scale = make_rows(d, n, dtype)
    gram = ops.gram(rows, scale=scale)
    assert torch.equal(gram, gram.T)
    values = torch.linalg.eigvalsh(gram)
    assert values[0] >= -64 * torch.finfo(wide(dtype)).eps * values[-1]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_threads_and_runs_give_the_same_bits(dtype, capability, threads):
    use(capability, 7)
    n, d = 300_007, 5
    s = make_sample(dtype, n, d)
    snapshots, _ = make_rows(d, n, dtype)
    outcomes = []
    for count in (1, 2, 3, 4, 1):
        threads(count)
        stored = snapshots.clone()
        kept = None if s.scale is None else s.scale.clone()
        gram = torch.zeros(d, d, dtype=torch.float64)
        ops.gram_append_(stored, gram, d - 1, s.tensors, s.origin, scale=kept)
        params = [torch.empty_like(t) for t in s.tensors]
        ops.reconstruct_(params, s.origin, s.basis, s.theta, scale=s.scale)
        outcomes.append(
            [
                ops.project(s.basis, s.tensors, scale=s.scale),
                ops.reconstruct(s.origin, s.basis, s.theta, scale=s.scale),
                reference.flat(params),
                ops.gram(s.basis, scale=s.scale),
                ops.form_basis(s.basis, torch.eye(d)[:2] + 0.5, scale=s.scale),
                stored.view(torch.uint8),
                gram,
            ]
        )
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)


def test_appended_rows_give_the_gram_of_the_stored_rows(cpu_capability):
    n, t = 70_001, 6
    for dtype in FLOATS:
        anchor = torch.randn(n, dtype=wide(dtype))
        rows = torch.zeros(t, n, dtype=dtype)
        appended = torch.zeros(t, t, dtype=torch.float64)
        for index in range(t):
            ops.gram_append_(rows, appended, index, [torch.randn(n)], anchor)
        full = ops.gram(rows)
        size = full.diagonal().max() * torch.finfo(wide(dtype)).eps
        assert (appended - full).abs().max() <= 16 * size
