"""Which of the tensors in a file are the weights: chosen with a note, or asked for."""

from __future__ import annotations

import warnings
from argparse import Namespace

import pytest
import torch
from torch import nn

from dldr_ext import Trajectory
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.state_dicts import find_state_dict, is_copy, progress


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def state(value=0.0, prefix=""):
    return {f"{prefix}{k}": torch.full_like(v, value) for k, v in net().state_dict().items()}


def optimizer(count=1):
    params = [nn.Parameter(torch.randn(4)) for _ in range(count)]
    adam = torch.optim.Adam(params)
    sum(p.sum() for p in params).backward()
    adam.step()
    return adam.state_dict()


SCALAR, TABLE = torch.tensor(0.5), torch.rand(30)
# What scripts of these libraries save, and the key of the weights in it.
FILES = {
    "plain": (state(), ""),
    "pytorch": (
        {"model_state_dict": state(), "optimizer_state_dict": optimizer(), "loss": SCALAR},
        "model_state_dict",
    ),
    "loss first": ({"loss": SCALAR, "best_acc": TABLE[0], "my_model": state()}, "my_model"),
    "table": ({"train_losses": TABLE, "network_state": state()}, "network_state"),
    "statistics": ({"mean": TABLE, "std": TABLE, "net": state()}, "net"),
    "unknown key": ({"epoch": 1, "stuff": state(), "opt": optimizer()}, "stuff"),
    "lightning": (
        {
            "epoch": 1,
            "global_step": 10,
            "state_dict": state(prefix="model."),
            "callbacks": {"EMA": {"ema_weights": [TABLE]}},
            "optimizer_states": [optimizer()],
            "lr_schedulers": [{"last_epoch": 1}],
            "hyper_parameters": {"class_weights": TABLE},
        },
        "state_dict",
    ),
    "timm": ({"epoch": 1, "arch": "x", "state_dict": state(), "optimizer": optimizer(),
              "args": Namespace(lr=1), "state_dict_ema": state(1), "metric": 0.5}, "state_dict"),
    "detectron2": ({"model": state(), "optimizer": optimizer(), "iteration": 99}, "model"),
    "moco": ({"state_dict": state(prefix="module.encoder_q."), "optimizer": optimizer()},
             "state_dict"),
    "dino": ({"student": state(prefix="module."), "teacher": state(1), "optimizer": optimizer(),
              "dino_loss": {"center": TABLE}}, "student"),
    "byol": ({"online": state(), "target": state(1)}, "online"),
    "fairseq": ({"args": None, "model": state(), "optimizer_history": [{"num_updates": 7}],
                 "extra_state": {"val_loss": 1.0}, "last_optimizer_state": optimizer()}, "model"),
    "diffusion": ({"model": state(), "ema": state(1), "opt": optimizer(), "args": None}, "model"),
    "torch_ema": ({"net": state(), "ema": {"decay": 0.9, "shadow_params": [TABLE, TABLE]}}, "net"),
    "ema alone": ({"ema_state_dict": state(), "step": 3}, "ema_state_dict"),
    "swa": ({"swa_model": state(1), "model": state()}, "model"),
    "best": ({"best_model": state(1), "model": state()}, "model"),
    "camel": ({"modelEMA": state(1), "modelState": state()}, "modelState"),
    "deepspeed": ({"module": state(), "optimizer": None, "global_steps": 5, "loss_scaler": TABLE},
                  "module"),
    "nested": ({"checkpoint": {"inner": {"weights": state()}}, "step": 4},
               "checkpoint.inner.weights"),
    "tuple": ((3, state()), "1"),
    "list": ([state(), optimizer()], "0"),
    "random numbers": ({"cpu": torch.get_rng_state(), "params": state()}, "params"),
    "moments": ({"weights": state(), "adam": {"0": {"exp_avg": TABLE, "exp_avg_sq": TABLE}}},
                "weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_weights_of_known_scripts(tmp_path, name, legacy):
    saved, key = FILES[name]
    choice = find_state_dict(saved)
    assert choice.key == key
    assert choice.tensors[next(iter(choice.tensors))].eq(0).all()
    again = find_state_dict(saved, choice.key)
    assert again.tensors.keys() == choice.tensors.keys() and again.key == key
    if name != "timm" or not legacy:
        torch.save(saved, tmp_path / "1.pt", _use_new_zipfile_serialization=not legacy)
        entries = Series(tmp_path / "1.pt").contents[0].entries
        assert len(entries) == len(choice.tensors)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "weights taken from")
            assert len(Trajectory.from_checkpoints(tmp_path, net())) == 1


def test_another_choice_is_said(tmp_path):
    torch.save({"model": state(), "ema": state(1)}, tmp_path / "1.pt")
    series = Series(tmp_path)
    assert series.notes[-1] == "weights taken from 'model', not under 'ema'; the key names another"
    assert not series.contents[0].is_copy
    assert Series(tmp_path, key="ema").contents[0].is_copy
    torch.save({"w": TABLE, "b": TABLE, "my_model": state()}, tmp_path / "1.pt")
    assert "not at the top (w, b)" in Series(tmp_path).notes[-1]


AMBIGUOUS = [
    ({"generator": state(), "discriminator": state()}, "under 'generator', 'discriminator'"),
    ({"model": state(), "net": state()}, "under 'model', 'net'"),
    ([state(), state()], "under '0', '1'"),
    ({**state(), "model": state()}, r"under 'model' and at the top \(0.weight, 0.bias, 1.weight"),
    ({"ema": state(), "teacher": state()}, "under 'ema', 'teacher'"),
    (
        {"model": {"actor": state(), "critic": state()}},
        "under 'model.actor', 'model.critic': name one as the key, or 'model' for all",
    ),
]


@pytest.mark.parametrize(("saved", "message"), AMBIGUOUS)
def test_a_tie_is_refused(tmp_path, saved, message):
    torch.save(saved, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=f"expected one state dict, found several {message}"):
        Series(tmp_path)


def test_the_key_takes_one_or_all(tmp_path):
    saved = {"model": {"actor": state(), "critic": state()}, "old.net": state()}
    torch.save(saved, tmp_path / "1.pt")
    assert Series(tmp_path, key="model.critic").names == Series(tmp_path, key="old.net").names
    nested = {"encoder": {"fc": {"w": torch.ones(2)}}, "head": {"w": torch.ones(3)}}
    torch.save(nested, tmp_path / "2.pt")
    with pytest.raises(CheckpointError, match=r"'head': name one as the key, or '' for"):
        Series(tmp_path / "2.pt")
    assert Series(tmp_path / "2.pt", key="").names == ["encoder.fc.w", "head.w"]
    (tmp_path / "2.pt").unlink()
    together = Series(tmp_path, key="model")
    assert together.names[0] == "actor.0.weight" and together.numel == 2 * 24
    torch.save(state(prefix="module.student."), tmp_path / "1.pt")
    assert Series(tmp_path, key="student").names[0] == "0.weight"
    with pytest.raises(CheckpointError, match="expected the key 'teacher', found a dict with"):
        Series(tmp_path, key="teacher")


def test_one_dict_under_two_keys_is_no_tie(tmp_path):
    same = state()
    torch.save({"net": same, "model": same, "history": [0.5] * 1000}, tmp_path / "1.pt")
    assert Series(tmp_path).numel == 24
    inside: dict = {}
    inside |= {str(i): inside for i in range(100)}
    assert find_state_dict({"loop": inside, "net": same}).key == "net"


def test_a_copy_where_others_have_the_weights_is_refused(tmp_path):
    torch.save({"model": state(), "ema": state()}, tmp_path / "1.pt")
    torch.save({"ema": state(1), "epoch": 10**400}, tmp_path / "2.pt")
    for rows in (True, False):
        with pytest.raises(CheckpointError, match=r"\[1\].*expected weights in training, as"):
            Series(tmp_path, rows=rows)
    assert len(Series(tmp_path, key="ema")) == 2


def test_a_model_settles_a_tie(tmp_path):
    other = nn.Linear(9, 9).state_dict()
    torch.save({"other": other, "mine": state(1)}, tmp_path / "1.pt")
    with pytest.warns(UserWarning, match="weights taken from 'mine', not under 'other'"):
        assert Trajectory.from_checkpoints(tmp_path, net()).anchor.unique().tolist() == [1]
    torch.save({"model": other, "ema": state(2)}, tmp_path / "1.pt")
    with pytest.warns(UserWarning, match="weights taken from 'ema', not under 'model'"):
        assert Trajectory.from_checkpoints(tmp_path, net()).anchor.unique().tolist() == [2]
    torch.save({"a": state(), "b": state()}, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match="several under 'a', 'b'"):
        Trajectory.from_checkpoints(tmp_path, net())


@pytest.mark.parametrize(
    ("live", "copy"),
    [("model", "ema_model"), ("student", "teacher"), ("online_net", "target_net"), ("net", "swa")],
)
def test_a_copy_in_one_state_dict(tmp_path, live, copy):
    both = state(1, f"{copy}.") | state(2, f"{live}.")
    for i in range(3):
        torch.save({"state_dict": both}, tmp_path / f"{i}.ckpt")
    series = Series(tmp_path, net())
    assert f"weights taken from {live}.* among '{copy}', '{live}'" in series.notes[0]
    with pytest.warns(UserWarning, match=f"weights taken from {live}"):
        assert Trajectory.from_checkpoints(tmp_path, net()).anchor.unique().tolist() == [2]
    chosen = Trajectory.from_checkpoints(tmp_path, net(), key=copy)
    assert chosen.anchor.unique().tolist() == [1]
    assert f"{copy}.* looks like a copy of {live}.*" in "".join(Series(tmp_path).notes)
    torch.save({"state_dict": state(1, f"{copy}.")}, tmp_path / "2.ckpt")
    with pytest.raises(CheckpointError, match=r"\[2\].*weights in training, as in the first"):
        Series(tmp_path, net())


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"net": net()})


