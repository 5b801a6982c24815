"""Folders as runs leave them: what in them are checkpoints, each once, and what is passed over."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from dldr_ext import Subspace, Trajectory
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.discovery import discover, find_checkpoints

W = {"w": torch.zeros(3)}


def made(path, saved=W):
    """Write a file in the format of its name, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".safetensors"):
        save_file(saved, path)
    elif path.name.endswith(
        (".json", ".txt", ".msgpack", ".index", ".pb", ".h5", ".gguf", ".onnx")
    ):
        path.write_text("{}")
    elif path.name == ".metadata":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": saved}, checkpoint_id=path.parent)
    else:
        torch.save(saved, path)


# What three checkpoints of a run consist of, what is read of each, and what lies beside them.
LAYOUTS = {
    "transformers": (
        ["checkpoint-{}/model.safetensors", "checkpoint-{}/optimizer.pt",
         "checkpoint-{}/rng_state.pth", "checkpoint-{}/training_args.bin"],
        ["model.safetensors", "training_args.bin", "config.json"],
    ),
    "older transformers": (["checkpoint-{}/pytorch_model.bin", "checkpoint-{}/scheduler.pt"], []),
    "sentence transformers": (["checkpoint-{}/model.safetensors"], ["2_Dense/model.safetensors"]),
    "scores first": (["loss0.{0}_epoch{0}/weights.pt"], []),
    "a folder of another library": (["model_{}.pt"], ["epoch_3/saved_model.pb"]),
    "logs beside": (["checkpoint-{}/model.safetensors"], ["runs/x.txt", "final/model.safetensors"]),
    "peft": (["checkpoint-{}/adapter_model.safetensors", "checkpoint-{}/adapter_config.json",
              "checkpoint-{}/optimizer.pt"], ["adapter_model.safetensors", "adapter_config.json"]),
    "peft, pickled": (["checkpoint-{}/adapter_model.bin"], []),
    "adapter and model": (["checkpoint-{}/adapter_model.safetensors",
                           "checkpoint-{}/adapter_config.json",
                           "checkpoint-{}/model.safetensors"], []),
    "variant": (["checkpoint-{}/model.fp16.safetensors"], []),
    "epoch folders": (["epoch_{}/checkpoint.pt", "epoch_{}/optim.pt"], ["log.txt"]),
    "folders of numbers": (["{}/weights.pt"], []),
    "in a folder of models": (["checkpoints/step_{}/model.pt"], ["hparams.pt/note.txt"]),
    "lightning": (["version_0/checkpoints/epoch={}-step=10.ckpt"], ["version_0/hparams.txt"]),
    "accelerate": (["checkpoints/checkpoint_{}/model.safetensors",
                    "checkpoints/checkpoint_{}/optimizer.bin",
                    "checkpoints/checkpoint_{}/sampler.bin"], []),
    "diffusers": (["checkpoint-{}/unet/diffusion_pytorch_model.safetensors",
                   "checkpoint-{}/unet_ema/diffusion_pytorch_model.safetensors"], []),
    "deepspeed": (["global_step{}/mp_rank_00_model_states.pt",
                   "global_step{}/zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["latest.txt"]),
    "dcp": (["step-{}/.metadata"], []),
    "fsdp of transformers": (["checkpoint-{}/pytorch_model_fsdp_0/.metadata",
                              "checkpoint-{}/optimizer_0/.metadata"], []),
    "megatron": (["iter_000000{}/.metadata"], []),
    "pth.tar": (["checkpoint_{}.pth.tar"], ["model_best.pth.tar"]),
    "guided diffusion": (["model00{}000.pt", "opt00{}000.pt", "ema_0.9999_00{}000.pt"], []),
    "detectron2": (["model_000{}999.pth"], ["model_final.pth", "last_checkpoint.txt"]),
    "fairseq": (["checkpoint{}.pt"], ["checkpoint_best.pt", "checkpoint_last.pt"]),
    "mmengine": (["epoch_{}.pth"], ["latest.pth", "best_acc_epoch_1.pth.txt"]),
    "allennlp": (["model_state_epoch_{}.th"], ["best.th"]),
    "torchvision": (["model_{}.pth"], ["checkpoint.pth"]),
    "espnet": (["{}epoch.pth"], ["checkpoint.pth", "latest.pth"]),
    "fsdp of lightning": (["epoch={}-step=5.ckpt/.metadata"], []),
    "deepspeed of lightning": (["epoch={}.ckpt/checkpoint/mp_rank_00_model_states.pt"], []),
    "composer": (["ep{}-ba100-rank0.pt"], ["latest-rank0.pt"]),
    "torchtune": (["epoch_{}/adapter_model.safetensors"], []),
    "capitals": (["Model_{}.PTH"], []),
    "not finished": (["checkpoint-{}/model.safetensors"], ["tmp-checkpoint-12/model.safetensors"]),
    "one rank": (["iter_{}/mp_rank_00/model_optim_rng.pt"], []),
    "without a suffix": (["ckpt-{}"], []),
    "pickles": (["params_{}.pkl"], ["log.txt"]),
    "final beside files": (["model_{}.safetensors"], ["model.safetensors"]),
    "mmengine, the best": (["epoch_{}.pth"], ["best_coco_bbox_mAP_epoch_2.pth"]),
    "the best of another epoch": (["epoch_{}.pth"], ["final_epoch_3.pth", "last_ema_epoch_3.pth"]),
    "the best without an epoch of theirs": (["model_{}.pt"], ["best_model_epoch_2.pt"]),
    "the best folder": (["checkpoint-{}/model.pt"], ["best-checkpoint-2/model.pt"]),
    "a copy of each folder": (["step_{}/model.pt", "step_{}_ema/model.pt"], []),
    "one fold": (["fold1_epoch{}.pt"], ["notes.txt"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    of_each, beside = LAYOUTS[name]
    run = tmp_path / "run"
    steps = (2, 3, 10) if "00" not in of_each[0] else (2, 3, 4)
    for step in steps:
        for path in of_each:
            made(run / path.format(step))
    for path in beside:
        made(run / path)
    wanted = [run / of_each[0].format(step) for step in steps]
    wanted = [path.parent if path.name == ".metadata" else path for path in wanted]
    assert find_checkpoints(run) == wanted
    if len(wanted[0].relative_to(run).parts) > 1 and "checkpoints" not in of_each[0]:
        assert find_checkpoints(run / wanted[0].relative_to(run).parts[0]) != []
    assert find_checkpoints(wanted[0].parent if "." not in wanted[0].name else wanted[0])
    notes = "\n".join(discover(run)[1])
    for path in beside:
        if path.endswith((".pt", ".pth", ".th", ".tar", ".safetensors")):
            assert path.partition("/")[0] in notes


def test_one_checkpoint_of_each_kind(tmp_path):
    made(tmp_path / "a" / "adapter_model.safetensors")
    made(tmp_path / "a" / "optimizer.pt")
    assert find_checkpoints(tmp_path / "a") == [tmp_path / "a" / "adapter_model.safetensors"]
    made(tmp_path / "b" / "model.safetensors")
    made(tmp_path / "b" / "global_step5" / "mp_rank_00_model_states.pt")
    assert find_checkpoints(tmp_path / "b") == [tmp_path / "b" / "model.safetensors"]
    index = tmp_path / "c" / "model.safetensors.index.json"
    made(tmp_path / "c" / "x-1.safetensors")
    made(tmp_path / "c" / "x-2.safetensors", {"v": torch.ones(1)})
    index.write_text(json.dumps({"weight_map": {"w": "x-1.safetensors", "v": "x-2.safetensors"}}))
    assert discover(tmp_path / "c") == ([(index, tmp_path / "c", 0, None)], [])


REFUSED = [
    (["model.ckpt-10.index", "checkpoint.txt"], "found TensorFlow: write its variables"),
    (["saved_model.pb"], "found TensorFlow"),
    (["weights.h5"], r"found Keras \(HDF5\)"),
    (["flax_model.msgpack"], "found Flax or Orbax"),
    (["model.gguf"], "found GGUF: it is rounded for inference"),
    (["model.onnx"], "found an exported program: take the checkpoint"),
    (["notes.txt"], r"expected a folder with checkpoints .*, found 1 other entries \(.txt\)"),
    (
        ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "ZeRO stage 3: write them whole with the zero_to_fp32.py",
    ),
    (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "found 2 parts of one model"),
    (["consolidated.00.pth", "consolidated.01.pth"], "found 2 parts of one model"),
    (["rank_0.pt", "rank_1.pt", "rank_2.pt"], "found 3 parts of one model .rank_0.pt, rank_1.pt"),
    (["ep3-rank0.pt", "ep3-rank1.pt", "optim-rank0.pt"], "found 2 parts of one model"),
    (["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "found 2 parts"),
    (
        ["layer_00-model_states.pt", "layer_01-model_states.pt", "mp_rank_00_model_states.pt"],
        "found 2 parts of one model",
    ),
    (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "found 2 parts of one"),
    (["model-00001-of-00002.safetensors"], "the index of the shards .model.safetensors.index.json"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
@pytest.mark.parametrize("step", ["", "checkpoint-1/"])
def test_what_is_not_read_is_named(tmp_path, files, message, step):
    for file in files:
        made(tmp_path / "run" / f"{step}{file}")
    if step and "other entries" in message:
        message = "expected a folder with checkpoints"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoints(tmp_path / "run")
    if step:  # beside a good one it is passed over, and named
        made(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
        found, notes = discover(tmp_path / "run")
        assert len(found) == 1
        assert "notes.txt" in files or re.search(f"passed over .*{message}", notes[0])


@pytest.mark.parametrize("name", ["m.gguf", "m.onnx", "tf_model.h5", "flax_model.msgpack"])
def test_a_file_of_another_library(tmp_path, name):
    made(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a file of torch.save or safetensors, found"):
        Series(tmp_path / name)


def test_several_of_a_folder_have_to_be_named(tmp_path):
    for i in range(2):
        made(tmp_path / "gan" / f"epoch_{i}" / "generator.pt")
        made(tmp_path / "gan" / f"epoch_{i}" / "discriminator.pt")
        made(tmp_path / "pipeline" / f"checkpoint-{i}" / "unet" / "model.safetensors")
        made(tmp_path / "pipeline" / f"checkpoint-{i}" / "vae" / "model.safetensors")
        for t in range(3):
            made(tmp_path / "runs" / f"version_{i}" / "checkpoints" / f"{t}.pt")
    with pytest.raises(
        CheckpointError, match=r"one checkpoint, found .*: name the same one of.*\*/"
    ):
        find_checkpoints(tmp_path / "gan")
    with pytest.raises(
        CheckpointError, match=r"those of a pipeline: unet, vae: name one, .*\*/unet"
    ):
        find_checkpoints(tmp_path / "pipeline")
    with pytest.raises(CheckpointError, match=r"version_0 \(3\), version_1 \(3\): name one"):
        find_checkpoints(tmp_path / "runs")
    for name in ("G_1.pth", "G_20.pth", "D_1.pth", "D_20.pth", "G_best.pth"):
        made(tmp_path / "flat" / name)
    message = (
        r"one checkpoint of each step, found D_\*.pth and G_\*.pth: name those of one, as .*/D_"
    )
    with pytest.raises(CheckpointError, match=message):
        find_checkpoints(tmp_path / "flat")
    assert len(find_checkpoints(sorted((tmp_path / "flat").glob("G_*0.pth")))) == 1
    for name in ("fold{}_epoch{}.pt", "seed{}_{}.pt", "05-0{}_step{}/model.pt"):
        for i in range(4):
            made(tmp_path / name[:5] / name.format(i // 2, i % 2))
        message = (
            r"one run, found steps of several: .*0.*, .*1.*: name those of one, as .*0_?\*, or"
        )
        with pytest.raises(CheckpointError, match=message):
            find_checkpoints(tmp_path / name[:5])
        assert len(find_checkpoints(sorted((tmp_path / name[:5]).iterdir()))) == 4
    assert len(find_checkpoints(sorted((tmp_path / "pipeline").glob("*/unet")))) == 2


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copy])
@pytest.mark.parametrize("name", ["last.ckpt", "again.ckpt", "best model.ckpt"])
def test_a_file_under_two_names_counts_once(tmp_path, link, name):
    for i in (1, 2, 3):
        made(tmp_path / f"epoch={i}.ckpt")
    link(tmp_path / "epoch=3.ckpt", tmp_path / name)
    found, notes = discover(tmp_path)
    if link is shutil.copy and name == "again.ckpt":
        assert len(found) == 4
        return
    assert name in "".join(notes)
    if link is not shutil.copy:
        assert [f.path.name for f in found] == [f"epoch={i}.ckpt" for i in (1, 2, 3)]


def test_a_folder_under_two_names_counts_once(tmp_path):
    for i in (1, 2):
        made(tmp_path / f"checkpoint-{i}" / "model.safetensors")
    os.symlink(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    os.symlink(tmp_path / "nowhere", tmp_path / "checkpoint-4.pt")
    found, notes = discover(tmp_path)
    assert len(found) == len(find_checkpoints(tmp_path)) == 2
    assert "checkpoint-3 is the same folder as" in "".join(notes) and "links to nothing" in "".join(
        notes
    )


def test_a_final_model_in_shards_beside_the_steps(tmp_path):
    for i in (1, 2):
        made(tmp_path / f"checkpoint-{i}" / "model.safetensors")
    made(tmp_path / "model-00001-of-00001.safetensors")
    places = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    found, notes = discover(tmp_path)
    assert len(found) == 2
    assert "beside folders of steps: model.safetensors.index.json (count if" in notes[0]
    assert "00001" not in notes[0]


def test_a_step_without_weights_is_passed_over(tmp_path):
    for i in (1, 2):
        made(tmp_path / f"checkpoint-{i}" / "model.safetensors")
    made(tmp_path / "checkpoint-3" / "rng_state.pth")
    os.symlink("checkpoint-2", tmp_path / "newest")
    os.symlink("checkpoint-2", tmp_path / "epoch-9")
    found, notes = discover(tmp_path)
    assert len(found) == 2
    assert re.search("passed over .*checkpoint-3: expected a folder with", "\n".join(notes))
    for name in ("newest", "epoch-9"):
        assert re.search(f"{name} is the same folder as checkpoint-2: counts once", "".join(notes))


def test_best_and_last_are_set_apart(tmp_path):
    for name in ("e1.pt", "e2.pt", "best.pt", "last.pt", "model_final.pt", "best-epoch=3.pt"):
        made(tmp_path / name)
    found, notes = discover(tmp_path)
    assert [f.path.name for f in found] == ["e1.pt", "e2.pt", "best-epoch=3.pt"]
    assert "not among the steps of the run: best.pt, last.pt, model_final.pt (count if" in notes[0]
    for name in ("e1.pt", "e2.pt", "best-epoch=3.pt"):
        (tmp_path / name).unlink()
    assert len(find_checkpoints(tmp_path)) == 3  # nothing else is there


def test_files_of_this_package_do_not_count(tmp_path):
    for i in range(3):
        made(tmp_path / f"{i}.safetensors")
    basis = Subspace(torch.eye(3)[:1], torch.zeros(3))
    basis.save(tmp_path / "9.safetensors")
    found, notes = discover(tmp_path)
    assert len(found) == 3 and "written by dldr: 9.safetensors" in notes[0]
    with pytest.raises(
        CheckpointError, match="expected a checkpoint, found a subspace saved by dld"
    ):
        Series(tmp_path / "9.safetensors")


class Adapted(nn.Module):
    """The names of a model with adapters of PEFT."""

    def __init__(self, adapters=("default",)):
        super().__init__()
        q = nn.ModuleDict({"base_layer": nn.Linear(8, 8)})
        q.requires_grad_(False)
        for part, sizes in (("lora_A", (8, 2)), ("lora_B", (2, 8))):
            q[part] = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name in adapters})
        head = nn.ModuleDict({"modules_to_save": nn.ModuleDict({adapters[0]: nn.Linear(8, 2)})})
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"q": q, "head": head})})


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_adapters_have_other_names_in_files(tmp_path, adapter):
    model = Adapted((adapter,))
    recorded = Trajectory(model.named_parameters(), dtype=torch.float32)
    for step in (10, 200, 3000):
        for p in model.parameters():
            p.data.add_(torch.randn_like(p))
        recorded.record()
        saved = {
            name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}.", "."): p.data
            for name, p in model.named_parameters()
            if "base_layer" not in name
        }
        made(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors", saved)
    found = Trajectory.from_checkpoints(tmp_path, model, dtype=torch.float32)
    assert found.names == recorded.names
    assert torch.equal(found.anchor, recorded.anchor)
    assert torch.equal(found.snapshots, recorded.snapshots)
    with pytest.raises(
        CheckpointError, match=r"expected the tensor .*lora_A.default.weight of the"
    ):
        Trajectory.from_checkpoints(tmp_path, Adapted(("default", "other")))
