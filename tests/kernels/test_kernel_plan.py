"""The planner at pretended sizes: nothing of that size is allocated."""

import numpy as np
import pytest
from kernel_reference import cut

LARGE = [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 12345, 2**33 - 1, 2**33]
SMALL = [0, 1, 4095, 4096, 4097, 4096 * 1024, 4096 * 1024 + 1, 11_200_000, 25_000_000]


def check_chunks(plan, numel, max_chunks):
    """Chunks are of whole tiles, without a gap, overlap or empty chunk, and cover everything."""
    assert plan.numel == numel
    assert 0 <= plan.chunks <= max_chunks
    at = 0
    for chunk in range(plan.chunks):
        assert plan.chunk_begin(chunk) == at
        assert at % plan.tile == 0
        assert plan.chunk_end(chunk) > at
        at = plan.chunk_end(chunk)
    assert at == numel
    assert plan.tiles * plan.tile >= numel > (plan.tiles - 1) * plan.tile


@pytest.mark.parametrize("numel", SMALL + LARGE)
def test_plan(kernels, numel):
    plan = kernels.make_plan(numel)
    assert plan.tile == kernels.TILE
    check_chunks(plan, numel, kernels.MAX_CHUNKS)
    if plan.tiles >= kernels.MAX_CHUNKS:  # large vectors leave many threads several chunks each
        assert plan.chunks > kernels.MAX_CHUNKS // 2


@pytest.mark.parametrize("rows", [1, 2, 40, 81, 100, 1000, 5000])
@pytest.mark.parametrize("numel", SMALL + LARGE)
def test_gram_plan(kernels, rows, numel):
    plan = kernels.make_gram_plan(rows, numel)
    check_chunks(plan, numel, 256)
    assert plan.tile % kernels.SCALE_BLOCK == 0
    # a float32 panel of one strip of rows stays in a private L2
    assert 4 * min(rows, 128) * plan.tile <= 256 << 10
    # the sums of all chunks stay small, or are no more than the matrix itself
    assert plan.chunks <= 1 or 8 * rows * rows * plan.chunks <= 64 << 20


def test_plan_borders_depend_on_numel_alone(kernels):
    plans = [kernels.make_plan(2**33 - 7) for _ in range(2)]
    borders = [[plan.chunk_begin(k) for k in range(plan.chunks + 1)] for plan in plans]
    assert borders[0] == borders[1]


@pytest.mark.parametrize("numel", [5000, 2**31 + 3, 2**33])
@pytest.mark.parametrize("tensors", [1, 2, 62, 5000])
def test_pieces_of_every_chunk(kernels, numel, tensors):
    """The pieces of all chunks, in order, are every element of every tensor once."""
    rng = np.random.default_rng([tensors, numel])
    sizes = [size for size in cut(numel, tensors, rng) if size > 0]
    begins = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    plan = kernels.make_plan(numel)
    at = 0
    for chunk in range(plan.chunks):
        begin, end = plan.chunk_begin(chunk), plan.chunk_end(chunk)
        for tensor, offset, position, count in kernels.pieces(sizes, begin, end):
            assert begins[tensor] + offset == begin + position == at
            assert 0 < count <= sizes[tensor] - offset
            at += count
        assert at == end
    assert at == numel


@pytest.mark.parametrize("numel", [10_000, 2**33])
def test_find_entry(kernels, numel):
    rng = np.random.default_rng(numel)
    sizes = [size for size in cut(numel, 500, rng) if size > 0]
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    indices = [0, numel - 1, *begins[1:].tolist(), *(begins[1:] - 1).tolist()]
    for index in [*indices, *rng.integers(0, numel, 200).tolist()]:
        expected = np.searchsorted(begins, index, side="right") - 1
        assert kernels.find_entry(sizes, index) == expected


def test_empty_ranges_and_tensors(kernels):
    assert kernels.pieces([], 0, 0) == []
    assert kernels.pieces([3, 4], 5, 5) == []
    assert kernels.pieces([0, 3, 0, 0, 4, 0], 0, 7) == [(0, 0, 0, 3), (1, 0, 3, 4)]
    assert kernels.pieces([2**33], 2**33 - 5, 2**33) == [(0, 2**33 - 5, 0, 5)]
    with pytest.raises(ValueError, match="end <= 7, got 0 and 8"):
        kernels.pieces([3, 4], 0, 8)
    with pytest.raises(ValueError, match="index: expected 0 <= index < 7, got 7"):
        kernels.find_entry([3, 4], 7)
    with pytest.raises(ValueError, match="sizes"):
        kernels.pieces([3, -4], 0, 3)
