"""reconstruct_ and trial_: what writes into a list of tensors."""

import kernel_reference as ref
import numpy as np
import pytest


def outputs(sizes: list[int], names: list[str]) -> list[ref.Guarded]:
    """Tensors to be written, full of NaN among NaN."""
    return ref.as_list(np.full(sum(sizes), np.nan), sizes, names)


def check_written(
    params: list[ref.Guarded], sizes: list[int], expected: np.ndarray, names: list[str]
):
    for param, right in zip(params, ref.as_list(expected, sizes, names), strict=True):
        np.testing.assert_array_equal(ref.decode(param.array), ref.decode(right.array))
        param.check()


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("numel", ref.SIZES)
def test_reconstruct_exactly(kernels, path, name, numel):
    for dim in ref.dims(numel):
        sample = ref.Sample(dim, numel, name)
        origin = ref.Guarded(sample.vector.astype(sample.wide), offset=1)
        theta = ref.Guarded(sample.theta, offset=3)
        sizes = ref.cut(numel, 7, np.random.default_rng(dim))
        start = None if dim in (2, 5, 8) else origin.array  # None stands for zeros
        params = outputs(sizes, ref.FLOATS)
        before = sample.stored.buffer.copy()
        kernels.reconstruct_(
            ref.arrays(params), start, sample.array, theta.array, scale=sample.scale, path=path
        )
        expected = sample.theta @ sample.values + (0 if start is None else sample.vector)
        check_written(params, sizes, expected, ref.FLOATS)
        assert ref.same_bits(before, sample.stored.buffer)


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("target", ref.FLOATS)
def test_reconstruct_rounding_error_bound(kernels, path, name, target):
    """d rounded steps, one more for the origin, one to the tensor's format."""
    numel, dim = ref.TILE + 300, 13
    rng = np.random.default_rng(0)
    scale = None
    rows = rng.normal(size=(dim, numel)) * (30 if name in ref.QUANTIZED else 1)
    if name in ref.QUANTIZED:
        scale = rng.uniform(1e-3, 1e-2, (dim, -(-numel // 256))).astype(np.float32)
    stored = ref.encode(rows, name)
    rows = ref.decode(stored)
    if scale is not None:
        rows = rows * np.repeat(scale.astype(np.float64), 256, axis=1)[:, :numel]
    wide = np.float64 if name == "float64" else np.float32
    theta, origin = rng.normal(size=dim).astype(wide), rng.normal(size=numel).astype(wide)
    params = outputs([numel], [target])
    kernels.reconstruct_(ref.arrays(params), origin, stored, theta, scale=scale, path=path)
    unit = ref.UNIT["float64" if name == "float64" else "float32"]
    expected = origin + theta.astype(np.float64) @ rows
    bound = (2 * dim + 4) * unit * (np.abs(theta) @ np.abs(rows) + np.abs(origin))
    bound += ref.UNIT[target] * (np.abs(expected) + bound) + ref.TINY[target]
    assert (np.abs(ref.decode(params[0].array) - expected) <= bound).all()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_reconstruct_bits_do_not_depend_on_threads_or_on_the_cut(kernels, path, name):
    numel, dim = 5 * ref.TILE + 77, 6
    sample, scale, rng = ref.random_sample(dim, numel, name)
    basis = sample.array
    theta = rng.normal(size=dim).astype(sample.wide)
    origin = rng.normal(size=numel).astype(sample.wide)
    once = np.zeros(numel, np.float32)
    kernels.reconstruct_([once], origin, basis, theta, scale=scale, path=path)
    for threads, pieces in ((1, 3), (2, 1), (5, 900), (64, 2)):
        params = outputs(ref.cut(numel, pieces, rng), ["float32"])
        kernels.reconstruct_(
            ref.arrays(params), origin, basis, theta, scale=scale, path=path, threads=threads
        )
        assert ref.same_bits(np.concatenate(ref.arrays(params)), once), (threads, pieces)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn"])
def test_a_zero_coordinate_does_not_hide_nan(kernels, path, name):
    numel = ref.TILE + 60
    for where in (0, 300, ref.TILE + 59):
        sample = ref.Sample(6, numel, name)
        sample.array[:, where] = ref.encode(np.full(6, np.nan), name)
        params = outputs([numel], ["float32"])
        theta = np.zeros(6, sample.wide)
        kernels.reconstruct_(
            ref.arrays(params), None, sample.array, theta, scale=sample.scale, path=path
        )
        (bad,) = np.nonzero(np.isnan(params[0].array))
        assert bad.tolist() == [where]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ref.FLOATS)
def test_nan_and_inf_reach_the_tensors(kernels, path, target, bad):
    sample = ref.Sample(5, 500, "float32")
    sample.array[...] = np.abs(sample.array) + 1
    origin = np.zeros(500, np.float32)
    origin[7] = bad
    params = outputs([500], [target])
    kernels.reconstruct_(
        ref.arrays(params), origin, sample.array, np.zeros(5, np.float32), path=path
    )
    expected = np.zeros(500)
    expected[7] = bad
    np.testing.assert_array_equal(ref.decode(params[0].array), expected)
    theta = np.array([1, 0, bad, 1, 1], np.float32)
    kernels.reconstruct_(ref.arrays(params), None, sample.array, theta, path=path)
    np.testing.assert_array_equal(ref.decode(params[0].array), np.full(500, bad))


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("numel", ref.SIZES)
def test_trial_exactly(kernels, path, wide, numel):
    rng = np.random.default_rng(numel)
    point = rng.integers(-50, 51, numel).astype(np.float64)
    direction = rng.integers(-20, 21, numel).astype(np.float64)
    for alpha in (0.0, 1.0, -0.5, 0.25):
        sizes = ref.cut(numel, 6, rng)
        params = outputs(sizes, ref.FLOATS)
        kernels.trial_(
            ref.arrays(params),
            ref.Guarded(ref.encode(point, wide), offset=3).array,
            ref.Guarded(ref.encode(direction, wide), offset=1).array,
            alpha,
            path=path,
        )
        check_written(params, sizes, point + alpha * direction, ref.FLOATS)


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("target", ref.FLOATS)
def test_trial_rounding_error_and_bits(kernels, path, wide, target):
    numel = 3 * ref.TILE + 100
    rng = np.random.default_rng(4)
    point, direction = (ref.encode(rng.normal(size=numel), wide) for _ in range(2))
    alpha = 0.375  # exact in float32
    params = outputs([numel], [target])
    kernels.trial_(ref.arrays(params), point, direction, alpha, path=path)
    expected = point.astype(np.float64) + alpha * direction.astype(np.float64)
    bound = 2 * ref.UNIT[wide] * (np.abs(point) + np.abs(alpha * direction))
    bound = bound + ref.UNIT[target] * (np.abs(expected) + bound) + ref.TINY[target]
    assert (np.abs(ref.decode(params[0].array) - expected) <= bound).all()
    for threads, pieces in ((2, 1), (3, 40), (64, 5)):
        again = outputs(ref.cut(numel, pieces, rng), [target])
        kernels.trial_(ref.arrays(again), point, direction, alpha, path=path, threads=threads)
        assert ref.same_bits(np.concatenate(ref.arrays(again)), params[0].array)


def test_trial_propagates_nan(kernels, path):
    numel = 1000
    point, direction = np.zeros(numel, np.float32), np.zeros(numel, np.float32)
    point[3], direction[999], direction[500] = np.nan, np.nan, np.inf
    params = outputs([numel], ["bfloat16"])
    kernels.trial_(ref.arrays(params), point, direction, 0.0, path=path)
    (bad,) = np.nonzero(np.isnan(ref.decode(params[0].array)))
    assert bad.tolist() == [3, 500, 999]


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_chunks_of_several_tiles(kernels, path, name):
    numel = kernels.TILE * (kernels.MAX_CHUNKS + 3) + 99
    sample = ref.Sample(1, numel, name)
    params = [np.empty(numel // 3, np.float32), np.empty(numel - numel // 3, np.float32)]
    theta = np.full(1, 2, np.float32)
    kernels.reconstruct_(params, None, sample.array, theta, scale=sample.scale, path=path)
    result = np.concatenate(params)
    np.testing.assert_array_equal(result, 2 * sample.values[0])
    kernels.trial_(params, result, result, 0.5, path=path, threads=2)
    np.testing.assert_array_equal(np.concatenate(params), 3 * sample.values[0])
