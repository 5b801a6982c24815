"""Every bad input of the ops: the exception, a message that names the argument, nothing written."""

from __future__ import annotations

import re

import pytest
import torch

from dldr_ext import ops

pytestmark = pytest.mark.usefixtures("device")
N, D, T = 600, 4, 3


class Case:
    """Valid arguments of every op; a test spoils one of them."""

    def __init__(self):
        self.basis = torch.randn(D, N)
        self.tensors = [torch.randn(200), torch.randn(20, 20)]
        self.origin = torch.randn(N)
        self.theta = torch.randn(D)
        self.snapshots = torch.randn(T, N)
        self.gram = torch.randn(T, T, dtype=torch.float64)
        self.coefficients = torch.randn(2, T)
        self.scale = None
        self.index = 1
        self.count = 2
        self.alpha = 0.5
        self.dtype = None

    def call(self, op):
        if op == "project":
            return ops.project(self.basis, self.tensors, scale=self.scale)
        if op == "reconstruct":
            return ops.reconstruct(self.origin, self.basis, self.theta, scale=self.scale)
        if op == "reconstruct_":
            return ops.reconstruct_(
                self.tensors, self.origin, self.basis, self.theta, scale=self.scale
            )
        if op == "project_many":
            return ops.project_many(self.basis, [[self.origin], self.tensors], scale=self.scale)
        if op == "reconstruct_residual":
            return ops.reconstruct_residual(
                self.basis, self.theta, self.theta, self.tensors, scale=self.scale
            )
        if op == "store_snapshot_":
            return ops.store_snapshot_(
                self.snapshots, self.index, self.tensors, self.origin, scale=self.scale
            )
        if op == "gram_block_":
            return ops.gram_block_(
                self.snapshots, self.gram, self.index, self.count, scale=self.scale
            )
        if op == "trial_":
            return ops.trial_(self.tensors, self.origin, self.origin, self.alpha)
        if op == "gram":
            return ops.gram(self.snapshots, scale=self.scale)
        if op == "gram_append_":
            return ops.gram_append_(
                self.snapshots, self.gram, self.index, self.tensors, self.origin, scale=self.scale
            )
        assert op == "form_basis"
        return ops.form_basis(self.snapshots, self.coefficients, scale=self.scale, dtype=self.dtype)

    def everything(self):
        found = [self.basis, self.origin, self.theta, self.snapshots, self.gram, self.scale]
        if isinstance(self.tensors, (list, tuple)):
            found += self.tensors
        return [t for t in found if isinstance(t, torch.Tensor) and t.layout == torch.strided]


def refuse(op, kind, message, **spoiled):
    case = Case()
    for name, value in spoiled.items():
        setattr(case, name, value)
    before = [t.clone() for t in case.everything() if t.device.type != "meta"]
    with pytest.raises(kind, match=message):
        case.call(op)
    after = [t for t in case.everything() if t.device.type != "meta"]
    for old, new in zip(before, after, strict=True):
        if old.dtype == torch.float8_e4m3fn:  # torch cannot compare it
            old, new = old.float(), new.float()
        assert torch.equal(old, new), "something was written"


LISTS = [("project", "tensors"), ("reconstruct_", "params"), ("trial_", "params")]
LISTS += [("gram_append_", "params"), ("store_snapshot_", "params")]
LISTS += [("project_many", "lists[1]"), ("reconstruct_residual", "tensors")]


