"""The ways to train that are compared; each is a function of a task and the run of SGD before it.

* ``sgd``, ``sgd_half``: SGD, and the same run half way, where sampling ends;
* ``sgd_sampled``: the same run where the sample of the subspace ends, if that is before half;
* ``sgd_short``: SGD with its whole schedule in half the passes;
* ``psgd``, ``pbfgs``: in the DLDR subspace of the sampled part of SGD, from the initial weights,
  as published;
* ``pbfgs_last``: the same from the last weights of the sample;
* ``pbfgs_early``: the same from those of half that sample, within half that budget, so that
  sampling and P-BFGS together read what half of SGD reads;
* ``random``: P-BFGS in a random subspace of the same dimension;
* ``lbfgs``: torch's L-BFGS on all parameters, with the passes of the full SGD;
* ``swa``: from half of SGD on a constant rate, averaged at every epoch's end (arXiv:1803.05407);
* ``twa``: the same checkpoints with trained coefficients (arXiv:2205.13104);
* ``trained``, ``tuned_sgd``, ``tuned_pbfgs``: a trained model, and what a short fine-tune and
  P-BFGS in its subspace make of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dldr_ext import PSGD, Subspace

from .coordinates import Run, flat, principal, run_pbfgs, write
from .training import (
    Account,
    Lead,
    Outcome,
    Task,
    copied,
    counted_closure,
    has_norms,
    make_sgd,
    run_sgd,
    sgd_steps,
)

NAMES = {
    "sgd": "SGD",
    "sgd_half": "SGD, first half",
    "sgd_sampled": "SGD, stopped after the sample",
    "sgd_short": "SGD, half as long",
    "lbfgs": "L-BFGS, all parameters",
    "swa": "SWA",
    "twa": "trainable weight averaging",
    "psgd": "P-SGD",
    "pbfgs": "P-BFGS",
    "pbfgs_last": "P-BFGS from the last sample",
    "pbfgs_early": "P-BFGS from an early sample",
    "random": "random subspace",
    "trained": "trained model",
    "tuned_sgd": "fine-tuned, SGD",
    "tuned_pbfgs": "fine-tuned, P-BFGS",
}
_ROWS = {"first": 0, "last": -1}
_LBFGS_ITERATIONS = 5  # on one batch, before the next comes


def sgd(task: Task, lead: Lead) -> Outcome:
    """The full run."""
    return _of_lead(task, lead, "final", len(lead.curve), lead.states["best"])


def sgd_half(task: Task, lead: Lead) -> Outcome:
    """The same run half way."""
    return _of_lead(task, lead, "half", 1 + task.settings.half, None)


def _of_lead(
    task: Task, lead: Lead, name: str, length: int, best: dict[str, Tensor] | None
) -> Outcome:
    model = task.model()
    model.load_state_dict(lead.states[name])
    return Outcome(model, lead.accounts[name], 0.0, lead.curve[:length], best)


def sgd_sampled(task: Task, lead: Lead) -> Outcome:
    """The run stopped where the sample of P-BFGS ends: what early stopping alone comes to."""
    epochs, model = task.settings.sampled_epochs, task.model()
    write(model, lead.weights(epochs)[-1])
    account = lead.accounts["final"].part(epochs / task.settings.epochs)
    with account:
        account.read(task.renew_norms(model))
    curve = [*lead.curve[:epochs], (account.passes, task.validate(model))]
    return Outcome(model, account, 0.0, curve, copied(model))


def sgd_short(task: Task, lead: Lead) -> Outcome:
    """A run of its own with the whole schedule in half the epochs."""
    del lead
    shorter = replace(task.settings, epochs=task.settings.half, sampled=0.0, snapshots=1)
    other = Task(task.problem, task.network, shorter, task.seed)
    other.noise = task.noise
    return sgd(other, run_sgd(other))


def psgd(task: Task, lead: Lead) -> Outcome:
    """SGD with momentum on the coordinates, from the initial weights."""
    s = task.settings
    subspace = principal(lead.weights(s.sampled_epochs), s.dim)
    run = Run(task, subspace, s.passes, s.sampled_epochs, s.subspace_decay)
    optimizer = PSGD(run.model.parameters(), subspace, s.psgd_lr, s.momentum, metric=None)
    schedule = replace(s, lr=s.psgd_lr)
    for inputs, labels in task.batches(s.batch, 1):
        if run.left < len(labels):
            break
        optimizer.param_groups[0]["lr"] = schedule.rate(run.done)
        run.step(optimizer, inputs, labels)
    return run.outcome()


def pbfgs(task: Task, lead: Lead) -> Outcome:
    """P-BFGS in the DLDR subspace, from the initial weights."""
    s = task.settings
    subspace = principal(lead.weights(s.sampled_epochs), s.dim)
    run = Run(task, subspace, s.passes, s.sampled_epochs, s.subspace_decay, s.averages)
    return run_pbfgs(run, s.subspace_batch)


def pbfgs_last(task: Task, lead: Lead) -> Outcome:
    """P-BFGS in the same subspace, from the last weights of the sample."""
    s = task.settings
    return _pbfgs_last(task, lead, s.sampled_epochs, s.passes)


def pbfgs_early(task: Task, lead: Lead) -> Outcome:
    """The same from the first half of the sample, in what is left of half of SGD."""
    epochs = max(1, task.settings.sampled_epochs // 2)
    return _pbfgs_last(task, lead, epochs, max(3, task.settings.half - epochs))


def _pbfgs_last(task: Task, lead: Lead, epochs: int, passes: int) -> Outcome:
    s, weights = task.settings, lead.weights(epochs)
    subspace = principal(weights, s.dim)
    run = Run(task, subspace, passes, epochs, s.last_decay, s.averages)
    return run_pbfgs(run, s.last_batch, subspace.coordinates(weights[-1]))


def random(task: Task, lead: Lead) -> Outcome:
    """The control: a random subspace at the initial weights."""
    del lead
    s, parameters = task.settings, task.model().parameters()
    subspace = Subspace.random(parameters, s.dim, generator=task.generator(3))
    run = Run(task, subspace, s.passes, 0.0, s.subspace_decay, s.averages)
    return run_pbfgs(run, s.subspace_batch)


def lbfgs(task: Task, lead: Lead) -> Outcome:
    """torch's L-BFGS with strong Wolfe searches, in the passes of the full SGD."""
    del lead
    s = task.settings
    model = task.model()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it wants that
    account = Account(len(task.problem.train))
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    allowed = (s.epochs - has_norms(model)) * account.size
    curve = [(0.0, task.validate(model))]
    for inputs, labels in task.batches(s.lbfgs_batch, 4):
        if allowed - account.images < 3 * len(labels):
            break
        # max_eval is looked at between searches, hence a run may end a few trials late.
        optimizer.param_groups[0]["max_iter"] = _LBFGS_ITERATIONS
        optimizer.param_groups[0]["max_eval"] = (allowed - account.images) // len(labels)
        evaluate = counted_closure(model, inputs, labels, s.weight_decay, account)

        def closure(evaluate: Callable[[], Tensor] = evaluate) -> Tensor:
            optimizer.zero_grad()
            loss = evaluate()
            loss.backward()
            return loss

        with account:
            optimizer.step(closure)
        if account.passes >= curve[-1][0] + 1 and not has_norms(model):
            curve.append((account.passes, task.validate(model)))
    with account:
        account.read(task.renew_norms(model))
    curve.append((account.passes, task.validate(model)))
    return Outcome(model, account, 0.0, curve)


