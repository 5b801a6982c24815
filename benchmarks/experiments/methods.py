"""The ways to train that are compared; each is a function of a task and the run of SGD before it.

* ``sgd``, ``sgd_half``: SGD, and the same run half way, where sampling ends;
* ``sgd_sampled``: the same run where the sample of the subspace ends, if that is before half;
* ``sgd_short``: SGD with its whole schedule in half the passes;
* ``sgd_cosine``: SGD whose rate falls along a cosine, in the passes of sampling and P-BFGS;
* ``ema``: the full run's running average of the weights of all steps, its decay chosen on the
  validation part;
* ``mean_last``: the mean of the weights at the end of the full run's last epochs, their number
  chosen likewise;
* ``psgd``, ``pbfgs``: in the DLDR subspace of the sampled part of SGD, from the initial weights;
* ``pbfgs_published``: the same with the options of the paper;
* ``one_pass``, ``one_pass_mean``, ``one_pass_last``: a single pass of Adam over the coordinates in
  the metric of the trajectory, its rate along a cosine, from the initial weights, the mean of the
  snapshots and the last one;
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
from published import PUBLISHED
from torch import Tensor, nn

from dldr_ext import PSGD, InSubspace, Subspace

from .coordinates import Run, principal, run_first_order, run_pbfgs
from .settings import Settings, cosine
from .sgd import Lead, make_optimizer, run_sgd, train_epochs
from .training import Account, Outcome, Task, copied, counted_closure, flat, has_norms, write

NAMES = {
    "sgd": "SGD",
    "sgd_half": "SGD, first half",
    "sgd_sampled": "SGD, stopped after the sample",
    "sgd_short": "SGD, half as long",
    "sgd_cosine": "SGD, cosine, in P-BFGS's passes",
    "lbfgs": "L-BFGS, all parameters",
    "swa": "SWA",
    "ema": "running average of SGD",
    "mean_last": "mean of SGD's last epochs",
    "twa": "trainable weight averaging",
    "psgd": "P-SGD",
    "one_pass": "one pass of Adam",
    "one_pass_mean": "one pass of Adam from the mean",
    "one_pass_last": "one pass of Adam from the last sample",
    "pbfgs_published": "P-BFGS, published options",
    "pbfgs": "P-BFGS",
    "pbfgs_last": "P-BFGS from the last sample",
    "pbfgs_early": "P-BFGS from an early sample",
    "random": "random subspace",
    "trained": "trained model",
    "tuned_sgd": "fine-tuned, SGD",
    "tuned_pbfgs": "fine-tuned, P-BFGS",
}
_ROWS = {"first": 0, "last": -1}
_LAST_EPOCHS = (3, 5, 10, 20)  # of which the mean is taken
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
    other = _other(task, replace(task.settings, epochs=task.settings.half))
    return sgd(other, run_sgd(other))


def sgd_cosine(task: Task, lead: Lead) -> Outcome:
    """A run of its own that reads as much as sampling and P-BFGS together."""
    del lead
    s = task.settings
    model, account = task.model(), Account(len(task.problem.train))
    kept = {"curve": [(0.0, task.validate(model))]}
    for _ in train_epochs(
        task,
        model,
        make_optimizer(task, model),
        account,
        task.batches(s.batch, 0),
        s.sampled_epochs + s.passes,
        lambda done: cosine(s.lr, done),
        kept,
    ):
        kept["curve"].append((account.passes, task.validate(model)))
    return Outcome(model, account, 0.0, kept["curve"])


def _other(task: Task, settings: Settings) -> Task:
    """The task with other settings, of whose run nothing is recorded."""
    other = Task(task.problem, task.network, replace(settings, sampled=0.0, snapshots=1), task.seed)
    other.noise, other.progress = task.noise, task.progress
    return other


def ema(task: Task, lead: Lead) -> Outcome:
    """The running average that is best on the validation part."""
    return _best_average(task, lead, "decay", lead.averages)


def mean_last(task: Task, lead: Lead) -> Outcome:
    """The mean of the last epochs' ends, of as many as is best on the validation part."""
    counts = [count for count in _LAST_EPOCHS if count <= len(lead.ends)] or [len(lead.ends)]
    means = {count: lead.ends[-count:].mean(0) for count in counts}
    return _best_average(task, lead, "epochs", means)


def _best_average(task: Task, lead: Lead, what: str, candidates: dict[float, Tensor]) -> Outcome:
    """The best of some weights; choosing is off the account."""
    found = []
    for value, weights in candidates.items():
        model = task.model()
        write(model, weights)
        task.renew_norms(model)
        found.append((task.validate(model), value, model))
    best, value, model = max(found, key=lambda one: one[0])
    account = lead.accounts["final"].copy()
    with account:
        account.read(task.renew_norms(model))
    return Outcome(model, account, 0.0, [(account.passes, best)], notes={what: value})


def psgd(task: Task, lead: Lead) -> Outcome:
    """SGD with momentum on the coordinates, from the initial weights."""
    s = task.settings
    subspace = principal(lead.weights(s.sampled_epochs), s.dim)
    run = Run(task, subspace, s.passes, s.sampled_epochs, s.subspace_decay)
    optimizer = PSGD(run.model.parameters(), subspace, s.psgd_lr, s.momentum)
    schedule = replace(s, lr=s.psgd_lr)
    return run_first_order(run, optimizer, s.batch, schedule.rate)


