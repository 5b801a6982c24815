"""Every kernel on arrays that fill their allocations to the last byte: what is read or written past
one of them lies in a red zone of AddressSanitizer (sanitize.sh)."""

import kernel_reference as ref
import numpy as np
import pytest


class Exact:
    """The arrays of one sample, each in an allocation of its own size."""

    def __init__(self, rows: int, numel: int, name: str):
        sample = ref.Sample(rows, numel, name)
        self.rows = sample.array.copy()
        self.scale = None if sample.scale is None else sample.scale.copy()
        self.values, self.vector, self.wide = sample.values, sample.vector, sample.wide
        self.theta = sample.theta.copy()
        self.sizes = ref.cut(numel, 6, np.random.default_rng(numel))

    def tensors(self, values: np.ndarray) -> list[np.ndarray]:
        parts = np.split(values, np.cumsum(self.sizes)[:-1])
        return [ref.encode(part, ref.FLOATS[i % 4]).copy() for i, part in enumerate(parts)]


@pytest.fixture(params=[1, 4, 6])
def rows(request) -> int:
    return request.param


@pytest.mark.parametrize("name", ref.FORMATS)
def test_project(kernels, path, name, rows):
    for numel in ref.SIZES:
        exact = Exact(rows, numel, name)
        tensors = exact.tensors(exact.vector)
        sums = kernels.project(exact.rows, tensors, scale=exact.scale, path=path)
        np.testing.assert_array_equal(sums, exact.values @ exact.vector)
        zero = np.broadcast_to(np.zeros(1, np.float32), (numel,))
        sums = kernels.project(exact.rows, [zero], scale=exact.scale, path=path)
        np.testing.assert_array_equal(sums, np.zeros(rows))


@pytest.mark.parametrize("name", ref.FORMATS)
def test_reconstruct_and_trial(kernels, path, name, rows):
    for numel in ref.SIZES:
        exact = Exact(rows, numel, name)
        params = exact.tensors(np.full(numel, np.nan))
        origin = exact.vector.astype(exact.wide)
        kernels.reconstruct_(params, origin, exact.rows, exact.theta, scale=exact.scale, path=path)
        step = exact.theta @ exact.values
        expected = exact.tensors(exact.vector + step)
        for param, right in zip(params, expected, strict=True):
            np.testing.assert_array_equal(ref.decode(param), ref.decode(right))
        direction = ref.encode(step, np.dtype(exact.wide).name)
        kernels.trial_(params, origin, direction, 1.0, path=path)
        for param, right in zip(params, expected, strict=True):
            np.testing.assert_array_equal(ref.decode(param), ref.decode(right))


@pytest.mark.parametrize("name", ref.FORMATS)
def test_gram_and_append(kernels, path, name, rows):
    for numel in ref.SIZES:
        exact = Exact(rows, numel, name)
        gram = kernels.gram(exact.rows, scale=exact.scale, path=path)
        np.testing.assert_array_equal(gram, exact.values @ exact.values.T)
        tensors, zeros = exact.tensors(exact.values[-1]), np.zeros(numel, exact.wide)
        products = kernels.gram_append_(
            exact.rows, rows - 1, tensors, zeros, scale=exact.scale, path=path
        )
        if name in ref.QUANTIZED:  # stored with a scale of its own: multiply what was stored
            factors = np.repeat(exact.scale, 256, axis=1)[:, :numel].astype(np.float64)
            values = ref.decode(exact.rows) * factors
            bound = 600 * 2.0**-24 * (np.abs(values) @ np.abs(values[-1]))
            assert (np.abs(products - values @ values[-1]) <= bound).all()
        else:
            np.testing.assert_array_equal(products, gram[-1])


@pytest.mark.parametrize("name", ref.FORMATS)
def test_form_basis(kernels, path, name, rows):
    for numel in ref.SIZES:
        exact = Exact(rows, numel, name)
        coefficients = np.arange(7.0 * rows).reshape(7, rows) - 9
        for target in ref.FLOATS:
            out = np.zeros((7, numel), ref.STORAGE[target])
            kernels.form_basis_(out, exact.rows, coefficients, scale=exact.scale, path=path)
            expected = ref.encode(coefficients @ exact.values, target)
            np.testing.assert_array_equal(ref.decode(out), ref.decode(expected))
