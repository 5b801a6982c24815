"""The ops that do the work of several in one read give, to the bit, what those give."""

from __future__ import annotations

import pytest
import torch
from samples import LISTS, QUANTIZED, STORAGE, make_list, make_sample, wide

from dldr_ext import ops

pytestmark = pytest.mark.usefixtures("kernels")
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)


@dtypes
@pytest.mark.parametrize("lists", [1, 2, 3, 5])
def test_project_many_is_project_of_each(dtype, lists):
    for n in (0, 1, 63, 257, 4_097, 9_001):
        for d in (1, 3, 4, 6, 13):
            s = make_sample(dtype, n, d)
            many = [make_list(LISTS[(n + k) % len(LISTS)], n) for k in range(lists)]
            found = ops.project_many(s.basis, many, scale=s.scale)
            each = torch.stack([ops.project(s.basis, one, scale=s.scale) for one in many])
            assert found.dtype == wide(dtype)
            assert torch.equal(found, each), (n, d)


@dtypes
def test_project_many_chunks_and_threads(dtype, threads):
    n = 4096 * 1024 + 4097  # chunks of two tiles
    s = make_sample(dtype, n, 2, "one")
    many = [make_list("cut", n), make_list("mixed", n)]
    each = torch.stack([ops.project(s.basis, one, scale=s.scale) for one in many])
    for count in (1, 3):
        threads(count)
        assert torch.equal(ops.project_many(s.basis, many, scale=s.scale), each)


def test_project_many_takes_none():
    basis, a, b = torch.randn(4, 100), torch.randn(30), torch.randn(5, 14)
    zeros = torch.zeros(70)
    found = ops.project_many(basis, [[a, None], [a, b], [None]])
    expected = [ops.project(basis, x) for x in ([a, zeros], [a, b], [torch.zeros(100)])]
    assert torch.equal(found, torch.stack(expected))


@dtypes
@pytest.mark.parametrize("kind", LISTS)
def test_reconstruct_residual_is_two_reconstructions(dtype, kind, threads):
    for n in (0, 1, 15, 257, 9_001):
        for d in (1, 5, 8, 11):
            s = make_sample(dtype, n, d, kind)
            c = torch.randn(d, dtype=wide(dtype))
            threads(1 + d % 3)
            direction, residual = ops.reconstruct_residual(
                s.basis, s.theta, c, s.tensors, scale=s.scale
            )
            assert torch.equal(direction, ops.reconstruct(None, s.basis, s.theta, scale=s.scale))
            inside = ops.reconstruct(None, s.basis, c, scale=s.scale)
            pieces = [t.reshape(-1).to(wide(dtype)) for t in s.tensors]
            flat = torch.cat(pieces) if pieces else torch.zeros(0, dtype=wide(dtype))
            assert torch.equal(residual, flat - inside), (n, d)


def empty_store(dtype, capacity, n):
    """Snapshots, their scale if the format has one, and a Gram matrix that nothing was put in."""
    scale = torch.full((capacity, -(-n // 256)), 7.0) if dtype in QUANTIZED else None
    gram = torch.full((capacity, capacity), 7.0, dtype=torch.float64)
    return torch.full((capacity, n), 7.0).to(dtype), scale, gram


def same_store(one, two):
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dtypes
@pytest.mark.parametrize("n", [0, 1, 257, 9_001])
def test_stored_rows_and_their_products(dtype, n):
    """Rows stored first and multiplied later, in blocks of any size, as if appended one by one."""
    capacity = 11
    for cut in ([11], [1] * 10, [3, 2, 5], [9, 2]):
        appended, blocks = empty_store(dtype, capacity, n), empty_store(dtype, capacity, n)
        anchor = torch.randn(n, dtype=wide(dtype))
        rows = [make_list(LISTS[k % len(LISTS)], n) for k in range(sum(cut))]
        for index, row in enumerate(rows):
            ops.gram_append_(appended[0], appended[2], index, row, anchor, scale=appended[1])
            gram = blocks[2].clone()
            ops.store_snapshot_(blocks[0], index, row, anchor, scale=blocks[1])
            assert torch.equal(gram, blocks[2])
        same_store(appended[:2], blocks[:2])
        index = 0
        for count in cut:
            ops.gram_block_(blocks[0], blocks[2], index, count, scale=blocks[1])
            index += count
            assert (blocks[2][index:] == 7).all() and (blocks[2][:, index:] == 7).all()
        same_store(appended, blocks)


def test_gram_block_in_waves(threads):
    """Many products of many chunks: their sums are made wave by wave."""
    n, count, dtype = 410_000, 150, torch.bfloat16
    rows = torch.randn(count, 7).repeat(1, n // 7 + 1)[:, :n].to(dtype)
    gram = torch.zeros(count, count, dtype=torch.float64)
    threads(2)
    ops.gram_block_(rows, gram, 0, count)
    last = torch.zeros_like(gram)
    index = count - 1
    zeros = torch.zeros(n, dtype=wide(dtype))
    ops.gram_append_(rows, last, index, [rows[index].clone()], zeros)
    assert torch.equal(gram[index], last[index])
    assert torch.equal(gram, gram.T)


def test_strided_gram_and_snapshots():
    n = 700
    wide_rows, wide_gram = torch.randn(5, n + 9), torch.zeros(10, 12, dtype=torch.float64)
    rows, gram = wide_rows[:, 4 : n + 4], wide_gram[:, ::2][2:7, :5]
    assert gram.shape == (5, 5)
    ops.gram_block_(rows, gram, 1, 4)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    ops.gram_block_(rows.contiguous(), expected, 1, 4)
    assert torch.equal(gram, expected)
    before = wide_rows.clone()
    ops.store_snapshot_(rows, 3, [torch.ones(n)], torch.zeros(n))
    before[3, 4 : n + 4] = 1
    assert torch.equal(wide_rows, before)
