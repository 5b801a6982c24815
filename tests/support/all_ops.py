"""Every op on one set of inputs, for what must hold of each: order, capture, poisoned memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import reference
import torch
from samples import Sample, make_list, make_rows, wide
from torch import Tensor

from dldr_ext import ops

quasi_newton_ = torch.ops.dldr_ext.quasi_newton_


@contextmanager
def poisoned_memory():
    """Fresh memory, scratch memory too, holds NaNs and the largest integers."""
    torch.use_deterministic_algorithms(True)  # with its default fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class AllOps:
    """Inputs and outputs of every op; `run` calls them all and returns what they gave.

    The second list of `project_many` is cut in another way than `tensors`, and so are the written
    parameters (`cut_of_params`). ``tensors`` may be given, for the same numbers in another cut.
    """

    def __init__(self, dtype: torch.dtype, n: int, d: int, kind: str = "cut") -> None:
        self.dtype, self.n, self.d = dtype, n, d
        self.basis, self.scale = make_rows(d, n, dtype)
        self.tensors = make_list(kind, n)
        self.other = make_list("mixed", n)
        self.params = [
            torch.empty_like(t) for t in make_list("many" if kind == "many" else "cut", n)
        ]
        self.trial = [torch.empty_like(t) for t in self.params]
        self.theta, self.coordinates = torch.randn(2, d, dtype=wide(dtype)).unbind()
        self.origin, self.direction = torch.randn(2, n, dtype=wide(dtype)).unbind()
        self.coefficients = torch.randn(3, d, dtype=torch.float64)
        self.H, step = torch.eye(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
        self.initial, self.step = torch.ones(d, dtype=torch.float64), step
        self.change, self.c = 2 * step, torch.randn(d, dtype=torch.float64)
        # rows 0 ... d - 1 are the basis; rows d and d + 1 are stored by `run`
        more, scales = make_rows(2, n, dtype)
        self.rows = torch.cat([self.basis.view(torch.uint8), more.view(torch.uint8)]).view(dtype)
        self.row_scale = None if scales is None else torch.cat([self.scale, scales])
        self.gram = torch.zeros(d + 2, d + 2, dtype=torch.float64)
        self.fresh_outputs()

    def outputs(self) -> list[Tensor]:
        """What `run` writes in place."""
        written = [*self.params, *self.trial, self.gram]
        return written if self.row_scale is None else [*written, self.row_scale[self.d :]]

    def fresh_outputs(self) -> None:
        """NaN wherever `run` has to write."""
        for tensor in self.outputs():
            tensor.fill_(torch.nan)

    def fresh_inputs(self) -> None:
        """Other numbers, at the same addresses."""
        inputs = [*self.tensors, *self.other, self.theta, self.coordinates, self.c]
        for tensor in [*inputs, self.origin, self.direction]:
            tensor.copy_(torch.randn_like(tensor))

    def run(self) -> dict[str, Tensor]:
        """Calls every op; allocates nothing but results."""
        basis, scale = self.basis, self.scale
        direction, residual = ops.reconstruct_residual(
            basis, self.theta, self.coordinates, self.tensors, scale=scale
        )
        results = {
            "project": ops.project(basis, self.tensors, scale=scale),
            "project_many": ops.project_many(basis, [self.tensors, self.other] * 2, scale=scale),
            "reconstruct": ops.reconstruct(self.origin, basis, self.theta, scale=scale),
            "direction": direction,
            "residual": residual,
            "gram": ops.gram(basis, scale=scale),
            "form_basis": ops.form_basis(basis, self.coefficients, scale=scale),
        }
        ops.reconstruct_(self.params, self.origin, basis, self.theta, scale=scale)
        ops.trial_(self.trial, self.origin, self.direction, 0.3)
        store, d = self.rows, self.d
        ops.gram_append_(store, self.gram, d, self.tensors, self.origin, scale=self.row_scale)
        ops.store_snapshot_(store, d + 1, self.other, self.origin, scale=self.row_scale)
        ops.gram_block_(store, self.gram, 0, d + 2, scale=self.row_scale)
        results["inverse Hessian"] = self.H.clone()
        results["quasi_newton_"], results["quasi_newton_ info"] = quasi_newton_(
            results["inverse Hessian"], self.initial, self.c, self.step, self.change, self.step,
            fresh=True, damped=True, published=False,
        )  # fmt: skip
        return results

    def results(self, returned: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of everything that `run` returned or wrote."""
        copies = {name: tensor.clone() for name, tensor in returned.items()}
        copies["reconstruct_"] = reference.flat(self.params)
        copies["trial_"] = reference.flat(self.trial)
        copies["gram_block_"] = self.gram.clone()
        copies["stored"] = self.rows[self.d :].view(torch.uint8).clone()
        if self.row_scale is not None:
            copies["row scale"] = self.row_scale[self.d :].clone()
        return copies

    def now(self) -> dict[str, Tensor]:
        """What a plain call of everything gives."""
        self.fresh_outputs()
        return self.results(self.run())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Equal to the bit, and without a NaN: every number was written."""
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), f"{what} {name}: numbers that nothing wrote"
        assert torch.equal(actual[name], tensor), f"{what} {name}: other bits"


def pieces_of(flat: Tensor, edges: Sequence[int]) -> list[Tensor]:
    """The same numbers in tensors of their own, cut at `edges`."""
    return [piece.clone() for piece in flat.tensor_split(sorted(edges))]


def sample_of(case: AllOps) -> Sample:
    """The case as the checks of single ops take it."""
    return Sample(case.basis, case.scale, case.tensors, case.theta, case.origin)
