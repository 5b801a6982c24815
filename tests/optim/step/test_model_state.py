"""Buffers, dropout, moving averages and tied weights around an optimizer in a subspace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_problems import bits, one_thread, random_subspace  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace

MAKERS: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PSGD, {"lr": 0.1}),
    (InSubspace, {"optimizer": torch.optim.Adam, "lr": 0.05}),
]


class Net(nn.Module):
    """Batch norm, dropout and tied weights: the decoder is the encoder transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.encode(x)))
        self.masks.append(x.detach() == 0)
        return self.decode(x)


def problem(make: Any, options: dict[str, Any]) -> tuple[Net, Any, Tensor]:
    net, x = Net(), torch.randn(64, 6)
    if make is PBFGS:
        options = options | {"buffers": net}
    subspace = Subspace.random(net.named_parameters(), 12)
    return net, make(net.parameters(), subspace, **options), x


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return functional.mse_loss(net(x), x.flip(1))


def test_masks_and_statistics_of_a_step() -> None:
    """Each trial sees the masks and the statistics of the first evaluation."""
    net, optimizer, x = problem(PBFGS, {"lr": 50.0})  # several trials
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([b.clone() for b in net.buffers()])
        return loss_of(net, x)

    for _ in range(4):
        seen.clear()
        net.masks.clear()
        before = [b.clone() for b in net.buffers()]
        optimizer.step(closure)
        assert len(seen) > 1
        for buffers in seen:
            assert all(map(torch.equal, buffers, before))
        # Nothing is zero but what was dropped.
        assert all(torch.equal(mask, net.masks[0]) for mask in net.masks)
    first = net.masks[0]
    net(x)
    assert not torch.equal(net.masks[-1], first)  # the next step's masks are new ones


@pytest.mark.parametrize(("make", "options"), MAKERS)
def test_update_bn_after_a_move(make: Any, options: dict[str, Any]) -> None:
    net, optimizer, x = problem(make, options)
    for _ in range(3):
        optimizer.step(lambda: loss_of(net, x))
    weights = bits(net.parameters())
    update_bn([x[:32], x[32:]], net)
    hidden = net.encode(x).detach()
    torch.testing.assert_close(net.norm.running_mean, hidden.mean(0))
    assert bits(net.parameters()) == weights
    optimizer.step(lambda: loss_of(net, x))  # the optimizer takes no offence at it
    assert optimizer.status.moved


@pytest.mark.parametrize(("make", "options"), MAKERS)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_averages(make: Any, options: dict[str, Any], use_buffers: bool) -> None:
    net, optimizer, x = problem(make, options)
    twin, same, _ = copy.deepcopy((net, optimizer, x))
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    expected: list[Tensor] = []
    for step in range(6):
        for model, one in ((net, optimizer), (twin, same)):
            torch.manual_seed(step)
            one.step(lambda model=model: loss_of(model, x))
        ema.update_parameters(net)
        weights = [p.detach().clone() for p in net.parameters()]
        expected = [
            torch.lerp(mean, w, 0.1) for mean, w in zip(expected or weights, weights, strict=True)
        ]
    assert bits(net.parameters()) == bits(twin.parameters())
    for mean, p in zip(expected, ema.module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), mean)
    assert ema.module.decode.weight is ema.module.encode.weight
    before = bits(ema.parameters())
    torch.manual_seed(9)
    optimizer.step(lambda: loss_of(net, x))
    assert bits(ema.parameters()) == before


def test_an_average_put_into_the_model_is_noticed() -> None:
    """Weights of another origin are refused until the optimizer is told."""
    net, optimizer, x = problem(PBFGS, {})
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(4):
        optimizer.step(lambda: loss_of(net, x))
        ema.update_parameters(net)
    net.load_state_dict(ema.module.state_dict())
    with pytest.raises(ValueError, match="something else wrote to them"):
        optimizer.step(lambda: loss_of(net, x))
    optimizer.resync()
    for p, q in zip(net.parameters(), ema.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # averages lie in the subspace


@pytest.mark.parametrize(("make", "options"), MAKERS)
def test_tied_weights_move_as_one(make: Any, options: dict[str, Any]) -> None:
    """The same steps as without ties, for a model whose forward pass ties by hand."""
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(64, 6, dtype=torch.float64)
    net.drop.p = 0.0
    twin = copy.deepcopy(net)
    subspace = random_subspace(net.parameters(), 12)
    assert subspace.numel == 6 * 6 + 6 + 6 + 6 + 6
    flat = nn.Parameter(nn.utils.parameters_to_vector(twin.parameters()).detach())
    shapes = [(name, p.shape) for name, p in twin.named_parameters()]

    def by_hand() -> Tensor:
        pieces = flat.split([shape.numel() for _, shape in shapes])
        state = {name: p.view(s) for (name, s), p in zip(shapes, pieces, strict=True)}
        return functional.mse_loss(torch.func.functional_call(twin, state, x), x.flip(1))

    one, other = make(net.parameters(), subspace, **options), make([flat], subspace, **options)
    for _ in range(10):
        one.step(lambda: loss_of(net, x))
        other.step(by_hand)
    assert net.decode.weight is net.encode.weight
    moved = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(moved, flat, rtol=1e-9, atol=1e-9)
    assert (moved - subspace.origin).norm().item() > 0.1


def test_frozen_parts_stay_outside() -> None:
    """A part that needs no gradient is no part of the subspace; nothing else is needed."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    net[0].requires_grad_(False)
    x, kept = torch.randn(64, 6), bits(net[0].parameters())
    subspace = Subspace.random(net.named_parameters(), 12)
    assert subspace.numel == 54 and subspace.names == ["2.weight", "2.bias"]
    optimizer = PBFGS(net.parameters(), subspace)
    before = loss_of(net, x).item()
    for _ in range(10):
        optimizer.step(lambda: loss_of(net, x))
    assert loss_of(net, x).item() < 0.9 * before and bits(net[0].parameters()) == kept
