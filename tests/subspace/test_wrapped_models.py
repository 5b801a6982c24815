"""Models in wrappers, with frozen parameters of any kind, or not initialised yet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dldr_ext import (
    PBFGS,
    PSGD,
    GroupedSubspace,
    InSubspace,
    Subspace,
    Trajectory,
    layer_groups,
    weight_averaging_subspace,
)


class _Around(nn.Module):
    """A module around a model, as a LightningModule is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


_WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "module around": _Around,
    "DataParallel of compile": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "compile of DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "AveragedModel of DataParallel": lambda m: AveragedModel(nn.DataParallel(m)),
    "module around compile": lambda m: _Around(torch.compile(m, backend="eager")),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", _WRAPPERS)
def test_a_wrapped_model_is_the_model(kind: str, tmp_path: Path) -> None:
    model = _model()
    wrapped = _WRAPPERS[kind](copy.deepcopy(model))
    assert layer_groups(wrapped) == layer_groups(model) == [2, 2, 2]
    assert layer_groups(wrapped, depth=1) == layer_groups(model, depth=1) == [2, 4]

    subspace = Subspace.random(model.named_parameters(), 3)
    module, other = subspace.parametrize(wrapped), subspace.parametrize(model)
    x = torch.randn(5, 4)
    for m in (module, other):
        m.theta.data += 0.3
    assert torch.equal(module(x), other(x))
    module.write_back()
    moved = torch.cat([p.detach().reshape(-1) for p in wrapped.parameters()])
    assert torch.equal(moved, subspace.reconstruct(module.theta))

    back = Subspace.random(wrapped.named_parameters(), 3).parametrize(model)
    assert back.weights().keys() == dict(model.named_parameters()).keys()

    trajectory = Trajectory(model.named_parameters(), 3)
    trajectory.record()
    trajectory.save(tmp_path / "t")
    assert len(Trajectory.load(tmp_path / "t", wrapped.named_parameters())) == 1

    states = [m.state_dict() for m in (model, wrapped)]
    one = weight_averaging_subspace(states, model)
    two = weight_averaging_subspace(states, wrapped, groups=layer_groups(wrapped))
    assert torch.equal(one.origin, two.origin)


@pytest.mark.parametrize("kind", _WRAPPERS)
def test_optimizers_of_a_wrapped_model_take_the_subspace_of_the_model(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    wrapped, x = _WRAPPERS[kind](model), torch.randn(16, 4)
    named = list(wrapped.named_parameters())
    subspace = Subspace.random(model.named_parameters(), 4)
    for make in (PBFGS, PSGD):
        options = {"buffers": wrapped} if make is PBFGS else {}
        optimizer = make(named, subspace, theta0="current", **options)
        counted = [b.clone() for n, b in wrapped.named_buffers() if n.endswith("batches_tracked")]
        optimizer.step(lambda: wrapped(x).square().mean())
        assert optimizer.status.moved
        now = [b for n, b in wrapped.named_buffers() if n.endswith("batches_tracked")]
        assert all(bool(b == a + 1) for a, b in zip(counted, now, strict=True)) and now
        subspace.coordinates(named)
        with pytest.raises(
            ValueError, match=r"\[\d\]: expected the name .*, as in the subspace, got"
        ):
            make([named[0], named[2], named[1], *named[3:]], subspace)


@pytest.mark.parametrize("kind", _WRAPPERS)
def test_checkpoints_of_either_are_recorded_for_the_other(kind: str, tmp_path: Path) -> None:
    model = _model()
    wrapped = _WRAPPERS[kind](copy.deepcopy(model))
    rows = []
    for saved, asked in ((model, wrapped), (wrapped, model)):
        folder = tmp_path / type(saved).__name__
        folder.mkdir()
        for epoch in range(2):
            state = {k: v + epoch for k, v in saved.state_dict().items()}
            torch.save(state, folder / f"{epoch}.pt")
        rows.append(Trajectory.from_checkpoints(folder, asked).snapshots[1])
    assert all(bool((row == 1).all()) for row in rows) and rows


def test_other_models_are_still_told_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    subspace = Subspace.random(model.named_parameters(), 3)
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"trainable parameter 0.weight, as in the subspace; it"):
        subspace.parametrize(other)
    with pytest.raises(ValueError, match=r"expected the parameter a.weight, as in the model, got"):
        weight_averaging_subspace([model.state_dict()] * 2, other)


