"""Any folder of a run: its soup is the mean by hand, whatever the layout and what lies beside."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dldr_ext.averaging.soup_files import write_mean
from dldr_ext.checkpoints import Series
from dldr_ext.checkpoints.reader import CheckpointReader

CASES = 2_000 if os.environ.get("DLDR_EVERY_CASE") else 60
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ADAM = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def torch_file(saved, path):
    torch.save(saved, path.with_suffix(".pt"))


def tar_file(saved, path):
    torch.save(saved, path.with_name(f"{path.name}.pth.tar"))


def legacy_file(saved, path):
    torch.save(saved, path.with_suffix(".ckpt"), _use_new_zipfile_serialization=False)


def safe_file(state, path):
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    save_file(tensors, path.with_name(f"{path.name}.safetensors"))


def folder_of(name):
    def write(saved, path):
        path.mkdir()
        torch.save(saved, path / name)
        torch.save(ADAM, path / "optimizer.pt")

    return write


def safe_folder(name):
    def write(state, path):
        path.mkdir()
        safe_file(state, path / name)
        (path / "adapter_config.json").write_text("{}")

    return write


def sharded(state, path):
    path.mkdir()
    names = list(state)
    for i, part in enumerate((names[::2], names[1::2])):
        safe_file({name: state[name] for name in part}, path / f"model-0000{i + 1}-of-00002")
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def distributed(saved, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=path)


# Files in one folder, a folder for each checkpoint: writers, and whether they keep nested dicts.
FILES = [(torch_file, True), (legacy_file, True), (safe_file, False), (tar_file, True)]
FOLDERS = [
    (folder_of("model.pt"), True),
    (folder_of("pytorch_model.bin"), True),
    (folder_of("mp_rank_00_model_states.pt"), True),
    (safe_folder("adapter_model"), False),
    (safe_folder("model.fp16"), False),
    (sharded, False),
    (distributed, True),
]
FILE_NAMES = ["{}", "model_{}", "epoch={}-loss=0.5", "ckpt_e{:03}", "net-step{}-v1", "m{}k"]
FOLDER_NAMES = ["checkpoint-{}", "epoch_{}", "{}", "global_step{}", "iter_{:07}"]
WRAPPED = [
    lambda state, step: state,
    lambda state, step: {"state_dict": state, "optimizer": ADAM, "epoch": 3},
    lambda state, step: {"epoch": step, "my_model": state, "loss": torch.tensor(0.5)},
    lambda state, step: {"model": state, "ema": {n: t * 0 - 7 for n, t in state.items()}},
    lambda state, step: {"student": state, "teacher": {n: t * 0 for n, t in state.items()}},
    lambda state, step: {"run": {"net": state, "step": step}, "rng": torch.get_rng_state()},
]
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod."]


@st.composite
def states(draw):
    """Some states of one model, with numbers whose means are exact, and ties."""
    count = draw(st.integers(1, 5))
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
    dtypes = [draw(st.sampled_from([*FLOATS, torch.int64])) for _ in shapes[1:]]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tied, transposed = draw(st.booleans()), draw(st.booleans())
    saved = []
    for _ in range(count):
        state = {}
        for i, (shape, dtype) in enumerate(zip(shapes, [torch.float32, *dtypes], strict=True)):
            numbers = torch.randint(-60, 60, shape or [1], generator=generator)
            tensor = (numbers / 4).to(dtype)
            state[f"layer{i}.weight"] = tensor.T if transposed and tensor.dim() == 2 else tensor
        if tied:
            state["head.weight"] = state["layer0.weight"]
        saved.append(state)
    return saved


def put_beside(draw, folder, entries, state, members, out):
    """Put into the folder what does not count."""
    entry = draw(st.sampled_from(entries))
    if draw(st.booleans()):
        last = f"last{entry.suffix}" if entry.is_file() else "last"
        os.symlink(entry, folder / last)
    if draw(st.booleans()) and entry.is_file():
        os.link(entry, folder / f"again{entry.suffix}")
    if draw(st.booleans()) and entry.is_file():
        shutil.copy(entry, folder / f"best{entry.suffix}")
    if draw(st.booleans()):
        os.symlink(folder / "gone", folder / "lost.pt")
    if draw(st.booleans()) and len(entries) > 1:
        torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "model_final.pth")
        torch.save(ADAM, folder / "optimizer.pt")
    if draw(st.booleans()):
        write_mean(Series(entries), folder / "soup.safetensors")
    (folder / "log.txt").write_text("epoch 3")


def by_hand(members, weights=None):
    weights = [1] * len(members) if weights is None else weights
    result = {}
    for name, first in members[0].items():
        if first.is_floating_point():
            total = sum(w * m[name].double() for w, m in zip(weights, members, strict=True))
            result[name] = (total / sum(weights)).to(first.dtype)
        else:
            result[name] = members[-1][name]
    return result


def check(path, expected):
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        precision = {8: 1e-9, 4: 1e-6, 2: 1e-2}[tensor.element_size()]
        assert torch.allclose(found[name].double(), tensor.double(), rtol=precision)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_soup_is_the_mean_by_hand(data):
    draw = data.draw
    members = draw(states())
    in_folders = draw(st.booleans())
    writer, nested = draw(st.sampled_from(FOLDERS if in_folders else FILES))
    template = draw(st.sampled_from(FOLDER_NAMES if in_folders else FILE_NAMES))
    wrap = draw(st.sampled_from(WRAPPED if nested else WRAPPED[:1]))
    prefix = draw(st.sampled_from(PREFIXES))
    steps = sorted(
        draw(st.sets(st.integers(0, 2000), min_size=len(members), max_size=len(members)))
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        order = draw(st.permutations(range(len(members))))
        for i in order:
            named = {prefix + name: tensor for name, tensor in members[i].items()}
            writer(wrap(named, steps[i]), folder / template.format(steps[i]))
        entries = Series(folder).paths
        entries = [next(p for p in folder.iterdir() if p in (e, *e.parents)) for e in entries]
        assert len(entries) == len(members)
        out = Path(temporary) / "soup.safetensors"
        put_beside(draw, folder, entries, members[0], members, out)

        series = Series(folder)
        assert len(series) == len(members), series.paths
        write_mean(series, out)
        check(out, by_hand(members))
        row = torch.empty(series.numel, dtype=torch.float64)
        with CheckpointReader() as reader:
            series.read(reader, len(series) - 1, 0, row)
        wanted = torch.cat([members[-1][name].reshape(-1).double() for name in series.names])
        assert torch.equal(row, wanted)

        # Typed in any order, with the weights of that order.
        typed = draw(st.permutations(range(len(members))))
        weights = draw(st.lists(st.integers(1, 9), min_size=len(members), max_size=len(members)))
        series = Series([entries[i] for i in typed], as_given=False)
        write_mean(series, out, weights)
        check(out, by_hand(members, [weights[typed.index(i)] for i in range(len(members))]))