@pytest.mark.parametrize("op, name", LISTS)
def test_lists(op, name):
    name = re.escape(name)
    # behind the one tensor of the list before
    joined = r"tensors\[2\]" if op == "project_many" else rf"{name}\[1\]"
    short = [torch.randn(200), torch.randn(20, 19)]
    refuse(op, ValueError, rf"{op}: {name}: expected 600 elements .* got 580", tensors=short)
    long = [torch.randn(200), torch.randn(20, 21)]
    refuse(op, ValueError, rf"{op}: {name}: expected 600 elements .* got 620", tensors=long)
    refuse(op, ValueError, rf"{op}: {name}: expected 600 .* got 0", tensors=[])
    one = torch.randn(600)
    refuse(op, TypeError, rf"{op}: {name}: expected a list or tuple .* got Tensor", tensors=one)
    refuse(op, TypeError, rf"{op}: {name}: expected a list or tuple .* got None", tensors=None)
    text = [torch.randn(200), "weights"]
    refuse(op, TypeError, rf"{op}: {name}\[1\]: expected a tensor, got str", tensors=text)
    whole = [torch.randn(200), torch.ones(400, dtype=torch.int64)]
    refuse(op, TypeError, rf"{op}: {joined}: expected float32.* got dtype Long", tensors=whole)
    byte = [torch.randn(200), torch.ones(400, dtype=torch.int8)]
    refuse(op, TypeError, rf"{op}: {joined}: expected float32.* got torch.int8", tensors=byte)
    imaginary = [torch.randn(200), torch.randn(400, dtype=torch.complex64)]
    refuse(op, TypeError, rf"{op}: {joined}: .*complex64", tensors=imaginary)
    sparse = [torch.randn(200), torch.randn(20, 20).to_sparse()]
    refuse(op, TypeError, rf"{op}: {joined}: expected a dense tensor", tensors=sparse)
    meta = [torch.randn(200), torch.randn(400, device="meta")]
    refuse(op, ValueError, rf"{op}: .*(cpu|cuda:0).*meta.*; move them to one", tensors=meta)


@pytest.mark.parametrize("op", ["reconstruct_", "trial_"])
def test_written_lists_must_be_writable(op):
    expanded = [torch.randn(200), torch.randn(20, 1).expand(20, 20)]
    refuse(op, ValueError, rf"{op}: params\[1\]: .*expanded", tensors=expanded)


BASES = ["project", "project_many", "reconstruct", "reconstruct_", "reconstruct_residual"]


@pytest.mark.parametrize("op", BASES)
def test_basis(op):
    refuse(op, ValueError, f"{op}: basis: expected 2 dimensions", basis=torch.randn(N))
    refuse(op, ValueError, f"{op}: basis: .*at least one row", basis=torch.randn(0, N))
    big = torch.zeros(1025, 1).expand(1025, N).contiguous()
    refuse(
        op, ValueError, f"{op}: basis: expected at most 1024", basis=big, theta=torch.randn(1025)
    )
    refuse(op, ValueError, f"{op}: basis: expected contiguous rows", basis=torch.randn(N, D).T)
    refuse(op, TypeError, f"{op}: basis: .*dtype Int", basis=torch.ones(D, N, dtype=torch.int32))
    refuse(op, TypeError, f"{op}: basis: expected a tensor, got None", basis=None)
    sparse = torch.randn(D, N).to_sparse()
    refuse(op, TypeError, f"{op}: basis: expected a dense tensor", basis=sparse)
    refuse(op, ValueError, f"{op}: .*meta", basis=torch.randn(D, N, device="meta"))


@pytest.mark.parametrize("op", BASES)
def test_scale(op):
    q = torch.ones(D, N, dtype=torch.int8)
    f8 = q.to(torch.float8_e4m3fn)
    good = torch.ones(D, 3)
    refuse(op, ValueError, f"{op}: scale: expected .*\\(4, 3\\).* got None", basis=q)
    refuse(op, ValueError, f"{op}: scale: expected .*\\(4, 3\\).* got None", basis=f8)
    refuse(
        op, ValueError, f"{op}: scale: expected shape \\(4, 3\\).* got \\(4, 2\\)",
        basis=q, scale=torch.ones(D, 2),
    )  # fmt: skip
    refuse(op, TypeError, f"{op}: scale: expected torch.float32", basis=q, scale=good.double())
    refuse(op, ValueError, f"{op}: scale: expected None", scale=good)
    refuse(op, ValueError, f"{op}: scale: .*contiguous", basis=q, scale=torch.ones(3, D).T)


