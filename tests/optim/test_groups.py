"""Parameter groups with weight decay of their own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from optim_problems import bits
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, InSubspace, Subspace, Trajectory


def adam(params: Any, subspace: Any, **options: Any) -> InSubspace:
    return InSubspace(params, subspace, torch.optim.Adam, **options)


def lbfgs(params: Any, subspace: Any, **options: Any) -> InSubspace:
    return InSubspace(params, subspace, torch.optim.LBFGS, line_search_fn="strong_wolfe", **options)


CASES: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PBFGS, {"curvature": "consecutive", "max_iter": 2}),
    (PBFGS, {"line_search_fn": "strong_wolfe"}),
    (PBFGS, {"residual_lr": 0.05, "maximize": True}),
    (PBFGS, {"residual_lr": 0.05, "curvature": "consecutive"}),
    (PSGD, {"lr": 0.1}),
    (PSGD, {"lr": 0.1, "maximize": True}),
    (adam, {"lr": 0.1}),
    (adam, {"lr": 0.1, "maximize": True}),
    (lbfgs, {"max_iter": 3}),
]


class Net(nn.Module):
    """Norms, biases and matrices in turn, so that groups put them in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def by_timm(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What timm.optim.param_groups_weight_decay gives."""
    params = [p for p in model.parameters() if p.requires_grad]
    no_decay = [p for p in params if p.ndim <= 1]
    decay = [p for p in params if p.ndim > 1]
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def by_transformers(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What transformers.Trainer.create_optimizer gives."""
    decays = {
        name for name, _ in model.named_parameters() if not ("bias" in name or "norm" in name)
    }
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in decays], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decays], "weight_decay": 0.0},
    ]


