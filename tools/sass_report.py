"""What the machine code of every kernel says about its speed and its arithmetic.

Disassembles the objects under a build folder with cuobjdump (of the CUDA toolkit, or the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). For each kernel and architecture it prints

- the innermost loops that read 16 bytes at a time: how many such loads are under way at once, that
  is before an instruction reads what the first of them brings. Source and PTX do not show this: the
  assembler may sink a load behind a branch;
- chains: innermost loops where every load waits for the store of what the one before brought;
- instructions on local memory, where spills go;
- contracted doubles: fused multiply-adds in a kernel whose source has none.

Fails where a loop has fewer loads under way than --least, and on any chain, spill or contraction.
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
# Kernels, and architectures, that may have fewer: arithmetic on doubles is their bound, or, in the
# residual of one-byte formats, the instructions that widen them.
_BOUND = [
    (re.compile(r"residual_tile<(signed char|f8e4m3)>"), re.compile("100|120")),
    (re.compile(r"(reconstruct|residual)_tile<double>"), re.compile("120")),
    (re.compile(r"form_tile<"), re.compile("")),
]
# One block with d x d numbers: its barriers are its bound, not its loads.
_SMALL = re.compile("quasi_newton_block")
# Kernels that multiply and add doubles in one rounding, because their source says so.
_FUSED = re.compile(r"<double|form_tile|trial_tile")
# Quotients and roots of doubles come with fused steps of their own, so many at most.
_STEPS_OF_A_QUOTIENT = 12
_FUNCTION = re.compile(r"Function : (\S+)")
_ARCH = re.compile(r"code for sm_(\d+)")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_REGISTER = re.compile(r"\bR(\d+)")
_PREDICATE = re.compile(r"@!?U?P\w+ ")


@dataclass
class Kernel:
    """What the machine code of one kernel for one architecture shows."""

    kernel: str
    arch: str
    loops: list[tuple[int, int]]  # 16-byte loads in a streaming loop, and those under way at once
    chains: int
    local: int  # instructions on local memory
    fused: int  # fused multiply-adds of doubles
    quotients: int

    def wrong(self, least: int) -> list[str]:
        """What is wrong with it, in words."""
        bound = any(k.match(self.kernel) and a.match(self.arch) for k, a in _BOUND)
        found = []
        if not bound and any(most < least for _, most in self.loops):
            found.append("loads wait for each other")
        if self.chains and not _SMALL.match(self.kernel):
            found.append(f"{self.chains} load-store-load chains")
        if self.local:
            found.append(f"{self.local} on local memory")
        if self.fused > _STEPS_OF_A_QUOTIENT * self.quotients and not _FUSED.search(self.kernel):
            found.append(f"{self.fused} doubles contracted")
        return found


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


def innermost(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those loops that hold no other."""
    return [
        one
        for one in found
        if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in found)
    ]


def under_way(code: Code, first: int, last: int) -> tuple[int, int, bool]:
    """Wide loads between two addresses, how many are under way at once, whether all loads chain.

    Loads come back in order: what reads a register of one waits for those before it too. The loop
    is gone through twice, since loads of a turn may be under way into the next. It is a chain if it
    has several loads and stores, and never two loads under way.
    """
    body = [text for at, text in code if first <= at <= last]
    wide = most = most_of_all = loads = stores = 0
    pending: list[tuple[bool, range]] = []  # loads under way, wide or not, and their registers
    for text in 2 * body:
        name, _, operands = text.partition(" ")
        target, _, sources = operands.partition(",")
        stores += name.startswith(("STG", "STS", "ST."))
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
            loads += 1
            most = max(most, sum(is_wide for is_wide, _ in pending))
            most_of_all = max(most_of_all, len(pending))
    return wide // 2, most, loads >= 4 and stores >= 4 and most_of_all < 2


def read_kernels(text: str) -> list[Kernel]:
    """Each kernel of what cuobjdump printed."""
    found = []
    listed = kernels(text)
    names = demangled([name for name, _, _ in listed])
    for name, (_, arch, code) in zip(names, listed, strict=True):
        operations = [op.split()[0].split(".")[0] for _, op in code]
        seen = [under_way(code, first, last) for first, last in innermost(loops(code))]
        found.append(
            Kernel(
                kernel=name,
                arch=arch,
                loops=[(wide, most) for wide, most, _ in seen if wide >= _WIDE],
                chains=sum(chain for _, _, chain in seen),
                local=sum(op in ("LDL", "STL") for op in operations),
                fused=operations.count("DFMA"),
                quotients=sum("64H" in op.split()[0] for _, op in code),
            )
        )
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
    """Print the table; 1 if a kernel waits, spills or contracts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="its objects are searched for kernels")
    parser.add_argument("--least", type=int, default=6, help="wide loads under way")
    parser.add_argument("--json", type=Path, help="file for all of it")
    options = parser.parse_args(arguments)
    found: list[Kernel] = []
    paths = sorted(p for p in options.folder.rglob("*") if p.suffix in (".o", ".cubin"))
    for path in paths:
        if path.suffix == ".cubin" or Path(f"{path}.ptxas").exists():
            found += read_kernels(disassembled(path))
    if not any(kernel.loops for kernel in found):
        print(f"no kernel with a streaming loop in {options.folder}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in found], indent=1) + "\n")
    bad = 0
    for kernel in sorted(found, key=lambda kernel: (kernel.kernel, int(kernel.arch))):
        wrong = kernel.wrong(options.least)
        bad += bool(wrong)
        if kernel.loops or wrong:
            shown = ", ".join(f"{most} of {wide}" for wide, most in kernel.loops) or "no"
            print(
                f"{'!!' if wrong else '  '} sm_{kernel.arch:<4} {shown} wide loads under way: "
                f"{kernel.kernel}{': ' if wrong else ''}{', '.join(wrong)}"
            )
    print(f"{bad} of {len(found)} kernels wait, spill or contract")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