def one_pass(task: Task, lead: Lead) -> Outcome:
    """One pass of Adam over the coordinates, from the initial weights."""
    return _one_pass(task, lead, lambda weights: weights[0])


def one_pass_mean(task: Task, lead: Lead) -> Outcome:
    """The same from the mean of the snapshots."""
    return _one_pass(task, lead, lambda weights: weights.mean(0))


def one_pass_last(task: Task, lead: Lead) -> Outcome:
    """The same from the last snapshot."""
    return _one_pass(task, lead, lambda weights: weights[-1])


def _one_pass(task: Task, lead: Lead, choose: Callable[[Tensor], Tensor]) -> Outcome:
    s, weights = task.settings, lead.weights(task.settings.sampled_epochs)
    subspace = principal(weights, s.dim)
    passes = 1 + has_norms(task.model())
    run = Run(task, subspace, passes, s.sampled_epochs, s.subspace_decay)
    start = subspace.coordinates(choose(weights))
    optimizer = InSubspace(
        run.model.parameters(), subspace, torch.optim.Adam, lr=s.one_pass_lr, theta0=start
    )
    return run_first_order(run, optimizer, s.batch, lambda done: cosine(s.one_pass_lr, done))


def pbfgs(task: Task, lead: Lead) -> Outcome:
    """P-BFGS in the DLDR subspace, from the initial weights."""
    s = task.settings
    subspace = principal(lead.weights(s.sampled_epochs), s.dim)
    run = Run(task, subspace, s.passes, s.sampled_epochs, s.subspace_decay, s.averages)
    return run_pbfgs(run, s.subspace_batch)


def pbfgs_published(task: Task, lead: Lead) -> Outcome:
    """The same with the options of the paper, at the last coordinates."""
    s = task.settings
    subspace = principal(lead.weights(s.sampled_epochs), s.dim)
    run = Run(task, subspace, s.passes, s.sampled_epochs, s.subspace_decay)
    return run_pbfgs(run, s.subspace_batch, **PUBLISHED)


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
    subspace = Subspace.random(parameters, s.dim, generator=task.generator(3, task.device))
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
    return run_first_order(run, optimizer, s.batch, lambda _: s.twa_lr)


def _checkpoints(task: Task, lead: Lead) -> tuple[nn.Module, Account, Tensor]:
    """SGD from half of the run on at the rate of SWA: the weights (T, n) at each epoch's end."""
    s, model = task.settings, task.model()
    model.load_state_dict(lead.states["half"])
    optimizer, account = make_optimizer(task, model), lead.accounts["half"].copy()
    for name, p in model.named_parameters():
        if name in lead.momenta:
            optimizer.state[p]["momentum_buffer"] = lead.momenta[name].clone()
    kept: dict[str, list[Tensor]] = {"rows": []}
    stream = task.batches(s.batch, 6)
    for _ in train_epochs(
        task, model, optimizer, account, stream, s.epochs - s.half, lambda _: s.swa_lr, kept
    ):
        kept["rows"].append(flat(model))
    return model, account, torch.stack(kept["rows"])


def trained(task: Task, lead: Lead) -> Outcome:
    """The model that is to be improved: the full run of SGD."""
    return replace(sgd(task, lead), best=None)


def tuned_sgd(task: Task, lead: Lead) -> Outcome:
    """The fine-tune alone, with as many passes as fine-tune and P-BFGS together, at a rate that
    falls to a tenth where P-BFGS would begin."""
    s, model, account = task.settings, *_trained(task, lead)
    kept = {"curve": [(0.0, task.validate(model))]}
    for _ in train_epochs(
        task,
        model,
        make_optimizer(task, model),
        account,
        task.batches(s.batch, 7),
        2 * s.tuning_epochs,
        lambda done: s.tuning_lr * (1.0 if done < 0.5 else 0.1),
        kept,
    ):
        kept["curve"].append((account.passes, task.validate(model)))
    return Outcome(model, account, lead.accounts["final"].passes, kept["curve"])


def tuned_pbfgs(task: Task, lead: Lead) -> Outcome:
    """A short fine-tune is sampled; P-BFGS then trains at most 30 coordinates of it from the
    trained weights' own coordinates on."""
    s, model, account = task.settings, *_trained(task, lead)
    rows, due = [flat(model)], task.snapshot_steps()
    for _ in train_epochs(
        task,
        model,
        make_optimizer(task, model),
        account,
        task.batches(s.batch, 7),
        s.tuning_epochs,
        lambda _: s.tuning_lr,
        {"rows": rows},
        lambda step: rows.append(flat(model)) if step in due else None,
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
    "sgd_cosine": sgd_cosine,
    "lbfgs": lbfgs,
    "swa": swa,
    "twa": twa,
    "ema": ema,
    "mean_last": mean_last,
    "psgd": psgd,
    "one_pass": one_pass,
    "one_pass_mean": one_pass_mean,
    "one_pass_last": one_pass_last,
    "pbfgs_published": pbfgs_published,
    "pbfgs": pbfgs,
    "pbfgs_last": pbfgs_last,
    "pbfgs_early": pbfgs_early,
    "random": random,
    "trained": trained,
    "tuned_sgd": tuned_sgd,
    "tuned_pbfgs": tuned_pbfgs,
}
#: Those that train settings.dim numbers.
IN_SUBSPACE = (
    "psgd",
    "one_pass",
    "one_pass_mean",
    "one_pass_last",
    "pbfgs_published",
    "pbfgs",
    "pbfgs_last",
    "pbfgs_early",
    "random",
    "tuned_pbfgs",
)
