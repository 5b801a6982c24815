"""Checkpoint files of every format, written from the states of a small random walk."""

from __future__ import annotations

import argparse
import io
import json
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dldr_ext import Trajectory


class Tied(nn.Module):
    """Convolution, batch norm, a frozen layer and a weight used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight


def states(count=5, dtype=torch.float32):
    """A model, the states of its random walk, and the trajectory that recorded them."""
    model = Tied().to(dtype)
    trajectory = Trajectory(model.named_parameters(), count, torch.float32)
    saved = []
    for _ in range(count):
        trajectory.record()
        saved.append({k: v.clone() for k, v in model.state_dict().items()})
        saved[-1]["head.weight"] = saved[-1]["embed.weight"]
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model, saved, trajectory


def untied(state):
    return {k: v.contiguous() for k, v in state.items() if k != "head.weight"}


def plain(state, path):
    torch.save(state, path.with_suffix(".pt"))


def legacy(state, path):
    torch.save(state, path.with_suffix(".pth"), _use_new_zipfile_serialization=False)


def compressed(state, path):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(path.with_suffix(".pt"), "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))


def safe(state, path):
    save_file(untied(state), path.with_suffix(".safetensors"))


def parallel(state, path):
    torch.save({f"module.{k}": v for k, v in state.items()}, path.with_suffix(".pt"))


def compiled(state, path):
    names = {k: f"module._orig_mod.{k}" for k in state}
    torch.save({"epoch": 3, "model": {names[k]: v for k, v in state.items()}}, path)


def wrapped(state, path):
    optimizer = {"state": {0: {"momentum": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    extra = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "loss": torch.ones(())}
    torch.save({"state_dict": state, "optimizer": optimizer, **extra}, path.with_suffix(".ckpt"))


def lightning(state, path):
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, path)


def strided(state, path):
    state = dict(state)
    state["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    state["embed.weight"] = state["embed.weight"].T.contiguous().T
    state["norm.bias"] = torch.stack([state["norm.bias"]] * 2, 1)[:, 0]
    torch.save(state, path.with_suffix(".pt"))


def sharded(state, path):
    path.mkdir()
    tensors = untied(state)
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def sharded_bin(state, path):
    path.mkdir()
    torch.save(state, path / "pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(state, "pytorch_model-1.bin")}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS = [
    plain,
    legacy,
    compressed,
    safe,
    parallel,
    compiled,
    wrapped,
    lightning,
    strided,
    sharded,
    sharded_bin,
]


def write(folder, saved, writer=plain, first=8):
    """Write states as checkpoints 8, 9, 10, ...: an order that is not that of letters."""
    folder.mkdir(exist_ok=True)
    for i, state in enumerate(saved):
        suffix = ".pt" if writer in (compiled, lightning) else ""
        writer(state, folder / f"{first + i}{suffix}")
    return folder


class Wide(torch.nn.Module):
    """Parameters only, several chunks of them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(100, 101)
        self.second = torch.nn.Linear(101, 70)


def walk(folder, count=6, dtype=torch.float32):
    """A folder of checkpoints whose steps grow shorter, and the model."""
    model = Wide().to(dtype)
    saved = []
    for t in range(count):
        saved.append({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 / (t + 1))
    return write(folder, saved), model
