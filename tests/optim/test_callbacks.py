"""Records as they come: a function, trackers, a progress bar."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import Batches, random_subspace

from dldr_ext import PBFGS, PSGD, InSubspace, Status, StepRecord
from dldr_ext.callbacks import (
    log_to_mlflow,
    log_to_tensorboard,
    log_to_wandb,
    on_step,
    progress,
)


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


def test_a_function_gets_every_record_once() -> None:
    for optimizer, batches in optimizers():
        optimizer.step(batches.forward(0))  # before it is watched
        before = len(optimizer.history)
        seen: list[StepRecord] = []
        handle = on_step(optimizer, seen.append)
        for step in range(1, 4):
            optimizer.step(batches.forward(step))
        assert seen == list(optimizer.history)[before:] and len(seen) >= 3
        state = optimizer.state_dict()
        optimizer.step(batches.forward(0))
        optimizer.load_state_dict(state)  # whose next record has the number of the last
        optimizer.step(batches.forward(1))
        assert seen == list(optimizer.history)[before:]
        handle.remove()
        optimizer.step(batches.forward(0))
        assert len(seen) == len(optimizer.history) - before - len(
            [r for r in optimizer.history if r.step > seen[-1].step]
        )
    with pytest.raises(TypeError, match="function: expected a callable that takes a record, got 3"):
        on_step(optimizer, 3)  # type: ignore[arg-type]


def test_records_are_json() -> None:
    record = StepRecord(3, math.inf, Status.NON_FINITE_LOSS, trials=2)
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "step": 3,
        "loss": None,
        "status": "NON_FINITE_LOSS",
        "gradient_norm": None,
        "alpha": 0.0,
        "step_length": 0.0,
        "trials": 2,
        "curvature": "none",
        "condition": None,
        "loss_after": None,
    }


def test_a_status_is_a_string_too() -> None:
    for status in Status:
        assert isinstance(status, str) and status == status.name and Status[status] is status
        assert json.dumps(status) == f'"{status.name}"' and f"{status} {status!s}".split() == (
            [status.name] * 2
        )
        assert Status(status.value) is status and pickle.loads(pickle.dumps(status)) is status
        assert len(status.value.split()) > 3  # a sentence


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


def offline_rows(path: Path) -> list[dict[str, Any]]:
    """What a run of wandb has logged into its file, a log of LevelDB's."""
    from wandb.proto import wandb_internal_pb2

    data, rows, whole, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        left = 32768 - position % 32768  # of the block
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if left < 7:
            position += left
            continue
        if position + 7 + length > len(data):
            break  # not written to its end
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return [row for row in rows if row]


def test_wandb_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what was sent to the run's file."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    optimizer, batches = optimizers()[0]
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        log_to_wandb(optimizer, run)
        for step in range(3):
            optimizer.step(batches.forward(step))
            run.log({"mine": step})  # beside it
    (path,) = tmp_path.rglob("*.wandb")
    records, end = list(optimizer.history), time.monotonic() + 60
    while len(rows := offline_rows(path)) < len(records) + 3 and time.monotonic() < end:
        time.sleep(0.1)  # wandb's own process may still be writing
    found = [row for row in rows if "optimizer/loss" in row]
    assert [row["optimizer/step"] for row in found] == [r.step for r in records]
    assert [row["optimizer/loss"] for row in found] == [pytest.approx(r.loss) for r in records]
    assert {row["optimizer/status"] for row in found} == {"ACCEPTED"}
    assert [row["mine"] for row in rows if "mine" in row] == [0, 1, 2]


@pytest.mark.parametrize("active", [True, False])
def test_mlflow_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, active: bool) -> None:
    """A store of files."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    optimizer, batches = optimizers()[0]
    with mlflow.start_run() as run:
        handle = log_to_mlflow(optimizer, None if active else run)
        for step in range(3):
            optimizer.step(batches.forward(step))
    client, records = mlflow.MlflowClient(), list(optimizer.history)
    found = client.get_metric_history(run.info.run_id, "optimizer/loss")
    assert [(m.step, m.value) for m in found] == [(r.step, pytest.approx(r.loss)) for r in records]
    assert client.get_run(run.info.run_id).data.tags["optimizer/status"] == "ACCEPTED"
    if active:
        with pytest.raises(RuntimeError, match="expected a run, or an active one, got none"):
            optimizer.step(batches.forward(0))
    handle.remove()


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
