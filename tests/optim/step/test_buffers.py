"""Buffers that a forward pass changes in any way are changed once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dldr_ext import PBFGS, Status, Subspace
from dldr_ext.tensors.buffers import SavedBuffers


class _Net(nn.Module):
    """A layer, and a buffer that counts the evaluations as ``count`` does."""

    def __init__(self, count: Callable[[Any], None], buffer: Tensor | None, **kept: bool) -> None:
        super().__init__()
        self.layer, self.count, self.inner = nn.Linear(5, 2), count, nn.BatchNorm1d(5, affine=False)
        self.register_buffer("seen", buffer, **kept)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count(self)
        return self.layer(x)


def _assign(net: Any) -> None:
    net.seen = net.seen + 1


def _in_place(net: Any) -> None:
    net.seen += 1


def _through_data(net: Any) -> None:
    net.seen.data = net.seen.data + 1


def _make(net: Any) -> None:
    net.seen = torch.ones(1) if net.seen is None else net.seen + 1


def _make_another(net: Any) -> None:
    if not hasattr(net, "more"):
        net.register_buffer("more", torch.zeros(1))
    net.more += 1
    net.seen = net.more.clone()


def _delete(net: Any) -> None:
    seen = net.seen + 1
    del net.seen
    net.register_buffer("seen", seen, persistent=False)


def _grow(net: Any) -> None:
    size = len(net.seen)
    net.seen.resize_(size + 1).fill_(size)


def _grow_anew(net: Any) -> None:
    net.seen = torch.full((len(net.seen) + 1,), float(len(net.seen)))


def _cast(net: Any) -> None:
    net.seen = (net.seen + 1).to(torch.float64)


def _expand(net: Any) -> None:
    net.seen = (net.seen[:1] + 1).expand(3)


def _another_module(net: Any) -> None:
    inner = nn.BatchNorm1d(5, affine=False)
    inner.load_state_dict(net.inner.state_dict())
    inner.num_batches_tracked += 1
    net.inner = inner
    net.seen = inner.num_batches_tracked.to(torch.float32).reshape(1)


def _in_inference_mode(net: Any) -> None:
    with torch.inference_mode():
        net.seen = net.seen + 1


_WAYS: dict[str, tuple[Callable[[Any], None], Tensor | None]] = {
    "assigned": (_assign, torch.zeros(1)),
    "written": (_in_place, torch.zeros(2)),
    "written through data": (_through_data, torch.zeros(2)),
    "made": (_make, None),
    "another one made": (_make_another, torch.zeros(1)),
    "deleted and made": (_delete, torch.zeros(1)),
    "resized": (_grow, torch.zeros(1)),
    "of another size": (_grow_anew, torch.zeros(1)),
    "cast": (_cast, torch.zeros(1, dtype=torch.float32)),
    "expanded": (_expand, torch.zeros(1).expand(3)),
    "in another module": (_another_module, torch.zeros(1)),
    "in inference mode": (_in_inference_mode, torch.zeros(1)),
    "a view": (_assign, torch.zeros(4)[2:]),
}


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("way", _WAYS)
def test_a_buffer_is_changed_once_a_step(way: str, persistent: bool) -> None:
    torch.manual_seed(0)
    count, buffer = _WAYS[way]
    buffer = None if buffer is None else buffer.clone()
    net, x = _Net(count, buffer, persistent=persistent), torch.randn(32, 5)
    y = (x[:, 0] > 0).long()
    optimizer = PBFGS(net.parameters(), Subspace.random(net.parameters(), 4), buffers=net)
    grows = way in ("resized", "of another size")
    for step in range(1, 4):
        if step == 3:  # another object than the one of construction
            buffers = {name: b.clone() for name, b in net.named_buffers()}
            net.load_state_dict(buffers, strict=False, assign=True)
        optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))
        assert optimizer.status.moved
        assert (len(net.seen) - 1 if grows else net.seen[-1]) == step, optimizer.closure_calls
    assert optimizer.closure_calls > 3


@pytest.mark.parametrize("way", _WAYS)
def test_a_step_that_fails_leaves_the_buffers(way: str) -> None:
    torch.manual_seed(0)
    count, buffer = _WAYS[way]
    net, x = _Net(count, None if buffer is None else buffer.clone()), torch.randn(32, 5)
    optimizer = PBFGS(net.parameters(), Subspace.random(net.parameters(), 4), buffers=net, max_ls=3)
    before = [(name, b, b.tolist()) for name, b in net.named_buffers()]
    calls = iter(range(100))
    optimizer.step(lambda: net(x).square().mean() + 1e6 * next(calls))
    assert optimizer.status is Status.LINE_SEARCH_FAILED
    after = [(name, b, b.tolist()) for name, b in net.named_buffers()]
    assert [(name, values) for name, _, values in after] == [
        (name, values) for name, _, values in before
    ]
    assert all(old[1] is new[1] for old, new in zip(before, after, strict=True))


def test_the_iterations_of_a_step_change_a_buffer_once() -> None:
    torch.manual_seed(0)
    net, x = _Net(_assign, torch.zeros(1)), torch.randn(32, 5)
    optimizer = PBFGS(
        net.parameters(), Subspace.random(net.parameters(), 4), buffers=net, max_iter=4
    )
    optimizer.step(lambda: net(x).square().mean())
    assert len(optimizer.history) == 4 and net.seen == 1


def test_batch_norm_that_assigns_its_count() -> None:
    """As torch's own did, and modules written after it do."""
    torch.manual_seed(0)

    def count(net: nn.Module) -> None:
        net.inner.num_batches_tracked = net.inner.num_batches_tracked + 1

    net, x = _Net(count, torch.zeros(1)), torch.randn(32, 5)
    optimizer = PBFGS(net.parameters(), Subspace.random(net.parameters(), 4), buffers=net)
    for _ in range(3):
        optimizer.step(lambda: net(net.inner(x)).square().mean())
    assert net.inner.num_batches_tracked == 6  # by itself, and by this