@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_", "reconstruct_residual"])
def test_theta(op):
    refuse(op, ValueError, rf"{op}: theta: expected shape \(4,\).* got \(5,\)", theta=torch.ones(5))
    refuse(op, ValueError, rf"{op}: theta: expected shape", theta=torch.ones(D, 1))
    refuse(op, TypeError, f"{op}: theta: .*Long", theta=torch.ones(D, dtype=torch.int64))
    refuse(op, TypeError, f"{op}: theta: expected a tensor, got list", theta=[1.0] * D)


@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_"])
def test_origin(op):
    refuse(op, ValueError, f"{op}: origin: expected shape", origin=torch.ones(N + 1))
    refuse(op, ValueError, f"{op}: origin: expected shape", origin=torch.ones(N, 1))
    double = torch.ones(N, dtype=torch.float64)
    refuse(op, TypeError, f"{op}: origin: expected torch.float32", origin=double)
    refuse(op, TypeError, f"{op}: origin: expected torch.float64", basis=torch.ones(D, N).double())


def test_a_basis_that_needs_a_gradient_is_refused():
    basis = torch.randn(D, N, requires_grad=True)
    refuse("reconstruct", ValueError, "reconstruct: basis: .*gradient", basis=basis)


def test_trial():
    for alpha in (float("nan"), float("inf")):
        refuse("trial_", ValueError, "trial_: alpha: expected a finite number", alpha=alpha)
    refuse("trial_", TypeError, "trial_: alpha: expected a number, got str", alpha="1")
    refuse("trial_", TypeError, "trial_: point: .*float16", origin=torch.ones(N).half())
    refuse("trial_", ValueError, "trial_: point: expected 1 dim", origin=torch.ones(N, 1))
    with pytest.raises(ValueError, match="trial_: direction: expected shape"):
        ops.trial_([torch.ones(N)], torch.ones(N), torch.ones(N - 1), 1.0)
    with pytest.raises(TypeError, match=r"trial_: direction: expected torch\.float32"):
        ops.trial_([torch.ones(N)], torch.ones(N), torch.ones(N).double(), 1.0)


APPENDS = ["gram_append_", "store_snapshot_", "gram_block_"]


@pytest.mark.parametrize("op", APPENDS)
def test_appended_rows(op):
    for index in (-1, T, 2**40):
        refuse(op, ValueError, rf"{op}: index: expected 0 <= index < 3 .* got {index}", index=index)
    refuse(op, TypeError, f"{op}: index: expected a number, got float", index=1.5)
    refuse(op, ValueError, f"{op}: snapshots: expected 2 dim", snapshots=torch.ones(N))
    refuse(op, ValueError, f"{op}: scale: .*None", snapshots=torch.ones(T, N, dtype=torch.int8))


@pytest.mark.parametrize("op", ["gram_append_", "gram_block_"])
def test_appended_products(op):
    refuse(op, TypeError, f"{op}: gram: expected torch.float64", gram=torch.ones(T, T))
    wide = torch.ones(T, T + 1, dtype=torch.float64)
    refuse(op, ValueError, f"{op}: gram: expected a square", gram=wide)
    small = torch.ones(1, 1, dtype=torch.float64)
    refuse(op, ValueError, f"{op}: gram: expected a square .* at least [23] rows", gram=small)
    refuse(op, TypeError, f"{op}: gram: expected a tensor, got None", gram=None)


@pytest.mark.parametrize("op", ["gram_append_", "store_snapshot_"])
def test_appended_parameters(op):
    refuse(op, ValueError, f"{op}: anchor: expected shape", origin=torch.ones(N - 1))
    refuse(op, TypeError, f"{op}: anchor: .*float16", origin=torch.ones(N).half())


