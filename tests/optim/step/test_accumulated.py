"""Gradients that were there before a closure, and those that it changes after backward."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace, whole_space
from torch import Tensor, nn
from torch import distributed as dist

from dldr_ext import PBFGS, PSGD, InSubspace, LocalSubspace, virtual_batch

SGD = torch.optim.SGD
Backward = Callable[[int, float], Tensor]


def first_order(params: list[nn.Parameter], name: str) -> torch.optim.Optimizer:
    """SGD itself, and what is SGD where P = I."""
    if name == "torch":
        return SGD(params, lr=0.3, momentum=0.5)
    if name == "PSGD":
        return PSGD(params, whole_space(params), lr=0.3, momentum=0.5)
    return InSubspace(params, whole_space(params), SGD, lr=0.3, momentum=0.5)


def last_in_closure(batches: Batches, optimizer: Any, part: Backward) -> None:
    """As Lightning does it."""
    optimizer.zero_grad()
    part(0, 0.25)
    part(1, 0.25)
    optimizer.step(lambda: part(2, 0.5))


def zeroed_in_place(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.zero_grad(set_to_none=False)
    part(0, 0.5)
    optimizer.step(lambda: part(1, 0.5))


def zeroed_afterwards(batches: Batches, optimizer: Any, part: Backward) -> None:
    part(0, 0.5)
    optimizer.step(lambda: part(1, 0.5))
    batches.model.zero_grad()


def never_zeroed(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.step(lambda: part(0, 0.1))


def no_closure(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.zero_grad()
    part(0, 0.5)
    part(1, 0.5)
    optimizer.step()


def backward_twice(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.zero_grad()
    part(0, 0.5)

    def closure() -> Tensor:
        part(1, 0.25)
        return part(2, 0.25)

    optimizer.step(closure)


def written_in_place(batches: Batches, optimizer: Any, part: Backward) -> None:
    """Gradients that no backward pass has put there, into memory that is kept."""

    def closure() -> Tensor:
        loss = batches.forward(1)()
        for p, g in zip(batches.params, torch.autograd.grad(loss, batches.params), strict=True):
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
            p.grad.copy_(g)
        return loss

    optimizer.step(closure)


def clipped_by_norm(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.zero_grad()
    part(0, 0.5)

    def closure() -> Tensor:
        loss = part(1, 0.5)
        nn.utils.clip_grad_norm_(batches.params, 0.05)
        return loss

    optimizer.step(closure)


def clipped_by_value(batches: Batches, optimizer: Any, part: Backward) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = part(1, 1.0)
        nn.utils.clip_grad_value_(batches.params, 0.01)
        return loss

    optimizer.step(closure)


def hooked(batches: Batches, optimizer: Any, part: Backward) -> None:
    optimizer.zero_grad()
    handles = [p.register_hook(lambda g: g.clamp(-0.01, 0.01)) for p in batches.params]

    def halve(p: Tensor) -> None:
        p.grad.mul_(0.5)

    handles += [p.register_post_accumulate_grad_hook(halve) for p in batches.params]
    part(0, 1.0)
    optimizer.step(lambda: part(1, 1.0))
    for handle in handles:
        handle.remove()


def some_without(batches: Batches, optimizer: Any, part: Backward) -> None:
    """A frozen layer for one micro-batch: some have a gradient from before, others none."""
    optimizer.zero_grad()
    loss = batches.forward(0)() * 0.5
    batches.params[0].grad = torch.autograd.grad(loss, batches.params[:1])[0]
    optimizer.step(lambda: part(1, 0.5))


LOOPS = [
    last_in_closure, zeroed_in_place, zeroed_afterwards, never_zeroed, no_closure, backward_twice,
    written_in_place, clipped_by_norm, clipped_by_value, hooked, some_without,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["PSGD", "InSubspace"])
def test_a_loop_steps_as_with_torchs_sgd(name: str, loop: Any, dtype: torch.dtype) -> None:
    runs = []
    for made in ("torch", name):
        batches = Batches(1, dtype=dtype)
        optimizer = first_order(batches.params, made)

        def part(i: int, weight: float, batches: Batches = batches) -> Tensor:
            loss = batches.forward(i)() * weight
            loss.backward()
            return loss

        start = flat(batches.params)
        for _ in range(4):
            loop(batches, optimizer, part)
        runs.append(flat(batches.params))
        assert not torch.equal(runs[-1], start)
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


def test_forward_only_closures_do_not_lose_what_came_before_them() -> None:
    batches = Batches(0)
    batches.usual(0)()  # before the optimizer: of another training
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    for step in range(2):
        optimizer.step(batches.forward(step))  # the last step's gradients are in nobody's way
    optimizer.step()
    optimizer.step(batches.forward(2))
    before = bits(batches.params)
    batches.usual(1)()
    with pytest.raises(ValueError, match=r"no gradients from before the step.*params\[0\].grad"):
        optimizer.step(batches.forward(3))
    assert bits(batches.params) == before
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(batches.forward(3))
    assert bits(batches.params) != before


@pytest.mark.parametrize("make", [PBFGS, lambda p, s: PSGD(p, s, lr=0.1, momentum=0.0)])
def test_two_networks_against_each_other_need_no_zeroing(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The backward of one leaves gradients with the other: not accumulated for it."""
    runs = []
    for zeroing in (False, True):
        torch.manual_seed(0)
        one, other = nn.Linear(3, 6).double(), nn.Linear(6, 1).double()
        x, z = torch.randn(8, 6).double(), torch.randn(8, 3).double()
        first, second = (make(m.parameters(), whole_space(m.parameters())) for m in (one, other))
        for _ in range(3):
            if zeroing:
                second.zero_grad()
            fake = one(z).detach()
            second.step(lambda: nn.functional.softplus(other(fake) - other(x)).mean())  # noqa: B023
            if zeroing:
                first.zero_grad()
            first.step(lambda: nn.functional.softplus(-other(one(z))).mean())  # noqa: B023
        runs.append(bits(one.parameters()) + bits(other.parameters()))
    assert runs[0] == runs[1] and not caplog.records
    other(x).sum().backward()  # but this is the user's
    if make is not PBFGS:
        with pytest.raises(ValueError, match="no gradients from before the step"):
            second.step(lambda: other(x).mean())


