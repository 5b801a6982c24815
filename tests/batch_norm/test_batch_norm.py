"""Statistics of the weights where a model stands, and everything else left as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dldr_ext import PBFGS, Subspace
from dldr_ext.batch_norm import reestimated


class Net(nn.Module):
    """A norm that is shared, one that has another momentum, one for instances, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
        self.drop, self.unused = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.passes = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.passes += 1
        x = self.second(self.first(self.plain(x)) + self.first(2 * x))
        return scale * self.drop(self.instance(x.reshape(-1, 3, 4)))


def state(model: nn.Module) -> list[Any]:
    """All that is to be left alone; buffers with the objects that they are."""
    return [
        (
            name,
            m.training,
            getattr(m, "momentum", None),
            [(key, id(b), None if b is None else b.tolist()) for key, b in m._buffers.items()],
            list(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    ]


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(6, 4) + i for i in range(count)]


def trained(model: nn.Module) -> nn.Module:
    """With statistics that are not those of a new model."""
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            buffer.copy_(torch.rand(buffer.shape) + 1 if "running" in key else torch.tensor(7))
    return model


def test_the_statistics_are_those_of_update_bn_and_the_rest_stays() -> None:
    net, given = trained(Net()), batches()
    reference, before = copy.deepcopy(net), state(net)
    random = torch.get_rng_state()
    with reestimated(net, iter(given)):
        assert net.passes == 3 and not any(m.training for m in net.modules())
        assert (net.first.momentum, net.second.momentum) == (0.1, None)
        found = dict(copy.deepcopy(net).named_buffers())
    assert state(net) == before and torch.equal(torch.get_rng_state(), random)  # no dropout
    reference.drop.p = 0.0
    with torch.no_grad():
        expected: dict[str, Tensor] = {}
        for x in given:  # torch has no cumulative average of instance norm
            x = reference.second(reference.first(reference.plain(x)) + reference.first(2 * x))
            groups = x.reshape(-1, 3, 4)
            for key, value in (
                ("instance.running_mean", groups.mean((0, 2))),
                ("instance.running_var", groups.var(2).mean(0)),
            ):
                expected[key] = expected.get(key, torch.zeros(3)) + value / len(given)
    update_bn(given, reference)
    expected |= {k: b for k, b in reference.named_buffers() if "instance" not in k}
    for key, value in expected.items():
        if key.startswith("unused"):  # what no batch reaches stays
            assert torch.equal(found[key], dict(net.named_buffers())[key]), key
        elif "instance" in key:
            torch.testing.assert_close(found[key], value)
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_is_that_of_these_weights(training: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
        expected = net(x)
    net.train(training)
    before = state(net)
    with reestimated(net, [x]), torch.no_grad():
        # But for n / (n - 1) in the variance, which is what torch keeps.
        torch.testing.assert_close(net(x), expected, rtol=0.02, atol=0.02)
        net.train()  # whatever is done inside
        net(5 * x)
    assert state(net) == before


@pytest.mark.parametrize("where", ["model", "batches", "body"])
def test_everything_is_put_back_after_an_error(where: str) -> None:
    net = trained(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)))
    before = state(net)

    def given() -> Iterator[Tensor]:
        yield torch.randn(6, 4)
        if where == "batches":
            raise KeyError(where)
        yield torch.randn(6, 3 if where == "model" else 4)

    expected = RuntimeError if where == "model" else KeyError
    with pytest.raises(expected), reestimated(net, given()):
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items() if "0." in k}, False)
        raise KeyError(where)
    assert [entry[1:] for entry in state(net)] == [entry[1:] for entry in before]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(x.double() if isinstance(x, Tensor) else x[0])


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(6)),
        lambda x: [x, torch.zeros(6)],
        lambda x: {"x": x, "labels": torch.zeros(6)},
        lambda x: UserDict(x=x),  # as the batches of transformers' tokenizers are
        lambda x: ({"x": x}, torch.zeros(6)),
        lambda x: ((x, 3), torch.zeros(6)),
    ],
)
def test_batches_come_in_many_forms(form: Any) -> None:
    net, x = Keywords().double(), torch.randn(6, 4, dtype=torch.float64)
    with reestimated(net, [form(x)]):
        torch.testing.assert_close(net.norm.running_mean, x.mean(0))


def test_batches_are_moved_to_the_model() -> None:
    net = nn.BatchNorm1d(4, device="meta")
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].device.type))
    with reestimated(net, [(torch.randn(6, 4), torch.zeros(6))]):
        assert seen == ["meta"]


def test_without_running_statistics_no_batch_is_read() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout())
    with reestimated(net, iter(lambda: pytest.fail("a batch was read"), None)):
        assert not net.training and not net[2].training
    assert net.training and net[2].training


