"""A model as a function of theta."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dldr_ext import Subspace
from dldr_ext.subspace.parametrize import SubspaceModule


class Net(nn.Module):
    """Convolution, batch norm, dropout, tied and frozen weights."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
        )
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(16, 3)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x, *, twice=1):
        x = self.features(x).mean(1).flatten(1)
        return twice * self.frozen(torch.tanh(self.two(torch.tanh(self.one(x)))))


def example(dtype=torch.float32, dim=5, names=True):
    model = Net().to(dtype)
    listed = model.named_parameters() if names else model.parameters()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return model, Subspace.random(listed, dim, dtype=wide)


def inputs(dtype=torch.float32):
    return torch.randn(6, 1, 4, 4, dtype=dtype)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_theta_is_the_only_parameter():
    model, subspace = example()
    module = subspace.parametrize(model)
    assert isinstance(module, SubspaceModule)
    assert [name for name, _ in module.named_parameters()] == ["theta"]
    assert sum(p.numel() for m in module.modules() for p in m.parameters(recurse=False)) == 5
    assert module.theta.shape == (5,) and not module.theta.any()
    assert "Net, Subspace(dim=5" in repr(module)
    frozen = model.frozen.weight
    assert subspace.numel == sum(p.numel() for p in model.parameters()) - frozen.numel()


@pytest.mark.parametrize("names", [True, False])
def test_output_is_that_of_the_reconstructed_weights(names):
    model, subspace = example(names=names)
    module = subspace.parametrize(model).eval()
    x, theta = inputs(), torch.randn(5)
    assert torch.equal(module(x), model(x))
    module.theta.data.copy_(theta)
    output = module(x, twice=2)
    with pytest.raises(AssertionError):  # theta does matter
        torch.testing.assert_close(output, model(x, twice=2))
    subspace.reconstruct_(model.parameters(), theta)
    assert torch.equal(output, model(x, twice=2))


def test_own_weights_stay_until_write_back():
    model, subspace = example()
    module = subspace.parametrize(model)
    before = [p.detach().clone() for p in model.parameters()]
    module.theta.data.normal_()
    module(inputs()).sum().backward()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None
    frozen = model.frozen.weight.clone()
    assert module.write_back() is model
    expected = subspace.reconstruct(module.theta.detach())
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in trainable(model)]), expected)
    assert torch.equal(model.frozen.weight, frozen)
    assert model.one.weight is model.two.weight


def test_gradient(threads):
    threads(1)
    model, subspace = example(torch.float64)
    module = subspace.parametrize(model).eval()
    x = inputs(torch.float64)
    weights = torch.randn(6, 3, dtype=torch.float64)

    def loss(theta):
        pieces = subspace.reconstruct(theta).split([p.numel() for p in trainable(model)])
        values = {
            name: piece.view(model.get_parameter(name).shape)
            for name, piece in zip(subspace.names, pieces, strict=True)
        }
        return (functional_call(model, values, (x,)) * weights).sum()

    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, theta)
    module.theta.data.copy_(theta)
    (module(x) * weights).sum().backward()
    torch.testing.assert_close(module.theta.grad, torch.autograd.grad(loss(theta), theta)[0])


def test_gradient_is_the_projected_gradient():
    model, subspace = example()
    module = subspace.parametrize(model).eval()
    x = inputs()
    module(x).square().sum().backward()
    model(x).square().sum().backward()
    expected = subspace.project([p.grad for p in trainable(model)])
    torch.testing.assert_close(module.theta.grad, expected)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", torch.bfloat16], ids=str)
def test_small_bases(kind):
    model, subspace = example()
    subspace = subspace.quantize(kind) if isinstance(kind, str) else subspace.to(dtype=kind)
    module = subspace.parametrize(model).eval()
    assert module.theta.dtype == torch.float32
    module(inputs()).sum().backward()
    assert module.theta.grad.isfinite().all() and module.theta.grad.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5),
    ],
    ids=["SGD", "Adam", "LBFGS"],
)
def test_any_optimizer_finds_the_optimum_in_the_subspace(make, threads):
    """Least squares: the optimum over theta is that of a small linear system."""
    threads(1)
    model = nn.Linear(8, 3, bias=False).double()
    subspace = Subspace.random(model.parameters(), 4, dtype=torch.float64)
    x, y = torch.randn(50, 8).double(), torch.randn(50, 3).double()
    columns = torch.stack([(x @ row.view(3, 8).T).reshape(-1) for row in subspace.basis], 1)
    rest = (y - x @ subspace.origin.view(3, 8).T).reshape(-1)
    best = torch.linalg.lstsq(columns, rest).solution
    module = subspace.parametrize(model)
    optimizer = make(module.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(200):
        optimizer.step(closure)
    torch.testing.assert_close(module.theta.detach(), best, rtol=1e-3, atol=1e-3)


def test_batch_norm_updates_the_buffers_of_the_model():
    model, subspace = example()
    twin = copy.deepcopy(model)
    module = subspace.parametrize(model)
    x = inputs()
    module(x)
    twin(x)
    assert int(model.features[1].num_batches_tracked) == 1
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)
    module.eval()
    module(x)
    assert int(model.features[1].num_batches_tracked) == 1
    assert [name for name, _ in module.named_buffers()] == [
        f"model.{name}" for name, _ in model.named_buffers()
    ]
    assert next(module.buffers()).data_ptr() == next(model.buffers()).data_ptr()


