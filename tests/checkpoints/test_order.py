"""The order of checkpoints: what files store, then numbers in names, then time."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from dldr_ext.checkpoints import Series
from dldr_ext.checkpoints.discovery import find_checkpoints
from dldr_ext.checkpoints.order import natural_key

W = {"w": torch.zeros(3)}
ORDERED = [
    ["0.pt", "2.pt", "10.pt", "100.pt"],
    ["model_9.pt", "model_10.pt", "model_100.pt"],
    ["ckpt_e005.pt", "ckpt_e05.5.pt", "ckpt_e6.pt"],
    ["epoch=3-step=300-val_loss=0.12.ckpt", "epoch=20-step=2000-val_loss=0.05.ckpt"],
    ["val_loss=0.9-epoch=1.ckpt", "val_loss=0.12-epoch=2.ckpt", "val_loss=0.3-epoch=10.ckpt"],
    ["epoch_1_step_900.pt", "epoch_2_step_100.pt", "epoch_10_step_1.pt"],
    ["acc0.91_ep2.pth", "acc0.5_ep10.pth"],
    ["2023-12-31_9.pt", "2024-01-05_10.pt", "2024-01-05_12.pt", "2024-11-01_1.pt"],
    ["step_2e2.pt", "step_1e3.pt", "step_1.5e3.pt"],
    ["iter_900.pth", "iter_2k.pth", "iter_10k.pth", "iter_1M.pth"],
    ["model_0.25.pt", "model_0.5.pt", "model_1.125.pt"],
    ["net-v1.9.pt", "net-v1.10.pt", "net-v2.0.pt"],
    ["epoch=-2.ckpt", "epoch=-1.ckpt", "epoch=0.ckpt", "epoch=1.ckpt"],
    ["00001.safetensors", "00010.safetensors", "00100.safetensors"],
    ["initial.pt", "model_2.pt", "model_10.pt", "trained.pt"],
    ["checkpoint_1.pth.tar", "checkpoint_12.pth.tar"],
    ["m_0.50_1.pth", "m_0.40_2.pth", "m_0.91_10.pth"],
    ["m-loss=0.9-1.pth", "m-loss=0.5-2.pth", "m-loss=0.7-10.pth"],
    ["loss=1.2e-01-4.pt", "loss=9.1e-02-9.pt", "loss=8.7e-02-12.pt"],
    ["acc60_1.pt", "acc50_2.pt", "acc70_10.pt"],
    ["step_500.pt", "step_1,000.pt", "step_10,000.pt"],
    ["ckpt_500M.pt", "ckpt_1B.pt", "ckpt_1.5B.pt"],
    ["epoch=0.ckpt", "epoch=0-v1.ckpt", "epoch=0-v2.ckpt", "epoch=1.ckpt"],
]


@pytest.mark.parametrize("names", ORDERED, ids=lambda names: names[0])
def test_names_tell_the_order(tmp_path, names):
    for i, name in enumerate(random.sample(names, len(names))):
        torch.save(W, tmp_path / name) if "safe" not in name else save_file(W, tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    if "trained.pt" in names:
        os.utime(tmp_path / "trained.pt", (99, 99))
    assert [p.name for p in find_checkpoints(tmp_path)] == names
    assert [p.name for p in Series(tmp_path).paths] == names
    typed = sorted(tmp_path.iterdir())
    assert [p.name for p in Series(typed, as_given=False).paths] == names
    assert Series(typed).paths == typed


def test_keys_of_very_long_numbers_differ():
    assert natural_key("a20240105123059123456") < natural_key("a20240105123059123457")


STORED = [
    [{"epoch": 2}, {"epoch": 10}],
    [{"epoch": 1, "global_step": 30}, {"epoch": 1, "global_step": 200}],
    [{"iteration": 5.0}, {"iteration": 50.0}],
    [{"step": torch.tensor(3)}, {"step": torch.tensor(20)}],
    [{"meta": {"iter": 4}}, {"meta": {"iter": 11}}],
]


@pytest.mark.parametrize("counters", STORED)
def test_what_files_store_goes_before_their_names(tmp_path, counters):
    for name, stored in zip(("9.pt", "1.pt"), counters, strict=True):
        torch.save({"model": W, **stored}, tmp_path / name)
    series = Series(tmp_path)
    assert [p.name for p in series.paths] == ["9.pt", "1.pt"]
    assert "in the order of the steps in the files, which is not" in series.decisions[0]
    assert series.indices == [0, 1]  # of the folder, as weights are given
    names = [tmp_path / "1.pt", tmp_path / "9.pt"]
    assert Series(names).paths == names
    given = Series(names, as_given=False)
    assert [p.name for p in given.paths] == ["9.pt", "1.pt"] and given.indices == [1, 0]
    torch.save({"model": W}, tmp_path / "9.pt")  # not all tell
    assert [p.name for p in Series(tmp_path).paths] == ["1.pt", "9.pt"]


@pytest.mark.parametrize("counters", [[0, 1, 2, 0, 1, 2], [391, 390, 391, 390, 391, 390]])
def test_counters_that_start_again_do_not_order(tmp_path, counters):
    """Of a run that was resumed, or steps of an epoch: those of the names go on."""
    for i, count in enumerate(counters):
        torch.save({"model": W, "step": count}, tmp_path / f"{i + 1}00.pt")
    series = Series(tmp_path)
    assert [p.stem for p in series.paths] == ["100", "200", "300", "400", "500", "600"]
    assert "of their names, which is not that of the steps in the files" in series.decisions[0]


def test_steps_that_several_tell_are_said(tmp_path):
    """As Lightning writes a second run into the folder of the first."""
    for i, end in enumerate(("", "-v1", "", "-v1")):
        state = {"epoch": i // 2, "global_step": 10 * (i // 2), "state_dict": W}
        torch.save(state, tmp_path / f"epoch={i // 2}{end}.ckpt")
    said = "of the same step, as if of several runs: epoch=0.ckpt, epoch=0-v1.ckpt"
    assert Series(tmp_path).decisions == [said]


def test_numbers_in_names_that_are_not_alike_are_said(tmp_path):
    for name in ("m_9f3a.pt", "m_1b2c.pt"):
        torch.save(W, tmp_path / name)
    said = "in the order of their names, which are not alike: m_1b2c.pt, m_9f3a.pt"
    assert Series(tmp_path).decisions == [said]


def test_the_same_everywhere_tells_nothing(tmp_path):
    for i in (2, 10, 1):
        torch.save({"model": W, "epoch": 100}, tmp_path / f"{i}.pt")
    assert [p.name for p in Series(tmp_path).paths] == ["1.pt", "2.pt", "10.pt"]


def test_steps_beside_the_weights_and_in_metadata(tmp_path):
    for step, name in ((500, "b"), (1000, "a"), (20, "c")):
        (tmp_path / "trainer" / name).mkdir(parents=True)
        save_file(W, tmp_path / "trainer" / name / "model.safetensors")
        state = {"global_step": step, "epoch": 0.5}
        (tmp_path / "trainer" / name / "trainer_state.json").write_text(json.dumps(state))
        (tmp_path / "metadata").mkdir(exist_ok=True)
        path = tmp_path / "metadata" / f"{name}.safetensors"
        save_file(W, path, metadata={"step": str(step)})
    assert [p.parent.name for p in Series(tmp_path / "trainer").paths] == ["c", "b", "a"]
    assert [p.stem for p in Series(tmp_path / "metadata").paths] == ["c", "b", "a"]


def test_times_where_nothing_else_tells(tmp_path):
    for time, name in enumerate(("red", "green", "blue")):
        torch.save(W, tmp_path / f"{name}.pt")
        os.utime(tmp_path / f"{name}.pt", (time, time))
    series = Series(tmp_path)
    assert [p.stem for p in series.paths] == ["red", "green", "blue"]
    assert "in the order of their times" in series.notes[-1]


def test_days_before_years_do_not_sort(tmp_path):
    for time, name in enumerate(("30-12-2023", "02-01-2024", "10-01-2024")):
        torch.save(W, tmp_path / f"run_{name}.pt")
        os.utime(tmp_path / f"run_{name}.pt", (time, time))
    assert [p.stem[4:6] for p in Series(tmp_path).paths] == ["30", "02", "10"]


def test_runs_follow_each_other(tmp_path):
    for run in ("run10", "run2"):
        (tmp_path / run).mkdir()
        for step in (1, 2, 10):
            torch.save({"net": W, "step": step}, tmp_path / run / f"{step}.pt")
    typed = sorted(tmp_path.glob("*/*"))
    found = [str(p.relative_to(tmp_path)) for p in Series(typed, as_given=False).paths]
    assert found == [f"{run}/{step}.pt" for run in ("run2", "run10") for step in (1, 2, 10)]
    folders = [tmp_path / "run10", tmp_path / "run2"]
    found = [str(p.relative_to(tmp_path)) for p in Series(folders).paths]
    assert found == [f"{run}/{step}.pt" for run in ("run10", "run2") for step in (1, 2, 10)]
