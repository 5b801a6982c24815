"""CUDA ops beyond the cases that they share with the CPU (test_ops*.py): bits, memory, size."""

from __future__ import annotations

import pytest
import reference
import torch
from all_ops import AllOps, assert_same, pieces_of, poisoned_memory
from samples import STORAGE, make_list, make_rows, wide

from dldr_ext import ops
from dldr_ext.tensors.memory import empty_rows

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)
KINDS = ["cut", "mixed", "strided", "channels_last", "empty", "many"]


@dtypes
@pytest.mark.parametrize("n, kind", [(1, "one"), (4_097, "cut"), (300_007, "many")])
def test_same_bits_from_run_to_run(dtype, n, kind):
    case = AllOps(dtype, n, 11, kind)
    expected = case.now()
    for _ in range(3):
        assert_same(case.now(), expected)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_what_memory_held(dtype, kind):
    """Results and scratch memory that hold NaNs when a kernel gets them."""
    for n in (257, 9_001, 70_000):
        case = AllOps(dtype, n, 9, kind)
        expected = case.now()
        with poisoned_memory():
            assert torch.empty(3).isnan().all()
            found = case.now()
        assert_same(found, expected, f"n={n}")


@dtypes
def test_any_cut_gives_the_same_bits(dtype):
    n = 100_003
    case = AllOps(dtype, n, 7, "one")
    (flat,) = case.tensors
    expected = case.now()
    for parts in (2, 9, 216, 217, 2_000, 5_000):
        edges = torch.randint(0, n + 1, (parts - 1,)).tolist()  # some pieces are empty
        case.tensors = pieces_of(flat, edges)
        case.params = pieces_of(torch.empty(n), edges)
        case.trial = pieces_of(torch.empty(n), edges)
        assert_same(case.now(), expected, f"{parts} tensors")


@dtypes
@pytest.mark.parametrize("count", [215, 216, 217, 2_000, 5_000])
def test_long_lists(dtype, count):
    """Around what travels in a kernel's arguments, and several uploads' worth."""
    n = 20_011
    basis, scale = make_rows(5, n, dtype)
    tensors = pieces_of(torch.randn(n), torch.randint(0, n + 1, (count - 1,)).tolist())
    assert len(tensors) == count
    c = ops.project(basis, tensors, scale=scale)
    exact = reference.project(basis, tensors, scale)
    peer = reference.project(basis, tensors, scale, wide(dtype))
    reference.assert_close(c, exact, peer, str(count), reference.terms(basis, tensors, scale))
    mixed = [t.to((torch.float32, torch.bfloat16)[i % 2]) for i, t in enumerate(tensors)]
    many = ops.project_many(basis, [tensors, mixed], scale=scale)
    assert torch.equal(many[0], c)
    assert torch.equal(many[1], ops.project(basis, mixed, scale=scale))


@dtypes
@pytest.mark.parametrize("lists", [2, 3, 5, 8, 9, 17])
def test_several_lists_in_one_read(dtype, lists):
    for n, d in ((70_001, 3), (9_001, 40), (2_048, 130)):
        basis, scale = make_rows(d, n, dtype)
        many = [make_list(KINDS[k % len(KINDS)], n) for k in range(lists)]
        found = ops.project_many(basis, many, scale=scale)
        each = torch.stack([ops.project(basis, one, scale=scale) for one in many])
        assert torch.equal(found, each), (n, d)


@dtypes
def test_rows_stored_in_blocks_or_one_by_one(dtype):
    n, capacity = 70_001, 21
    anchor = torch.randn(n, dtype=wide(dtype))
    lists = [make_list(KINDS[k % len(KINDS)], n) for k in range(capacity)]
    stores = []
    for cut in ([1] * capacity, [capacity], [3, 8, 9, 1], [16, 5]):
        rows, scale = make_rows(capacity, n, dtype)
        gram = torch.full((capacity, capacity), torch.nan, dtype=torch.float64)
        index = 0
        for count in cut:
            if count == 1:
                ops.gram_append_(rows, gram, index, lists[index], anchor, scale=scale)
            else:
                for k in range(index, index + count):
                    ops.store_snapshot_(rows, k, lists[k], anchor, scale=scale)
                ops.gram_block_(rows, gram, index, count, scale=scale)
            index += count
        stores.append((rows.view(torch.uint8), gram))
    for rows, gram in stores[1:]:
        assert torch.equal(rows, stores[0][0])
        assert torch.equal(gram, stores[0][1])


@dtypes
def test_aligned_and_unaligned_rows_give_the_same_bits(dtype):
    for n in (4_097, 33_333):
        case = AllOps(dtype, n, 10)
        expected = case.now()
        aligned = empty_rows(10, n, dtype=dtype, device=case.basis.device)
        aligned.copy_(case.basis)
        case.basis = aligned
        assert_same(case.now(), expected, f"n={n}")
        shifted = torch.zeros(10, n + 5).to(dtype)[:, 3 : n + 3]
        case.basis = shifted.copy_(aligned)
        assert_same(case.now(), expected, f"n={n}, shifted")