def test_train_and_eval():
    model, subspace = example()
    model.eval()
    module = subspace.parametrize(model)
    assert not module.training
    x = inputs()
    assert torch.equal(module(x), module(x))
    module.train()
    assert model.features[3].training and module.training
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert not model.features[3].training


def test_parameters_in_half_precision():
    model, subspace = example(torch.bfloat16)
    assert subspace.origin.dtype == torch.float32
    module = subspace.parametrize(model).eval()
    output = module(inputs(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.theta.grad.dtype == torch.float32 and module.theta.grad.any()


def test_casts_act_on_the_model_and_not_on_theta():
    model, subspace = example()
    module = subspace.parametrize(model).eval()
    module.theta.data.normal_()
    theta = module.theta.detach().clone()
    module.bfloat16()
    assert model.one.weight.dtype == torch.bfloat16
    assert module.theta.dtype == torch.float32 and torch.equal(module.theta, theta)
    assert module(inputs(torch.bfloat16)).dtype == torch.bfloat16
    module.double()
    assert model.one.weight.dtype == torch.float64 and torch.equal(module.theta, theta)
    module(inputs(torch.float64)).sum().backward()
    assert module.to("cpu") is module and module.subspace is subspace


def test_state_dict_round_trip():
    model, subspace = example()
    module = subspace.parametrize(model)
    module.theta.data.normal_()
    for _ in range(3):
        module(inputs())
    state = copy.deepcopy(module.state_dict())
    norm = [f"model.features.1.{key}" for key in nn.BatchNorm2d(4).state_dict()][2:]
    assert list(state) == ["theta", *norm]
    other_model = Net()
    other_model.load_state_dict(model.state_dict())
    for buffer in other_model.buffers():
        buffer.zero_()
    other = subspace.parametrize(other_model)
    assert other.load_state_dict(state).missing_keys == []
    x = inputs()
    assert torch.equal(module.eval()(x), other.eval()(x))
    # and inside another module
    outer, inner = nn.Sequential(module), nn.Sequential(other)
    with torch.no_grad():
        module.theta.add_(1)
    inner.load_state_dict(outer.state_dict())
    assert torch.equal(other.theta, module.theta)


def test_state_dicts_that_do_not_fit():
    model, subspace = example()
    module = subspace.parametrize(model)
    state = module.state_dict()
    mean = "model.features.1.running_mean"
    changes = [
        ({k: v for k, v in state.items() if k != mean}, f'Missing key.*"{mean}"'),
        ({k: v for k, v in state.items() if k != "theta"}, 'Missing key.*"theta"'),
        (dict(state, **{"model.more": torch.ones(1)}), 'Unexpected key.*"model.more"'),
        (dict(state, **{mean: torch.ones(3)}), f"size mismatch for {mean}: .*3.*4"),
        (dict(state, theta=torch.ones(3)), "size mismatch for theta"),
    ]
    for changed, message in changes:
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            module.load_state_dict(changed)
    partial = {k: v for k, v in state.items() if k != mean}
    assert module.load_state_dict(partial, strict=False).missing_keys == [mean]


def test_deep_copies_are_apart():
    model, subspace = example()
    module = subspace.parametrize(model)
    twin = copy.deepcopy(module)
    twin.theta.data.normal_()
    twin.write_back()
    assert twin.model is not model and not torch.equal(twin.model.one.bias, model.one.bias)
    assert not module.theta.any()


def test_recurrent_models():
    model = nn.LSTM(3, 4, batch_first=True)
    subspace = Subspace.random(model.named_parameters(), 6)
    module = subspace.parametrize(model)
    module.theta.data.normal_()
    x = torch.randn(2, 5, 3)
    output, _ = module(x)
    output.sum().backward()
    assert module.theta.grad.any()
    module.write_back()
    torch.testing.assert_close(model(x)[0], output)


def test_channels_last_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    subspace = Subspace.random(model.parameters(), 4)
    module = subspace.parametrize(model)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(module(x), model(x))
    module.theta.data.normal_()
    output = module(x)
    module.write_back()
    torch.testing.assert_close(output, model(x))


def test_order_follows_the_names_of_the_subspace():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    subspace = Subspace.random(list(model.named_parameters())[::-1], 2)
    assert subspace.names == ["b.weight", "a.weight"]
    module = SubspaceModule(model, subspace)
    assert torch.equal(module.weights()["a.weight"], model["a"].weight)
    module.theta.data.normal_()
    module.write_back()
    assert torch.equal(
        torch.cat([model["b"].weight.reshape(-1), model["a"].weight.reshape(-1)]),
        subspace.reconstruct(module.theta.detach()),
    )


def test_models_that_do_not_match():
    model, named = example()
    unnamed = Subspace(named.basis, named.origin, shapes=named.shapes)
    bare = Subspace(named.basis, named.origin)
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"trainable parameter features.0.weight, .* 0.weight, 0.b"
    ):
        named.parametrize(other)
    with pytest.raises(ValueError, match=r"model\[0\] .*: expected shape \(4, 1, 3, 3\)"):
        unnamed.parametrize(other)
    with pytest.raises(ValueError, match=r"expected \d+ trainable elements .*, got 8"):
        bare.parametrize(other)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        named.parametrize(3)
    bare.parametrize(model)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"the subspace has no parameter extra.weight"):
        named.parametrize(model)
    with pytest.raises(ValueError, match=r"expected \d+ tensors, .*shape \(1, 1\) is too many"):
        unnamed.parametrize(model)
    with pytest.raises(ValueError, match="model: expected device cpu, as the subspace, got meta"):
        Subspace.random(nn.Linear(2, 2).parameters(), 2).parametrize(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="model: expected at least one tensor"):
        bare.parametrize(nn.ReLU())


