"""Weights that share memory without being one parameter."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, Trajectory
from dldr_ext import weight_averaging_subspace as averages_of
from dldr_ext.tensors.storage import first_shared


def _views(kind: str) -> list[Tensor]:
    flat = torch.arange(24.0)
    array = np.zeros(6, dtype=np.float32)
    return {
        "the same": [flat[:6].view(2, 3), torch.zeros(2), flat[:6].view(2, 3)],
        "transposed": [flat[:6].view(2, 3), torch.zeros(2), flat[:6].view(2, 3).T],
        "slices": [flat[:6], torch.zeros(2), flat[5:9]],
        "inside": [flat[::3], torch.zeros(2), flat[3:4]],
        "rows and columns": [flat.view(4, 6)[:, :2], flat.view(4, 6)[3:, 3:], flat.view(4, 6)[3]],
        "other dtypes": [flat[:4], torch.zeros(2), flat[2:6].view(torch.bfloat16)],
        "one array": [torch.from_numpy(array), torch.zeros(2), torch.from_numpy(array)[2:]],
        "meta": [torch.empty(6, device="meta")] * 2,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("the same", (0, 2)),
        ("transposed", (0, 2)),
        ("slices", (0, 2)),
        ("inside", (0, 2)),
        ("rows and columns", (1, 2)),
        ("other dtypes", (0, 2)),
        ("one array", (0, 2)),
        ("meta", (0, 1)),
    ],
)
def test_shared_elements_are_found(kind: str, pair: tuple[int, int]) -> None:
    assert first_shared(_views(kind)) == pair


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(()).expand(2),
        torch.arange(6.0).as_strided((3, 3), (1, 1)),
        torch.arange(9.0).as_strided((2, 2, 2), (1, 3, 4)),
    ],
)
def test_elements_that_share_memory_in_one_tensor_are_found(tensor: Tensor) -> None:
    assert first_shared([torch.zeros(1), tensor]) == (1, 1)


@pytest.mark.parametrize(
    "tensors",
    [
        list(torch.arange(24.0).split([5, 1, 12, 6])),
        list(torch.arange(24.0).view(4, 6).split(2, dim=1)),  # they interleave
        [torch.arange(24.0)[::2], torch.arange(24.0)[1::2]],
        [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(3, 2).T],
        [torch.zeros(0, 3), torch.zeros(0)],
        [torch.zeros(()), torch.zeros(1, 5).expand(1, 5)],
        [torch.empty(6, device="meta"), torch.empty(6, device="meta")],
        [torch.arange(9.0).as_strided((2, 2, 2), (1, 5, 2))],
    ],
)
def test_memory_of_ones_own_is_accepted(tensors: list[Tensor]) -> None:
    assert first_shared(tensors) is None


_VIEW = st.tuples(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=0, max_size=3),
    st.integers(0, 6),
    st.sampled_from([torch.float32, torch.float16, torch.float64]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_VIEW, min_size=1, max_size=4))
def test_any_views_of_one_storage(views: list[Any]) -> None:
    """Against the sets of bytes of their elements."""
    storage = torch.zeros(64, dtype=torch.float64).untyped_storage()
    tensors, places = [], []
    for dims, offset, dtype in views:
        shape, stride = [n for n, _ in dims], [s for _, s in dims]
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        indices = itertools.product(*map(range, shape))
        starts = [offset + sum(map(operator.mul, i, stride)) for i in indices]
        size = dtype.itemsize
        tensors.append(tensor)
        places.append([size * start + byte for start in starts for byte in range(size)])
    shared = {
        (i, j)
        for i, j in itertools.combinations_with_replacement(range(len(tensors)), 2)
        if (len(set(places[i])) < len(places[i]) if i == j else set(places[i]) & set(places[j]))
    }
    found = first_shared(tensors)
    assert found in shared if shared else found is None


class _Shared(nn.Module):
    """Two layers over one storage, and one that has its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(6, 6, bias=False) for _ in range(2))
        self.o = nn.Linear(6, 2)
        weight = self.a.weight
        if how == "data":
            self.b.weight.data = weight.data
        elif how == "transposed":
            self.b.weight.data = weight.data.T
        elif how == "part":
            self.b.weight = nn.Parameter(weight.data[2:])
        elif how == "expanded":
            self.b.weight = nn.Parameter(torch.zeros(6, 1).expand(6, 6))
        elif how == "flat":
            flat = torch.randn(72)
            self.a.weight.data, self.b.weight.data = (w.view(6, 6) for w in flat.split(36))


@pytest.mark.parametrize("how", ["data", "transposed", "part", "expanded"])
def test_a_model_whose_weights_share_memory_is_refused_everywhere(how: str) -> None:
    model = _Shared(how)
    named = list(model.named_parameters())
    message = r"\[1\] \(b.weight\): expected memory of its own, got that of .*\[0\] \(a.weight\)"
    if how == "expanded":
        message = r"\[1\] \(b.weight\): expected memory for each element"
    size = sum(p.numel() for _, p in named)
    subspace = Subspace(torch.eye(2, size), torch.zeros(size))
    before = model.a.weight.clone()
    state = {name: p.detach().clone() for name, p in named}
    calls = [
        lambda: Trajectory(named),
        lambda: Subspace.random(named, 2),
        lambda: subspace.parametrize(model),
        lambda: subspace.reconstruct_(named, torch.ones(2)),
        lambda: averages_of([state, state], model),
        lambda: PBFGS(named, subspace),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    without = message.replace(r" \(b.weight\)", ".*").replace(r" \(a.weight\)", "")
    for make in (PSGD, PBFGS, lambda p, s: InSubspace(p, s, torch.optim.SGD, lr=1.0)):
        with pytest.raises(ValueError, match=without):
            make(model.parameters(), subspace)
    assert torch.equal(model.a.weight, before)


def test_plain_tensors_that_are_written_are_looked_at_too() -> None:
    flat, subspace = torch.zeros(9), Subspace(torch.eye(2, 10), torch.ones(10))
    subspace.coordinates([flat[:5], flat[:5] + 0])  # only read
    with pytest.raises(ValueError, match=r"params\[1\]: expected memory of its own, got that of"):
        subspace.reconstruct_([flat[:5], flat[4:]], torch.ones(2))
    assert not flat.any()


def test_views_of_one_flat_buffer_that_do_not_overlap_train() -> None:
    torch.manual_seed(0)
    model, x = _Shared("flat"), torch.randn(32, 6)
    subspace = Subspace.random(model.named_parameters(), 8)
    optimizer = PBFGS(model.parameters(), subspace)
    for _ in range(3):
        optimizer.step(lambda: model.o(model.b(model.a(x).tanh())).square().mean())
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(flat, subspace.reconstruct(optimizer.theta))
    assert optimizer.status.moved


def test_a_tied_parameter_still_counts_once() -> None:
    model = _Shared("none")
    model.b.weight = model.a.weight
    assert Trajectory(model.named_parameters()).numel == 36 + 14
