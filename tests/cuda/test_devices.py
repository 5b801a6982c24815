"""Recording, subspaces and optimizers from end to end, on each kind of device."""

from __future__ import annotations

import pytest
import torch
from published import PUBLISHED
from torch import nn

from dldr_ext import (
    PBFGS,
    PSGD,
    GroupedSubspace,
    InSubspace,
    Status,
    Subspace,
    Trajectory,
    layer_groups,
    ops,
)

pytestmark = pytest.mark.usefixtures("device")
FORMATS = [torch.float32, torch.bfloat16, torch.float64, "int8", "float8_e4m3fn"]


class Problem:
    """A small network (dropout, batch norm, convolutions in channels_last) and one batch."""

    def __init__(self, dtype=torch.float32, dropout=0.0, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 36, 4),
        ).to(dtype=dtype, memory_format=torch.channels_last)
        self.inputs = torch.randn(64, 3, 6, 6, dtype=dtype)
        self.labels = self.inputs[:, :, :2, :2].sum((2, 3)).argmax(1)
        self.params = list(self.model.parameters())

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.inputs), self.labels)

    def record(self, dtype=torch.float32, count=12):
        """SGD from the initial weights, recorded; the model is back at the start after it."""
        trajectory = Trajectory(self.model.named_parameters(), count, dtype=dtype)
        optimizer = torch.optim.SGD(self.params, 0.2)
        for _ in range(count):
            trajectory.record()
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        start = trajectory.subspace(1)
        start.reconstruct_(self.params, start.origin.new_zeros(1))
        return trajectory


def subspace_of(problem, format):
    dtype = format if isinstance(format, torch.dtype) else torch.float32
    subspace = problem.record(dtype).subspace(6)
    return subspace if format == dtype else subspace.quantize(format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        PUBLISHED,
        {"line_search_fn": "strong_wolfe"},
        {"weight_decay": 1e-3, "max_iter": 2},
    ],
)
def test_pbfgs(format, options, device):
    problem = Problem()
    subspace = subspace_of(problem, format)
    assert subspace.basis.device.type == device.type
    optimizer = PBFGS(problem.params, subspace, buffers=problem.model, **options)
    first = float(optimizer.step(problem.loss))
    for _ in range(8):
        optimizer.step(problem.loss)
    assert problem.loss().item() < 0.8 * first
    assert optimizer.status in (Status.ACCEPTED, Status.DECREASED, Status.LINE_SEARCH_FAILED)
    # the weights stand where theta says
    own = torch.cat([p.detach().reshape(-1) for p in problem.params])
    there = subspace.reconstruct(optimizer.theta)
    assert torch.linalg.vector_norm(own - there) <= 1e-5 * torch.linalg.vector_norm(there)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_psgd(format):
    problem = Problem()
    optimizer = PSGD(problem.params, subspace_of(problem, format), lr=0.2)
    first = float(optimizer.step(problem.loss))
    for _ in range(30):
        optimizer.step(problem.loss)
    assert problem.loss().item() < 0.8 * first


