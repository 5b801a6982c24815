"""TensorBoard and the progress bar."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, random_subspace

from dldr_ext import PBFGS, PSGD, InSubspace
from dldr_ext.optim.callbacks import log_to_tensorboard, progress


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))


def optimizers() -> list[tuple[Any, Batches]]:
    made: list[tuple[Any, Batches]] = []
    for make, options in (
        (PBFGS, {"max_iter": 2}),
        (PSGD, {"lr": 0.1}),
        (InSubspace, {"optimizer": torch.optim.Adam}),
    ):
        batches = Batches(0)
        made.append((make(batches.params, random_subspace(batches.params, 4), **options), batches))
    return made


def test_writes_every_record_once() -> None:
    for optimizer, batches in optimizers():
        optimizer.step(batches.forward(0))  # before it is watched
        before, writer = len(optimizer.history), Writer()
        handle = log_to_tensorboard(optimizer, writer, "run")  # type: ignore[arg-type]
        for step in range(1, 5):
            optimizer.step(batches.forward(step))
        records = list(optimizer.history)[before:]
        assert writer.scalars["run/loss"] == [(r.step, r.loss) for r in records]
        assert writer.scalars["run/trials"] == [(r.step, r.trials) for r in records]
        assert "run/step" not in writer.scalars
        assert not any(math.isnan(v) for values in writer.scalars.values() for _, v in values)
        handle.remove()
        optimizer.step(batches.forward(0))
        assert len(writer.scalars["run/loss"]) == len(records)


def test_words_are_written_where_they_change() -> None:
    batches, writer = Batches(0), Writer()
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    log_to_tensorboard(optimizer, writer)  # type: ignore[arg-type]
    for step in range(5):
        optimizer.step(lambda step=step: batches.forward(0)() + (math.nan if step == 3 else 0.0))
    states = [(word, step) for tag, word, step in writer.texts if tag == "optimizer/status"]
    assert states == [("ACCEPTED", 1), ("NON_FINITE_LOSS", 4), ("ACCEPTED", 5)]


def test_tensorboard_reads_it(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    optimizer, batches = optimizers()[0]
    with SummaryWriter(tmp_path) as writer:
        log_to_tensorboard(optimizer, writer)
        for step in range(3):
            optimizer.step(batches.forward(step))
    events = EventAccumulator(str(tmp_path)).Reload()
    records = list(optimizer.history)
    found = [(event.step, event.value) for event in events.Scalars("optimizer/loss")]
    assert found == [(r.step, pytest.approx(r.loss)) for r in records]


def test_progress_shows_the_last_step() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    for optimizer, batches in optimizers():
        out = io.StringIO()
        with progress(optimizer, 3, console=Console(file=out, width=150, force_terminal=True)):
            for step in range(3):
                optimizer.step(batches.forward(step))
        text, record = out.getvalue(), optimizer.history[-1]
        assert "3/3" in text and f"loss {record.loss:.6g}" in text
        assert "trial" in text and f"step length {record.step_length:.3g}" in text
        optimizer.step(batches.forward(3))
        assert out.getvalue() == text  # the hook is gone


def test_other_optimizers_are_refused() -> None:
    sgd = torch.optim.SGD(Batches(0).params)
    with pytest.raises(TypeError, match=r"expected one of dldr_ext, .* got SGD"):
        log_to_tensorboard(sgd, Writer())  # type: ignore[arg-type]
    pytest.importorskip("rich")
    with pytest.raises(TypeError, match="got SGD"), progress(sgd, 3):
        pass
