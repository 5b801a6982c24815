"""P-BFGS: a quasi-Newton method on the coordinates of a subspace."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..collectives.process_group import listed, together
from ..subspace.base import AffineSubspace
from .options import checked, names_options
from .quasi_newton import QuasiNewton
from .status import Status
from .step.closure import Closure, Loss


class PBFGS(QuasiNewton):
    """P-BFGS (Li et al., TPAMI 2022, algorithm 2), with the step made safe.

    A step takes c = P^T g (pass 1 over the basis), the direction p = -B c with B an approximation
    of the d x d inverse Hessian, u = P p (pass 2), and searches along w + alpha u without touching
    the basis again. The projected gradient at the accepted point, which ``curvature="same_batch"``
    wants, is made in pass 1 of the next step.

    Constructing it puts the model at origin + P theta0 and logs a warning (logger ``dldr_ext``) if
    that moved the weights. From then on the weights are the optimizer's: it writes them from its
    own copy in each step, and refuses weights that something else has written (see `resync`).

    Parameters
    ----------
    params : iterable of Tensor
        The parameters that the subspace was made for.
    subspace : Subspace or GroupedSubspace
    lr : float or Tensor of one element
        First trial step of each search, > 0 (the step itself without a search); in
        ``param_groups``, so that schedulers work.
    line_search_fn : "armijo", "strong_wolfe" or None
        Backtracking; bracketing and interpolation, which also uses gradients of the trials; none.
    c1 : float
        Sufficient decrease, in (0, 1): f(w + alpha u) < f(w) + c1 alpha c.p.
    backtrack : float
        Factor in (0, 1) from trial to trial (of "strong_wolfe": after a trial that is not finite).
    max_ls : int
        Largest number of trials of one search.
    curvature : "same_batch" or "consecutive"
        Where y comes from. "same_batch": the change of the projected gradient of this step's
        closure from the old to the new point; costs one evaluation with backward, the accepted
        trial itself whenever that kept its graph, and a flat copy of the gradient (n numbers).
        "consecutive": the change between the gradients of two consecutive steps, whatever their
        batches; costs nothing, and is the same if the closure always uses all data.
    damping : "powell" or None
        Powell's damping of y, which keeps B positive definite where the curvature is negative.
    max_iter : int
        Iterations of one step, all with the same closure, as in torch's LBFGS. From the second on
        the accepted trial is the first evaluation: one evaluation less for each.
    tolerance_grad : float
        A step whose |c| is not larger does not move (CONVERGED).
    weight_decay : float
        >= 0; wd / 2 |w|^2 is added to the objective: gradient, curvature and trials. What
        ``step`` returns and ``history`` holds is the closure's loss alone.
    maximize : bool
        Maximises what the closure returns.
    grad_scaler : torch.amp.GradScaler or None
        For float16 gradients: a closure that calls backward itself calls it on
        ``scaler.scale(loss)`` and returns ``loss``; for the other style the optimizer does so.
        The optimizer divides by the scale, makes it smaller after a gradient that is not finite
        and larger after ``growth_interval`` steps without: neither ``scaler.step`` nor
        ``scaler.unscale_`` nor ``scaler.update`` are called.
    residual_lr : float
        Learning rate, >= 0, of the part g - P P^T g of the gradient outside the subspace, by which
        the weights move too after each accepted step (P+-BFGS). The weights then leave
        origin + P theta; costs 2 n numbers and no pass of its own.
    residual_momentum : float
        Momentum of that part, in [0, 1).
    buffers : module, iterable of Tensor, or None
        Tensors that an evaluation changes (batch-norm statistics): pass the model. Every
        evaluation of a step sees them as before the step.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        The ranks that step together, each with a closure of its own batch: the objective is the
        mean of their losses, each counting the same. None: this process alone. Every rank calls
        `step`, `state_dict` and the like; d + 1 numbers are summed for a gradient, one for a
        trial. A module in ``DistributedDataParallel`` means its group, and that its own sum of n
        numbers is left out (`no_sync`).
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.

    Notes
    -----
    B starts at diag(sigma_i / sigma_1) if the subspace knows its singular values, else at I; it is
    scaled up before its first update where the curvature allows longer steps; updates use a
    relative curvature test. Only ``curvature="consecutive", damping=None`` follows the
    published rule: B starts at I, is never scaled, and is updated when y.s > 1e-20. Together with
    ``line_search_fn="armijo", c1=0.4, backtrack=0.4, max_ls=20`` that is the published algorithm,
    except that a failed search does not step.

    A step that ends without moving (`Status`) leaves weights and buffers bitwise as they were; if
    it failed, B is back at its start. Where the loss or a gradient is not finite at weights whose
    loss or gradient nothing has looked at yet, the step goes back to the last point where both
    were finite (RESTORED). Random numbers (torch's, CPU and the parameters' CUDA devices) are the
    same in every evaluation of a step, and go on afterwards as after one evaluation. After an
    accepted step the buffers are as the evaluation at the accepted weights leaves them.

    On a GPU, with "armijo" and without ``weight_decay``, ``grad_scaler`` and ``max_iter``, all
    d x d algebra runs there in one kernel and the first trial is made before the host has read any
    number of the step: it waits once a trial. The first trial is then made even where the gradient
    turns out to be zero or not finite, and a gradient that is not finite at an accepted point is
    found by the next step, which goes back (RESTORED).

    The state that `state_dict` saves includes a flat copy of the weights, n numbers.
    """

    @names_options
    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float | Tensor = 1.0,
        *,
        line_search_fn: Literal["armijo", "strong_wolfe"] | None = "armijo",
        c1: float = 1e-4,
        backtrack: float = 0.5,
        max_ls: int = 20,
        curvature: Literal["same_batch", "consecutive"] = "same_batch",
        damping: Literal["powell"] | None = "powell",
        max_iter: int = 1,
        tolerance_grad: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        residual_lr: float = 0.0,
        residual_momentum: float = 0.9,
        buffers: nn.Module | Iterable[Tensor] | None = None,
        process_group: Any = None,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        params = listed(params)
        ranks = together("PBFGS", process_group, params)
        with nullcontext() if ranks is None else ranks.agreeing():
            defaults = checked(
                lr=lr,
                line_search_fn=line_search_fn,
                c1=c1,
                backtrack=backtrack,
                max_ls=max_ls,
                curvature=curvature,
                damping=damping,
                max_iter=max_iter,
                tolerance_grad=tolerance_grad,
                weight_decay=weight_decay,
                maximize=maximize,
                residual_lr=residual_lr,
                residual_momentum=residual_momentum,
            )
            super().__init__(params, subspace, defaults, theta0, buffers, grad_scaler, ranks)

    @torch.no_grad()
    def step(self, closure: Closure) -> Loss:  # type: ignore[override]
        """One step.

        Parameters
        ----------
        closure : callable
            Evaluates the loss of one batch at the current weights; called several times, for the
            same batch. Either it zeroes the gradients, calls backward and returns the loss (as for
            torch's LBFGS), or it only returns a loss with a graph: then the optimizer calls
            backward where a gradient is needed, gradients need not be zeroed, and the trials of
            the search run under ``torch.no_grad()``, except where a trial is likely to be accepted
            and its gradient is wanted next (same-batch curvature, once B has been updated). For a
            batch in parts see `virtual_batch`.

        Returns
        -------
        Tensor or float
            The loss before the step, detached.

        Raises
        ------
        TypeError
            The closure is none, or does not return a scalar.
        ValueError
            The loss has no graph and the closure left no gradients; it is not finite in the very
            first step; something else wrote to the weights since the last step (see `resync`).
        Exception
            Whatever the closure raises. Weights and buffers are then as before the step.
        """
        if not callable(closure):
            raise TypeError(f"PBFGS: step: closure: expected a callable, got {closure!r}")
        self._check_untouched()
        self._scale.begin()
        self._replay.begin()
        try:
            first = self._first_evaluation(closure)
            if self._runs_ahead():
                loss = self._one_ahead(closure, first)
            else:
                loss = self._several(closure, first)
        except BaseException:
            self._put_back()
            self._guard.remember()
            raise
        self._replay.finish()
        self._scale.end(self._status)
        self._guard.remember()
        if self._ranks is not None:
            return torch.full_like(first, loss).detach() if isinstance(first, Tensor) else loss
        return first.detach() if isinstance(first, Tensor) else first

    def _one_ahead(self, closure: Closure, first: Loss) -> float:
        known: dict[str, Any] = {}
        loss = self._iterate_ahead(closure, first, known)
        self._end(known.pop("status"), loss, known)
        return loss

    def _several(self, closure: Closure, first: Loss) -> float:
        """Iterations on one closure; the loss before the first."""
        before: float | None = None
        iterations = self.param_groups[0]["max_iter"]
        for k in range(iterations):
            more = k + 1 < iterations
            known: dict[str, Any] = {}
            status, loss = self._iterate(closure, first, k > 0, more, known)
            before = loss if before is None else before
            self._end(status, loss, known)
            if not more or "loss_after" not in known:
                break
            self._replay.keep()
            first = known["loss_after"]
        assert before is not None
        return before

    def _end(self, status: Status, loss: float, known: dict[str, Any]) -> None:
        self._record(loss, status if status.moved else self._stay(status), **known)
