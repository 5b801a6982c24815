"""Averages of tensors of every kind: right, or kept as they are the same, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dldr_ext import greedy_soup, uniform_soup

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, on rare dtypes

REAL = torch.tensor([[1.0, -2.0], [3.0, 5.0]])
Z = torch.complex(REAL, REAL.flip(0))
# Numbers: made of three, they average to that of their mean.
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{str(d): lambda x, z, d=d: x.to(d) for d in (torch.float64, torch.float16, torch.bfloat16)},
    **{str(d): lambda x, z, d=d: z.to(d) for d in (torch.complex32, torch.complex64)},
    "complex128": lambda x, z: z.to(torch.complex128),
    "conjugate": lambda x, z: z.clone().conj(),
    "imaginary part of a conjugate": lambda x, z: z.clone().conj().imag,
    "negative": lambda x, z: torch._neg_view(x.clone()),
    "expanded": lambda x, z: x[:1, :1].expand(3, 4),
    "transposed": lambda x, z: x.clone().T,
    "overlapping": lambda x, z: x.as_strided((2, 2), (1, 1)),
    "a number": lambda x, z: x[0, 0].clone(),
    "empty": lambda x, z: torch.empty(0, 3),
    "parameter": lambda x, z: torch.nn.Parameter(x),
    "sparse": lambda x, z: x.to_sparse(),
    "sparse complex": lambda x, z: z.to_sparse(),
}
# Codes: their mean means nothing.
CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda x: x.to(torch.float8_e5m2),
    "float8_e8m0fnu": lambda x: x.abs().to(torch.float8_e8m0fnu),
    "bits8": lambda x: x.to(torch.uint8).view(torch.bits8),
    "a tensor of layout sparse_csr": lambda x: x.to_sparse_csr(),
    "a tensor of layout sparse_bsc": lambda x: x.to_sparse_bsc((1, 1)),
    "a nested tensor": lambda x: torch.nested.nested_tensor([x[0], x[0, :1]]),
    "qint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "quint8": lambda x: torch.quantize_per_channel(
        x, torch.ones(2), torch.zeros(2), 0, torch.quint8
    ),
    "a Packed of float32": lambda x: Packed(x.to(torch.int8)),
}


class Packed(torch.Tensor):
    """A wrapper subclass, as those of torchao."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore
        raise NotImplementedError(str(function))


def states(make: Callable[..., Tensor], *arguments: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    return [{"w": torch.ones(2) * i, "x": make(*each)} for i, each in enumerate(arguments)]


@pytest.mark.parametrize("name", list(NUMBERS))
def test_numbers_are_averaged(name: str) -> None:
    make = NUMBERS[name]
    found = uniform_soup(states(make, (REAL, Z), (3 * REAL, 3 * Z), (5 * REAL, 5 * Z)))
    expected = make(3 * REAL, 3 * Z)
    assert found["w"].tolist() == [1, 1]
    assert (found["x"].dtype, found["x"].layout) == (expected.dtype, expected.layout)
    wide = [
        t.detach().to_dense().resolve_conj().to(torch.complex128) for t in (found["x"], expected)
    ]
    assert torch.equal(*wide)


@pytest.mark.parametrize("name", list(CODES))
def test_codes_stay_or_are_refused(name: str) -> None:
    make = CODES[name]
    alike = states(make, (REAL.clone(),), (REAL.clone(),))
    assert uniform_soup(alike)["x"] is alike[-1]["x"]
    assert greedy_soup(alike, lambda state: 0.0).members == [0, 1]
    with pytest.raises(TypeError, match=rf"checkpoints\[1\]: x: expected floating.*, got {name}:"):
        uniform_soup(states(make, (REAL,), (REAL + 1,)))


def test_integers_are_those_of_the_last() -> None:
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.uint16, torch.uint32, torch.uint64):
        values = [torch.tensor([i, 1]).to(dtype) for i in range(3)]
        states = [{"w": torch.ones(1), "x": value, "n": value[0], "epoch": 3} for value in values]
        for average in (uniform_soup, lambda s: greedy_soup(s[::-1], lambda _: 0.0).state_dict):
            with pytest.warns(UserWarning, match=r"as in the last one: x \(integers that differ\)"):
                found = average(states)
            assert found["x"] is values[-1 if average is uniform_soup else 0]
        assert uniform_soup(states[:1] * 2)["x"] is values[0]


def test_a_tensor_without_values_is_refused() -> None:
    meta = torch.ones(2, device="meta")
    with pytest.raises(TypeError, match=r"x: .* got a tensor on the meta device, without values"):
        uniform_soup([{"x": meta}, {"x": meta.clone()}])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(2), torch.ones(2, dtype=torch.int64), "floating-point numbers, .* got integer"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2), "integer numbers, .* got floating-point"),
        (torch.ones(2), torch.ones(2) * 1j, "floating-point numbers, .* got complex numbers"),
        (torch.ones(2), 3, "floating-point numbers, as in checkpoints.0., got a int"),
        (
            torch.ones(2),
            torch.ones(2).to(torch.float8_e5m2),
            "floating-point numbers, .* got float8_e5m2",
        ),
    ],
)
def test_kinds_are_not_mixed(first: Tensor, second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoints\[1\]: x: expected {message}"):
        uniform_soup([{"x": first}, {"x": second}])
