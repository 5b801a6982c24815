"""form_basis: combinations of stored rows, accumulated in float64."""

import kernel_reference as ref
import numpy as np
import pytest
from kernel_paths import MMA


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", ref.SIZES)
def test_exact_combinations(kernels, mma_path, name, numel):
    rng = np.random.default_rng(numel)
    shapes = [(1, 1), (2, 7), (5, 5), (9, 6), (12, 13), (81, 40), (3, 1024)]
    for k, (snapshots, dim) in enumerate(shapes):
        if snapshots * dim > 1000 and numel > 257:
            continue
        sample = ref.Sample(snapshots, numel, name)
        coefficients = rng.integers(-2, 3, (dim, snapshots)).astype(np.float64)
        expected = coefficients @ sample.values
        for target in (ref.FLOATS[k % 4], ref.FLOATS[(k + 2) % 4]):
            out = ref.Guarded(ref.encode(np.full(dim * numel, np.nan), target), offset=5)
            shaped = out.array.reshape(dim, numel)
            kernels.form_basis_(
                shaped, sample.array, coefficients, scale=sample.scale, path=mma_path
            )
            np.testing.assert_array_equal(
                ref.decode(shaped), ref.decode(ref.encode(expected, target))
            )
            out.check()


@pytest.mark.parametrize("target", ref.FLOATS)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_one_rounding_and_bits(kernels, mma_path, name, target):
    """float64 sums, rounded once: the nearest number unless the sum is within its own error of a
    tie. Where bfloat16 is combined by matrix instructions, sums of the terms of coefficients are
    float32. The bits depend on no number of threads."""
    snapshots, dim, numel = 17, 8, 2 * ref.TILE + 70
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(snapshots, numel)) * (20 if name in ref.QUANTIZED else 1)
    stored = ref.encode(rows, name)
    rows, scale = ref.decode(stored), None
    if name in ref.QUANTIZED:
        scale = (2.0 ** rng.integers(-9, 0, (snapshots, -(-numel // 256)))).astype(np.float32)
        rows = rows * np.repeat(scale.astype(np.float64), 256, axis=1)[:, :numel]
    coefficients = rng.normal(size=(dim, snapshots))
    out = np.zeros((dim, numel), ref.encode(np.zeros(0), target).dtype)
    kernels.form_basis_(out, stored, coefficients, scale=scale, path=mma_path)
    expected = coefficients @ rows
    sums = "float32" if mma_path in MMA and name == target == "bfloat16" else "float64"
    error = 3 * snapshots * ref.UNIT[sums] * (np.abs(coefficients) @ np.abs(rows))
    bound = error + ref.UNIT[target] * (np.abs(expected) + error) + ref.TINY[target]
    assert (np.abs(ref.decode(out) - expected) <= bound).all()
    for threads in (2, 5, 64):
        again = np.zeros_like(out)
        kernels.form_basis_(
            again, stored, coefficients, scale=scale, path=mma_path, threads=threads
        )
        assert ref.same_bits(out, again)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn"])
def test_a_zero_coefficient_does_not_hide_nan(kernels, mma_path, name):
    sample = ref.Sample(9, 700, name)
    sample.array[2, 650] = ref.encode(np.array([np.nan]), name)[0]
    out = np.zeros((7, 700), np.float32)
    kernels.form_basis_(out, sample.array, np.zeros((7, 9)), scale=sample.scale, path=mma_path)
    expected = np.zeros((7, 700), dtype=bool)
    expected[:, 650] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


def test_sums_need_float64(kernels, mma_path):
    """Large terms that cancel leave a small one, which float32 sums would lose."""
    rows = np.full((3, 40), 1.0, np.float32)
    out = np.zeros((1, 40), np.float32)
    kernels.form_basis_(out, rows, np.array([[2.0**40, 0.75, -(2.0**40)]]), path=mma_path)
    assert (out == 0.75).all()


def test_sums_that_float32_cannot_hold(kernels, mma_path):
    """Infinite snapshots give what BLAS gives; terms past the largest float32 may cancel."""
    rows = np.ones((8, 70))
    rows[0, 5], rows[1, 6], rows[2, 6] = np.inf, -np.inf, np.inf
    rows[:, 40:] = 3e38
    coefficients = np.array([[0.3, 0, 0, 0.7] + [0] * 4, [3, 2, 1, -5.5] + [0] * 4])
    out = np.zeros((2, 70), np.uint16)
    stored = ref.encode(rows, "bfloat16")
    kernels.form_basis_(out, stored, coefficients, path=mma_path)
    with np.errstate(invalid="ignore"):
        expected = np.stack([(c[:, None] * ref.decode(stored)).sum(0) for c in coefficients])
    np.testing.assert_array_equal(ref.decode(out), ref.decode(ref.encode(expected, "bfloat16")))
    assert np.isfinite(expected[0, 40:]).all() and np.isinf(expected[0, 5])


@pytest.mark.parametrize("size", [2.0**-80, 2.0**80])
def test_coefficients_far_from_one(kernels, mma_path, size):
    rng = np.random.default_rng(4)
    stored = ref.encode(rng.normal(size=(9, 300)) / 1024, "bfloat16")
    coefficients = rng.normal(size=(3, 9)) * size
    out = np.zeros((3, 300), np.uint16)
    kernels.form_basis_(out, stored, coefficients, path=mma_path)
    expected = coefficients @ ref.decode(stored)
    np.testing.assert_allclose(ref.decode(out), expected, rtol=2.0**-8)