@pytest.mark.parametrize("prefix", ["", "net.", "inner.net.", "lit.inner.net."])
def test_a_file_of_what_the_model_wraps(tmp_path, prefix):
    torch.save({"model": state(3, prefix), "opt": optimizer()}, tmp_path / "1.pt")
    found = Trajectory.from_checkpoints(tmp_path, Wrapper())
    assert found.names[0] == "inner.net.0.weight" and found.anchor.unique().tolist() == [3]
    torch.save(state(3, "other.") | {"head.weight": torch.ones(2)}, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=r"expected the tensor inner.net.0.weight of the mod"):
        Trajectory.from_checkpoints(tmp_path, Wrapper())


@pytest.mark.parametrize("pair", [("encoder_q", "encoder_k"), ("layer1", "layer2"), ("a.b", "a.c")])
def test_two_that_are_alike_are_listed(tmp_path, pair):
    both = state(1, f"{pair[0]}.") | state(2, f"{pair[1]}.")
    torch.save(both, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=f"under each of '{pair[0]}', '{pair[1]}': name one"):
        Series(tmp_path, net())
    chosen = Trajectory.from_checkpoints(tmp_path, net(), key=pair[1])
    assert chosen.anchor.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        (optimizer(1), "the state of an optimizer"),
        (optimizer(3), "the state of an optimizer"),
        ({"optimizer": optimizer()}, "a dict with the keys"),
        ({"state": {0: {"exp_avg": TABLE, "exp_avg_sq": TABLE}}}, "a dict with the keys"),
        ({"cpu": torch.get_rng_state(), "python": [3]}, "the states of random generators"),
        ({"scale": 65536.0, "growth_factor": 2.0}, "the state of a gradient scaler"),
        (Namespace(lr=0.1), "an object of argparse.Namespace"),
        ({"last_epoch": 3, "_step_count": 4, "base_lrs": [0.1]}, "a learning-rate scheduler"),
        ({"scale": 65536.0, "_growth_tracker": 3}, "a dict with the keys"),
        ({"loss": SCALAR, "val_losses": TABLE}, "a dict with the keys"),
        ([1, 2], "a list of 2"),
        (3, "a int"),
    ],
)
def test_what_holds_no_weights(tmp_path, saved, what):
    torch.save(saved, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=f"expected a state dict, found .*{what}"):
        Series(tmp_path / "1.pt")


