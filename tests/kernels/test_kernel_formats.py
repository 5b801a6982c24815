"""Storage formats: every code is read, and every tie, subnormal, NaN and overflow is rounded, as
the definition says; by the scalar conversions and by the vectors of every path."""

import kernel_reference as ref
import numpy as np
import pytest

SMALL = ["bfloat16", "float16", "int8", "float8_e4m3fn"]


def all_codes(name: str) -> np.ndarray:
    size = np.dtype(ref.STORAGE[name]).itemsize
    codes = np.arange(2 ** (8 * size), dtype=f"u{size}")
    return codes.view(ref.STORAGE[name])


def same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal, signs of zeros included; NaN equals NaN."""
    np.testing.assert_array_equal(actual, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[number]), np.signbit(expected[number]))


def hard_cases(name: str) -> np.ndarray:
    """Values of the format, their midpoints, and the float32 neighbours of both; specials."""
    if name == "int8":
        values = np.arange(-127.5, 128, 0.5)
    else:
        table = ref.magnitudes(name)
        values = np.concatenate([table, (table[:-1] + table[1:]) / 2])
        values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
        limit = np.float32(np.inf)
        cases = [near, np.nextafter(near, limit), np.nextafter(near, -limit)]
    if name == "int8":
        cases = [case[np.abs(case) <= 127] for case in cases]
    if name == "float8_e4m3fn":
        cases = [case[np.abs(case) <= 464] for case in cases]
    if name in ref.FLOATS:
        rng = np.random.default_rng(0)
        cases.append(rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32))
        cases.append(np.array([np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32))
    if name != "int8":
        cases.append(np.array([np.nan, -np.nan], np.float32))
    return np.concatenate(cases)


@pytest.mark.parametrize("name", SMALL)
def test_scalar_widen(kernels, name):
    codes = all_codes(name)
    same_numbers(kernels.widen(codes), ref.decode(codes))


@pytest.mark.parametrize("name", SMALL)
def test_scalar_narrow(kernels, name):
    cases = hard_cases(name)
    expected = ref.encode(cases, name)
    codes = kernels.narrow(cases, name).astype(f"u{expected.itemsize}").view(expected.dtype)
    same_numbers(ref.decode(codes), ref.decode(expected))


@pytest.mark.parametrize("name", ref.FLOATS)
def test_reading_a_tensor(kernels, path, name):
    """gram_append_ into float32 rows stores list - 0: the list, widened."""
    codes = all_codes(name) if name in SMALL else ref.encode(hard_cases("float16"), name)
    rows = np.zeros((1, codes.size), np.float32)
    kernels.gram_append_(rows, 0, [codes], np.zeros(codes.size, np.float32), path=path)
    same_numbers(ref.decode(rows[0]), ref.decode(codes))


@pytest.mark.parametrize("name", SMALL)
def test_reading_rows(kernels, path, name):
    """form_basis with the coefficient 1 and reconstruct with theta = 1 give the row, widened."""
    codes = all_codes(name)
    scale = None
    if name in ref.QUANTIZED:
        scale = np.full((1, -(-codes.size // 256)), 0.125, np.float32)
    expected = ref.decode(codes) * (0.125 if name in ref.QUANTIZED else 1)
    formed = np.zeros((1, codes.size))
    kernels.form_basis_(formed, codes[None], np.ones((1, 1)), scale=scale, path=path)
    np.testing.assert_array_equal(formed[0], expected)
    combined = np.zeros(codes.size)
    one = np.ones(1, np.float32)
    kernels.reconstruct_([combined], None, codes[None], one, scale=scale, path=path)
    np.testing.assert_array_equal(combined, expected)


@pytest.mark.parametrize("name", SMALL)
def test_products_of_rows(kernels, path, name):
    """project with one nonzero gradient at a time reads single codes, gram squares them."""
    codes = all_codes(name)[:: 257 if name in ref.LAYOUT and name != "float8_e4m3fn" else 1]
    finite = codes[np.isfinite(ref.decode(codes))]
    values = ref.decode(finite)
    scale = np.ones((1, -(-finite.size // 256)), np.float32) if name in ref.QUANTIZED else None
    for i in range(finite.size):
        unit = np.zeros(finite.size, np.float32)
        unit[i] = 1
        assert kernels.project(finite[None], [unit], scale=scale, path=path)[0] == values[i]
    columns = np.ascontiguousarray(finite[:, None])
    scale = np.ones((finite.size, 1), np.float32) if name in ref.QUANTIZED else None
    moderate = np.abs(values) < 1e18  # products of larger ones overflow float32
    gram = kernels.gram(columns, scale=scale, path=path)[np.ix_(moderate, moderate)]
    outer = np.multiply.outer(values[moderate], values[moderate])
    np.testing.assert_allclose(gram, outer, rtol=2**-23, atol=2**-149)


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("name", ref.FLOATS)
def test_writing_a_tensor(kernels, path, name, wide):
    """trial_ with a direction of -0 writes the point, rounded once."""
    cases = hard_cases(name if name in ref.LAYOUT else "float16")
    point = ref.encode(cases, np.dtype(wide).name)
    params = np.zeros(point.size, ref.STORAGE[name])
    kernels.trial_([params], point, np.full(point.size, -0.0, wide), 1.0, path=path)
    same_numbers(ref.decode(params), ref.decode(ref.encode(point, name)))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_float64_is_rounded_once(kernels, path, name):
    """The smallest step off a tie decides, though float32 cannot hold it."""
    table = ref.magnitudes(name)
    ties = (table[:-1] + table[1:]) / 2
    cases = np.concatenate([np.nextafter(ties, 0), ties, np.nextafter(ties, np.inf)])
    cases = np.concatenate(
        [cases, -cases, [1e300, -1e300, 1e39, 1e-300, -1e-45, 1.7e-45, np.inf, np.nan, 0.0, -0.0]]
    )
    params = np.zeros(cases.size, ref.STORAGE[name])
    kernels.trial_([params], cases, np.full(cases.size, -0.0), 1.0, path=path)
    same_numbers(ref.decode(params), ref.decode(ref.encode(cases, name)))


@pytest.mark.parametrize("name", ref.QUANTIZED)
def test_narrowing_rows(kernels, path, name):
    """A block whose largest number is that of the format is stored with the scale 1."""
    largest = 127.0 if name == "int8" else 448.0
    cases = hard_cases(name)
    cases = cases[np.abs(cases) <= largest]
    cases = cases[: cases.size // 255 * 255].reshape(-1, 255)
    delta = np.concatenate([np.full((len(cases), 1), largest, np.float32), cases], axis=1).ravel()
    rows = np.zeros((1, delta.size), ref.STORAGE[name])
    scale = np.zeros((1, delta.size // 256), np.float32)
    zeros = np.zeros(delta.size, np.float32)
    kernels.gram_append_(rows, 0, [delta], zeros, scale=scale, path=path)
    assert (scale == 1).all()
    assert ref.same_bits(rows[0], ref.encode(delta, name))
