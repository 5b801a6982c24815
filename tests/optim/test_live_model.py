"""Parameters that a model replaces, adds, freezes, resizes or ties after they were taken."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from dldr_ext import PBFGS, PSGD, InSubspace, Status, Subspace, Trajectory

Model = nn.Sequential


def _model() -> Model:
    torch.manual_seed(0)
    model = Model(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)
    return model


def _sgd(params: Any, subspace: Any) -> Any:
    return InSubspace(params, subspace, torch.optim.SGD, lr=0.1)


class _Recorder:
    """A trajectory with the face of an optimizer."""

    def __init__(self, params: Any, subspace: Subspace) -> None:
        self.trajectory = Trajectory(params)
        self.status = Status.ACCEPTED

    def step(self, closure: Any) -> None:
        self.trajectory.record()


MAKERS = [PBFGS, PSGD, _sgd, _Recorder]
LISTS: dict[str, Callable[[nn.Module], Any]] = {
    "generator": nn.Module.parameters,
    "named": nn.Module.named_parameters,
    "trainable alone": lambda m: [p for p in m.parameters() if p.requires_grad],
    "groups": lambda m: [{"params": list(m.parameters())}],
}


def _replace(m: Model) -> None:
    m[2].weight = nn.Parameter(torch.randn(4, 4))


def _assign(m: Model) -> None:
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)


def _convert(m: Model) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        m.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _replace_layer(m: Model) -> None:
    m[2] = nn.Linear(4, 4)


def _freeze(m: Model) -> None:
    m[2].requires_grad_(False)


def _unfreeze(m: Model) -> None:
    m[3].bias.requires_grad_(True)


def _resize(m: Model) -> None:
    m[2].weight.data = torch.randn(4, 5)


def _reshape(m: Model) -> None:
    m[0].weight.data = m[0].weight.data.view(5, 4)  # the same memory


def _add(m: Model) -> None:
    m[1].register_parameter("scale", nn.Parameter(torch.ones(1)))


def _add_layer(m: Model) -> None:
    m.append(nn.Linear(2, 2))


def _replace_frozen(m: Model) -> None:
    m[1] = nn.PReLU()  # for a module without parameters


def _tie(m: Model) -> None:
    m[2].weight.data = m[2].weight.data.clone()
    m[2].bias.data = m[0].bias.data


def _weight_norm(m: Model) -> None:
    nn.utils.parametrizations.weight_norm(m[2])


_CHANGES = {
    _replace: r"params\[2\]: expected the parameter that the model has, .* \(2.weight\)",
    _assign: r"params\[0\]: expected the parameter that the model has, .* \(0.weight\)",
    _convert: r"params\[0\]: expected the parameter that the model has, .* \(0.weight\)",
    _replace_layer: r"params\[2\]: expected the parameter that the model has, .* \(2.weight\)",
    _freeze: r"params\[2\]: expected requires_grad=True, .* got False \(2.weight\)",
    _unfreeze: r"params: expected requires_grad=False, .* got True \(3.bias\)",
    _resize: r"params\[2\]: expected shape \(4, 4\), .* got \(4, 5\) \(2.weight\)",
    _reshape: r"params\[0\]: expected shape \(4, 5\), .* got \(5, 4\) \(0.weight\)",
    _add: r"params: expected the trainable parameters that the model had .* got 1.scale too",
    _add_layer: r"params: expected the trainable parameters .* got 4.weight too",
    _replace_frozen: r"params: expected the trainable parameters .* got 1.weight too",
    _tie: r"params\[3\] .*expected memory of its own, got that of params\[1\]",
    _weight_norm: r"params\[2\]: expected the parameter that the model has, .* \(2.weight\)",
}


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("change", _CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_what_has_changed_is_named(make: Any, change: Callable[[Model], None], listed: str) -> None:
    model, x = _model(), torch.randn(16, 5)
    subspace = Subspace.random(LISTS[listed](model), 4)
    made = make(LISTS[listed](model), subspace)
    made.step(lambda: model(x).square().mean())
    held = list(model.parameters())  # as another optimizer does
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # it stays an error
        with pytest.raises(ValueError, match=_CHANGES[change]):
            made.step(lambda: model(x).square().mean())
    after = [p.detach() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and held


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_a_model_that_was_copied(make: Any) -> None:
    model, x = _model(), torch.randn(16, 5)
    made = make(model.parameters(), Subspace.random(model.parameters(), 4))
    made.step(lambda: model(x).square().mean())
    with torch.no_grad():
        model[0].weight.mul_(1.0)
    model = copy.deepcopy(model)
    gc.collect()
    if make is _Recorder:  # may be right: the weights were written to since the last time
        made.step(None)
    message = r"depends on none of them|whose model is gone: it was copied, .* \(0.weight\)"
    with pytest.raises(ValueError, match=message):
        made.step(lambda: model(x).square().mean())


def test_a_closure_that_calls_backward_for_a_copy() -> None:
    model, x = _model(), torch.randn(16, 5)
    optimizer = PBFGS(model.parameters(), Subspace.random(model.parameters(), 4))
    model = copy.deepcopy(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"PBFGS: closure: .* depends on none of them"):
        optimizer.step(closure)


def _rebind(m: Model) -> None:
    for p in m.parameters():
        p.data = p.data.clone()


def _channels_last(m: Model) -> None:
    m[2].weight.data = m[2].weight.data.T.contiguous().T


def _add_frozen(m: Model) -> None:
    m.register_parameter("extra", nn.Parameter(torch.ones(2), requires_grad=False))
    m.register_buffer("buffer", torch.ones(2))


def _prune(m: Model) -> None:
    prune.custom_from_mask(m[2], "weight", torch.ones(4, 4))  # the parameter moves to weight_orig


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _parametrize(m: Model) -> None:
    parametrize.register_parametrization(m[2], "weight", _Same())


def _wrap(m: Model) -> None:
    nn.DataParallel(m)
    m.append(nn.Identity())


def _move_layer(m: Model) -> None:
    layer = nn.Linear(4, 4)
    layer.weight, layer.bias = m[2].weight, m[2].bias
    m[2] = layer


@pytest.mark.parametrize(
    "change",
    [_rebind, _channels_last, _add_frozen, _prune, _parametrize, _wrap, _move_layer],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_the_same_parameters_go_on(make: Any, change: Callable[[Model], None]) -> None:
    model, x = _model(), torch.randn(16, 5)
    made = make(model.parameters(), Subspace.random(model.parameters(), 4))
    change(model)
    for _ in range(2):
        made.step(lambda: model(x).square().mean())
        assert made.status.moved


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_a_part_of_a_model_is_not_concerned_by_the_rest(make: Any) -> None:
    model, x = _model(), torch.randn(16, 5)
    head = list(model[2].parameters())
    made = make(head, Subspace.random(head, 4))
    model.append(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    model[3].bias.requires_grad_(True)
    made.step(lambda: model(x).square().mean())
    assert made.status.moved
    model[2].bias = None
    with pytest.raises(ValueError, match=r"params\[1\]: expected the parameter that the model"):
        made.step(lambda: model(x).square().mean())


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_memory_that_was_freed(make: Any) -> None:
    model, x = _model(), torch.randn(16, 5)
    made = make(model.parameters(), Subspace.random(model.parameters(), 4))
    model[2].weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[2\]: expected memory, .* freed \(2.weight\)"):
        made.step(lambda: model(x).square().mean())


@pytest.mark.parametrize("make", [PBFGS, PSGD, _sgd], ids=lambda m: m.__name__)
def test_nothing_goes_on_from_other_parameters(make: Any) -> None:
    model = _model()
    subspace = Subspace.random(model.parameters(), 4)
    optimizer = make(model.parameters(), subspace)
    saved = optimizer.state_dict()
    model[2].weight = nn.Parameter(torch.zeros(4, 4))
    for call in (
        optimizer.resync,
        lambda: optimizer.change_subspace(subspace),
        lambda: optimizer.load_state_dict(saved),
    ):
        with pytest.raises(ValueError, match=r"params\[2\]: expected the parameter that the model"):
            call()


class _Unhashable(type):
    """A metaclass as some packages have."""

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]


def test_odd_objects_of_the_process_are_in_nobodys_way() -> None:
    odd = [_Unhashable("Odd", (), {})(), nn.Module.__new__(nn.Module)]  # the second in the making
    assert Trajectory(_model().named_parameters()).record() == 0 and len(odd) == 2


def test_an_untied_weight_is_a_parameter_more() -> None:
    model, x = Model(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    model[1].weight = model[0].weight
    optimizer = PSGD(model.parameters(), Subspace.random(model.parameters(), 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(ValueError, match=r"got 1.weight too"):
        optimizer.step(lambda: model(x).square().mean())


def test_parameters_of_no_module_and_of_one_that_is_gone_train() -> None:
    loose = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    gone = nn.ParameterList(loose)
    optimizer = PBFGS(gone, Subspace.random(loose, 3))
    del gone
    gc.collect()
    for _ in range(2):
        optimizer.step(lambda: sum(p.exp().sum() for p in loose))
        assert optimizer.status.moved


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", [PBFGS, PSGD, _sgd])
def test_copies_of_model_and_optimizer_go_on(make: Any, copied: Callable[[Any], Any]) -> None:
    model, x = _model(), torch.randn(16, 5)
    options = {"buffers": model} if make is PBFGS else {}
    optimizer = make(model.parameters(), Subspace.random(model.parameters(), 4), **options)
    optimizer.step(lambda: model(x).square().mean())
    other, twin = copied((model, optimizer))
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
        twin.step(lambda: other(x).square().mean())
    assert torch.equal(optimizer.theta, twin.theta)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


class _Clamped(nn.Module):
    """A layer that clamps its weight in each forward pass."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.layer, self.most = nn.Linear(5, 2), most

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-self.most, self.most)
        return self.layer(x)


