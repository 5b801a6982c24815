"""project: P^T g for every path, format and size."""

import kernel_reference as ref
import numpy as np
import pytest


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", ref.SIZES)
def test_exact_sums(kernels, path, name, numel):
    for dim in ref.dims(numel):
        sample = ref.Sample(dim, numel, name)
        tensors = ref.as_list(
            sample.vector, ref.cut(numel, 7, np.random.default_rng(dim)), ref.FLOATS
        )
        sums = kernels.project(sample.array, ref.arrays(tensors), scale=sample.scale, path=path)
        assert sums.dtype == np.float64
        np.testing.assert_array_equal(sums, sample.values @ sample.vector, err_msg=f"d = {dim}")


@pytest.mark.parametrize("name", ref.FORMATS)
def test_rounding_error_bound(kernels, path, name):
    """Each of a tile's 16 (float64: 8) sums takes 256 (512) rounded steps, scales take 32 more."""
    numel, dim = 5 * ref.TILE + 1234, 11
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(dim, numel)) * 10.0 ** rng.integers(-3, 4, (dim, 1))
    scale = None
    if name in ref.QUANTIZED:
        rows = rng.normal(size=(dim, numel)) * 30
        scale = rng.uniform(1e-3, 1e-2, (dim, -(-numel // 256))).astype(np.float32)
    stored = ref.encode(rows, name)
    rows = ref.decode(stored)
    if scale is not None:
        rows = rows * np.repeat(scale.astype(np.float64), 256, axis=1)[:, :numel]
    tensors = ref.as_list(rng.normal(size=numel), [5000, 1, numel - 5001], ref.FLOATS)
    vector = np.concatenate([ref.decode(t.array) for t in tensors])
    unit = ref.UNIT["float64" if name == "float64" else "float32"]
    sums = kernels.project(stored, ref.arrays(tensors), scale=scale, path=path)
    bound = (520 if name == "float64" else 292) * unit * (np.abs(rows) @ np.abs(vector))
    assert (np.abs(sums - rows @ vector) <= bound).all()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_a_gradient_counts_with_all_its_digits(kernels, path, name):
    """One number in a row, so that nothing cancels: tensor cores take float32 in two parts."""
    rng = np.random.default_rng(1)
    rows = ref.encode(rng.integers(1, 90, (13, 1)).astype(np.float64), name)
    scale = np.full((13, 1), 0.25, np.float32) if name in ref.QUANTIZED else None
    exact = ref.decode(rows)[:, 0] * (1 if scale is None else 0.25)
    one = np.float32(1)
    for value in (*rng.normal(size=20), np.nextafter(one, 2), np.nextafter(one, 0), 1e-30, 1e36):
        vector = np.array([value, 0, 0], np.float32)
        wide = np.concatenate([rows, np.zeros((13, 2), rows.dtype)], axis=1)
        sums = kernels.project(wide, [vector], scale=scale, path=path)
        np.testing.assert_allclose(sums, exact * float(vector[0]), rtol=2.0**-21)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_infinity_in_the_basis(kernels, path, name):
    """It stays one, also where a gradient has no lower part."""
    rows = ref.encode(np.array([[np.inf, 2.0], [1.0, -np.inf]]), name)
    for vector in ([1.0, 3.0], [1.1, -0.3]):
        sums = kernels.project(rows, [np.array(vector, np.float32)], path=path)
        np.testing.assert_array_equal(sums, [np.inf, -np.sign(vector[1]) * np.inf])


@pytest.mark.parametrize("name", ref.FORMATS)
def test_bits_do_not_depend_on_threads_or_on_the_cut(kernels, path, name):
    numel, dim = 9 * ref.TILE + 77, 7
    sample, scale, rng = ref.random_sample(dim, numel, name)
    basis = sample.array
    vector = rng.normal(size=numel).astype(np.float32)
    once = kernels.project(basis, [vector], scale=scale, path=path)
    for threads, pieces in ((1, 50), (2, 1), (3, 3000), (16, 2), (64, 7)):
        tensors = ref.arrays(ref.as_list(vector, ref.cut(numel, pieces, rng), ["float32"]))
        again = kernels.project(basis, tensors, scale=scale, path=path, threads=threads)
        assert ref.same_bits(once, again), (threads, pieces)


def test_every_tensor_of_5000(kernels, path):
    sizes = ref.cut(40_000, 5000, np.random.default_rng(2))
    sample = ref.Sample(3, 40_000, "float32")
    tensors = ref.as_list(sample.vector, sizes, ref.FLOATS)
    sums = kernels.project(sample.array, ref.arrays(tensors), path=path, threads=2)
    np.testing.assert_array_equal(sums, sample.values @ sample.vector)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_chunks_of_several_tiles(kernels, path, name):
    """Past 1,024 tiles a chunk has more than one of them; of the emulated GPU past six of 2,048."""
    numel = kernels.TILE * (kernels.MAX_CHUNKS + 5) + 99
    assert kernels.make_plan(numel).tiles_per_chunk == 2
    numel = 30_000 if path == "cuda" else numel
    sample = ref.Sample(1, numel, name)
    tensors = ref.arrays(ref.as_list(sample.vector, [numel // 3, numel - numel // 3], ["float32"]))
    sums = kernels.project(sample.array, tensors, scale=sample.scale, path=path, threads=2)
    np.testing.assert_array_equal(sums, sample.values @ sample.vector)


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("other", ["avx512", "avx512_emulated"])
def test_avx2_and_avx512_agree_to_the_bit(kernels, name, other):
    if not {"avx2", other} <= set(kernels.paths()):
        pytest.skip(f"this processor cannot run both avx2 and {other}")
    for numel in (1, 31, 700, 2 * ref.TILE + 333):
        sample, scale, rng = ref.random_sample(9, numel, name)
        basis = sample.array
        tensors = ref.arrays(
            ref.as_list(rng.normal(size=numel), ref.cut(numel, 5, rng), ref.FLOATS)
        )
        one, two = (
            kernels.project(basis, tensors, scale=scale, path=which) for which in ("avx2", other)
        )
        assert ref.same_bits(one, two), numel


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_a_zero_in_the_basis_does_not_hide_nan_or_inf(kernels, path, name, bad):
    for numel, where in ((1, 0), (300, 299), (300, 5), (2 * ref.TILE + 3, ref.TILE)):
        sample = ref.Sample(6, numel, name)
        sample.array[2] = 0
        vector = sample.vector.copy()
        vector[where] = bad
        tensors = ref.arrays(ref.as_list(vector, [numel // 2, numel - numel // 2], ref.FLOATS))
        sums = kernels.project(sample.array, tensors, scale=sample.scale, path=path)
        with np.errstate(invalid="ignore"):
            expected = sample.values.copy()
            expected[2] = 0
            expected = (expected * vector).sum(axis=1)
        np.testing.assert_array_equal(sums, expected)
        assert np.isnan(sums[2])


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn"])
def test_nan_in_the_basis_meets_a_zero_gradient(kernels, path, name):
    sample = ref.Sample(5, 2 * ref.TILE + 40, name)
    sample.array[3, ref.TILE + 7] = ref.encode(np.array([np.nan]), name)[0]
    zeros = np.broadcast_to(np.float32(0), sample.array.shape[1:])
    sums = kernels.project(sample.array, [zeros], scale=sample.scale, path=path)
    np.testing.assert_array_equal(np.isnan(sums), [False, False, False, True, False])


@pytest.mark.parametrize("name", ref.FLOATS)
def test_constant_entries(kernels, path, name):
    """A gradient that is None is read as a stride-0 zero; any other constant works as well."""
    first, constant, zeros = 100, 700, ref.TILE
    sample = ref.Sample(4, first + constant + zeros, "bfloat16")
    two = ref.Guarded(ref.encode(np.array([2.0]), name)).array
    tensors = [
        sample.vector[:first].astype(np.float32),
        np.broadcast_to(two, (4, 25, 7)),
        np.broadcast_to(two, (0, 9)),
        np.broadcast_to(np.zeros((), two.dtype), (zeros,)),
    ]
    vector = np.concatenate([sample.vector[:first], np.full(constant, 2.0), np.zeros(zeros)])
    sums = kernels.project(sample.array, tensors, path=path)
    np.testing.assert_array_equal(sums, sample.values @ vector)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_reads_nothing_outside_and_writes_nothing(kernels, path, name):
    """Every array lies among NaN; one that was read would show, as would a write."""
    for numel in ref.SIZES:
        sample = ref.Sample(5, numel, name)
        tensors = ref.as_list(
            sample.vector, ref.cut(numel, 4, np.random.default_rng(numel)), ref.FLOATS
        )
        before = sample.stored.buffer.copy()
        sums = kernels.project(sample.array, ref.arrays(tensors), scale=sample.scale, path=path)
        assert np.isfinite(sums).all(), numel
        assert ref.same_bits(before, sample.stored.buffer)
        for tensor in tensors:
            tensor.check()


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("name", ref.FORMATS)
def test_misaligned_rows_and_gradients(kernels, path, name, offset):
    numel, dim = 400, 5
    sample = ref.Sample(dim, numel, name)
    moved = ref.Guarded(sample.array, offset=offset, gap=offset)
    tensors = [ref.Guarded(sample.vector.astype(np.float32), offset=offset)]
    sums = kernels.project(moved.array, ref.arrays(tensors), scale=sample.scale, path=path)
    np.testing.assert_array_equal(sums, sample.values @ sample.vector)