def _frozen(kind: str) -> Tensor:
    tensor = torch.ones(4, 4)
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "csr":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tensor.to_sparse_csr()
    if kind == "quantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    return tensor.to(getattr(torch, kind))


@pytest.mark.parametrize(
    "kind",
    ["uint8", "int8", "bool", "int64", "float8_e5m2", "float8_e4m3fn", "complex64", "sparse", "csr",
     "quantized"],
)  # fmt: skip
def test_frozen_parameters_of_any_kind_are_left_as_they_are(kind: str, tmp_path: Path) -> None:
    model = _model()
    model.register_parameter("base", nn.Parameter(_frozen(kind), requires_grad=False))
    named = list(model.named_parameters())
    trained = [pair for pair in named if pair[1].requires_grad]
    subspace = Subspace.random(named, 4)
    assert subspace.names == [name for name, _ in trained]
    assert Trajectory(named).names == subspace.names
    assert layer_groups(model) == [2, 2, 2]
    GroupedSubspace.random(named, 2, layer_groups(model))
    x = torch.randn(8, 4)
    assert subspace.parametrize(model)(x).shape == (8, 2)
    for make in (PBFGS, PSGD, lambda p, s: InSubspace(p, s, torch.optim.Adam)):
        optimizer = make(model.parameters(), subspace)
        optimizer.step(lambda: model(x).square().mean())
        assert optimizer.status.moved
    torch.save({k: v for k, v in model.state_dict().items() if k != "base"}, tmp_path / "1.pt")
    assert len(Trajectory.from_checkpoints(tmp_path, model)) == 1


def test_an_all_frozen_copy_keeps_what_can_have_been_trained() -> None:
    model = _model()
    model.register_parameter("base", nn.Parameter(_frozen("uint8"), requires_grad=False))
    names = Trajectory(model.named_parameters()).names
    assert Trajectory(copy.deepcopy(model).requires_grad_(False).named_parameters()).names == names


class _Pair(Tensor):
    """A tensor that holds others, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Pair(args[0].inner)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"got complex64; keep it as a real"),
        (
            nn.Parameter(torch.ones(2, 2).to_sparse()),
            "expected a dense tensor, got torch.sparse_coo",
        ),
        (nn.Parameter(torch.ones(2).to(torch.float8_e5m2)), "got float8_e5m2"),
        (nn.Parameter(torch.ones(2, dtype=torch.complex64).conj().imag), "flipped when it is read"),
        (nn.Parameter(_Pair(torch.ones(2))), "expected an ordinary tensor, got _Pair"),
    ],
)
def test_trainable_ones_that_are_no_real_numbers_are_refused(
    parameter: nn.Parameter, message: str
) -> None:
    model = _model()
    model.register_parameter("odd", parameter)
    subspace = Subspace.random(_model().parameters(), 2)
    for call in (
        lambda: Trajectory(model.named_parameters()),
        lambda: Subspace.random(model.named_parameters(), 2),
        lambda: subspace.parametrize(model),
        lambda: layer_groups(model),
        lambda: PBFGS(model.named_parameters(), subspace),
    ):
        with pytest.raises(TypeError, match=rf"(params|model)\[0\] \(odd\): .*{message}"):
            call()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_must_have_run(tmp_path: Path) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))

    model = lazy()
    subspace = Subspace.random(_model().parameters(), 2)
    torch.save(_model().state_dict(), tmp_path / "1.pt")
    named, missing = list(model.named_parameters()), r"\(1.weight\): not initialised yet: run the"
    for call in (
        lambda: Trajectory(named),
        lambda: Trajectory.from_checkpoints(tmp_path, model),
        lambda: Subspace.random(named, 2),
        lambda: GroupedSubspace.random(named, 2, [4]),
        lambda: subspace.parametrize(model),
        lambda: subspace.coordinates(named),
        lambda: layer_groups(model),
        lambda: weight_averaging_subspace([model.state_dict()] * 2, model),
        lambda: PBFGS(named, subspace),
        lambda: PSGD(named, subspace),
    ):
        with pytest.raises(ValueError, match=rf"^(\w+: )?(params|model)\[2\] {missing}"):
            call()
    model(torch.ones(1, 4))
    assert Trajectory(model.named_parameters()).numel == 35
