"""Derivatives of project and reconstruct: both modes, any order, batches; refused where none is."""

from __future__ import annotations

import pytest
import reference
import torch
from opcheck import check
from samples import QUANTIZED, STORAGE, make_list, make_sample, wide
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from dldr_ext import ops

raw = torch.ops.dldr_ext
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # torch's, under torch.compile
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # linearize
]
NO_GRADIENT = "basis: expected a tensor that needs no gradient"


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-3)


class Cubes:
    """sum_k w_k^3 of w = origin + P theta, and what its derivatives are."""

    def __init__(self, dtype, n=300, d=4):
        self.sample = make_sample(dtype, n, d)
        self.theta = self.sample.theta.to(wide(dtype))
        self.rows = reference.decode(self.sample.basis, self.sample.scale)
        self.w = self.sample.origin.double() + self.theta.double() @ self.rows

    def point(self, theta):
        return ops.reconstruct(
            self.sample.origin, self.sample.basis, theta, scale=self.sample.scale
        )

    def coordinates(self, tensors):
        return ops.project(self.sample.basis, tensors, scale=self.sample.scale)

    def __call__(self, theta):
        return (self.point(theta) ** 3).sum()

    @property
    def gradient(self):
        return 3 * self.rows @ self.w**2

    @property
    def hessian(self):
        return 6 * (self.rows * self.w) @ self.rows.T


@pytest.mark.filterwarnings("ignore:Backwards compatibility")
@pytest.mark.parametrize("kind", ["one", "cut", "channels_last", "empty"])
def test_project_to_second_order_in_both_modes(kind):
    s = make_sample(torch.float64, 40, 3)
    tensors = [t.double().requires_grad_() for t in make_list(kind, 40)]

    def project(*tensors):
        return ops.project(s.basis, tensors)

    batched = {"check_batched_grad": True, "check_forward_ad": True}
    assert gradcheck(project, tensors, **batched, check_batched_forward_grad=True)
    assert gradgradcheck(project, tensors, check_batched_grad=True, check_fwd_over_rev=True)