def test_buffers_over_one_storage_and_one_in_two_modules() -> None:
    net = nn.Module()
    flat = torch.zeros(4)
    net.a, net.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    net.register_buffer("whole", flat)
    net.register_buffer("part", flat[1:3])
    net.b.running_mean = net.a.running_mean
    saved = SavedBuffers(net)
    net.part += 1
    net.a.running_mean += 1
    net.b.running_mean = torch.ones(4)
    saved.put_back()
    assert not flat.any() and net.part.data_ptr() == flat[1:].data_ptr()
    assert net.b.running_mean is net.a.running_mean and not net.a.running_mean.any()


def test_what_is_put_back_is_a_buffer_again() -> None:
    net = nn.BatchNorm1d(3)
    net.register_buffer("cache", torch.ones(2), persistent=False)
    net.register_buffer("mask", None)
    cache, saved = net.cache, SavedBuffers(net)
    del net.cache
    net.cache, net.mask = torch.zeros(5), torch.zeros(5)  # the first as a plain attribute
    saved.put_back()
    assert net.cache is cache and "cache" in net._buffers and "cache" not in net.state_dict()
    assert net.mask is None and "mask" in net._buffers


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_module() -> None:
    net = torch.jit.script(nn.BatchNorm1d(3))
    saved = SavedBuffers(net)
    net(torch.randn(8, 3))
    assert net.running_mean.any() and net.num_batches_tracked == 1
    saved.put_back()
    assert not net.running_mean.any() and net.num_batches_tracked == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).as_strided((3, 2), (1, 1)),
        torch.eye(2).expand(3, 2, 2),
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(2, 3).T,
    ],
)
def test_tensors_of_any_layout_in_a_list(tensor: Tensor) -> None:
    net = nn.Linear(3, 2)
    subspace, before = Subspace.random(net.parameters(), 3), tensor.to_dense().tolist()
    optimizer = PBFGS(net.parameters(), subspace, buffers=[tensor])
    optimizer.step(lambda: net(torch.ones(1, 3)).square().mean())
    assert tensor.to_dense().tolist() == before and optimizer.status.moved


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.LazyBatchNorm1d(affine=False))
    subspace = Subspace.random(net.parameters(), 2)
    for buffers, message in (
        (net, r"^buffers: 1.running_mean: not initialised yet: run the model once"),
        (net.buffers(), r"^buffers\[0\]: not initialised yet"),
    ):
        with pytest.raises(ValueError, match=message):
            PBFGS(net.parameters(), subspace, buffers=buffers)
    with torch.inference_mode():
        made = torch.zeros(2)
    with pytest.raises(ValueError, match=r"buffers\[0\]: expected a tensor that can be written"):
        PBFGS(net.parameters(), subspace, buffers=[made])


def test_a_frozen_parameter_that_the_forward_pass_writes() -> None:
    """As the teacher of a model that trains itself: every trial would write it again."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 2), nn.Linear(5, 2).requires_grad_(False)), torch.ones(3, 5)

    def forward() -> Tensor:
        with torch.no_grad():
            net[1].weight.lerp_(net[0].weight, 0.1)
        return (net[0](x) - net[1](x)).square().mean()

    optimizer = PBFGS(net.parameters(), Subspace.random(net.parameters(), 3), buffers=net)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=r"buffers: 1.weight: expected a frozen parameter that"):
        optimizer.step(forward)
    assert torch.equal(net[0].weight, before)
    teacher = net[1].weight.detach().clone()
    del net[1].weight
    net[1].register_buffer("weight", teacher)
    optimizer.step(forward)
    assert optimizer.status.moved and optimizer.closure_calls > 2
