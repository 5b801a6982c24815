"""The ops as torch ops: opcheck, gradients, torch.compile, one table of samples."""

from __future__ import annotations

import pytest
import torch
from opcheck import check
from samples import QUANTIZED, STORAGE, make_list, make_sample, wide

import dldr_ext
from dldr_ext import ops

raw = torch.ops.dldr_ext
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)
pytestmark = [
    pytest.mark.usefixtures("device"),
    # torch's own code, under torch.compile and opcheck
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    # opcheck of torch 2.14 looks at .grad of tensors that it made itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@dtypes
@pytest.mark.parametrize("kind", ["one", "mixed", "channels_last", "empty"])
def test_opcheck_lists(dtype, kind):
    s = make_sample(dtype, 500, 3, kind)
    check(raw.project.default, (s.basis, s.tensors, s.scale))
    check(raw.reconstruct_.default, (s.tensors, s.origin, s.basis, s.theta, s.scale))
    anchor = torch.randn(500, dtype=wide(dtype))
    gram = torch.zeros(3, 3, dtype=torch.float64)
    check(raw.gram_append_.default, (s.basis.clone(), gram, 1, s.tensors, anchor, s.scale))
    check(raw.store_snapshot_.default, (s.basis.clone(), 1, s.tensors, anchor, s.scale))
    check(raw.trial_.default, (s.tensors, anchor, anchor + 1, 0.5))
    check(raw.project_many.default, (s.basis, [*s.tensors, *s.tensors], 2, s.scale))
    check(raw.reconstruct_residual.default, (s.basis, s.theta, s.theta, s.tensors, s.scale))


@dtypes
def test_opcheck_flat(dtype):
    s = make_sample(dtype, 500, 3)
    for origin in (s.origin, None):
        check(raw.reconstruct.default, (origin, s.basis, s.theta, s.scale))
        theta = s.theta.clone().requires_grad_()
        check(raw.reconstruct.default, (origin, s.basis, theta, s.scale))
    check(raw.gram.default, (s.basis, s.scale))
    gram = torch.zeros(3, 3, dtype=torch.float64)
    check(raw.gram_block_.default, (s.basis, gram, 1, 2, s.scale))
    coefficients = torch.randn(2, 3)
    check(raw.form_basis.default, (s.basis, coefficients, s.scale))
    check(raw.form_basis.default, (s.basis, coefficients, s.scale), {"dtype": torch.bfloat16})
    tensors = [t.float().requires_grad_() for t in s.tensors]
    check(raw.project.default, (s.basis, tensors, s.scale))


def test_gradients():
    s = make_sample(torch.float64, 40, 3)
    theta, origin = s.theta.requires_grad_(), s.origin.requires_grad_()
    tensors = [t.double().requires_grad_() for t in s.tensors]

    def reconstruct(theta, origin):
        return ops.reconstruct(origin, s.basis, theta)

    def project(*tensors):
        return ops.project(s.basis, tensors)

    assert torch.autograd.gradcheck(reconstruct, (theta, origin))
    assert torch.autograd.gradgradcheck(reconstruct, (theta, origin))
    assert torch.autograd.gradcheck(project, tensors)
    assert torch.autograd.gradgradcheck(project, tensors)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_gradients_of_quantized_bases(dtype):
    s = make_sample(dtype, 300, 3)
    theta = s.theta.requires_grad_()
    weights = torch.randn(300)
    (ops.reconstruct(None, s.basis, theta, scale=s.scale) * weights).sum().backward()
    assert torch.equal(theta.grad, ops.project(s.basis, [weights], scale=s.scale))


def test_no_gradient_is_computed_that_nobody_asked_for():
    s = make_sample(torch.float32, 40, 3)
    origin = s.origin.requires_grad_()
    ops.reconstruct(origin, s.basis, s.theta).sum().backward()
    assert torch.equal(origin.grad, torch.ones(40))
    assert s.theta.grad is None


def test_compile():
    s = make_sample(torch.bfloat16, 700, 4)
    like = make_list("cut", 700)

    def step(origin, basis, theta, tensors, params):
        c = ops.project(basis, tensors)
        w = ops.reconstruct(origin, basis, theta - 0.1 * c)
        ops.reconstruct_(params, origin, basis, theta)
        return c, w.sum() + sum(p.sum() for p in params)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, theirs = ([torch.empty_like(t) for t in like] for _ in range(2))
    expected = step(s.origin, s.basis, s.theta, s.tensors, ours)
    found = compiled(s.origin, s.basis, s.theta, s.tensors, theirs)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_meta_tensors():
    basis = torch.empty(5, 2**33, dtype=torch.int8, device="meta")
    scale = torch.empty(5, 2**25, device="meta")
    gradient = torch.empty(2**33, device="meta", dtype=torch.bfloat16)
    assert ops.project(basis, [gradient], scale=scale).shape == (5,)
    theta = torch.empty(5, device="meta")
    w = ops.reconstruct(None, basis, theta, scale=scale)
    assert w.shape == (2**33,) and w.device.type == "meta"
    assert ops.project_many(basis, [[gradient], [gradient]], scale=scale).shape == (2, 5)
    for vector in ops.reconstruct_residual(basis, theta, theta, [gradient], scale=scale):
        assert vector.shape == (2**33,) and vector.dtype == torch.float32


def test_build_info():
    info = dldr_ext.build_info()
    assert info["version"] == dldr_ext.__version__
    assert info["cpu_capabilities"][0] == "portable"
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cuda"] is False or torch.version.cuda is not None
    assert isinstance(info["cuda_archs"], list)
    assert info["torch_target"] == "2.10"