@dtypes
def test_cpu_and_cuda_agree(dtype):
    n, d = 70_001, 11
    case = AllOps(dtype, n, d, "mixed")
    found = {name: tensor.cpu() for name, tensor in case.now().items()}
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.cpu())
        elif isinstance(value, list):
            setattr(case, name, [tensor.cpu() for tensor in value])
    eps = torch.finfo(wide(dtype)).eps
    quantized = dtype in (torch.int8, torch.float8_e4m3fn)
    for name, expected in case.now().items():
        if name == "stored" and not quantized:
            assert torch.equal(found[name], expected)  # one subtraction, one rounding
        elif name not in ("stored", "row scale"):
            size = expected.abs().max().item()
            # of the parameters of 16 bits an ulp, where a float32 ulp changes the rounding
            coarse = 2.0**-8 if name in ("reconstruct_", "trial_") else 0.0
            error = (found[name].double() - expected.double()).abs()
            # in 8 bits a product one rounding off may be stored as the next value
            fine = 1e-4 if quantized and name == "gram_block_" else 64 * eps
            assert (error <= fine * size + coarse * expected.double().abs()).all(), name


def random_rows(d: int, n: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    rows = (
        empty_rows(d, n, dtype=dtype, device="cuda") if aligned else torch.empty(d, n, dtype=dtype)
    )
    for row in rows:
        row.copy_(torch.randn(n) if dtype.is_floating_point else torch.randint(-127, 128, (n,)))
    return rows


@pytest.mark.slow
@pytest.mark.needs_gpu
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_basis_of_more_than_two_to_the_31(dtype, aligned):
    n, d = 50_000_017, 44
    assert n * d > 2**31
    basis = random_rows(d, n, dtype, aligned)
    scale = None if dtype == torch.bfloat16 else torch.rand(d, -(-n // 256)) + 0.5
    tensors = [torch.randn(n // 3), torch.randn(n - n // 3).bfloat16()]
    g = reference.flat(tensors)
    theta = torch.randn(d)
    eps = torch.finfo(torch.float32).eps

    def row(r):
        return reference.decode(basis[r : r + 1], None if scale is None else scale[r : r + 1])[0]

    c = ops.project(basis, tensors, scale=scale)
    w = ops.reconstruct(None, basis, theta, scale=scale)
    gram = ops.gram(basis, scale=scale)
    last = row(d - 1)
    moved, squares = torch.zeros(2, n, dtype=torch.float64).unbind()
    for r in range(d):
        one = row(r)
        assert (c[r] - one @ g).abs() <= 16 * eps * (one * g).norm()
        assert (gram[d - 1, r] - one @ last).abs() <= 16 * eps * (one * last).norm() * (
            1 if r < d - 1 else 100  # squares add up, their roundings do not cancel as signs do
        )
        moved.add_(one, alpha=float(theta[r]))
        squares.addcmul_(one, one, value=float(theta[r]) ** 2)
    assert ((w - moved).abs() <= 32 * eps * squares.sqrt()).all()
    del moved, squares
    combined = ops.form_basis(basis, torch.eye(d, dtype=torch.float64)[d - 1 :], scale=scale)
    assert torch.equal(combined[0], last.to(combined.dtype))
    params = [torch.full((n,), torch.nan, dtype=torch.bfloat16)]
    ops.reconstruct_(params, None, basis, theta, scale=scale)
    assert torch.equal(params[0], w.bfloat16())
    products = torch.zeros(d, d, dtype=torch.float64)
    anchor = torch.zeros(n)
    ops.gram_append_(basis, products, d - 1, tensors, anchor, scale=scale)
    stored = row(d - 1)
    assert (stored - g).abs().max() <= g.abs().max() / 100
    for r in (0, d // 2, d - 1):
        one = row(r)
        assert (products[d - 1, r] - one @ stored).abs() <= 1600 * eps * (one * stored).norm()


@pytest.mark.slow
@pytest.mark.needs_gpu
def test_more_than_two_to_the_31_parameters():
    n, d = 2**31 + 4_099, 2
    basis = torch.ones(d, n, dtype=torch.bfloat16)
    basis[1].fill_(-0.5)
    tensors = [torch.ones(2**31 - 7, dtype=torch.bfloat16), torch.full((4_106,), 3.0)]
    total = 2**31 - 7 + 3 * 4_106
    assert ops.project(basis, tensors).tolist() == pytest.approx([total, -total / 2], rel=1e-6)
    tensors[1].fill_(torch.nan)
    tensors[0].fill_(torch.nan)
    ops.reconstruct_(tensors, None, basis, torch.tensor([2.0, 1.0]))
    assert all(bool((t == 1.5).all()) for t in tensors)
    rows, gram = torch.empty(1, n, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.float64)
    ops.gram_append_(rows, gram, 0, tensors, torch.zeros(n))
    assert float(gram) == pytest.approx(2.25 * n, rel=1e-6)
    assert bool((rows == 1.5).all())
