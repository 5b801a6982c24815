"""`dldr soup` beside a merge in ten lines of torch and mergekit's: numbers, memory and time.

    python -m benchmarks.scaling.soup --folder /tmp/merges --mergekit /tmp/venv/bin/python

Writes ``--count`` Llama checkpoints of ``--millions`` million parameters, merges them each way in a
process of its own, with all weights 1, and removes them. Memory is the peak that is resident of the
whole process, pages of mapped files among it; what importing alone takes is said beside. Numbers
are compared with sums in float64. Needs transformers, and mergekit in an interpreter that is named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import ROOT
from ..measure import save

# Runs a module as a program, and prints what its process took.
_MEASURED = """
import atexit, json, runpy, sys, time
start = time.perf_counter()
def took():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = 1024 * int(lines["VmHWM"].split()[0])
    print(json.dumps({"peak_bytes": peak, "seconds": time.perf_counter() - start}))
atexit.register(took)
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__" if len(sys.argv) > 1 else module, alter_sys=True)
"""


def in_ten_lines(paths: list[str], output: str) -> None:
    """The merge that is written by hand: sums in float32, a checkpoint at a time."""
    mean: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in load_file(f"{path}/model.safetensors").items():
            share = tensor.float() / len(paths)
            mean[name] = mean[name].add_(share) if name in mean else share
    dtypes = {name: tensor.dtype for name, tensor in load_file(f"{path}/model.safetensors").items()}
    result = {name: tensor.to(dtypes[name]) for name, tensor in mean.items()}
    save_file(result, f"{output}/model.safetensors", metadata={"format": "pt"})


def write(folder: Path, count: int, millions: float, dtype: torch.dtype) -> int:
    """Write a random walk of a Llama; returns its number of parameters."""
    import transformers

    width, rows = 768, 32000
    layers = max(1, int((millions * 1e6 - rows * width) / (16 * width**2)))
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(config).state_dict()
    del hollow["lm_head.weight"]  # tied
    torch.manual_seed(0)
    state = {name: torch.randn(value.shape).mul_(0.02) for name, value in hollow.items()}
    for t in range(count):
        for tensor in state.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.002)
        path = folder / f"checkpoint-{t}"
        config.save_pretrained(path)
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


def measured(python: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own, and another that imports it alone."""
    command = [python, "-c", _MEASURED, module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def off(folder: Path, paths: list[Path]) -> dict[str, float]:
    """Compare a merge with the float64 mean, rounded once: the share of other numbers."""
    differing = numel = 0
    largest = 0.0
    with safe_open(folder / "model.safetensors", "pt") as merged:
        for name in merged.keys():  # noqa: SIM118  (not a dict)
            found = merged.get_tensor(name)
            exact = torch.zeros(found.shape, dtype=torch.float64)
            for path in paths:
                with safe_open(path / "model.safetensors", "pt") as file:
                    exact += file.get_tensor(name).double()
            exact /= len(paths)
            nearest = exact.to(found.dtype)
            differing += int((found != nearest).sum())
            numel += found.numel()
            largest = max(largest, float((found.double() - nearest.double()).abs().max()))
    return {"not_nearest": differing / numel, "largest_difference": largest}


def merge(way: str, folder: Path, count: int, mergekit: str | None) -> dict[str, Any]:
    """Merge in one way; returns what it took, what importing takes, and how far it is off."""
    paths = [folder / f"checkpoint-{t}" for t in range(count)]
    output = folder / way
    if way == "mergekit":
        assert mergekit is not None
        models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
        config = folder / "merge.yml"  # JSON is YAML
        config.write_text(json.dumps({"models": models, "merge_method": "linear"}))
        options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        run = (mergekit, "mergekit.scripts.run_yaml", str(config), str(output), *options)
        alone = (mergekit, "mergekit.merge")
    elif way == "torch":
        output.mkdir()
        run = (sys.executable, __spec__.name, "--merge", str(output), *map(str, paths))
        alone = (sys.executable, "safetensors.torch")
    else:
        run = (sys.executable, "dldr_ext", "soup", *map(str, paths), "--quiet", "-o", f"{output}/")
        alone = (sys.executable, "dldr_ext.cli.app")
    took = measured(*run)
    return took | {"import": measured(*alone)} | off(output, paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="must not exist")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mergekit", help="an interpreter that has it; default: without it")
    parser.add_argument("--merge", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        return in_ten_lines(options.merge[1:], options.merge[0])
    folder = options.folder.resolve()
    try:
        numel = write(folder, options.count, options.millions, getattr(torch, options.dtype))
        results = {}
        for way in ("dldr", "torch", *(["mergekit"] if options.mergekit else [])):
            results[way] = merge(way, folder, options.count, options.mergekit)
            print(way, results[way], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = {"checkpoints": options.count, "numel": numel, "dtype": options.dtype}
    save(options.output, sizes, results)


if __name__ == "__main__":
    main()