def test_gram_block_counts_rows_that_are_there():
    for count in (-1, 0, 3, 2**40):
        message = rf"gram_block_: count: expected 1 <= count <= 2 .* got {count}"
        refuse("gram_block_", ValueError, message, count=count)
    refuse("gram_block_", TypeError, "gram_block_: count: expected a number, got None", count=None)


@pytest.mark.parametrize("op", ["gram", "form_basis"])
def test_snapshots(op):
    refuse(op, ValueError, f"{op}: snapshots: expected 2 dimensions", snapshots=torch.ones(N))
    refuse(op, ValueError, f"{op}: snapshots: .*contiguous rows", snapshots=torch.ones(N, T).T)
    refuse(op, TypeError, f"{op}: snapshots: .*Bool", snapshots=torch.ones(T, N) > 0)
    refuse(op, ValueError, f"{op}: scale: .*None", snapshots=torch.ones(T, N, dtype=torch.int8))


def test_form_basis():
    op, match = "form_basis", r"form_basis: coefficients: expected shape \(d, 3\)"
    refuse(op, ValueError, match, coefficients=torch.ones(2, 4))
    refuse(op, ValueError, match, coefficients=torch.ones(T))
    refuse(op, ValueError, match, coefficients=torch.ones(0, T))
    integers = torch.ones(2, T, dtype=torch.int64)
    refuse(op, TypeError, "form_basis: coefficients: .*Long", coefficients=integers)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.int32):
        refuse(op, TypeError, "form_basis: dtype: expected float32", dtype=dtype)
    refuse(op, TypeError, "form_basis: dtype: expected a torch.dtype, got str", dtype="bfloat16")


def test_none_that_cannot_be_sized():
    a, b = torch.randn(100), torch.randn(300)
    refuse(
        "project", ValueError, r"project: tensors: the Nones at \[0, 2\]", tensors=[None, a, None]
    )
    refuse(
        "project", ValueError, "project: tensors: expected 600 .* got 700",
        tensors=[a, b, None, b],
    )  # fmt: skip


def test_project_many_lists():
    basis, a = torch.randn(D, N), torch.randn(N)
    with pytest.raises(TypeError, match=r"project_many: lists: expected a list.* got Tensor"):
        ops.project_many(basis, a)
    with pytest.raises(TypeError, match=r"project_many: lists\[0\]: expected a list.* got Tensor"):
        ops.project_many(basis, [a, a])
    with pytest.raises(ValueError, match="project_many: lists: expected at least one list"):
        ops.project_many(basis, [])
    # the sizes of both lists together would be right
    with pytest.raises(ValueError, match=r"lists\[0\]: expected 600 elements in all.* got 1200"):
        ops.project_many(basis, [[a, a], []])
    with pytest.raises(ValueError, match=r"project_many: lists\[1\]: the Nones at \[0, 2\]"):
        ops.project_many(basis, [[a], [None, a[:9], None]])
    raw = torch.ops.dldr_ext.project_many
    halves = [a[:300], a[:601].repeat(2)[:600], a[:300]]
    with pytest.raises(RuntimeError, match=r"expected 2 lists of 600 .* got 900 in list 0"):
        raw(basis, halves, 2)


def test_coordinates_of_reconstruct_residual():
    basis, g, theta = torch.randn(D, N), [torch.randn(N)], torch.randn(D)
    name = "reconstruct_residual: coordinates"
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(4,\).* got \(5,\)"):
        ops.reconstruct_residual(basis, theta, torch.ones(5), g)
    with pytest.raises(TypeError, match=f"{name}: expected a tensor, got None"):
        ops.reconstruct_residual(basis, theta, None, g)


def test_the_raw_op_raises_runtime_error():
    with pytest.raises(RuntimeError, match="project: tensors: expected 600"):
        torch.ops.dldr_ext.project(torch.ones(D, N), [torch.ones(3)])
