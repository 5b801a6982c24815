"""P-BFGS: what it computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from optim_problems import Batches, bits, flat, published, random_subspace, whole_space
from published import PUBLISHED
from torch import Tensor, nn

from dldr_ext import PBFGS, Status, Subspace, ops

SEARCHES = ["armijo", "strong_wolfe"]
CURVATURES = ["same_batch", "consecutive"]


# The published algorithm.


@pytest.mark.parametrize(("seed", "dim"), [(0, 5), (1, 12), (2, 1)])
def test_published_algorithm_step_by_step(seed: int, dim: int) -> None:
    ours, theirs = Batches(seed), Batches(seed)
    subspace = random_subspace(ours.params, dim, seed=seed)
    optimizer = PBFGS(ours.params, subspace, **PUBLISHED)
    reference = published(theirs, subspace)
    calls = 0
    for step in range(25):
        loss = optimizer.step(ours.forward(step))
        assert float(loss) == pytest.approx(reference.step(theirs.forward(step)), rel=1e-8)
        assert not reference.failed
        assert optimizer.status is Status.ACCEPTED
        assert optimizer.closure_calls - calls == 1 + reference.trials
        calls = optimizer.closure_calls
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-7, atol=1e-8)
    assert ours.forward(0)().item() < 1.0


def test_published_algorithm_with_the_residual() -> None:
    ours, theirs = Batches(3), Batches(3)
    subspace = random_subspace(ours.params, 6)
    options = {"residual_lr": 0.05, "residual_momentum": 0.8}
    optimizer = PBFGS(ours.params, subspace, **PUBLISHED, **options)
    reference = published(theirs, subspace, **options)
    for step in range(40):  # past the step that computes the point anew
        optimizer.step(ours.forward(step))
        reference.step(theirs.forward(step))
        assert not reference.failed
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-6, atol=1e-7)
    outside = flat(ours.params) - subspace.origin - optimizer.theta @ subspace.basis
    assert torch.linalg.vector_norm(outside) > 0.1


def test_point_is_computed_anew_from_theta() -> None:
    """Else the rounding of many steps would carry the weights out of the subspace."""
    batches = Batches(0, dtype=torch.float32)
    subspace = random_subspace(batches.params, 6, torch.float32)
    # No search, so that every step is accepted.
    optimizer = PBFGS(batches.params, subspace, lr=1e-2, line_search_fn=None)
    same = []
    for step in range(64):
        optimizer.step(batches.forward(step))
        assert optimizer.status is Status.ACCEPTED
        expected = subspace.reconstruct(optimizer.theta)
        torch.testing.assert_close(flat(batches.params).float(), expected, rtol=1e-5, atol=1e-6)
        same.append(torch.equal(flat(batches.params).float(), expected))
    assert same[31] and same[63] and not all(same)


# Against SciPy, in the whole space.


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(x: Tensor) -> Tensor:
    scale = torch.logspace(0, 3, len(x), dtype=torch.float64)
    return 0.5 * (scale * (x - 1) ** 2).sum() + 0.1 * x.sum() ** 2


def logistic(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, len(x), dtype=torch.float64, generator=generator)
    labels = torch.where(features @ torch.ones_like(x) + 1 > 0, 1.0, -1.0).double()
    return nn.functional.softplus(-labels * (features @ x)).mean() + 0.01 * (x @ x)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("problem", "dim"), [(rosenbrock, 2), (rosenbrock, 8), (quadratic, 10), (logistic, 6)]
)
def test_reaches_scipys_optimum(
    problem: Callable[[Tensor], Tensor], dim: int, search: str, curvature: str
) -> None:
    start = torch.linspace(-1.2, 0.7, dim, dtype=torch.float64)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(x, requires_grad=True)
        value = problem(leaf)
        value.backward()
        return value.item(), leaf.grad.numpy()

    theirs = scipy.optimize.minimize(
        value_and_gradient, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-8}
    )
    x = nn.Parameter(start.clone())
    optimizer = PBFGS([x], whole_space([x]), line_search_fn=search, curvature=curvature)
    steps = 0
    while steps < 300 and (x.grad is None or x.grad.abs().max() > 1e-7):
        optimizer.step(lambda: problem(x))
        steps += 1
        x.grad = torch.autograd.grad(problem(x), x)[0]
    torch.testing.assert_close(x.detach(), torch.tensor(theirs.x), rtol=1e-5, atol=1e-5)
    # Each step begins with an evaluation that SciPy, with one fixed function, need not repeat.
    backtracks = 2 if search == "strong_wolfe" else 4
    assert optimizer.closure_calls - steps <= backtracks * theirs.nfev


@pytest.mark.parametrize("search", SEARCHES)
def test_exact_optimum_of_a_quadratic_in_a_random_subspace(search: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(5, 6, dtype=torch.float64, generator=generator))
    bias = nn.Parameter(torch.randn(7, dtype=torch.float64, generator=generator))
    root = torch.randn(37, 37, dtype=torch.float64, generator=generator)
    h = root @ root.T + torch.eye(37, dtype=torch.float64)
    q = torch.randn(37, dtype=torch.float64, generator=generator)
    subspace = random_subspace([weights, bias], 9)
    p, w0 = subspace.basis.T, subspace.origin

    def forward() -> Tensor:
        w = torch.cat([weights.reshape(-1), bias])
        return 0.5 * w @ h @ w + q @ w

    optimizer = PBFGS([weights, bias], subspace, line_search_fn=search)
    for _ in range(60):
        optimizer.step(forward)
    exact = -torch.linalg.solve(p.T @ h @ p, p.T @ (h @ w0 + q))
    torch.testing.assert_close(optimizer.theta, exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flat([weights, bias]), w0 + p @ exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_strong_wolfe_conditions_hold_at_accepted_points(curvature: str) -> None:
    batches = Batches(4)
    subspace = random_subspace(batches.params, 8)
    optimizer = PBFGS(
        batches.params, subspace, line_search_fn="strong_wolfe", curvature=curvature, c1=1e-3
    )

    def loss_and_coordinates(step: int) -> tuple[float, Tensor]:
        loss = batches.forward(step)()
        return loss.item(), subspace.basis @ flat(torch.autograd.grad(loss, batches.params))

    statuses = []
    for step in range(30):
        theta = optimizer.theta
        before, c = loss_and_coordinates(step)
        optimizer.step(batches.forward(step))
        statuses.append(optimizer.status)
        s = optimizer.theta - theta
        after, c_after = loss_and_coordinates(step)
        if optimizer.status.moved:
            assert after <= before + 1e-3 * float(c @ s) + 1e-12
        if optimizer.status is Status.ACCEPTED:
            assert abs(float(c_after @ s)) <= 0.9 * abs(float(c @ s)) + 1e-12
    assert statuses.count(Status.ACCEPTED) >= 25


# Closures.


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_both_styles_of_closure_give_the_same_bits(search: str | None, curvature: str) -> None:
    one, other = Batches(5), Batches(5)
    subspace = random_subspace(one.params, 7)
    options = {"line_search_fn": search, "curvature": curvature, "lr": 0.5}
    first = PBFGS(one.params, subspace, **options)
    second = PBFGS(other.params, subspace, **options)
    for step in range(15):
        a, b = first.step(one.forward(step)), second.step(other.usual(step))
        assert torch.equal(a, b) and not a.requires_grad and not b.requires_grad
        assert first.status is second.status
        assert bits(one.params) == bits(other.params)
    assert torch.equal(first.theta, second.theta)
    assert second.gradient_calls == second.closure_calls
    if search == "armijo" and curvature == "consecutive":
        assert first.gradient_calls < first.closure_calls


def test_a_closure_may_return_a_number() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    usual = batches.usual(0)
    assert isinstance(optimizer.step(lambda: usual().item()), float)
    assert optimizer.status is Status.ACCEPTED


def test_trials_of_a_forward_only_closure_build_no_graph() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), **PUBLISHED)
    for step in range(8):
        enabled: list[bool] = []
        forward = batches.forward(step)
        optimizer.step(lambda: enabled.append(torch.is_grad_enabled()) or forward())  # noqa: B023
        assert enabled == [True] + [False] * (len(enabled) - 1) and len(enabled) > 1
    assert optimizer.gradient_calls == 8


def test_same_batch_needs_no_extra_evaluation_where_the_trial_kept_its_graph() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), lr=0.5)
    counts = []
    for step in range(10):
        before = optimizer.closure_calls, optimizer.gradient_calls
        optimizer.step(batches.forward(step))
        counts.append((optimizer.closure_calls - before[0], optimizer.gradient_calls - before[1]))
    assert counts[0][0] >= 3  # nothing is known yet: a trial without a graph, then the gradient
    assert counts.count((2, 2)) >= 7  # gradient, accepted trial


def test_gradients_need_not_be_zeroed() -> None:
    one, other = Batches(1), Batches(1)
    subspace = random_subspace(one.params, 4)
    first, second = PBFGS(one.params, subspace), PBFGS(other.params, subspace)
    for step in range(4):
        for p in one.params:
            p.grad = torch.full_like(p, 100.0)
        first.step(one.forward(step))
        second.step(other.forward(step))
    assert bits(one.params) == bits(other.params)


# Learning rate, theta, weights.


def test_lr_is_the_first_trial_and_schedulers_change_it() -> None:
    batches = Batches(2)
    subspace = random_subspace(batches.params, 4)
    optimizer = PBFGS(batches.params, subspace, lr=0.25, c1=1e-6)
    optimizer.step(batches.forward(9))  # the first one may make its trial longer
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        b, theta = optimizer.state_dict()["subspace"]["inverse_hessian"], optimizer.theta
        loss = batches.forward(step)()
        c = optimizer.subspace.basis @ flat(torch.autograd.grad(loss, batches.params))
        optimizer.step(batches.forward(step))
        torch.testing.assert_close(optimizer.theta - theta, -(0.25 * 0.5**step) * (b @ c))
        schedule.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_stay_in_the_subspace(dtype: torch.dtype) -> None:
    """Over a hundred steps rounding does not carry the weights away from origin + P theta."""
    batches = Batches(3, dtype=torch.float32)
    subspace = random_subspace(batches.params, 5, dtype=dtype)
    optimizer = PBFGS(batches.params, subspace, lr=0.3, line_search_fn=None)
    for step in range(100):
        optimizer.step(batches.forward(step))
    assert optimizer.theta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    there = subspace.origin.double() + optimizer.theta.double() @ subspace.basis.double()
    torch.testing.assert_close(flat(batches.params), there, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_models_of_mixed_dtypes(basis_dtype: torch.dtype) -> None:
    batches = Batches(6, dtype=torch.float32)
    model = batches.model
    model[0].weight.data = model[0].weight.data.bfloat16()
    model[2].weight.data = model[2].weight.data.half()
    model[2].bias.data = model[2].bias.data.double()

    def forward() -> Tensor:
        x = torch.tanh(batches.inputs[0] @ model[0].weight.float().T + model[0].bias)
        x = x @ model[2].weight.float().T + model[2].bias.float()
        return nn.functional.cross_entropy(x, batches.targets[0])

    optimizer = PBFGS(batches.params, random_subspace(batches.params, 9, dtype=basis_dtype))
    losses = [float(optimizer.step(forward)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    dtypes = [p.dtype for p in batches.params]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float16, torch.float64]


def test_a_quantised_subspace_works() -> None:
    batches = Batches(7, dtype=torch.float32)
    subspace = random_subspace(batches.params, 6, dtype=torch.float32).quantize("int8")
    optimizer = PBFGS(batches.params, subspace)
    losses = [float(optimizer.step(batches.forward(0))) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(
        flat(batches.params).float(), subspace.reconstruct(optimizer.theta), rtol=1e-5, atol=1e-5
    )


def test_frozen_unused_and_tied_parameters() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "frozen": nn.Linear(4, 4),
            "first": nn.Linear(4, 4),
            "unused": nn.Linear(3, 3),
            "second": nn.Linear(4, 4),
        }
    ).double()
    model["frozen"].requires_grad_(False)
    model["second"].weight = model["first"].weight
    trained = [*model["first"].parameters(), *model["unused"].parameters(), model["second"].bias]
    x = torch.randn(10, 4, dtype=torch.float64)

    def forward() -> Tensor:
        return model["second"](torch.tanh(model["first"](model["frozen"](x)))).square().mean()

    untouched = bits(model["frozen"].parameters())
    subspace = random_subspace(trained, 6)
    optimizer = PBFGS(model.parameters(), subspace)
    losses = [float(optimizer.step(forward)) for _ in range(10)]
    assert losses[-1] < losses[0] and bits(model["frozen"].parameters()) == untouched
    there = subspace.reconstruct(optimizer.theta)
    torch.testing.assert_close(flat(trained), there, rtol=1e-10, atol=1e-10)


def test_channels_last_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(5, 3, 3, 3).to(memory_format=layout))
        optimizer = PBFGS([weight], random_subspace([weight], 4, dtype=torch.float32))
        dense = lambda w=weight: nn.functional.conv2d(x, w.contiguous()).square().mean()  # noqa: E731
        for _ in range(5):
            optimizer.step(dense)
        assert weight.is_contiguous(memory_format=layout)
        results.append(weight.detach().contiguous())
    assert torch.equal(*results)


# Ends that move nothing, and ends without a search.


def test_zero_gradient_is_convergence() -> None:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]))
    assert optimizer.status is Status.INITIAL
    optimizer.step(lambda: x.square().sum())
    assert optimizer.status is Status.CONVERGED and not optimizer.status.moved
    assert optimizer.closure_calls == 1 and not x.any()


def test_a_loss_that_none_of_the_parameters_is_part_of() -> None:
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]))
    with pytest.raises(ValueError, match=r"PBFGS: closure: .* depends on none of them"):
        optimizer.step(lambda: other.square().sum())
    assert bits([x]) == bits([torch.ones(3).double()])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_without_a_search_the_step_is_lr(curvature: str) -> None:
    x = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=0.1, line_search_fn=None, curvature=curvature)
    optimizer.step(lambda: x.square().sum())
    torch.testing.assert_close(x.detach(), torch.tensor([1.6, -0.8], dtype=torch.float64))
    assert optimizer.closure_calls == (2 if curvature == "same_batch" else 1)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(lambda: x.square().sum())  # H is exact now
    torch.testing.assert_close(x.detach(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_a_schedule_may_end_at_zero(search: str | None) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), line_search_fn=search)
    optimizer.param_groups[0]["lr"] = 0.0
    before = bits(batches.params)
    optimizer.step(batches.forward(0))
    assert bits(batches.params) == before and not optimizer.theta.any()


def test_a_direction_that_does_not_descend_resets_h() -> None:
    x = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=0.1)
    state = optimizer.state_dict()
    state["subspace"]["inverse_hessian"] = -torch.eye(2, dtype=torch.float64)
    state["subspace"]["fresh"] = False
    optimizer.load_state_dict(state)
    optimizer.step(lambda: x.square().sum())
    assert optimizer.status is Status.ACCEPTED
    # The gradient is downhill again; 0.1 of it is too short, and two slopes give the minimiser.
    torch.testing.assert_close(x.detach(), torch.zeros(2, dtype=torch.float64))


def test_negative_curvature_is_damped() -> None:
    """Between a maximum and a minimum y.s < 0; H stays positive definite and the loss falls."""
    x = nn.Parameter(torch.tensor([0.1, 0.05], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]))
    losses = []
    for _ in range(40):
        losses.append(float(optimizer.step(lambda: x.cos().sum())))
        b = optimizer.state_dict()["subspace"]["inverse_hessian"]
        assert torch.linalg.eigvalsh(b)[0] > 0
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(-2.0)
    torch.testing.assert_close(x.detach().cos(), -torch.ones(2, dtype=torch.float64))


def test_two_passes_over_the_basis_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many trials: the last step's pair and the residual travel with other passes."""
    passes: list[str] = []
    for name in ops.__all__:
        real = getattr(ops, name)

        def counted(*args: object, real: object = real, name: str = name, **kwargs: object):
            if any(a is subspace.basis for a in args):
                lists = f" {len(args[1])}" if name == "project_many" else ""
                passes.append(name + lists)
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    single, both, three = [[f"project_many {k}", "reconstruct_"] for k in (1, 2, 3)]
    alone, outside, decayed = [[f"project_many {k}", "reconstruct_residual"] for k in (1, 2, 3)]
    for options, first, expected in (
        (PUBLISHED, single, single),
        ({}, single, both),
        ({"line_search_fn": "strong_wolfe"}, single, both),
        ({"weight_decay": 0.1}, both, three),
        ({"max_iter": 2}, single * 2, [*both, *single]),
        ({"residual_lr": 0.1}, alone, outside),
        ({"residual_lr": 0.1, "weight_decay": 0.1}, outside, decayed),
    ):
        batches = Batches(0)
        subspace = random_subspace(batches.params, 4)
        optimizer = PBFGS(batches.params, subspace, **options)
        for step in range(6):
            passes.clear()
            optimizer.step(batches.forward(step))
            assert passes == (expected if step else first), options


