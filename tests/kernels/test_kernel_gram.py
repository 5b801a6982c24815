"""gram and gram_append_: products of stored rows, and how a row is stored."""

import kernel_reference as ref
import numpy as np
import pytest
from kernel_paths import EMULATED, MMA


def stored_values(rows: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    values = ref.decode(rows)
    if scale is not None:
        factors = np.repeat(scale.astype(np.float64), 256, axis=1)[:, : values.shape[1]]
        values = values * factors
    return values


def blocks(rows: int, numel: int) -> np.ndarray:
    return np.full((rows, -(-numel // 256)), np.nan, np.float32)


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", ref.SIZES)
def test_gram_exactly(kernels, mma_path, name, numel):
    for rows in [*ref.dims(numel), 81 if numel < ref.TILE else 50]:
        sample = ref.Sample(rows, numel, name)
        gram = kernels.gram(sample.array, scale=sample.scale, path=mma_path)
        expected = sample.values @ sample.values.T
        np.testing.assert_array_equal(gram, expected, err_msg=f"T = {rows}")


@pytest.mark.parametrize("name", ref.FORMATS)
def test_gram_rounding_error_and_bits(kernels, mma_path, name):
    """Sums over a tile of at most 1,024 elements, in two lanes at least: 512 rounded steps."""
    rows, numel = 50, 20_000
    rng = np.random.default_rng(0)
    snapshots = ref.encode(rng.normal(size=(rows, numel)) * 3, name)
    scale = None
    if name in ref.QUANTIZED:
        scale = rng.uniform(1e-3, 1e-2, (rows, -(-numel // 256))).astype(np.float32)
    values = stored_values(snapshots, scale)
    gram = kernels.gram(snapshots, scale=scale, path=mma_path)
    unit = ref.UNIT["float64" if name == "float64" else "float32"]
    bound = (512 + 8) * unit * (np.abs(values) @ np.abs(values).T)
    assert (np.abs(gram - values @ values.T) <= bound).all()
    assert ref.same_bits(gram, np.ascontiguousarray(gram.T))
    for threads in (2, 3, 64):
        again = kernels.gram(snapshots, scale=scale, path=mma_path, threads=threads)
        assert ref.same_bits(gram, again)


def test_gram_of_many_rows(kernels, mma_path):
    """Tiles become narrower, chunks fewer, and rows are cut into strips of 128."""
    for rows, name in ((127, "bfloat16"), (128, "int8"), (129, "bfloat16"), (300, "int8")):
        sample = ref.Sample(rows, 3000, name)
        expected = sample.values @ sample.values.T
        for threads in (1, 2, 7):
            gram = kernels.gram(sample.array, scale=sample.scale, path=mma_path, threads=threads)
            np.testing.assert_array_equal(gram, expected, err_msg=f"T = {rows}")


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn"])
def test_gram_propagates_nan(kernels, mma_path, name):
    sample = ref.Sample(50, 1500, name)
    sample.array[:, 1400] = ref.encode(np.zeros(50), name)
    sample.array[4, 1400] = ref.encode(np.array([np.nan]), name)[0]
    gram = kernels.gram(sample.array, scale=sample.scale, path=mma_path)
    expected = np.zeros((50, 50), dtype=bool)
    expected[4], expected[:, 4] = True, True
    np.testing.assert_array_equal(np.isnan(gram), expected)


@pytest.mark.parametrize("rows", [9, 50, 81])
def test_gram_keeps_infinity(kernels, mma_path, rows):
    """In one of several chunks, and with an infinity or a zero of another row at the same place."""
    sample = ref.Sample(rows, 5000, "float32")
    for row, number in ((4, np.inf), (7, -np.inf), (5, 0), (rows - 1, 1)):
        sample.array[row, 2500] = sample.values[row, 2500] = number
    with np.errstate(invalid="ignore"):
        expected = sample.values @ sample.values.T
    assert np.isnan(expected[4, 5])
    assert expected[4, 7] == -np.inf
    gram = kernels.gram(sample.array, path=mma_path)
    np.testing.assert_array_equal(gram, expected)


def test_gram_of_float32_of_any_size(kernels, mma_path):
    """Few numbers: errors of single products show, not those of long sums."""
    numel = 24
    rng = np.random.default_rng(2)
    values = rng.normal(size=(50, numel)) * 2.0 ** np.linspace(-148, 60, 50)[:, None]
    values[7] = 1 + 2.0**-7 - 2.0**-23  # all bits but those of the first eight places
    values[20] = np.ldexp(rng.normal(size=numel), rng.integers(-60, 60, numel))
    values[30, 12:] = -values[30, :12]
    values[31, 12:] = values[31, :12]
    rows = ref.encode(values, "float32")
    values = ref.decode(rows)
    gram = kernels.gram(rows, path=mma_path)
    size = np.abs(values)
    # Below 2^-133 numbers have fewer terms, below 2^-149 sums have no bits.
    tiny = 2.0**-133 * (size.sum(1)[:, None] + size.sum(1)) + numel * 2.0**-149
    bound = (numel + 8) * ref.UNIT["float32"] * (size @ size.T) + tiny
    assert (np.abs(gram - values @ values.T) <= bound).all()


@pytest.mark.parametrize("bad", [np.inf, 3e38])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_gram_of_numbers_that_overflow(kernels, mma_path, name, bad):
    rows = ref.encode(np.array([[bad, 1.0], [bad, -1.0], [0.0, 2.0]] * 12), name)
    gram = kernels.gram(rows, path=mma_path)
    crossed = np.nan if np.isinf(bad) else 0
    expected = [[np.inf, np.inf, 2 + crossed], [np.inf, np.inf, crossed - 2], [2 + crossed] * 3]
    expected[2] = [2 + crossed, crossed - 2, 4]
    np.testing.assert_array_equal(gram, np.tile(expected, (12, 12)))


def test_gram_of_the_largest_int8(kernels, mma_path):
    """Products of 256 numbers are summed exactly, those of -128 too."""
    rows = np.full((18, 600), 127, np.int8)
    rows[::2] = -128
    scale = np.ones((18, 3), np.float32)
    values = rows.astype(np.float64)
    gram = kernels.gram(rows, scale=scale, path=mma_path)
    np.testing.assert_array_equal(gram, values @ values.T)


@pytest.mark.parametrize("name", MMA)
def test_squares_lose_no_more_than_others(kernels, name):
    """Long float32 sums of odd squares, which are 1 modulo 8, are rounded down more often."""
    if name not in kernels.paths():
        pytest.skip(f"this processor cannot run {name}")
    rows = ref.encode(np.random.default_rng(3).uniform(0.5, 2, (30, 30_000)), "bfloat16")
    squares = (ref.decode(rows) ** 2).sum(1)
    gram = kernels.gram(rows, path=name)
    np.testing.assert_allclose(gram.diagonal(), squares, rtol=2.0**-24)


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx"])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "float8_e4m3fn"])
def test_emulated_instructions_add_as_the_others(kernels, unit, name):
    if unit not in kernels.paths():
        pytest.skip(f"this processor cannot run {unit}")
    sample, scale, rng = ref.random_sample(50, 1000, name)
    sample.array[3, 7], sample.array[4, 7] = 1, 3  # subnormal in bfloat16
    real, emulated = (
        kernels.gram(sample.array, scale=scale, path=path) for path in (unit, unit + EMULATED)
    )
    assert ref.same_bits(real, emulated)
    coefficients, out = rng.normal(size=(19, 50)), np.zeros((2, 19, 1000), np.uint16)
    for to, path in zip(out, (unit, unit + EMULATED), strict=True):
        kernels.form_basis_(to, sample.array, coefficients, scale=scale, path=path)
    assert ref.same_bits(*out)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("numel", ref.SIZES)
def test_append_exactly(kernels, path, name, numel):
    capacity = 11
    sample = ref.Sample(capacity, numel, name)
    earlier = sample.array.copy()
    rng = np.random.default_rng(numel)
    for index in range(capacity):
        anchor = rng.integers(-9, 10, numel).astype(np.float64)
        params = ref.as_list(sample.values[index] + anchor, ref.cut(numel, 5, rng), ref.FLOATS)
        sample.array[index:] = ref.encode(np.full((capacity - index, numel), np.nan), name)
        rest = sample.array[index + 1 :].copy()
        origin = ref.Guarded(ref.encode(anchor, np.dtype(sample.wide).name), offset=1)
        products = kernels.gram_append_(
            sample.array, index, ref.arrays(params), origin.array, path=path
        )
        expected = sample.values[: index + 1] @ sample.values[index]
        np.testing.assert_array_equal(products, expected)
        assert ref.same_bits(sample.array[: index + 1], earlier[: index + 1])
        assert ref.same_bits(sample.array[index + 1 :], rest)
        sample.stored.check()
        for param in params:
            param.check()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_append_stores_rounded_rows_and_multiplies_those(kernels, path, name):
    rows, numel = 9, 3 * ref.TILE + 700
    rng = np.random.default_rng(5)
    wide = np.float64 if name == "float64" else np.float32
    snapshots = np.zeros((rows, numel), ref.STORAGE[name])
    scale = blocks(rows, numel) if name in ref.QUANTIZED else None
    anchor = rng.normal(size=numel).astype(wide)
    unit = ref.UNIT["float64" if name == "float64" else "float32"]
    for index in range(rows):
        params = ref.as_list(
            anchor + rng.normal(size=numel) / 8, ref.cut(numel, 9, rng), ref.FLOATS
        )
        flat = np.concatenate([ref.decode(param.array) for param in params]).astype(wide)
        products = kernels.gram_append_(
            snapshots, index, ref.arrays(params), anchor, scale=scale, path=path, threads=2
        )
        if name not in ref.QUANTIZED:
            assert ref.same_bits(snapshots[index], ref.encode(flat - anchor, name))
        used = None if scale is None else scale[: index + 1]
        values = stored_values(snapshots[: index + 1], used)
        bound = 560 * unit * (np.abs(values) @ np.abs(values[index]))
        assert (np.abs(products - values @ values[index]) <= bound).all()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_append_bits_do_not_depend_on_threads_or_on_the_cut(kernels, path, name):
    rows, numel = 6, 4 * ref.TILE + 33
    rng = np.random.default_rng(6)
    sample = ref.Sample(rows, numel, name)
    anchor = rng.normal(size=numel).astype(sample.wide)
    flat = rng.normal(size=numel).astype(np.float32)
    results = []
    for threads, pieces in ((1, 1), (2, 7), (3, 1500), (64, 2)):
        snapshots = sample.array.copy()
        scale = None if sample.scale is None else sample.scale.copy()
        params = ref.arrays(ref.as_list(flat, ref.cut(numel, pieces, rng), ["float32"]))
        products = kernels.gram_append_(
            snapshots, 4, params, anchor, scale=scale, path=path, threads=threads
        )
        results.append(
            (products.tobytes(), snapshots.tobytes(), None if scale is None else scale.tobytes())
        )
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name", ref.QUANTIZED)
@pytest.mark.parametrize("numel", [1, 16, 255, 257, 2 * ref.TILE + 40])
def test_quantized_rows_are_as_close_as_their_format(kernels, path, name, numel):
    """The largest number of each block of 256 is kept; the others round to the nearest step."""
    index, rows = 1, 3
    for seed in range(20):
        rng = np.random.default_rng([numel, seed])
        delta = (rng.normal(size=numel) * 10.0 ** rng.integers(-6, 7)).astype(np.float32)
        stored = ref.Guarded(np.full((rows, numel), 7, ref.STORAGE[name]), offset=1, gap=3)
        scale = ref.Guarded(blocks(rows, numel).ravel())
        factors = scale.array.reshape(rows, -1)
        params = ref.as_list(delta, ref.cut(numel, 3, rng), ["float32"])
        zeros = np.zeros(numel, np.float32)
        kernels.gram_append_(
            stored.array, index, ref.arrays(params), zeros, scale=factors, path=path
        )
        stored.check()
        scale.check()
        assert (stored.array[[0, 2]] == 7).all()
        assert np.isnan(factors[[0, 2]]).all()
        values = stored_values(stored.array[[index]], factors[[index]])[0]
        for start in range(0, numel, 256):
            block, kept = delta[start : start + 256].astype(np.float64), values[start : start + 256]
            largest = np.abs(block).max()
            step = largest / ref.LARGEST[name]
            np.testing.assert_allclose(factors[index, start // 256], step, rtol=2**-23)
            assert np.abs(kept).max() == pytest.approx(largest, rel=2**-22)
            half = step / 2 if name == "int8" else np.maximum(np.abs(block) * 2**-4, step * 2**-10)
            assert (np.abs(kept - block) <= half * (1 + 2**-12)).all()


@pytest.mark.parametrize("name", ref.QUANTIZED)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 1e-38, 1e-36, 3e38])
def test_quantized_rows_of_tiny_and_huge_numbers(kernels, path, name, largest):
    """A block too small for a normal scale may become zero, but never NaN."""
    delta = np.zeros(300, np.float32)
    delta[5], delta[6], delta[280] = largest, -largest / 2, 1.0
    rows, scale = np.zeros((1, 300), ref.STORAGE[name]), blocks(1, 300)
    zeros = np.zeros(300, np.float32)
    kernels.gram_append_(rows, 0, [delta], zeros, scale=scale, path=path)
    values = stored_values(rows, scale)[0]
    assert (np.abs(values - delta)[:256] <= largest / 100 + 1e-35).all()
    assert values[280] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_append_propagates_nan_and_inf(kernels, path, name, bad):
    """A snapshot that is not finite shows in all of its products, in none of the others."""
    numel = ref.TILE + 300
    sample = ref.Sample(3, numel, name)
    delta = np.ones(numel, np.float32)
    delta[ref.TILE + 10] = bad
    zeros = np.zeros(numel, sample.wide)
    products = kernels.gram_append_(sample.array, 2, [delta], zeros, scale=sample.scale, path=path)
    assert not np.isfinite(products[2])
    rest = kernels.gram(
        sample.array[:2], scale=None if sample.scale is None else sample.scale[:2], path=path
    )
    assert np.isfinite(rest).all()