class _Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(x)


def test_a_forward_pass_that_writes_weights_is_refused() -> None:
    embedding = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(3, 2))
    subspace = Subspace.random(embedding.named_parameters(), 3)
    with pytest.raises(ValueError, match=r"model: 0.weight: .* got an embedding with max_norm=0.5"):
        subspace.parametrize(embedding)
    embedding[0].max_norm = None
    assert subspace.parametrize(embedding)(torch.zeros(4, 1, dtype=torch.int64)).shape == (4, 2)
    clamped = _Clamped()
    module = Subspace.random(clamped.named_parameters(), 3).parametrize(clamped)
    with pytest.raises(ValueError, match=r"model: expected weights .* got one that writes some"):
        module(torch.ones(1, 5))


def test_a_model_that_has_changed_since() -> None:
    def made() -> tuple[nn.Sequential, SubspaceModule]:
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        return model, Subspace.random(model.named_parameters(), 3).parametrize(model)

    x = torch.ones(1, 5)
    model, module = made()
    model[0].weight = nn.Parameter(torch.zeros(4, 5))  # found by name
    assert module(x).shape == (1, 2) and module.write_back()[0].weight.any()
    model.requires_grad_(False)  # theta alone trains anyway
    assert module(x).requires_grad
    module.write_back()
    model[1].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: 0.weight: expected requires_grad=True, .*False"):
        module(x)
    for change, message in (
        (
            lambda m: m.__setitem__(0, nn.Linear(5, 7)),
            r"0.weight: expected shape \(4, 5\), .* \(7, 5\)",
        ),
        (lambda m: setattr(m[0], "bias", None), r"0.bias: expected shape \(4,\), .* got no param"),
        (lambda m: m.pop(1), r"1.weight: expected shape \(2, 4\), .* got no parameter"),
    ):
        model, module = made()
        change(model)
        for call in (lambda m=module: m(x), module.write_back):
            with pytest.raises(ValueError, match=message):
                call()


def test_what_lies_in_the_memory_of_a_parameter_would_not_follow_theta() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    subspace = Subspace.random(model.named_parameters(), 3)
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match=r"model: 1.weight: expected memory of its own, got that"):
        subspace.parametrize(model)
    model[1].weight.data = torch.zeros(4, 4)
    model.register_buffer("row", model[0].weight.data[2])
    with pytest.raises(ValueError, match=r"model: row: expected memory of its own"):
        subspace.parametrize(model)
    flat = torch.zeros(32)
    model[0].weight.data, model[1].weight.data = (half.view(4, 4) for half in flat.split(16))
    model.row = torch.zeros(4)
    assert subspace.parametrize(model)(torch.ones(1, 4)).shape == (1, 4)