def test_reconstruct_to_second_order_in_both_modes():
    s = make_sample(torch.float64, 40, 3)
    theta, origin = s.theta.double().requires_grad_(), s.origin.requires_grad_()
    for function, inputs in (
        (lambda theta, origin: ops.reconstruct(origin, s.basis, theta), (theta, origin)),
        (lambda theta: ops.reconstruct(None, s.basis, theta), (theta,)),
        (lambda origin: ops.reconstruct(origin, s.basis, theta.detach()), (origin,)),
    ):
        batched = {"check_batched_grad": True, "check_forward_ad": True}
        assert gradcheck(function, inputs, **batched, check_batched_forward_grad=True)
        assert gradgradcheck(function, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@dtypes
def test_every_way_to_a_first_derivative(dtype):
    f = Cubes(dtype)
    v = torch.randn_like(f.theta)
    close(grad(f)(f.theta), f.gradient)
    close(jacrev(f)(f.theta), f.gradient)
    close(jacfwd(f)(f.theta), f.gradient)
    close(vjp(f, f.theta)[1](torch.ones((), dtype=wide(dtype)))[0], f.gradient)
    slope = f.gradient @ v.double()
    close(jvp(f, (f.theta,), (v,))[1], slope)
    close(linearize(f, f.theta)[1](v), slope)
    close(torch.autograd.functional.jvp(f, f.theta, v)[1], slope)
    close(jacfwd(f.point)(f.theta).T, f.rows)
    close(jacrev(f.point)(f.theta).T, f.rows)
    g = torch.randn(f.rows.shape[1])
    for jacobian in (jacfwd, jacrev):
        close(jacobian(lambda g: f.coordinates([g[:100], g[100:].view(50, 4)]))(g), f.rows)


@dtypes
def test_every_way_to_a_second_and_a_third_derivative(dtype):
    f = Cubes(dtype)
    old = torch.autograd.functional.hessian
    for found in (
        hessian(f)(f.theta),
        jacrev(jacrev(f))(f.theta),
        jacfwd(jacfwd(f))(f.theta),
        jacrev(jacfwd(f))(f.theta),
        old(f, f.theta),
        old(f, f.theta, vectorize=True),
        old(f, f.theta, vectorize=True, outer_jacobian_strategy="forward-mode"),
    ):
        close(found, f.hessian)
    third = 6 * torch.einsum("in,jn,kn->ijk", f.rows, f.rows, f.rows)
    close(jacfwd(hessian(f))(f.theta), third)
    close(jacrev(hessian(f))(f.theta), third)


@dtypes
def test_a_batch_has_the_bits_of_its_examples(dtype):
    f = Cubes(dtype)
    thetas = torch.randn(5, 4, dtype=wide(dtype))
    each = torch.stack([f.point(theta) for theta in thetas])
    assert torch.equal(vmap(f.point)(thetas), each)
    assert torch.equal(vmap(f.point, in_dims=1, out_dims=1)(thetas.T), each.T)
    nested = vmap(vmap(f.point, in_dims=1, out_dims=1))(torch.stack([thetas.T, 2 * thetas.T]))
    assert torch.equal(nested[0], each.T)
    gradients = torch.randn(300, 6)
    found = vmap(lambda g: f.coordinates([g[:7], g[7:]]), in_dims=1)(gradients)
    assert torch.equal(found, torch.stack([f.coordinates([g]) for g in gradients.T.contiguous()]))
    close(vmap(grad(f))(thetas)[2], grad(f)(thetas[2]))
    close(vmap(hessian(f))(thetas)[2], hessian(f)(thetas[2]))


def test_a_batch_of_bases():
    bases, g = torch.randn(3, 4, 20), torch.randn(20)
    found = vmap(lambda basis: ops.project(basis, [g]))(bases)
    assert torch.equal(found, torch.stack([ops.project(basis, [g]) for basis in bases]))
    thetas = torch.randn(3, 4)
    found = vmap(lambda basis, theta: ops.reconstruct(None, basis, theta))(bases, thetas)
    close(found, torch.einsum("kd,kdn->kn", thetas, bases))


@pytest.mark.parametrize(
    "project, reconstruct", [(ops.project, ops.reconstruct), (raw.project, raw.reconstruct)]
)
def test_dual_numbers(project, reconstruct):
    s = make_sample(torch.float32, 50, 3)
    v, g = torch.randn(3), torch.randn(20, dtype=torch.bfloat16)
    with forward_ad.dual_level():
        theta = forward_ad.make_dual(s.theta.float(), v)
        w = reconstruct(s.origin, s.basis, theta)
        assert torch.equal(forward_ad.unpack_dual(w).tangent, ops.reconstruct(None, s.basis, v))
        origin = forward_ad.make_dual(s.origin, torch.ones(50))
        w = reconstruct(origin, s.basis, s.theta)
        assert torch.equal(forward_ad.unpack_dual(w).tangent, torch.ones(50))
        tensors = [g, forward_ad.make_dual(torch.randn(30), torch.ones(30))]
        c = project(s.basis, tensors)
        close(forward_ad.unpack_dual(c).tangent, s.basis[:, 20:].sum(1))
        assert forward_ad.unpack_dual(project(s.basis, [torch.ones(50)])).tangent is None


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jvp": lambda f: lambda theta: jvp(f, (theta,), (torch.ones_like(theta),))[1],
    "vmap": lambda f: lambda theta: vmap(f)(torch.stack([theta, 2 * theta])),
}


def _slope(f):
    def slope(theta):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, theta))).tangent

    return slope


@pytest.mark.parametrize("name", [*TRANSFORMS, "dual"])
def test_compiled(name):
    f = Cubes(torch.float32)
    function = (TRANSFORMS | {"dual": _slope})[name](f)
    torch.compiler.reset()
    # Under a default device torch itself cannot trace these in one graph, or 2.10 cannot.
    whole = name not in ("jacfwd", "hessian", "vmap")
    found = torch.compile(function, backend="aot_eager", fullgraph=whole)(f.theta)
    torch.testing.assert_close(found, function(f.theta))


def test_opcheck_of_tensors_that_need_gradients():
    s = make_sample(torch.float32, 300, 3)
    theta, origin = s.theta.float().requires_grad_(), s.origin.requires_grad_()
    check(raw.reconstruct.default, (origin, s.basis, theta, s.scale))
    check(raw.project.default, (s.basis, [origin], s.scale))