def swa(task: Task, lead: Lead) -> Outcome:
    """Half of SGD, then a constant rate; the plain average of the weights at each epoch's end."""
    model, account, rows = _checkpoints(task, lead)
    write(model, rows.mean(0))
    with account:
        account.read(task.renew_norms(model))
    return Outcome(model, account, 0.0, [(account.passes, task.validate(model))])


def twa(task: Task, lead: Lead) -> Outcome:
    """P-SGD on the coefficients of the same checkpoints, from their plain average."""
    s = task.settings
    _, before, rows = _checkpoints(task, lead)
    subspace = Subspace.from_snapshots(rows, len(rows), "qr")
    run = Run(task, subspace, max(2, s.passes // 2), before.passes, s.subspace_decay)
    start = subspace.coordinates(rows.mean(0))
    optimizer = PSGD(run.model.parameters(), subspace, s.twa_lr, s.momentum, theta0=start)
    for inputs, labels in task.batches(s.batch, 5):
        if run.left < len(labels):
            break
        run.step(optimizer, inputs, labels)
    return run.outcome()


def _checkpoints(task: Task, lead: Lead) -> tuple[nn.Module, Account, Tensor]:
    """SGD from half of the run on at the rate of SWA: the weights (T, n) at each epoch's end."""
    s, model = task.settings, task.model()
    model.load_state_dict(lead.states["half"])
    optimizer, account = make_sgd(task, model), lead.accounts["half"].copy()
    for name, p in model.named_parameters():
        if name in lead.momenta:
            optimizer.state[p]["momentum_buffer"] = lead.momenta[name].clone()
    rows = []
    stream = task.batches(s.batch, 6)
    for _ in sgd_steps(
        task, model, optimizer, account, stream, s.epochs - s.half, lambda _: s.swa_lr
    ):
        rows.append(flat(model))
    return model, account, torch.stack(rows)


def trained(task: Task, lead: Lead) -> Outcome:
    """The model that is to be improved: the full run of SGD."""
    return replace(sgd(task, lead), best=None)


def tuned_sgd(task: Task, lead: Lead) -> Outcome:
    """The fine-tune alone, with as many passes as fine-tune and P-BFGS together, at a rate that
    falls to a tenth where P-BFGS would begin."""
    s, model, account = task.settings, *_trained(task, lead)
    optimizer = make_sgd(task, model)
    curve = [(0.0, task.validate(model))]
    for _ in sgd_steps(
        task,
        model,
        optimizer,
        account,
        task.batches(s.batch, 7),
        2 * s.tuning_epochs,
        lambda done: s.tuning_lr * (1.0 if done < 0.5 else 0.1),
    ):
        curve.append((account.passes, task.validate(model)))
    return Outcome(model, account, lead.accounts["final"].passes, curve)


def tuned_pbfgs(task: Task, lead: Lead) -> Outcome:
    """A short fine-tune is sampled; P-BFGS then trains at most 30 coordinates of it from the
    trained weights' own coordinates on."""
    s, model, account = task.settings, *_trained(task, lead)
    rows = [flat(model)]
    for _ in sgd_steps(
        task,
        model,
        make_sgd(task, model),
        account,
        task.batches(s.batch, 7),
        s.tuning_epochs,
        lambda _: s.tuning_lr,
        lambda: rows.append(flat(model)),
        s.snapshots,
    ):
        pass
    subspace = principal(torch.stack(rows), min(s.dim, 30))
    before = lead.accounts["final"].passes + account.passes
    passes = max(3, s.tuning_epochs)
    run = Run(task, subspace, passes, before, s.subspace_decay, s.averages)
    return run_pbfgs(run, s.subspace_batch, subspace.coordinates(rows[_ROWS[s.tuning_start]]))


def _trained(task: Task, lead: Lead) -> tuple[nn.Module, Account]:
    model = task.model()
    model.load_state_dict(lead.states["final"])
    return model, Account(len(task.problem.train))


#: Every method by its name in the files.
METHODS: dict[str, Callable[[Task, Lead], Outcome]] = {
    "sgd": sgd,
    "sgd_half": sgd_half,
    "sgd_sampled": sgd_sampled,
    "sgd_short": sgd_short,
    "lbfgs": lbfgs,
    "swa": swa,
    "twa": twa,
    "psgd": psgd,
    "pbfgs": pbfgs,
    "pbfgs_last": pbfgs_last,
    "pbfgs_early": pbfgs_early,
    "random": random,
    "trained": trained,
    "tuned_sgd": tuned_sgd,
    "tuned_pbfgs": tuned_pbfgs,
}
#: Those that train settings.dim numbers.
IN_SUBSPACE = ("psgd", "pbfgs", "pbfgs_last", "pbfgs_early", "random", "tuned_pbfgs")
