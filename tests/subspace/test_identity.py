"""IdentitySubspace: to the bit, or nearly, a `Subspace` whose basis is the identity matrix."""

import copy
import pickle

import pytest
import torch
from subspace_kinds import NAMES, SHAPES, Holder, N, flat, parameters
from torch.func import hessian, jacfwd, jacrev, vmap

from dldr_ext import PBFGS, PSGD, IdentitySubspace, InSubspace, Subspace


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def params(request):
    return parameters(request.param)


@pytest.fixture
def space(params):
    return IdentitySubspace(zip(NAMES, params, strict=True))


@pytest.fixture
def dense(space):
    basis = torch.eye(N, dtype=space.dtype)
    return Subspace(basis, space.origin, shapes=SHAPES, names=NAMES)


def test_it_has_what_a_subspace_has(space, dense):
    for name in ("dim", "numel", "device", "dtype", "coordinate_dtype", "spread", "shapes", "names",
                 "explained_variance_ratio", "singular_values", "choice"):  # fmt: skip
        assert getattr(space, name) == getattr(dense, name), name
    dtype = str(space.dtype).removeprefix("torch.")
    assert repr(space) == f"IdentitySubspace(dim={N}, dtype={dtype}, device=cpu)"
    assert space.digest() == dense.digest()
    for index in (0, 5, N - 1, -1):
        assert torch.equal(space.direction(index), dense.direction(index))
    with pytest.raises(IndexError):
        space.direction(N)


def test_passes(space, dense):
    theta = torch.randn(N, dtype=space.dtype)
    lists = [parameters(), [flat(parameters())], parameters(torch.float64)]
    close = torch.testing.assert_close
    for exact in (False, True):
        close(space.project(lists[0], exact=exact), dense.project(lists[0], exact=exact))
        close(space.coordinates(lists[0], exact=exact), dense.coordinates(lists[0]))
    close(space.nearest(lists[0]), dense.nearest(lists[0]))
    close(space.project([None, *lists[0][1:]]), dense.project([None, *lists[0][1:]]))
    close(space.project_many(lists), dense.project_many(lists))
    close(space.reconstruct(theta), dense.reconstruct(theta))
    close(*(s.combine_residual(theta, theta * 2, lists[0]) for s in (space, dense)))
    out = torch.empty_like(space.origin)
    for origin in (None, space.origin * 2):
        space.combine_(out, theta, origin)
        close(out, theta if origin is None else origin + theta)


def test_weights_are_written_rounded_once(space):
    params, theta = parameters(), torch.randn(N, dtype=space.dtype)
    params[1].data = params[1].data.bfloat16()
    space.reconstruct_(params, theta)
    expected = space.reconstruct(theta).split([p.numel() for p in params])
    for p, part in zip(params, expected, strict=True):
        assert torch.equal(p.detach(), part.view(p.shape).to(p.dtype))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's
def test_derivatives(space):
    theta, point = torch.randn(N, dtype=space.dtype), flat(parameters()).to(space.dtype)
    identity = torch.eye(N, dtype=space.dtype)
    for transform in (jacfwd, jacrev):
        assert torch.equal(transform(space.reconstruct)(theta), identity)
        assert torch.equal(transform(space.project)(point), identity)
        assert torch.equal(transform(space.coordinates)(point), identity)
    cubes = hessian(lambda theta: (space.reconstruct(theta) ** 3).sum())(theta)
    torch.testing.assert_close(cubes, torch.diag(6 * space.reconstruct(theta)))
    assert torch.equal(vmap(space.reconstruct)(theta[None])[0], space.reconstruct(theta))


def test_other_ways_to_have_it(space, dense, tmp_path):
    theta = torch.randn(N, dtype=space.dtype)
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space)), space.to("cpu")):
        assert torch.equal(other.reconstruct(theta), space.reconstruct(theta))
    assert space.to("cpu") is space and space.to(dtype=torch.float64).dtype == torch.float64
    assert space.to(dtype=torch.bfloat16).dtype == torch.float32
    assert torch.equal(space.to_dense().basis, dense.basis)
    in_8_bits = space.quantize("int8"), dense.quantize("int8")
    assert torch.equal(*(other.reconstruct(theta) for other in in_8_bits))
    space.save(tmp_path / "whole.safetensors")
    assert torch.equal(Subspace.load(tmp_path / "whole.safetensors").basis, dense.basis)
    moved = space.with_origin(parameters())
    assert not torch.equal(moved.origin, space.origin) and moved.names == NAMES
    module = space.parametrize(Holder(parameters(space.dtype)))
    assert module.theta.shape == (N,)


@pytest.mark.parametrize("make", [
    lambda params, space: PBFGS(params, space),
    lambda params, space: PBFGS(params, space, line_search_fn="strong_wolfe"),
    lambda params, space: PSGD(params, space, lr=0.1),
    lambda params, space: InSubspace(params, space, torch.optim.Adam, lr=0.1),
])  # fmt: skip
def test_optimizers_step_as_with_a_stored_basis(make, space, dense):
    ends = []
    for subspace in (space, dense):
        params = parameters(space.dtype)
        space.reconstruct_(params, torch.zeros(N, dtype=space.dtype))
        optimizer = make(list(zip(NAMES, params, strict=True)), subspace)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(((1 + p.numel()) * (p - 1).square()).sum() for p in params)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        ends.append(flat(params))
    torch.testing.assert_close(*ends)
    assert not torch.equal(ends[0], space.origin)


def test_bad_input():
    with pytest.raises(ValueError, match=r"params: expected 1 to 1024 elements in all, got 1025"):
        IdentitySubspace([torch.zeros(1025)])
    space = IdentitySubspace([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"theta: expected shape \(3,\) on cpu, got \(2,\) on cpu"):
        space.reconstruct(torch.zeros(2))
    with pytest.raises(TypeError, match=r"theta: expected a floating-point .*got torch.int64"):
        space.reconstruct(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected shape \(3,\)"):
        space.project([torch.zeros(4)])
    with pytest.raises(TypeError, match=r"tensors\[0\]: expected a tensor, got int"):
        space.project([3])