def _max_norm(most: float) -> nn.Module:
    return Model(nn.Embedding(10, 8, max_norm=most), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize("model", [_Clamped(0.1), _max_norm(0.5)], ids=["clamp", "max_norm"])
@pytest.mark.parametrize("make", [PBFGS, PSGD, _sgd], ids=lambda m: m.__name__)
def test_a_model_that_writes_its_weights_in_forward(make: Any, model: nn.Module) -> None:
    model = copy.deepcopy(model)
    x = torch.randint(10, (16, 1)) if isinstance(model, nn.Sequential) else torch.randn(16, 5)
    optimizer = make(model.parameters(), Subspace.random(model.parameters(), 4))
    message = r"closure: expected an evaluation that leaves .* writes params\[0\] \(.*weight\)"
    with pytest.raises(ValueError, match=f"{message}.*max_norm=None"):
        optimizer.step(lambda: model(x).square().mean())


def test_one_that_comes_to_write_them_in_a_trial_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = _Clamped(1.0), torch.randn(16, 5)
    optimizer = PBFGS(model.parameters(), Subspace.random(model.parameters(), 4), lr=100.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"writes params\[0\] \(weight\)"):
        optimizer.step(lambda: model(x).mean())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("model", [_Clamped(1e3), _max_norm(1e3)], ids=["clamp", "max_norm"])
def test_one_whose_limit_is_far_away_trains(model: nn.Module) -> None:
    x = torch.randint(10, (16, 1)) if isinstance(model, nn.Sequential) else torch.randn(16, 5)
    optimizer = PBFGS(model.parameters(), Subspace.random(model.parameters(), 4))
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
        assert optimizer.status.moved


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_norms_that_are_computed_from_weights_train() -> None:
    torch.manual_seed(0)
    model = Model(
        nn.utils.weight_norm(nn.Linear(5, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)),
    )
    x = torch.randn(16, 5)
    subspace = Subspace.random(model.named_parameters(), 6)
    optimizer = PBFGS(model.parameters(), subspace, buffers=model)
    for _ in range(4):
        optimizer.step(lambda: model(x).square().mean())
        assert optimizer.status.moved
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(flat, subspace.reconstruct(optimizer.theta))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["scripted", "traced", "in part"])
@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_scripted_and_traced_modules_train(make: Any, how: str) -> None:
    """Their lists of parameters are no dicts; a traced copy has those of the model."""
    plain, model, x = _model(), _model(), torch.ones(3, 5)
    if how == "in part":
        model[2] = torch.jit.script(model[2])
    else:
        model = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, x)
    losses = []
    for one in (plain, model):
        params = [p for p in one.parameters() if p.requires_grad]
        flat = torch.cat([p.detach().reshape(-1) for p in params])
        optimizer = make(params, Subspace(torch.eye(3, len(flat)), flat))
        for _ in range(3):
            optimizer.step(lambda one=one: one(x).square().mean())
        losses.append(one(x).square().mean())
    assert torch.equal(*losses)


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_a_model_made_in_inference_mode_is_refused(make: Any) -> None:
    with torch.inference_mode():
        model = _model()
    subspace = Subspace(torch.eye(2, 52), torch.zeros(52))
    with pytest.raises(ValueError, match=r"params\[0\]: .* made in torch.inference_mode: make or"):
        make([p for p in model.parameters() if p.requires_grad], subspace)