def test_a_virtual_batch_takes_in_what_came_before_it_once() -> None:
    ours, theirs = Batches(0), Batches(0)
    subspace = random_subspace(ours.params, 4)
    one, other = (PSGD(b.params, subspace, lr=0.1) for b in (ours, theirs))
    halves = [(ours, 1), (ours, 2)]
    closure = virtual_batch(lambda part: part[0].forward(part[1])(), halves, weights=[1, 1])
    for _ in range(3):
        theirs.model.zero_grad()
        for batches in (ours, theirs):
            if batches is ours:
                batches.model.zero_grad()
            batches.forward(0)().backward()
        one.step(closure)
        other.step(lambda: [(theirs.forward(i)() / 2).backward() for i in (1, 2)] and 0.0)
    one.step(closure)
    theirs.model.zero_grad()
    other.step(lambda: [(theirs.forward(i)() / 2).backward() for i in (1, 2)] and 0.0)
    torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-9, atol=1e-9)


SEARCHING: list[Any] = [
    lambda params, subspace: PBFGS(params, subspace),
    lambda params, subspace: PBFGS(params, subspace, curvature="consecutive", damping=None),
    lambda params, subspace: PBFGS(params, subspace, line_search_fn=None, lr=0.1),
    lambda params, subspace: InSubspace(params, subspace, torch.optim.LBFGS, lr=0.1, max_iter=3),
]


@pytest.mark.parametrize("zero", [{"set_to_none": True}, {"set_to_none": False}])
@pytest.mark.parametrize("make", SEARCHING)
def test_a_search_refuses_gradients_that_were_accumulated_before(make: Any, zero: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4))

    def last() -> Tensor:
        loss = batches.forward(1)() / 2
        loss.backward()
        return loss

    for _ in range(2):
        before = bits(batches.params)
        optimizer.zero_grad(**zero)
        (batches.forward(0)() / 2).backward()
        for _ in range(2):  # it stays refused
            with pytest.raises(ValueError, match=r"params\[0\].grad held before.*virtual_batch"):
                optimizer.step(last)
            assert bits(batches.params) == before
        optimizer.step(batches.usual(2))
        assert optimizer.status.moved


def zeroing(batches: Batches, optimizer: Any) -> Tensor:
    optimizer.zero_grad()
    loss = batches.forward(0)()
    loss.backward()
    return loss


def zeroing_in_place(batches: Batches, optimizer: Any) -> Tensor:
    batches.model.zero_grad(set_to_none=False)
    loss = batches.forward(0)()
    loss.backward()
    return loss


def attacking(batches: Batches, optimizer: Any) -> Tensor:
    """The attack's gradients are added to what was there, and all of it is zeroed."""
    batches.forward(1)().backward()
    batches.model.zero_grad(set_to_none=False)
    batches.forward(2)().backward()
    return zeroing(batches, optimizer)


