"""Kernels that do the work of several in one read: the same bits as those, on every path."""

import kernel_reference as ref
import numpy as np
import pytest

SIZES = [0, 1, 17, 257, ref.TILE, 2 * ref.TILE + 333]


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", SIZES)
def test_project_many(kernels, path, name, numel):
    for dim in (1, 2, 3, 5, 8):
        sample, scale, rng = ref.random_sample(dim, numel, name)
        lists = [
            ref.as_list(rng.normal(size=numel), ref.cut(numel, 4, rng), ref.FLOATS)
            for _ in range(5)
        ]
        each = [
            kernels.project(sample.array, ref.arrays(one), scale=scale, path=path) for one in lists
        ]
        for count in (1, 2, 3, 5):
            found = kernels.project_many(
                sample.array,
                [ref.arrays(one) for one in lists[:count]],
                scale=scale,
                path=path,
                threads=count,
            )
            assert ref.same_bits(found, np.stack(each[:count])), (dim, count)
        for tensor in [tensor for one in lists for tensor in one]:
            tensor.check()


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", SIZES)
def test_reconstruct_residual(kernels, path, name, numel):
    for dim in (1, 4, 7):
        sample, scale, rng = ref.random_sample(dim, numel, name)
        theta, c = (rng.normal(size=dim).astype(sample.wide) for _ in range(2))
        tensors = ref.as_list(rng.normal(size=numel), ref.cut(numel, 4, rng), ref.FLOATS)
        outputs = [ref.Guarded(np.full(numel, np.nan, sample.wide), offset=k) for k in range(4)]
        direction, residual, *separate = ref.arrays(outputs)
        kernels.reconstruct_residual_(
            direction, residual, sample.array, theta, c, ref.arrays(tensors),
            scale=scale, path=path, threads=dim,
        )  # fmt: skip
        for out, coordinates in zip(separate, (theta, c), strict=True):
            kernels.reconstruct_([out], None, sample.array, coordinates, scale=scale, path=path)
        assert ref.same_bits(direction, separate[0])
        flat = np.concatenate([np.zeros(0), *(ref.decode(t.array) for t in tensors)])
        assert ref.same_bits(residual, flat.astype(sample.wide) - separate[1])
        for guarded in outputs + tensors:
            guarded.check()


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", SIZES)
def test_store_and_gram_block(kernels, path, name, numel):
    """Rows stored first and multiplied later are those that gram_append stores and multiplies."""
    rows = 9
    rng = np.random.default_rng(numel)
    wide = np.float64 if name == "float64" else np.float32
    stores = [
        ref.Guarded(np.full((rows, numel), 7, ref.STORAGE[name]), offset=2, gap=3) for _ in range(2)
    ]
    scales = [None, None]
    if name in ref.QUANTIZED:
        scales = [np.full((rows, -(-numel // 256)), 7, np.float32) for _ in range(2)]
    anchor = rng.normal(size=numel).astype(wide)
    products = np.zeros((rows, rows))
    for index in range(rows):
        params = ref.as_list(rng.normal(size=numel), ref.cut(numel, 3, rng), ref.FLOATS)
        products[index, : index + 1] = kernels.gram_append_(
            stores[0].array, index, ref.arrays(params), anchor, scale=scales[0], path=path
        )
        kernels.store_snapshot_(
            stores[1].array,
            index,
            ref.arrays(params),
            anchor,
            scale=scales[1],
            path=path,
            threads=2,
        )
        assert ref.same_bits(stores[0].array, stores[1].array)
        stores[1].check()
    if name in ref.QUANTIZED:
        assert ref.same_bits(*scales)
    for index, count in ((0, 9), (0, 1), (4, 5), (3, 2), (8, 1)):
        block = kernels.gram_block(
            stores[1].array, index, count, scale=scales[1], path=path, threads=count
        )
        lower = np.tril_indices(count, index, index + count)
        assert ref.same_bits(block[lower], products[index : index + count, : index + count][lower])
    assert ref.same_bits(stores[0].array, stores[1].array)


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("other", ["avx512", "avx512_emulated"])
def test_avx2_and_avx512_agree_to_the_bit(kernels, name, other):
    if not {"avx2", other} <= set(kernels.paths()):
        pytest.skip(f"this processor cannot run both avx2 and {other}")
    sample, scale, rng = ref.random_sample(6, 2 * ref.TILE + 333, name)
    lists = [[rng.normal(size=sample.array.shape[1]).astype(np.float32)] for _ in range(3)]
    theta = rng.normal(size=6).astype(sample.wide)
    found = []
    for path in ("avx2", other):
        out = np.zeros((2, sample.array.shape[1]), sample.wide)
        kernels.reconstruct_residual_(
            out[0], out[1], sample.array, theta, -theta, lists[0], scale=scale, path=path
        )
        found.append((out, kernels.project_many(sample.array, lists, scale=scale, path=path)))
    assert all(ref.same_bits(one, two) for one, two in zip(*found, strict=True))


def test_bad_arguments(kernels):
    basis, vector = np.zeros((2, 5), np.float32), np.zeros(5, np.float32)
    with pytest.raises(ValueError, match="lists: expected at least one list"):
        kernels.project_many(basis, [])
    with pytest.raises(ValueError, match=r"lists\[1\]: expected 5 elements in all, got 0"):
        kernels.project_many(basis, [[vector], []])
    theta = np.ones(2, np.float32)
    with pytest.raises(ValueError, match=r"coordinates: expected shape \(2,\)"):
        kernels.reconstruct_residual_(vector, vector, basis, theta, vector, [vector])
    with pytest.raises(ValueError, match="index and count: expected rows of 2, got 1 and 2"):
        kernels.gram_block(basis, 1, 2)