@dtypes
def test_fused_ops_have_the_derivatives_of_what_they_fuse(dtype):
    s = make_sample(dtype, 600, 3, "mixed")
    tensors = [t.clone().requires_grad_() for t in s.tensors]
    theta = s.theta.clone().requires_grad_()
    many = ops.project_many(s.basis, [tensors, s.tensors], scale=s.scale)
    both = ops.reconstruct_residual(s.basis, theta, s.theta, tensors, scale=s.scale)
    with torch.no_grad():  # to the bit as without derivatives
        assert torch.equal(many, ops.project_many(s.basis, [tensors, tensors], scale=s.scale))
        fused = ops.reconstruct_residual(s.basis, theta, s.theta, tensors, scale=s.scale)
        assert all(map(torch.equal, both, fused))
    many[0].sum().backward()
    close(
        tensors[0].grad,
        reference.decode(s.basis, s.scale).sum(0)[: tensors[0].numel()].view_as(tensors[0]),
    )
    tensors[0].grad = None
    (both[0] + 2 * both[1]).sum().backward()
    close(theta.grad, reference.decode(s.basis, s.scale).sum(1))
    assert torch.equal(tensors[0].grad, torch.full_like(tensors[0], 2.0))
    direction = jacfwd(lambda t: ops.reconstruct_residual(s.basis, t, t, s.tensors, scale=s.scale))
    theta = s.theta.detach().to(wide(dtype))
    close(direction(theta)[0], reference.decode(s.basis, s.scale).T)
    close(direction(theta)[1], -reference.decode(s.basis, s.scale).T)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd])
def test_a_derivative_in_the_basis_is_refused(transform):
    s = make_sample(torch.float32, 20, 3)
    for function in (
        lambda basis: ops.project(basis, [torch.ones(20)]).sum(),
        lambda basis: ops.reconstruct(None, basis, torch.ones(3)).sum(),
        lambda basis: ops.project_many(basis, [[torch.ones(20)]]).sum(),
        lambda basis: ops.reconstruct_residual(
            basis, torch.ones(3), torch.ones(3), [torch.ones(20)]
        )[1].sum(),
    ):
        with pytest.raises((ValueError, RuntimeError), match=NO_GRADIENT):
            transform(function)(s.basis)
        with pytest.raises(ValueError, match=NO_GRADIENT):
            function(s.basis.clone().requires_grad_())


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_a_derivative_in_the_scale_is_refused(dtype):
    s = make_sample(dtype, 300, 3)
    with pytest.raises(ValueError, match="project: scale: expected a tensor that needs no grad"):
        ops.project(s.basis, [torch.ones(300)], scale=s.scale.requires_grad_())


IN_PLACE = {
    "reconstruct_": lambda x, p: ops.reconstruct_([p], p, torch.ones(20, 20), x),
    "trial_": lambda x, p: ops.trial_([p], x, p, 0.5),
    "gram_append_": lambda x, p: ops.gram_append_(
        torch.zeros(2, 20), torch.zeros(2, 2, dtype=torch.float64), 0, [x], p
    ),
    "store_snapshot_": lambda x, p: ops.store_snapshot_(torch.zeros(2, 20), 0, [x], p),
    "gram_block_": lambda x, p: ops.gram_block_(
        x[None], torch.zeros(1, 1, dtype=torch.float64), 0, 1
    ),
}


@pytest.mark.parametrize("op", IN_PLACE)
def test_what_writes_refuses_transforms_and_takes_values_of_leaves(op):
    x, p = torch.ones(20), torch.zeros(20)

    def write(x):
        IN_PLACE[op](x, p)
        return p.sum()

    message = rf"{op}: \w+: expected a plain tensor, since {op} has no derivative"
    for transform in TRANSFORMS.values():
        with pytest.raises(ValueError, match=message):
            transform(write)(x)
    with pytest.raises(ValueError, match=message):
        _slope(write)(x)
    assert not p.any()
    IN_PLACE[op](x.requires_grad_(), p)


@pytest.mark.parametrize("op", ["gram", "form_basis"])
def test_what_has_no_derivative_says_so(op):
    def function(x):
        return (ops.gram(x) if op == "gram" else ops.form_basis(x, torch.eye(3))).sum()

    x = torch.randn(3, 20)
    with pytest.raises(ValueError, match=f"{op}: snapshots: expected a plain tensor, since {op}"):
        jvp(function, (x,), (x,))
    needs = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{op}: snapshots: expected a tensor that needs no grad"):
        function(needs)
    with torch.no_grad():
        assert torch.equal(function(needs), function(x))
