"""What the kernel tests compare with: storage formats decoded and encoded in float64 from their
definitions, and arrays that lie in poisoned memory."""

import functools

import numpy as np

# NumPy has no bfloat16 and no float8: their codes travel as unsigned integers.
STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "int8": np.int8,
    "float8_e4m3fn": np.uint8,
}
NAMES = {np.dtype(storage): name for name, storage in STORAGE.items()}
FORMATS = list(STORAGE)
FLOATS = ["float32", "bfloat16", "float16", "float64"]
QUANTIZED = ["int8", "float8_e4m3fn"]
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
# exponent bits, mantissa bits, all exponent bits set means Inf or NaN
LAYOUT = {"bfloat16": (8, 7, True), "float16": (5, 10, True), "float8_e4m3fn": (4, 3, False)}
# half a unit in the last place of 1.0, and half of the smallest positive number
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"float32": 2.0**-150, "float64": 0.0, "bfloat16": 2.0**-134, "float16": 2.0**-25}

TILE = 4096
BLOCK = 256
SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 3 * TILE + 2 * BLOCK + 33]


def dims(numel: int) -> list[int]:
    """Numbers of rows to try: every remainder of the row blocks, fewer where it would take long."""
    every = [1, 2, 3, 4, 5, 6, 7, 8, 9, 40]
    return {17: [*every, 1024], 257: [*every, 1024], SIZES[-1]: [3, 9]}.get(numel, every)


@functools.cache
def magnitudes(name: str) -> np.ndarray:
    """The value of every code without its sign bit, ascending, from the definition of the format.

    One more value follows the largest finite one, the one at which rounding up overflows.
    """
    exponent_bits, mantissa_bits, has_inf = LAYOUT[name]
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(2 ** (exponent_bits + mantissa_bits), dtype=np.int64)
    exponent, mantissa = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    fraction = mantissa / 2.0**mantissa_bits
    values = np.where(
        exponent == 0,
        np.ldexp(fraction, 1 - bias),
        np.ldexp(1 + fraction, (exponent - bias).astype(np.int32)),
    )
    last = (2**exponent_bits - 1) << mantissa_bits if has_inf else codes[-1]
    return values[: last + 1]


def decode(array: np.ndarray) -> np.ndarray:
    """Stored numbers as float64; every NaN is the quiet one."""
    name = NAMES[array.dtype]
    if name not in ("bfloat16", "float8_e4m3fn"):
        with np.errstate(invalid="ignore"):
            wide = array.astype(np.float64)
        return np.where(np.isnan(wide), np.nan, wide)
    bits = sum(LAYOUT[name][:2])
    table = np.full(2**bits, np.nan)
    finite = magnitudes(name)[:-1]
    table[: len(finite)] = finite
    if LAYOUT[name][2]:
        table[len(finite)] = np.inf
    sign = np.where(array >> bits, -1.0, 1.0)
    return sign * table[array & (2**bits - 1)]


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """float64 rounded once, to nearest and ties to even, to a storage format.

    Past the largest number comes Inf, in float8_e4m3fn NaN.
    """
    with np.errstate(invalid="ignore"):
        values = np.asarray(values, dtype=np.float64)
    if name == "int8":
        return np.rint(values).astype(np.int8)
    if name in ("float32", "float64"):
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(STORAGE[name])
    table, size = magnitudes(name), np.abs(values)
    middle = (table[:-1] + table[1:]) / 2
    with np.errstate(invalid="ignore"):
        code = np.searchsorted(middle, size, side="left")
    tie = (code < len(middle)) & (middle[np.minimum(code, len(middle) - 1)] == size)
    code = np.where(tie, code + code % 2, code)
    code = np.where(np.isnan(size), (1 << sum(LAYOUT[name][:2])) - 1, code)
    code |= np.signbit(values).astype(np.int64) << sum(LAYOUT[name][:2])
    return code.astype(np.uint16 if name != "float8_e4m3fn" else np.uint8).view(STORAGE[name])


class Guarded:
    """A copy of `values` in a larger buffer whose other bytes are all 0xff.

    These are NaN in every floating-point format. `array` lies `offset` elements past a 64-byte
    border, `gap` elements lie between its rows; `check` proves that nothing else was written.
    """

    def __init__(self, values: np.ndarray, offset: int = 0, gap: int = 0):
        values = np.atleast_1d(values)
        rows = 1 if values.ndim == 1 else values.shape[0]
        width, item = values.shape[-1], values.itemsize
        stride = width + gap
        spare = 64 + 64 * item
        self.buffer = np.full(2 * spare + (offset + rows * stride) * item, 0xFF, dtype=np.uint8)
        start = spare - (self.buffer.ctypes.data + spare) % 64 + 64 + offset * item
        inner = self.buffer[start : start + rows * stride * item].view(values.dtype)
        self.array = inner.reshape(rows, stride)[:, :width]
        if values.ndim == 1:
            self.array = self.array[0]
        self.array[...] = values
        mask = np.zeros(rows * stride, dtype=bool).reshape(rows, stride)
        mask[:, :width] = True
        self.outside = np.ones(self.buffer.size, dtype=bool)
        self.outside[start : start + rows * stride * item] = ~np.repeat(mask, item)

    def check(self) -> None:
        assert (self.buffer[self.outside] == 0xFF).all(), "bytes outside the array were written"


def cut(numel: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """Sizes of a list of `pieces` tensors, empty ones among them."""
    borders = np.sort(rng.integers(0, numel + 1, pieces - 1))
    return np.diff(np.concatenate([[0], borders, [numel]])).tolist()


def as_list(values: np.ndarray, sizes: list[int], names: list[str]) -> list[Guarded]:
    """A flat vector as a list of guarded arrays, whose formats take turns."""
    borders = np.cumsum(sizes)[:-1]
    return [
        Guarded(encode(part, names[i % len(names)]), offset=i % 7)
        for i, part in enumerate(np.split(np.asarray(values, dtype=np.float64), borders))
    ]


def arrays(guarded: list[Guarded]) -> list[np.ndarray]:
    return [item.array for item in guarded]


class Sample:
    """Rows of small integers (times a power of two where there is a scale), exact in every format:
    sums of their products have no rounding error, so that results must equal the reference."""

    def __init__(self, rows: int, numel: int, name: str, seed: int = 0):
        rng = np.random.default_rng([rows, numel, seed])
        numbers = rng.integers(-3, 4, (rows, numel)).astype(np.float64)
        self.stored = Guarded(encode(numbers, name), offset=3, gap=5)
        self.scale = None
        self.values = numbers
        if name in QUANTIZED:
            factors = 2.0 ** rng.integers(-2, 3, (rows, -(-numel // BLOCK)))
            self.scale = np.ascontiguousarray(factors.astype(np.float32))
            self.values = numbers * np.repeat(factors, BLOCK, axis=1)[:, :numel]
        self.wide = np.float64 if name == "float64" else np.float32
        self.vector = rng.integers(-4, 5, numel).astype(np.float64)
        self.theta = rng.integers(-3, 4, rows).astype(self.wide)

    @property
    def array(self) -> np.ndarray:
        return self.stored.array


def random_sample(
    rows: int, numel: int, name: str
) -> tuple[Sample, np.ndarray | None, np.random.Generator]:
    """Rows of random numbers: sums of their products round, so that their order shows."""
    rng = np.random.default_rng([rows, numel])
    sample = Sample(rows, numel, name)
    if name not in QUANTIZED:
        sample.array[...] = encode(rng.normal(size=(rows, numel)), name)
    scale = None if sample.scale is None else sample.scale * np.float32(0.7)
    return sample, scale, rng


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
