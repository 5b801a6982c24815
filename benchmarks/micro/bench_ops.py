"""Each op against what a user would write in plain torch, and against the memory.

Buffers are of 1 to 4 GB, far beyond any cache, and hold random numbers.
"""

from __future__ import annotations

import pytest
import torch

from dldr_ext import ops
from dldr_ext.performance.roofline import Problem, resnet18_sizes
from dldr_ext.performance.timing import reader

D = 40
CASES = {"resnet18": resnet18_sizes(11_200_000), "25M": resnet18_sizes(25_000_000)}


@pytest.fixture(scope="module", params=CASES)
def problem(request):
    problem = Problem(CASES[request.param])
    problem.name = request.param
    return problem


def ceiling_of(data):
    return reader(data), data.numel() * data.element_size()


STORED = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("op", ["project", "reconstruct_"])
def test_pass(problem, op, dtype, compare):
    """One pass over the basis in each format."""
    basis, scale = problem.stored(dtype)
    params, origin, theta = problem.params, problem.origin, problem.theta
    work, vectors, peer, peer_name = {
        "project": (
            lambda: ops.project(basis, problem.gradients, scale=scale),
            4,
            problem.torch_project,
            "float32 mv(cat)",
        ),
        "reconstruct_": (
            lambda: ops.reconstruct_(params, origin, basis, theta, scale=scale),
            8,
            problem.torch_reconstruct,
            "float32 addmv, split, copy",
        ),
    }[op]
    compare(
        f"{op} {str(dtype)[6:]} {problem.name}",
        work,
        basis.numel() * basis.element_size() + vectors * problem.n,
        peer,
        *ceiling_of(basis),
        peer_name=peer_name,
    )


def test_project_against_torch_bfloat16(problem, compare):
    if problem.name != "resnet18":
        pytest.skip("torch's bfloat16 mv takes seconds")
    basis, _ = problem.stored(torch.bfloat16)
    gradient = torch.cat(problem.gradients).bfloat16()
    compare(
        "project bfloat16, bfloat16 mv",
        lambda: ops.project(basis, problem.gradients),
        basis.numel() * 2 + 4 * problem.n,
        lambda: torch.mv(basis, gradient),
        *ceiling_of(basis),
        peer_name="bfloat16 mv",
    )


def test_gram_append(problem, compare):
    t = D
    rows = torch.empty(t + 1, problem.n, dtype=torch.bfloat16)
    rows[:t] = problem.basis
    gram = torch.zeros(t + 1, t + 1, dtype=torch.float64)

    def peer():
        row = (torch.cat(problem.gradients) - problem.origin).bfloat16()
        rows[t] = row
        return torch.mv(rows, row)

    compare(
        f"gram_append_ bfloat16 t=40 {problem.name}",
        lambda: ops.gram_append_(rows, gram, t, problem.gradients, problem.origin),
        rows.numel() * 2 + 8 * problem.n,
        peer if problem.name == "resnet18" else None,
        *ceiling_of(rows),
        peer_name="cat, sub, cast, mv",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram(problem, dtype, compare):
    rows, _ = problem.stored(dtype)
    compare(
        f"gram T=40 {str(dtype)[6:]} {problem.name}",
        lambda: ops.gram(rows),
        rows.numel() * rows.element_size(),
        lambda: problem.basis @ problem.basis.T,
        *ceiling_of(rows),
        peer_name="float32 X @ X.T",
    )


@pytest.mark.parametrize(
    ("t", "n", "dtype"),
    [(40, 8, torch.bfloat16), (100, 4, torch.bfloat16), (100, 4, torch.int8)],
    ids=str,
)
def test_gram_of_snapshots(t, n, dtype, compare):
    """Against the one line of torch in bfloat16, which multiplies matrices as the processor can."""
    plain = torch.randn(t, n * 1_000_000).bfloat16()
    rows, scale = plain, None
    if dtype == torch.int8:
        rows = torch.randint(-127, 128, plain.shape, dtype=dtype)
        scale = torch.rand(t, rows.shape[1] // 256)
    compare(
        f"gram T={t} {str(dtype)[6:]} {n}M, bfloat16 matmul",
        lambda: ops.gram(rows, scale=scale),
        rows.numel() * rows.element_size(),
        lambda: plain @ plain.T,
        *ceiling_of(rows),
        peer_name="bfloat16 X @ X.T",
    )


def test_form_basis(compare):
    rows = torch.randn(100, 4_000_000).bfloat16()
    coefficients = torch.randn(D, 100, dtype=torch.float64)
    rounded = coefficients.bfloat16()
    compare(
        "form_basis T=100 bfloat16 4M",
        lambda: ops.form_basis(rows, coefficients),
        (100 + D) * rows.shape[1] * 2,
        lambda: rounded @ rows,
        *ceiling_of(rows),
        peer_name="bfloat16 C @ X",
    )


def test_gram_arithmetic(problem, compare):
    """What limits the Gram matrix: its products against the rate of torch's square matmul."""
    size = 2048
    a, b, c = torch.randn(3, size, size)
    compare(
        f"gram T=40 float32 {problem.name}, products",
        lambda: ops.gram(problem.basis),
        D * (D + 1) / 2 * problem.n,
        None,
        lambda: torch.mm(a, b, out=c),
        size**3,
        ceiling_name="multiply-adds of a 2048 x 2048 matmul",
    )


def test_trial(problem, compare):
    direction = torch.randn(problem.n)
    target = torch.empty(problem.n)

    def peer():
        flat = torch.add(problem.origin, direction, alpha=0.3)
        for param, part in zip(problem.params, flat.split(problem.sizes), strict=True):
            param.copy_(part)

    compare(
        f"trial_ {problem.name}",
        lambda: ops.trial_(problem.params, problem.origin, direction, 0.3),
        12 * problem.n,
        peer,
        lambda: torch.add(problem.origin, direction, alpha=0.3, out=target),
        12 * problem.n,
        peer_name="add, split, copy",
        ceiling_name="add with out=",
    )
