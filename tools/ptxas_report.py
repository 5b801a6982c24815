"""Registers, stack and spills of every kernel, as ptxas reported them while compiling.

Reads the `*.ptxas` files that tools/nvcc_keep_ptxas.sh left beside the objects, prints one line a
kernel (the worst of its architectures), writes all of it as JSON, and fails if a kernel spills
(with --arch: on one of these architectures; spills on others are printed all the same).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def parse(text: str) -> list[dict[str, Any]]:
    """One record for each kernel and architecture in the output of `ptxas -v`."""
    records: list[dict[str, Any]] = []
    in_entry = False
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            records.append({"kernel": entry[1], "arch": entry[2], "shared": 0})
            in_entry = True
        elif "Function properties for" in line and records:
            # A function that was not inlined has properties too; they are not the kernel's.
            in_entry = line.split()[-1] == records[-1]["kernel"]
        elif in_entry and (stack := STACK.search(line)):
            numbers = map(int, stack.groups())
            records[-1] |= dict(zip(("stack", "spill_stores", "spill_loads"), numbers, strict=True))
        elif records and (used := USED.search(line)):
            records[-1]["registers"] = int(used[1])
            if shared := SHARED.search(line):
                records[-1]["shared"] = int(shared[1])
    return records


def demangle(records: list[dict[str, Any]]) -> None:
    """Puts readable names in place, where c++filt is at hand."""
    program = shutil.which("c++filt")
    if program is None:
        return
    names = "\n".join(record["kernel"] for record in records)
    done = subprocess.run([program], input=names, capture_output=True, text=True, check=True)
    for record, name in zip(records, done.stdout.splitlines(), strict=True):
        record["kernel"] = short(name)


def short(name: str) -> str:
    """`dldr::cuda::(anonymous namespace)::f<float>(float*)` as `f<float>`."""
    name = name.replace("(anonymous namespace)::", "").replace("dldr::cuda::", "")
    name = name.replace("dldr::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def spilling(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records whose registers did not suffice."""
    return [record for record in records if record["spill_stores"] + record["spill_loads"] > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build"))
    parser.add_argument("--arch", nargs="+", help="fail for these alone, for example 90")
    parser.add_argument("--json", type=Path, help="write all records to this file")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for path in sorted(options.folder.rglob("*.ptxas")):
        found = parse(path.read_text())
        file = path.name.removesuffix(".o.ptxas") + ".cu"
        records += [{"file": file} | record for record in found]
    if not records:
        sys.exit(f"no ptxas output under {options.folder}: build the CUDA library first")
    demangle(records)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        line = worst.setdefault((record["file"], record["kernel"]), dict.fromkeys(record, 0))
        for key in ("registers", "stack", "shared", "spill_stores", "spill_loads"):
            line[key] = max(line[key], record[key])
    print("registers  stack  static shared  spills  kernel (worst of all architectures)")
    for (file, kernel), line in worst.items():
        spills = line["spill_stores"] + line["spill_loads"]
        print(
            f"{line['registers']:9}  {line['stack']:5}  {line['shared']:13}  {spills:6}  "
            f"{file}: {kernel}"
        )
    bad = spilling(records)
    for record in bad:
        print(f"spills on sm_{record['arch']}: {record['kernel']}", file=sys.stderr)
    failed = [r for r in bad if options.arch is None or r["arch"] in options.arch]
    if failed:
        sys.exit(f"{len(failed)} of {len(records)} compiled kernels spill registers")


if __name__ == "__main__":
    main()
