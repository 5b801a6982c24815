"""What every kind of subspace does alike: one class of tests, run for each kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from samples import FLOATS
from subspace_kinds import (
    FORMATS,
    KINDS,
    NAMES,
    OF_RANKS,
    SHAPES,
    D,
    Holder,
    N,
    flat,
    has_8_bit_basis,
    parameters,
    values,
)
from torch import distributed as dist
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from dldr_ext import GroupedSubspace, ImplicitSubspace, Subspace
from dldr_ext.subspace.base import PER_DIRECTION


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[*KINDS, *OF_RANKS])
def space(request, device):
    if request.param in KINDS:
        return KINDS[request.param]()
    if device.type != "cpu":
        pytest.skip("ranks that share a GPU are tested in tests/cuda")
    request.getfixturevalue("one_rank")
    return OF_RANKS[request.param]()


def close(actual, expected, space, factor=1.0):
    tolerance = factor * (1e-12 if space.coordinate_dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def same(one, other, space):
    """To the bit on the CPU; a GPU may add in another order where a list is cut elsewhere."""
    if space.device.type == "cpu":
        assert torch.equal(one, other)
    else:
        close(one, other, space)


def theta_for(space):
    return torch.randn(D, dtype=space.coordinate_dtype)


def refuses_exact(space):
    if space.spans_ranks:
        name = type(space).__name__
        with pytest.raises(ValueError, match=f"exact: expected False for a {name}, got True"):
            space.project(parameters(), exact=True)
    return space.spans_ranks


def refuses_gradients(space):
    if space.spans_ranks:
        with pytest.raises(ValueError, match="theta: expected a tensor that needs no gradient"):
            space.reconstruct(theta_for(space).requires_grad_())
    return space.spans_ranks


class TestSubspace:
    def test_named_weights_in_another_order_are_refused(self, space):
        params = parameters(space.coordinate_dtype)
        named = list(zip(NAMES, params, strict=True))
        one = space.coordinates(named)
        same(one, space.coordinates(params), space)
        wrong = list(zip([NAMES[0], *NAMES[:0:-1]], params, strict=True))
        before = [p.detach().clone() for p in params]
        theta = torch.zeros(space.dim, dtype=space.coordinate_dtype)
        for call in (
            space.coordinates,
            space.nearest,
            space.with_origin,
            lambda params: space.reconstruct_(params, theta),
        ):
            with pytest.raises(ValueError, match=r"params\[1\]: expected the name values.1, as in"):
                call(wrong)
        assert all(map(torch.equal, params, before))
        tensors = [(name, p.detach()) for name, p in named]
        c = space.project([p for _, p in tensors])
        same(space.project(tensors), c, space)
        same(space.project({f"module.{name}": p for name, p in tensors}), c, space)
        other = [tensors[0], (NAMES[3], tensors[1][1]), *tensors[2:]]
        with pytest.raises(ValueError, match=r"tensors\[1\]: expected the name values.1, as in"):
            space.project(other)
        space.reconstruct_([(f"module.{name}", p) for name, p in named], theta)
        same(flat(params), space.reconstruct(theta), space)

    def test_attributes(self, space):
        assert (space.dim, space.numel) == (D, N)
        assert (space.shapes, space.names) == (SHAPES, NAMES)
        assert space.origin.shape == (N,) and space.device == space.origin.device
        assert values(space).shape == (D, N) and space.coordinate_dtype == space.origin.dtype
        assert repr(space).startswith(f"{type(space).__name__}(")
        assert "6" in repr(space) and f"numel={N}" in repr(space)
        assert "numbers each" in space.report()
        if space.singular_values is None:
            assert space.spread is None
        else:  # in proportion, whatever T is
            ratio = space.spread / space.singular_values
            torch.testing.assert_close(ratio, ratio[:1].expand(D))

    # Passes

    def test_project(self, space):
        params = parameters()
        c = space.project(params)
        assert c.dtype == space.coordinate_dtype
        close(c, values(space) @ flat(params).double(), space)
        same(space.project(flat(params)), c, space)
        same(space.project([flat(params)]), c, space)
        assert torch.equal(space.project(params, exact=False), c)

    def test_none_counts_as_zeros(self, space):
        params = parameters()
        listed = [None, params[1], None, *params[3:]]
        zeros = [
            torch.zeros_like(p) if t is None else t for p, t in zip(params, listed, strict=True)
        ]
        same(space.project(listed), space.project(zeros), space)

    def test_project_many(self, space):
        lists = [parameters(), [flat(parameters())], parameters(torch.float64)]
        for count in (1, 3):
            found = space.project_many(lists[:count])
            assert found.dtype == space.coordinate_dtype
            close(
                found, torch.stack([values(space) @ flat(g).double() for g in lists[:count]]), space
            )

    def test_reconstruct(self, space):
        params, theta = parameters(space.coordinate_dtype), theta_for(space)
        point = space.reconstruct(theta)
        assert point.dtype == space.origin.dtype
        close(point, space.origin.double() + theta.double() @ values(space), space)
        space.reconstruct_(params, theta)
        same(flat(params), point, space)
        assert params[0].is_contiguous(memory_format=torch.channels_last)
        target = torch.zeros_like(point)
        space.reconstruct_([target], theta)
        same(target, point, space)

    def test_parameters_of_several_dtypes_are_rounded_once(self, space):
        if space.coordinate_dtype == torch.float64:
            return  # torch rounds float64 to 16 bits twice
        params, theta = parameters(), theta_for(space)
        for p, dtype in zip(params, [*FLOATS, torch.float32], strict=True):
            p.data = p.data.to(dtype)
        space.reconstruct_(params, theta)
        expected = space.reconstruct(theta).split([p.numel() for p in params])
        for p, numbers in zip(params, expected, strict=True):
            same(p.detach(), numbers.view(p.shape).to(p.dtype), space)

    def test_direction(self, space):
        rows = values(space)
        for index in (0, 2, D - 1, -1, -D):
            direction = space.direction(index)
            assert direction.dtype == space.origin.dtype
            close(direction, rows[index], space)
            direction.fill_(7)
        assert torch.equal(values(space), rows)
        for index in (D, -D - 1):
            with pytest.raises(IndexError):
                space.direction(index)

    def test_combine(self, space):
        theta, moved, start = theta_for(space), torch.empty_like(space.origin), space.origin * 2
        space.combine_(moved, theta)
        close(moved, theta.double() @ values(space), space)
        space.combine_(moved, theta, start)
        close(moved, start.double() + theta.double() @ values(space), space)

    def test_combine_residual(self, space):
        theta, c, params = theta_for(space), theta_for(space), parameters()
        direction, residual = space.combine_residual(theta, c, params)
        close(direction, theta.double() @ values(space), space)
        close(residual, flat(params).double() - c.double() @ values(space), space)

    # Coordinates

    def test_coordinates(self, space):
        params = parameters()
        c = space.coordinates(params)
        difference = flat(params).double() - space.origin.double()
        close(c, values(space) @ difference, space)
        assert c.dtype == space.coordinate_dtype
        assert torch.equal(space.coordinates(iter(params)), c)
        same(space.coordinates(flat(params)), c, space)

    def test_coordinates_do_not_cancel(self, space):
        """P^T w - P^T w0 in float32 would lose a step of 1e-4 beside weights of 1e3."""
        space = space.with_origin(1e3 * space.origin)
        params = [(space.origin.double() + 0.1 * torch.randn(N, dtype=torch.float64)).float()]
        expected = values(space) @ (params[0].double() - space.origin.double())
        assert (space.coordinates(params).double() - expected).abs().max() < 1e-6

    def test_the_point_of_theta_gives_theta_back(self, space):
        params, theta = parameters(space.coordinate_dtype), theta_for(space)
        space.reconstruct_(params, theta)
        plain = (space.coordinates(params) - theta).abs().max()
        if has_8_bit_basis(space):
            assert plain > 1e-4
        gram = values(space) @ values(space).T
        if (gram - torch.eye(D, dtype=gram.dtype)).abs().max() < 1e-6:
            close(space.coordinates(params), theta, space)
        if refuses_exact(space):
            return
        close(space.coordinates(params, exact=True), theta, space, 0.5)
        expected = space.coordinates(params, exact=has_8_bit_basis(space))
        assert torch.equal(space.nearest(params), expected)

    def test_exact_coordinates_solve_with_the_gram_of_the_stored_rows(self, space):
        if refuses_exact(space):
            return
        g = torch.randn(N, dtype=torch.float64)
        expected = torch.linalg.lstsq(values(space).T, g[:, None]).solution[:, 0]
        c = space.project([g], exact=True)
        assert c.dtype == space.coordinate_dtype
        close(c, expected, space, 1 if isinstance(space, ImplicitSubspace) else 0.5)

    # Derivatives

    def test_derivatives(self, space):
        if refuses_gradients(space):
            return
        theta = theta_for(space).requires_grad_()
        g = torch.randn(N, dtype=space.coordinate_dtype, requires_grad=True)
        weights, row = torch.randn_like(g), theta_for(space)
        (space.reconstruct(theta) @ weights).backward()
        close(theta.grad, values(space) @ weights.double(), space)
        (space.project(g) @ row).backward()
        close(g.grad, row.double() @ values(space), space)
        if space.coordinate_dtype == torch.float64:
            check = torch.autograd.gradcheck
            assert check(space.reconstruct, theta)
            assert check(space.project, g)
            assert check(lambda g: space.project(g, exact=True), g, fast_mode=True)

    @pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's, under torch.compile
    def test_torch_func(self, space):
        """Both modes, second order and batches, of project, coordinates and reconstruct."""
        rows, theta = values(space), theta_for(space)
        params = [p.detach().to(space.coordinate_dtype) for p in parameters()]
        point = flat(params)

        def coordinates(w):
            return space.coordinates(w)

        def project(w):
            return space.project(w)

        if space.spans_ranks:
            refused = "expected a .*, since .* has no derivative"
            for function, x in (
                (coordinates, point), (project, point), (space.reconstruct, theta),
            ):  # fmt: skip
                for transform in (jacfwd, jacrev, vmap):
                    with pytest.raises(ValueError, match=refused):
                        transform(function)(x[None] if transform is vmap else x)
            return
        for function in (coordinates, project):
            close(jacfwd(function)(point), rows, space)
            close(jacrev(function)(point), rows, space)
            pair = torch.stack([point, -point])
            close(vmap(function)(pair)[1], function(-point), space)

        def exact(w):
            return space.coordinates(w, exact=True)

        with pytest.raises(ValueError, match="exact: expected G to be known within a transform"):
            jacrev(exact)(point)
        exact(point)
        close(jacrev(exact)(point), torch.linalg.pinv(rows.T), space, 10)

        def cubes(theta):
            return (space.reconstruct(theta) ** 3).sum()

        expected = 6 * (rows * space.reconstruct(theta).double()) @ rows.T
        close(hessian(cubes)(theta), expected, space, 10)
        close(vmap(grad(cubes))(theta[None])[0], grad(cubes)(theta), space)
        torch.compiler.reset()
        compiled = torch.compile(grad(cubes), backend="aot_eager")
        close(compiled(theta), grad(cubes)(theta), space)

    def test_coordinates_of_parameters_have_a_derivative(self, space):
        """As a penalty on the distance in the subspace needs it."""
        params = parameters(space.coordinate_dtype)
        c = space.coordinates(params)
        assert c.requires_grad
        with torch.no_grad():
            assert torch.equal(space.coordinates(params), c)
            assert not space.coordinates(params).requires_grad
        if space.spans_ranks:
            with pytest.raises(RuntimeError, match=r"Subspace.project has no derivative"):
                c.sum().backward()
            with pytest.raises(RuntimeError, match=r"Subspace.project has no derivative"):
                space.project(params).sum().backward()
            return
        c.sum().backward()
        close(flat(p.grad for p in params), values(space).sum(0), space)

    def test_what_keeps_or_writes_values_refuses_transforms(self, space):
        params, theta = parameters(space.coordinate_dtype), theta_for(space)
        before = flat(params)

        def write(theta):
            space.reconstruct_(params, theta)
            return theta.sum()

        with pytest.raises(ValueError, match=r"\w+: expected a plain tensor"):
            grad(write)(theta)
        assert torch.equal(flat(params), before)
        with pytest.raises(ValueError, match="with_origin: params: expected a plain tensor"):
            grad(lambda w: space.with_origin(w).origin.sum())(before)
        with pytest.raises(ValueError, match="nearest: params: expected a plain tensor"):
            vmap(space.nearest)(before[None])
        assert not space.nearest(params).requires_grad
        space.reconstruct_(params, theta.requires_grad_())  # of a leaf its values
        same(flat(params), space.to().reconstruct(theta.detach()), space)

    def test_parametrize(self, space):
        model = Holder(parameters())
        module, x = space.parametrize(model), parameters()
        assert [name for name, _ in module.named_parameters()] == ["theta"]
        assert module.theta.dtype == space.coordinate_dtype and not module.theta.any()
        module.theta.data.normal_()
        assert module.write_back() is model
        point = space.reconstruct(module.theta.detach())
        torch.testing.assert_close(flat(model.parameters()), point.float(), rtol=0, atol=0)
        if refuses_gradients(space):
            return
        module(x).backward()
        torch.testing.assert_close(
            module.theta.grad, space.project(x).detach(), rtol=1e-5, atol=1e-5
        )
        module.double()  # the model; the subspace is told to go where it is already
        assert module.subspace is space and module.theta.dtype == space.coordinate_dtype

    # The same subspace otherwise

    def test_with_origin(self, space):
        params, before = parameters(), space.origin.clone()
        moved = space.with_origin(params)
        assert type(moved) is type(space) and torch.equal(space.origin, before)
        assert torch.equal(moved.origin, flat(params).to(space.origin.dtype))
        assert torch.equal(moved.project(params), space.project(params))
        assert not moved.coordinates(params).any()
        assert (moved.shapes, moved.names) == (SHAPES, NAMES)
        assert moved.mean is None and moved.to(dtype=torch.float64).mean is None
        assert torch.equal(space.with_origin(flat(params)).origin, moved.origin)
        assert moved.digest() == space.digest()

    @pytest.mark.parametrize("name", FORMATS)
    def test_quantize(self, space, name):
        quantized = space.quantize(name)
        assert (quantized.shapes, quantized.names) == (SHAPES, NAMES)
        rows = values(space)
        assert (values(quantized) - rows).abs().max() < 0.1 * rows.abs().max()
        for known in PER_DIRECTION:
            before, after = getattr(space, known), getattr(quantized, known)
            assert (before is None and after is None) or torch.equal(before, after)
        with pytest.raises(ValueError, match=r"format: expected one of .*'int8'\], got 'int4'"):
            space.quantize("int4")

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_to_another_dtype(self, space, dtype):
        moved = space.to(dtype=dtype)
        double = dtype == torch.float64
        assert moved.coordinate_dtype == (torch.float64 if double else torch.float32)
        assert (moved.shapes, moved.names) == (SHAPES, NAMES)
        eps = max(torch.finfo(dtype).eps, 2e-7)
        torch.testing.assert_close(values(moved), values(space), rtol=eps, atol=eps * 1e-3)

    def test_to_the_same(self, space):
        moved = space.to(space.device)
        assert torch.equal(values(moved), values(space))
        if not space.spans_ranks:
            assert moved is space and space.to() is space
            assert torch.equal(values(copy.deepcopy(space)), values(space))

    def test_save_and_load(self, space, tmp_path):
        path, kind = tmp_path / "file.safetensors", Subspace
        space.save(path)
        if space.spans_ranks:
            path = tmp_path / "file-00001-of-00001.safetensors"
        if isinstance(space, GroupedSubspace):
            kind = GroupedSubspace
            with pytest.raises(ValueError, match="expected a subspace, found a grouped_subspace"):
                Subspace.load(path)
        assert [*Path(tmp_path).iterdir()] == [path]
        loaded = kind.load(path, device=space.device)
        if isinstance(space, ImplicitSubspace):
            space = space.to_dense()
        assert torch.equal(values(loaded), values(space))
        assert torch.equal(loaded.origin, space.origin)
        assert torch.equal(loaded.reconstruct(ones(space)), space.reconstruct(ones(space)))
        if not isinstance(space, type(loaded)):  # a file of ranks tells less
            return
        assert (loaded.shapes, loaded.names) == (SHAPES, NAMES)
        for known in PER_DIRECTION:
            before, after = getattr(space, known), getattr(loaded, known)
            assert (before is None and after is None) or torch.equal(before, after)

    # What is refused

    @pytest.mark.parametrize("call", ["project", "coordinates", "reconstruct_", "with_origin"])
    def test_lists_that_do_not_match(self, space, call):
        params = parameters()
        before = flat(params)

        def use(listed):
            theta = (ones(space),) if call == "reconstruct_" else ()
            getattr(space, call)(listed, *theta)

        with pytest.raises(
            ValueError, match=r"\[1\] \(values.1\): expected shape \(7,\).* got \(11, 5\)"
        ):
            use([params[0], params[2], params[1], *params[3:]])
        with pytest.raises(
            ValueError, match=r"expected 5 tensors, as in the subspace, got 4: .*values.4"
        ):
            use(params[:4])
        if not (space.spans_ranks and call == "project"):
            with pytest.raises(TypeError, match="expected a tensor, got int"):
                use([*params[:4], 3])
        if call != "project":
            device = space.device
            with pytest.raises(ValueError, match=rf"params: expected device {device}, .* got meta"):
                use([torch.ones(shape, device="meta") for shape in SHAPES])
        assert torch.equal(flat(params), before)

    def test_theta_that_does_not_match_writes_nothing(self, space):
        params = parameters()
        before = flat(params)
        for theta in (torch.ones(5), torch.ones(2, 3), torch.ones(6).int()):
            with pytest.raises((ValueError, TypeError), match="theta"):
                space.reconstruct_(params, theta)
            with pytest.raises((ValueError, TypeError), match="theta"):
                space.reconstruct(theta)
        assert torch.equal(flat(params), before)


def ones(space):
    return torch.ones(D, dtype=space.coordinate_dtype)