def assigning(batches: Batches, optimizer: Any) -> Tensor:
    loss = batches.forward(0)()
    for p, g in zip(batches.params, torch.autograd.grad(loss, batches.params), strict=True):
        p.grad = g
    return loss


def never_zeroing(batches: Batches, optimizer: Any) -> Tensor:
    loss = batches.forward(0)()
    loss.backward()
    return loss


def zeroing_at_the_end_of_the_loop(batches: Batches, optimizer: Any) -> Tensor:
    return never_zeroing(batches, optimizer)


CLOSURES = [
    zeroing, zeroing_in_place, attacking, assigning, never_zeroing, zeroing_at_the_end_of_the_loop,
]  # fmt: skip


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("make", SEARCHING)
def test_closures_that_a_search_takes_as_ever(make: Any, closure: Any) -> None:
    runs = []
    for forward_only in (True, False):
        batches = Batches(0)
        subspace = random_subspace(batches.params, 4)
        batches.usual(3)()  # left by what trained before
        optimizer = make(batches.params, subspace)
        for _ in range(3):
            if forward_only:
                optimizer.step(batches.forward(0))
                continue
            if closure in (zeroing, zeroing_in_place, attacking, assigning):
                batches.usual(3)()  # left between two steps
            optimizer.step(lambda o=optimizer, b=batches: closure(b, o))
            if closure is zeroing_at_the_end_of_the_loop:
                batches.model.zero_grad(set_to_none=False)
        assert optimizer.status.moved
        runs.append(flat(batches.params))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


def test_after_a_closure_that_failed_its_gradients_are_not_taken_for_earlier_ones() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    for failing in (0, 1):  # in the first evaluation, in a trial
        calls = iter(range(9))

        def closure(failing: int = failing, calls: Any = calls) -> Tensor:
            loss = never_zeroing(batches, None)
            if next(calls) == failing:
                raise MemoryError("batch too large")
            return loss

        with pytest.raises(MemoryError):
            optimizer.step(closure)
        optimizer.step(lambda: never_zeroing(batches, None))
        assert optimizer.status.moved


@pytest.mark.parametrize("batched", [False, True])
def test_a_search_says_once_that_earlier_gradients_are_dropped(
    batched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    batches, others = Batches(0), Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer, undisturbed = PBFGS(batches.params, subspace), PBFGS(others.params, subspace)
    closure: Any = batches.forward(0)
    if batched:
        closure = virtual_batch(lambda _: batches.forward(0)(), [torch.ones(2)] * 2)
    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        optimizer.step(closure)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)
        assert not caplog.records
        for _ in range(2):
            batches.usual(1)()
            optimizer.step(closure)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "are dropped: the closure calls no backward" in caplog.text
    assert "dldr_ext.virtual_batch" in caplog.text
    for _ in range(4):
        undisturbed.step(others.forward(0))
    torch.testing.assert_close(flat(batches.params), flat(others.params), rtol=1e-9, atol=1e-9)


def test_shards_accumulate_too() -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        shard = tensor.distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [tensor.Shard(0)])
        w = nn.Parameter(shard)
        subspace = LocalSubspace.random([w], 6)
        optimizer = PSGD([w], subspace, lr=0.5, momentum=0.0, process_group="world")

        def half() -> Tensor:
            loss = w.to_local().square().sum() / 2
            loss.backward()
            return loss

        for _ in range(2):
            before = w.to_local().detach().clone()
            optimizer.zero_grad(set_to_none=False)
            half()
            optimizer.step(half)
            torch.testing.assert_close(w.to_local(), before * 0.0, rtol=0.0, atol=1e-5)
            with torch.no_grad():
                w.to_local().copy_(before)
            optimizer.resync()
        search = PBFGS([w], subspace, process_group="world", theta0="current")
        half()
        with pytest.raises(ValueError, match="virtual_batch"):
            search.step(half)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_knows_its_own_gradients(copied: Any) -> None:
    batches = Batches(0)
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    optimizer.step(batches.forward(0))
    (other,) = copied([optimizer])
    params = other.param_groups[0]["params"]
    before = bits(params)
    other.step(lambda: sum(p.square().sum() for p in params))
    assert bits(params) != before


def test_resync_takes_gradients_for_old_ones() -> None:
    batches = Batches(0)
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    ordinary = SGD(batches.params, lr=0.1)
    ordinary.step(batches.usual(0))
    optimizer.resync()
    optimizer.step(batches.forward(0))
    assert optimizer.status.moved


