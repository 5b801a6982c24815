"""Loads under way in the streaming loops of every kernel, read off its machine code.

Disassembles the objects under a build folder with cuobjdump (of the CUDA toolkit, or the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) and prints, for each kernel and architecture, the
innermost loop that reads 16 bytes at a time: how many such loads are under way at once, that is
before an instruction reads what the first of them brings. Source and PTX do not show this: the
assembler may sink a load behind a branch. Also the local memory of such kernels, where spills go.
Fails where a loop has fewer loads under way than --least, or its kernel has local memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from ptxas_report import short

_WIDE = 4  # wide loads that make a loop a streaming one
# (kernel, architecture) that may have fewer: double, at a 64th of the rate, is their bound.
_BOUND = {("reconstruct_tile<double>", "120"), ("residual_tile<double>", "120")}
_FUNCTION = re.compile(r"Function : (\S+)")
_ARCH = re.compile(r"code for sm_(\d+)")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_REGISTER = re.compile(r"\bR(\d+)")
_PREDICATE = re.compile(r"@!?U?P\w+ ")


@dataclass
class Loop:
    """A streaming loop: 16-byte loads in it and those under way at once; its kernel's spills."""

    kernel: str
    arch: str
    wide: int
    under_way: int
    local: int  # instructions on local memory, in the whole kernel


Code = list[tuple[int, str]]  # address, instruction without its predicate


def kernels(text: str) -> list[tuple[str, str, Code]]:
    """(kernel, architecture, code) of what cuobjdump printed."""
    found: list[tuple[str, str, Code]] = []
    arch = ""
    for line in text.splitlines():
        if match := _ARCH.search(line):
            arch = match[1]
        elif match := _FUNCTION.search(line):
            found.append((match[1], arch, []))
        elif found and (match := _LINE.match(line)):
            found[-1][2].append((int(match[1], 16), _PREDICATE.sub("", match[2])))
    return found


def loops(code: Code) -> list[tuple[int, int]]:
    """First and last address of every loop."""
    found = []
    for at, text in code:
        match = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if match and int(match[1], 16) < at:
            found.append((int(match[1], 16), at))
    return found


def under_way(code: Code, first: int, last: int) -> tuple[int, int]:
    """Wide loads between two addresses, and how many are under way at once.

    Loads come back in order: what reads a register of one waits for those before it too. The loop
    is gone through twice, since loads of a turn may be under way into the next.
    """
    body = [text for at, text in code if first <= at <= last]
    wide = most = 0
    pending: list[tuple[bool, range]] = []  # loads under way, wide or not, and their registers
    for text in 2 * body:
        name, _, operands = text.partition(" ")
        target, _, sources = operands.partition(",")
        read = {int(r) for r in _REGISTER.findall(operands if name.startswith("ST") else sources)}
        waits = [i for i, (_, registers) in enumerate(pending) if not read.isdisjoint(registers)]
        if waits:
            del pending[: waits[-1] + 1]
        match = _REGISTER.match(target)
        if name.startswith("LDG.") and match:
            is_wide = ".128" in name
            width = 4 if is_wide else 2 if ".64" in name else 1
            pending.append((is_wide, range(int(match[1]), int(match[1]) + width)))
            wide += is_wide
            most = max(most, sum(is_wide for is_wide, _ in pending))
    return wide // 2, most


def streaming_loops(text: str) -> list[Loop]:
    """The innermost streaming loop of each kernel that has one."""
    found = []
    for name, arch, code in kernels(text):
        local = sum(op.split()[0].split(".")[0] in ("LDL", "STL") for _, op in code)
        sizes = [(last - first, *under_way(code, first, last)) for first, last in loops(code)]
        streaming = [size for size in sizes if size[1] >= _WIDE]
        if streaming:
            _, wide, most = min(streaming)
            found.append(Loop(name, arch, wide, most, local))
    return found


def disassembled(path: Path) -> str:
    """What cuobjdump prints of an object file."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    places = os.pathsep.join([os.environ.get("PATH", ""), str(packages)])
    program = shutil.which("cuobjdump", path=places)
    if program is None:
        raise FileNotFoundError(
            "cuobjdump was not found on the PATH; it comes with the CUDA toolkit, or with "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    done = subprocess.run(
        [program, "-sass", str(path)],
        env=os.environ | {"PATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def demangled(names: list[str]) -> list[str]:
    """Readable names, where c++filt is at hand."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return names
    text = "\n".join(names)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return [short(name) for name in done.stdout.splitlines()]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a loop waits too often or a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="its objects are searched for kernels")
    parser.add_argument("--least", type=int, default=6, help="wide loads under way")
    parser.add_argument("--json", type=Path, help="file for all of it")
    options = parser.parse_args(arguments)
    found: list[Loop] = []
    paths = sorted(p for p in options.folder.rglob("*") if p.suffix in (".o", ".cubin"))
    for path in paths:
        if path.suffix == ".cubin" or Path(f"{path}.ptxas").exists():
            found += streaming_loops(disassembled(path))
    if not found:
        print(f"no kernel with a streaming loop in {options.folder}", file=sys.stderr)
        return 1
    for loop, name in zip(found, demangled([loop.kernel for loop in found]), strict=True):
        loop.kernel = name
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(loop) for loop in found], indent=1) + "\n")
    bad = 0
    for loop in sorted(found, key=lambda loop: (loop.kernel, int(loop.arch))):
        short_of = loop.under_way < options.least
        wrong = loop.local > 0 or (short_of and (loop.kernel, loop.arch) not in _BOUND)
        bad += wrong
        print(
            f"{'!!' if wrong else '  '} sm_{loop.arch:<4} {loop.under_way:2} of {loop.wide:2} wide "
            f"loads under way, {loop.local} on local memory: {loop.kernel}"
        )
    print(f"{bad} of {len(found)} loops wait too often, or belong to a kernel that spills")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