@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe", "residual_lr": 0.01}])
def test_learning_in_the_next_step_changes_no_bit(options: dict) -> None:
    """Saving makes the last pair count at once; what the caller does to p.grad does not matter."""
    results = []
    for saves in (False, True):
        batches = Batches(3)
        optimizer = PBFGS(batches.params, random_subspace(batches.params, 5), **options)
        for step in range(12):
            if saves:
                initial = optimizer.state_dict()["subspace"]["inverse_hessian"]
                assert step == 0 or not torch.equal(initial, torch.eye(5, dtype=torch.float64))
            else:
                for p in batches.params:
                    if p.grad is not None:
                        p.grad.fill_(torch.nan)
            optimizer.step(batches.forward(step))
        results.append([bits(batches.params), optimizer.state_dict()["subspace"]])
    (one, left), (two, right) = results
    assert one == two
    assert torch.equal(left["inverse_hessian"], right["inverse_hessian"])


def test_steps_are_deterministic_for_any_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            batches = Batches(8)
            optimizer = PBFGS(batches.params, random_subspace(batches.params, 6))
            for step in range(10):
                optimizer.step(batches.forward(step))
            results.append(bits(batches.params))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_subspace_from_another_origin_moves_the_model() -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 3)
    moved = Subspace(subspace.basis, subspace.origin + 1.0)
    optimizer = PBFGS(batches.params, moved)
    assert torch.equal(flat(batches.params), moved.origin)
    assert torch.equal(optimizer.theta, torch.zeros(3, dtype=torch.float64))