def edited(change: Callable[[list[nn.Parameter], Tensor], Any]) -> Any:
    """A closure that does something to its gradients after backward."""

    def closure(batches: Batches) -> Tensor:
        loss = zeroing(batches, batches.model)
        change(batches.params, loss)
        return loss

    return closure


def replaced(params: list[nn.Parameter], loss: Tensor) -> None:
    for p in params:
        p.grad = p.grad * (0.1 / loss.detach())


def noisy(params: list[nn.Parameter], loss: Tensor) -> None:
    for p in params:
        p.grad.add_(torch.randn_like(p), alpha=0.1)


EDITS = {
    "norm": lambda params, _: nn.utils.clip_grad_norm_(params, 0.01),
    "norm, one by one": lambda params, _: nn.utils.clip_grad_norm_(params, 0.01, foreach=False),
    "value": lambda params, _: nn.utils.clip_grad_value_(params, 0.001),
    "by another": replaced,
    "noise": noisy,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("make", [SEARCHING[0], SEARCHING[3]])
def test_a_search_refuses_gradients_that_its_closure_clips(make: Any, edit: str) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4))
    closure = edited(EDITS[edit])
    start = bits(batches.params)
    with pytest.raises(ValueError, match=r"changed after backward.*clipping.*PSGD and InSubspace"):
        for _ in range(3):
            before = bits(batches.params)
            optimizer.step(lambda: closure(batches))
    assert bits(batches.params) == before == start
    optimizer.step(batches.usual(0))
    assert optimizer.status.moved


@pytest.mark.parametrize("make", SEARCHING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_search_takes_gradients_that_are_changed_alike(make: Any, dtype: torch.dtype) -> None:
    """A sum divided by its parts; clipping that does not clip; what is found in no gradient."""
    batches = Batches(0, dtype=dtype)
    subspace = random_subspace(batches.params, 4, torch.float32)
    optimizer = make(batches.params, subspace)

    def mean() -> Tensor:
        optimizer.zero_grad()
        losses = [batches.forward(i)() for i in range(3)]
        for loss in losses:
            loss.backward()
        for p in batches.params:
            p.grad.div_(3)
        nn.utils.clip_grad_norm_(batches.params, 1e3)
        nn.utils.clip_grad_value_(batches.params, 1e3)
        return sum(losses).detach() / 3

    losses = [float(optimizer.step(mean)) for _ in range(4)]
    assert losses[-1] < losses[0]


def other_loss(batches: Batches) -> Tensor:
    """An attack in a forward-only closure, whose backward leaves gradients of the weights."""
    x = batches.inputs[0].clone().requires_grad_()
    nn.functional.cross_entropy(batches.model(x), batches.targets[0]).backward()
    attacked = x.detach() + 0.5 * x.grad.sign()
    return nn.functional.cross_entropy(batches.model(attacked), batches.targets[0])


def other_derivative(batches: Batches) -> Tensor:
    """A penalty on derivatives taken by backward, which adds them to the gradients."""
    x = batches.inputs[0].clone().requires_grad_()
    batches.model(x).square().sum().backward(create_graph=True)
    return x.grad.square().sum()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("loss", [other_loss, other_derivative])
def test_gradients_that_are_not_those_of_the_loss(
    loss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer = PBFGS(batches.params, subspace)
    before = bits(batches.params)
    with pytest.raises(ValueError, match=r"not on the loss that it returns.*torch.autograd.grad"):
        optimizer.step(lambda: loss(batches))
    assert bits(batches.params) == before
    first = PSGD(batches.params, subspace, lr=0.01)
    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        for _ in range(2):
            first.step(lambda: loss(batches))
    assert caplog.text.count("not on the loss that it returns") == 1


@pytest.mark.parametrize("make", SEARCHING)
def test_a_graph_that_is_kept_is_of_the_loss(make: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = batches.forward(0)()
        (loss * 0.5).backward(retain_graph=True)
        (loss * 0.5).backward(retain_graph=True)
        return loss

    optimizer.step(closure)
    assert optimizer.status.moved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["PSGD", "InSubspace"])
def test_lightning_accumulates(name: str) -> None:
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    inputs = torch.randn(64, 6)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())

    class Module(lightning.LightningModule):
        def __init__(self, made: str) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.model, self.made = nn.Linear(6, 2), made

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return first_order(list(self.model.parameters()), self.made)

    runs = []
    for made in ("torch", name):
        module = Module(made)
        trainer = lightning.Trainer(
            max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=0.2, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        runs.append(flat(module.model.parameters()))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)