def test_logged_values_beside_the_weights_are_no_weights(tmp_path):
    torch.save({**state(), "loss": SCALAR, "best_acc": SCALAR, "epoch": 3}, tmp_path / "1.pt")
    series = Series(tmp_path)
    assert series.numel == 24
    assert "left out (logged values, not weights): loss, best_acc" in series.notes
    torch.save({"logit_scale": SCALAR, "time_scale": torch.tensor(1.0)}, tmp_path / "1.pt")
    assert Series(tmp_path).names == ["logit_scale", "time_scale"]


def test_a_list_of_tensors(tmp_path):
    torch.save([p.detach() for p in net().parameters()], tmp_path / "1.pt")
    assert Series(tmp_path).names == ["0", "1", "2", "3"]


def test_words():
    assert all(map(is_copy, ["ema", "model_ema", "EMA_net", "modelEMA", "teacher.", "swa_state"]))
    assert not any(map(is_copy, ["model", "schema", "thematic", "student", "k_proj", "steam"]))


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ({"epoch": 3, "global_step": 90, "state_dict": {}}, {"epoch": 3, "step": 90}),
        ({"iteration": torch.tensor(7)}, {"step": 7}),
        ({"step": "12", "epoch": True}, {"step": 12}),
        ({"meta": {"epoch": 2, "iter": 30}}, {"epoch": 2, "step": 30}),
        ({"extra_state": {"train_iterator": {"epoch": 5}}}, {"epoch": 5}),
        ({"args": {"epoch": 100}, "optimizer": {"step": 3}}, {}),
        ({"epoch": float("nan"), "step": TABLE}, {}),
        ({"optimizer_history": [{"num_updates": 3}, {"num_updates": 40}]}, {"step": 40}),
        ([3], {}),
    ],
)
def test_progress(saved, found):
    assert progress(saved, float) == found


def test_the_step_may_be_a_tensor_in_the_file(tmp_path):
    for legacy in (False, True):
        saved = {"step": torch.tensor([5, 8])[1], "epoch": torch.tensor(2.0), "net": state()}
        torch.save(saved, tmp_path / "1.pt", _use_new_zipfile_serialization=not legacy)
        assert Series(tmp_path).contents[0].progress == {"step": 8, "epoch": 2}