def several(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Three rates, one of them the default, named, from generators."""
    named = dict(model.named_parameters())
    return [
        {"params": ((k, p) for k, p in named.items() if "last" in k), "weight_decay": weight_decay},
        {"params": [(k, p) for k, p in named.items() if "norm" in k]},
        {"params": [(k, p) for k, p in named.items() if "first" in k], "weight_decay": 0.05},
    ]


def rates(groups: list[dict[str, Any]]) -> dict[int, float]:
    return {id(p): group["weight_decay"] for group in groups for p in group["params"]}


def problem(kind: str = "dense") -> tuple[Net, Any, Tensor]:
    net = Net().double()
    if kind == "grouped":
        subspace: Any = GroupedSubspace.random(net.named_parameters(), 2, [2, 4])
    else:
        given = net.named_parameters() if kind == "named" else net.parameters()
        subspace = Subspace.random(given, 5, dtype=torch.float64)
    return net, subspace, torch.randn(16, 4, dtype=torch.float64)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x), x.flip(1))


@pytest.mark.parametrize("split", [by_timm, by_transformers, several])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_it_is_a_term_of_the_loss(make: Any, options: dict[str, Any], split: Any) -> None:
    """The same steps as with the sum of the groups' terms in the closure, but for rounding."""
    net, subspace, x = problem("named")
    other = copy.deepcopy(net)
    sign = -1.0 if options.get("maximize") else 1.0
    optimizer = make(split(net, 0.3), subspace, **options)
    plain = make(other.parameters(), subspace, **options)
    decay = rates(optimizer.param_groups)
    weights = [decay[id(p)] for p in net.parameters()]
    assert len(set(weights)) > 1

    def penalised() -> Tensor:
        terms = zip(weights, other.parameters(), strict=True)
        return sign * (loss_of(other, x) + 0.5 * sum(r * p.square().sum() for r, p in terms))

    for _ in range(6):
        loss = optimizer.step(lambda: sign * loss_of(net, x))
        assert float(loss) == pytest.approx(sign * loss_of(other, x).item(), rel=1e-6)
        plain.step(penalised)
        assert optimizer.status is plain.status
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.theta.norm() > 0.01


@pytest.mark.parametrize("make", [PBFGS, PSGD])
def test_one_rate_in_all_groups_is_the_option(make: Any) -> None:
    net, subspace, x = problem("grouped")
    other = copy.deepcopy(net)
    groups = by_timm(net, 0.2)
    groups[0]["weight_decay"] = 0.2
    one = make(groups, subspace, lr=0.1)
    two = make(other.parameters(), subspace, lr=0.1, weight_decay=0.2)
    for model, optimizer in itertools.product((net, other), (one, two)):
        if (model is net) == (optimizer is one):
            for _ in range(4):
                optimizer.step(lambda model=model: loss_of(model, x))
    assert bits(net.parameters()) == bits(other.parameters())


@pytest.mark.parametrize(("make", "options"), CASES[1::2])
def test_state_is_resumed_to_the_bit(make: Any, options: dict[str, Any]) -> None:
    net, subspace, x = problem("grouped")
    if options.get("maximize"):
        x = x * 0.1

    def run(optimizer: Any, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda: loss_of(model, x))

    optimizer = make(by_timm(net, 0.3), subspace, **options)
    run(optimizer, net, 3)
    other, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    assert [len(group["params"]) for group in saved["param_groups"]] == [4, 2]
    again = make(by_timm(other, 0.0), subspace, **options)
    again.load_state_dict(saved)
    assert [group["weight_decay"] for group in again.param_groups] == [0.0, 0.3]
    run(optimizer, net, 2)
    run(again, other, 2)
    assert bits(net.parameters()) == bits(other.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make(other.parameters(), subspace, **options).load_state_dict(saved)


def test_schedules_act_on_the_groups_alike() -> None:
    net, subspace, x = problem()
    optimizer = PSGD(by_timm(net, 0.3), subspace, lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(lambda: loss_of(net, x))
    schedule.step()
    for group in optimizer.param_groups:  # timm's schedules of weight decay
        group["weight_decay"] *= 0.5
    optimizer.step(lambda: loss_of(net, x))
    assert optimizer.history[-1].alpha == 0.2
    optimizer.param_groups[1]["lr"] = 0.1
    before = bits(net.parameters())
    with pytest.raises(ValueError, match=r"param_groups\[1\]: lr: expected 0.2, .* got 0.1"):
        optimizer.step(lambda: loss_of(net, x))
    assert bits(net.parameters()) == before


def without_a_model(shapes: list[tuple[int, ...]], names: bool = False) -> tuple[Any, Any]:
    params = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return params, Subspace.random(named if names else params, 2)


@pytest.mark.parametrize("kind", ["dense", "named", "grouped"])
@pytest.mark.parametrize("split", [by_timm, by_transformers, several])
def test_parameters_are_put_into_the_subspaces_order(split: Any, kind: str) -> None:
    net, subspace, _ = problem(kind)
    optimizer = PSGD(split(net, 0.1), subspace)
    assert all(map(lambda a, b: a is b, optimizer.leaves, net.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_names_tell_more_than_the_model_and_shapes_do_without_it() -> None:
    net, _, _ = problem()
    backwards = list(net.named_parameters())[::-1]
    optimizer = PSGD(by_timm(net, 0.1), Subspace.random(backwards, 2))
    assert [id(p) for p in optimizer.leaves] == [id(p) for _, p in backwards]

    def split(params: Any) -> Any:
        return [{"params": params[1::2], "weight_decay": 0.1}, {"params": params[::2]}]

    params, subspace = without_a_model([(3, 2), (3,), (2, 3), (3,)])
    optimizer = PSGD(split(params), subspace)
    assert [id(p) for p in optimizer.leaves] == list(map(id, params))
    params, subspace = without_a_model([(3, 2), (3,), (3,)])
    with pytest.raises(ValueError, match=r"groups whose parameters can be told apart .* pairs"):
        PSGD(split(params), subspace)
    params, subspace = without_a_model([(3, 2), (3,), (3,)], names=True)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = PSGD(split(named), subspace)
    assert [id(p) for p in optimizer.leaves] == list(map(id, params))


def test_frozen_parameters_in_groups_stay_outside() -> None:
    net, _, x = problem()
    net.last.requires_grad_(False)
    kept, subspace = bits(net.last.parameters()), Subspace.random(net.named_parameters(), 3)
    params = list(net.parameters())
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2]}]
    optimizer = PBFGS(groups, subspace)
    optimizer.step(lambda: loss_of(net, x))
    assert len(optimizer.leaves) == 4 and bits(net.last.parameters()) == kept


@pytest.mark.parametrize("make", [PBFGS, PSGD, adam])
def test_bad_groups(make: Any) -> None:
    net, subspace, _ = problem("named")
    named, before = list(net.named_parameters()), bits(net.parameters())
    first, rest = named[:2], named[2:]
    cases: list[tuple[Any, str]] = [
        (
            [{"params": first, "weight_decay": 0.1}, {"params": rest, "lr": 0.1, "betas": 1}],
            r"params\[1\]: expected no options of single parameter groups but weight_decay, got "
            r"\['betas', 'lr'\]",
        ),
        (
            [{"params": first, "weight_decay": -0.1}, {"params": rest}],
            r"params\[0\]: weight_decay: expected a number in \[0, inf\), got -0.1",
        ),
        (
            [{"params": first, "weight_decay": 0.1}, {"params": named}],
            r"params\[0\] \(first.weight\): expected it in one group, got it in several",
        ),
        ([{"params": first, "weight_decay": 0.1}], "expected 6 tensors, as in the subspace, got 2"),
        (
            [
                {"params": [first[0], ("a", first[1][1])], "weight_decay": 0.1},
                {"params": rest},
            ],
            "expected the name first.bias, as in the subspace, got a",
        ),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            make(given, subspace)
    assert bits(net.parameters()) == before
    made = make(by_timm(net, 0.1), subspace)
    with pytest.raises(ValueError, match="add_param_group: a subspace belongs to one list"):
        made.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_recorded_subspaces_take_groups_too() -> None:
    """The whole way: record, reduce, train with a decay mask."""
    net, _, x = problem()
    net = net.float()
    trajectory, sgd = Trajectory(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(8):
        trajectory.record()
        sgd.zero_grad()
        loss_of(net, x.float()).backward()
        sgd.step()
    optimizer = PBFGS(by_transformers(net, 0.01), trajectory.subspace(dim=3), theta0="current")
    losses = [float(optimizer.step(lambda: loss_of(net, x.float()))) for _ in range(4)]
    assert losses[-1] < losses[0]