def test_frozen_layers_keep_their_statistics() -> None:
    """In eval within a model in train: the loss is made with these statistics too."""
    net = trained(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    net[0].eval()
    kept, x = net[0].running_mean.clone(), torch.randn(6, 4)
    before = state(net)
    with reestimated(net, [x]):
        assert torch.equal(net[0].running_mean, kept)
        hidden = nn.functional.batch_norm(x, kept, net[0].running_var)
        torch.testing.assert_close(net[1].running_mean, hidden.mean(0))
    assert state(net) == before
    net[1].eval()
    with reestimated(net, iter(lambda: pytest.fail("a batch was read"), None)):
        pass


def test_bad_input() -> None:
    net, lazy = nn.BatchNorm1d(4), nn.Sequential(nn.LazyBatchNorm1d())
    used_up = iter(batches())
    list(used_up)
    for given, error, message in (
        ([], ValueError, "batches: expected at least one batch, got none"),
        (used_up, ValueError, r"got none \(a generator that was used up\?\)"),
        (
            torch.randn(6, 4),
            TypeError,
            r"an iterable of batches, got a tensor: \[inputs\]",
        ),
        (None, TypeError, "batches: expected an iterable of batches, got None"),
    ):
        before = state(net)
        with pytest.raises(error, match=message), reestimated(net, given):  # type: ignore[arg-type]
            pytest.fail("no statistics")
        assert state(net) == before
    with pytest.raises(ValueError, match="0: not initialised"), reestimated(lazy, batches()):
        pass
    assert lazy.training


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning")
def test_scripted_layers_are_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(TypeError, match=r"got 0 of torch.jit.script"), reestimated(scripted, []):
        pass


def test_a_compiled_model_is_not_compiled_anew() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    model, x = torch.compile(net, backend=backend), torch.randn(8, 4)
    with torch.no_grad():
        model(x)
        before = len(compiled)
        for _ in range(2):
            with reestimated(model, [x]):
                assert len(compiled) == before
                torch.testing.assert_close(net[1].running_mean, net[0](x).mean(0))
    assert net[1].num_batches_tracked == 1 and model.training and net.training


def problem() -> tuple[nn.Sequential, Any, Tensor]:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), torch.randn(32, 4)
    subspace = Subspace.random(net.named_parameters(), 4)
    return net, PBFGS(net.parameters(), subspace, buffers=net), x


def step(net: nn.Module, optimizer: Any, x: Tensor) -> None:
    net.train()
    optimizer.step(lambda: net(x).square().mean())


def said(log: pytest.LogCaptureFixture) -> int:
    count = sum("evaluated in eval() with running statistics" in text for text in log.messages)
    log.clear()
    return count


def test_an_evaluation_with_other_statistics_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer, x = problem()
    net.eval()(x)  # before there was a step
    step(net, optimizer, x)
    net(x)
    assert not said(caplog)
    step(net, optimizer, x)
    net.eval()(x)
    assert said(caplog) == 1 and not net[1]._forward_pre_hooks
    step(net, optimizer, x)
    net.eval()(x)
    assert not said(caplog)


def test_good_evaluations_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer, x = problem()
    for _ in range(2):
        step(net, optimizer, x)
        with reestimated(net, [x]):
            net(x)
        step(net, optimizer, x)
        update_bn([x], net)
        net.eval()(x)
    net.eval()
    optimizer.step(lambda: net(x).square().mean())  # trained with the running statistics
    net(x)
    with pytest.raises(KeyError):
        step(net.train(), optimizer, x)  # and fails inside
        optimizer.step(lambda: {}[net.eval()(x)])
    assert not said(caplog)


def test_the_hook_keeps_nothing_alive_and_is_in_nobodys_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, optimizer, x = problem()
    step(net, optimizer, x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert b"dldr_ext" not in pickle.dumps(other) + pickle.dumps(net)
        other.eval()(x)
    both, its_optimizer = copy.deepcopy((net, optimizer))
    step(both, its_optimizer, x)
    assert not said(caplog)
    another = PBFGS(net.parameters(), optimizer.subspace, buffers=net, theta0="current")
    assert len(net[1]._forward_pre_hooks) == 1  # of the last one
    gone = weakref.ref(optimizer)
    step(net, another, x)
    del optimizer, another
    gc.collect()
    assert gone() is None
    net.eval()(x)
    assert said(caplog) == 1


def test_compiled_models_are_compiled_in_one_piece() -> None:
    torch._dynamo.reset()
    net, _, x = problem()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    optimizer = PBFGS(net.parameters(), Subspace.random(net.named_parameters(), 4), buffers=net)
    for _ in range(2):
        net.train()
        optimizer.step(lambda: compiled(x).square().mean())
        net.eval()
        compiled(x)
    assert optimizer.status.moved
    other = copy.deepcopy(net)
    assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), net(x))