def test_the_same_run_as_on_the_cpu(device):
    """float64: the devices differ by roundings only."""
    with torch.device("cpu"):
        there = Problem(torch.float64)
    here = Problem(torch.float64)
    here.model.load_state_dict(there.model.state_dict())
    here.inputs, here.labels = there.inputs.to(device), there.labels.to(device)
    losses = []
    for problem in (there, here):
        trajectory = problem.record(torch.float64)
        optimizer = PBFGS(problem.params, trajectory.subspace(5), buffers=problem.model)
        losses.append([float(optimizer.step(problem.loss)) for _ in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_trials_see_the_same_random_numbers():
    """Dropout draws on the device's generator."""
    problem = Problem(dropout=0.5)
    optimizer = PBFGS(problem.params, subspace_of(Problem(), torch.float32), buffers=problem.model)
    seen = []

    def closure():
        seen.append(torch.rand(4).tolist())
        return problem.loss()

    for _ in range(3):
        seen.clear()
        optimizer.step(closure)
        assert len(seen) > 1 and all(numbers == seen[0] for numbers in seen)


@pytest.mark.parametrize("options", [{}, {"curvature": "consecutive"}])
def test_trials_see_the_numbers_of_the_closures_own_generator(options, device):
    problem = Problem()
    optimizer = PBFGS(problem.params, subspace_of(problem, torch.float32), **options)
    generator, seen = torch.Generator(device).manual_seed(0), []

    def closure():
        seen.append(torch.rand(2, generator=generator, device=device).tolist())
        return problem.loss() * (1 + seen[-1][0])

    last = None
    for _ in range(4):
        seen.clear()
        optimizer.step(closure)
        assert len(seen) > 1 and all(numbers == seen[0] for numbers in seen) and seen[0] != last
        last = seen[0]


@pytest.mark.parametrize("options", [{}, {"curvature": "consecutive"}])
def test_the_callers_autocast_is_the_forward_passes_alone(options, device):
    runs = []
    for outer in (False, True):
        problem = Problem()
        optimizer = PBFGS(problem.params, subspace_of(problem, torch.float32), **options)

        def closure(problem=problem):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return problem.loss()

        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=outer):
            losses = [float(optimizer.step(closure)) for _ in range(5)]
        assert losses[-1] < losses[0]
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"curvature": "consecutive"}, PUBLISHED])
def test_derivatives_inside_the_loss(options):
    problem = Problem()
    optimizer = PBFGS(problem.params, subspace_of(problem, torch.float32), **options)

    def closure():
        inputs = problem.inputs.clone().requires_grad_()
        outputs = problem.model(inputs)
        (slope,) = torch.autograd.grad(outputs.logsumexp(1).sum(), inputs, create_graph=True)
        return nn.functional.cross_entropy(outputs, problem.labels) + slope.square().sum(1).mean()

    losses = [float(optimizer.step(closure)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_gradients_accumulated_before_a_closure():
    runs = []
    for accumulated in (False, True):
        problem = Problem()
        optimizer = PSGD(problem.params, subspace_of(problem, torch.float32), lr=0.2)

        def part(weight, problem=problem):
            loss = weight * problem.loss()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            if accumulated:
                part(0.75)
            optimizer.step(lambda part=part, a=accumulated: part(0.25 if a else 1.0))
        runs.append(torch.cat([p.detach().reshape(-1) for p in problem.params]))
        search = PBFGS(problem.params, optimizer.subspace)
        part(0.5)
        with pytest.raises(ValueError, match="virtual_batch"):
            search.step(lambda part=part: part(0.5))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_saved_and_resumed(tmp_path, device):
    pytest.importorskip("safetensors")
    problem = Problem()
    trajectory = problem.record(torch.bfloat16)
    trajectory.save(tmp_path / "trajectory.safetensors")
    again = Trajectory.load(tmp_path / "trajectory.safetensors", problem.model.named_parameters())
    assert torch.equal(again.snapshots, trajectory.snapshots)
    assert torch.equal(again.gram, trajectory.gram)
    subspace = again.subspace(5)
    subspace.save(tmp_path / "subspace.safetensors")
    loaded = Subspace.load(tmp_path / "subspace.safetensors", device=device)
    assert loaded.device.type == device.type and torch.equal(loaded.basis, subspace.basis)
    optimizer = PBFGS(problem.params, loaded, buffers=problem.model)
    for _ in range(3):
        optimizer.step(problem.loss)
    state, weights = optimizer.state_dict(), problem.model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    optimizer.step(problem.loss)
    expected = [p.detach().clone() for p in problem.params]
    problem.model.load_state_dict(weights)
    resumed = PBFGS(problem.params, loaded, buffers=problem.model, theta0="current")
    resumed.load_state_dict(state)
    resumed.step(problem.loss)
    for p, value in zip(problem.params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)


def test_parametrized_model(device):
    problem = Problem()
    subspace = subspace_of(problem, torch.float32)
    module = subspace.parametrize(problem.model)
    module(problem.inputs).square().sum().backward()
    assert module.theta.grad.device.type == device.type
    assert bool(module.theta.grad.isfinite().all()) and bool(module.theta.grad.any())


@pytest.mark.parametrize("orthonormal", ["pca", "qr"])
def test_from_snapshots_and_random(orthonormal, device):
    n = 33_333  # odd: rows are padded on CUDA
    points = torch.randn(9, n).cumsum(0)
    subspaces = [
        Subspace.from_snapshots(points, 5, orthonormal),
        Subspace.random([torch.randn(n)], 5, generator=torch.Generator(device).manual_seed(1)),
    ]
    for subspace in subspaces:
        gram = ops.gram(subspace.basis)
        assert (gram - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-5
        if device.type == "cuda":
            assert subspace.basis.stride(0) * 4 % 256 == 0
        for format in ("int8", "float8_e4m3fn"):
            small = subspace.quantize(format)
            g = torch.randn(n)
            c, exact = small.project(g), subspace.project(g)
            assert (c - exact).abs().max() <= 0.1 * torch.linalg.vector_norm(exact)


def test_a_subspace_moves_between_devices(device):
    subspace = Subspace.random([torch.randn(3_333)], 4)
    with torch.device("cpu"):
        there = subspace.to("cpu")
        back = there.to(device)
        assert there.device.type == "cpu" and torch.equal(back.basis, subspace.basis)
        theta = torch.randn(4)
    torch.testing.assert_close(
        there.reconstruct(theta), back.reconstruct(theta.to(device)).cpu(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_grouped_and_refreshed(format, device):
    """Several bases, whose origins are views that start anywhere, against one with zeros."""
    problem = Problem()
    groups = layer_groups(problem.model)
    spaces = [GroupedSubspace.random(problem.params, 4, groups) for _ in range(2)]
    blocks = torch.block_diag(*[one.basis for one in spaces[0].subspaces])
    dense = Subspace(blocks, spaces[0].origin)
    tensors = [torch.randn_like(p) for p in problem.params]
    theta = torch.randn(dense.dim)
    c = dense.project(tensors)
    torch.testing.assert_close(spaces[0].project(tensors), c, rtol=1e-4, atol=1e-4)
    expected = dense.reconstruct(theta)
    torch.testing.assert_close(spaces[0].reconstruct(theta), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        spaces[0].combine_residual(theta, c, tensors),
        dense.combine_residual(theta, c, tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    quantized = isinstance(format, str)
    spaces = [one.quantize(format) if quantized else one.to(dtype=format) for one in spaces]
    optimizer = PBFGS(problem.params, spaces[0], buffers=problem.model)
    first = optimizer.step(problem.loss).item()
    for _ in range(4):
        optimizer.step(problem.loss)
    optimizer.change_subspace(spaces[1].with_origin(problem.params))
    for _ in range(3):
        last = optimizer.step(problem.loss).item()
    assert last < first and optimizer.theta.device.type == device.type


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_new_tensors_do_not_follow_torchs_default_device(format):
    """`torch.set_default_device` is for users: what it names is not where the parameters are."""
    problem = Problem()
    with torch.device("meta"):
        subspace = subspace_of(problem, format)
        assert subspace.basis.device == problem.inputs.device
        for options in (
            {},
            PUBLISHED,
            {"residual_lr": 0.1},
            {"residual_lr": 0.1, "weight_decay": 1e-3},
        ):
            optimizer = PBFGS(problem.params, subspace, buffers=problem.model, **options)
            first = optimizer.step(problem.loss).item()
            for _ in range(3):
                optimizer.step(problem.loss)
            assert optimizer.theta.device == problem.inputs.device
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.resync()
            optimizer.step(problem.loss)
        sgd = PSGD(problem.params, subspace)
        assert sgd.step(problem.loss).item() == pytest.approx(first, rel=1e-3)
        assert sgd.status is Status.ACCEPTED
        for options in ({"optimizer": torch.optim.Adam}, {"optimizer": torch.optim.LBFGS}):
            inside = InSubspace(problem.params, subspace, **options)
            inside.step(problem.loss)
            inside.change_subspace(subspace.with_origin(problem.params))
            inside.step(problem.loss)
            assert inside.theta.device == problem.inputs.device and inside.status.moved
        points = torch.stack([subspace.reconstruct(row) for row in subspace.basis[:, :6].float()])
        for orthonormal in ("pca", "qr"):
            Subspace.from_snapshots(points, 3, orthonormal)
        generator = torch.Generator(problem.inputs.device)
        random = Subspace.random(problem.params, 3, generator=generator)
        random.quantize("int8").to(dtype=torch.bfloat16)


def test_demo(device):
    pytest.importorskip("sklearn")
    from dldr_ext.demo.methods import NAMES
    from dldr_ext.demo.run import Config, run

    results, plane = run(Config("digits", dim=4, epochs=2, device=str(device)), lambda *_: None)
    assert (results["config"]["device"] == "cpu") == (device.type == "cpu")
    assert len(results["runs"]) == len(NAMES) and plane is not None
    assert all(0 <= one["test_accuracy"] <= 1 for one in results["runs"])
