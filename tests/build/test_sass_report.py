"""The check of machine code: it finds loads that wait for each other, and what spills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools/sass_report.py").is_file():
    pytest.skip("the tools are in the source tree only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import sass_report  # noqa: E402


def listing(name: str, body: list[str], arch: int = 90) -> str:
    """As cuobjdump prints it: a loop around the instructions, 16 bytes each."""
    lines = [f"\tcode for sm_{arch}", f"\t\tFunction : {name}"]
    code = ["MOV R1, c[0x0][0x28]", *body, "@P0 BRA 0x10", "EXIT"]
    lines += [f"        /*{16 * i:04x}*/    {text} ;   /* 0x0 */" for i, text in enumerate(code)]
    return "\n".join(lines) + "\n"


def load(i: int) -> str:
    return f"LDG.E.128.CONSTANT R{8 + 4 * i}, desc[UR4][R2.64+0x{16 * i:x}]"


def use(i: int) -> str:
    """Reads the last register that a load fills."""
    return f"FFMA R0, R{11 + 4 * i}, R1, R0"


LOADS, USES = [load(i) for i in range(8)], [use(i) for i in range(8)]
IN_TURN = [text for pair in zip(LOADS, USES, strict=True) for text in pair]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (LOADS + USES, (8, 8)),
        (IN_TURN, (8, 1)),
        ([*LOADS[:4], *USES[:4], *LOADS[4:], *USES[4:]], (8, 4)),
        ([*LOADS[:6], use(2), *LOADS[6:], *USES], (8, 6)),
        # What waits for another, earlier load does not wait for these.
        (["LDG.E R3, [R2.64]", *LOADS[:4], "FMUL R3, R3, R1", *LOADS[4:], *USES], (8, 8)),
        # Loads of the next turn are under way while this one's are used.
        ([*USES[:4], *LOADS[:4], *USES[4:], *LOADS[4:]], (8, 8)),
        ([f"@!P1 {text}" for text in LOADS] + ["IADD3 R2, R2, R5, RZ", *USES], (8, 8)),
        ([*LOADS[:3], "STS [R5], R8", *LOADS[3:], *USES], (8, 7)),
    ],
)
def test_loads_under_way_are_counted(body: list[str], expected: tuple[int, int]) -> None:
    (kernel,) = sass_report.read_kernels(listing("f", body))
    assert kernel.loops == [expected]
    assert (kernel.kernel, kernel.arch, kernel.local, kernel.chains) == ("f", "90", 0, 0)


def test_every_innermost_loop_and_each_architecture_count() -> None:
    text = listing("f", LOADS, 80) + listing("f", IN_TURN, 120)
    text += listing("short", LOADS[:3])  # no streaming loop
    text += listing("spills", ["STL [R1], R4", *LOADS, "LDL R4, [R1]"])
    text += listing("nested", ["MOV R0, RZ", *LOADS, *USES, "@P1 BRA 0x20", *IN_TURN])
    found = {(kernel.kernel, kernel.arch): kernel for kernel in sass_report.read_kernels(text)}
    assert found["f", "120"].loops == [(8, 1)] and found["spills", "90"].local == 2
    assert found["short", "90"].loops == []
    assert found["nested", "90"].loops == [(8, 8)]  # not the loop around it


CHAIN = [text for i in range(4) for text in (f"LDG.E R{8 + i}, [R2.64]", f"STS [R5], R{8 + i}")]
BATCH = [*CHAIN[::2], *CHAIN[1::2]]


@pytest.mark.parametrize(
    ("body", "chains"),
    [
        (CHAIN, 1),
        (BATCH, 0),
        (CHAIN[:2], 0),  # a tail of one element
        ([text.replace("STS", "STG.E") for text in CHAIN], 1),
        ([*BATCH, "FADD R0, R8, R0"], 0),
    ],
)
def test_loads_that_wait_for_stores_are_chains(body: list[str], chains: int) -> None:
    (kernel,) = sass_report.read_kernels(listing("f", body))
    assert kernel.chains == chains
    assert any("chains" in text for text in kernel.wrong(6)) == bool(chains)


@pytest.mark.parametrize(
    ("name", "body", "wrong"),
    [
        ("sum_gram", ["DMUL R4, R6, R8", "DADD R4, R4, R6"], False),
        ("sum_gram", ["DFMA R4, R6, R8, R4"], True),
        ("dot_chunk<double, 1>", ["DFMA R4, R6, R8, R4"], False),  # fma() in the source
        ("quasi_newton_block", ["MUFU.RCP64H R5, R7", *8 * ["DFMA R4, R6, R8, R4"]], False),
        ("quasi_newton_block", ["MUFU.RCP64H R5, R7", *30 * ["DFMA R4, R6, R8, R4"]], True),
    ],
)
def test_contracted_doubles_are_found(name: str, body: list[str], wrong: bool) -> None:
    (kernel,) = sass_report.read_kernels(listing(name, body))
    assert any("contracted" in text for text in kernel.wrong(6)) == wrong


def report(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    (folder / "x.cubin").write_bytes(b"")
    monkeypatch.setattr(sass_report, "disassembled", lambda path: text)
    return sass_report.main([str(folder), *arguments])


def test_a_loop_that_waits_and_a_kernel_that_spills_fail(tmp_path, monkeypatch, capsys) -> None:
    good = listing("f", LOADS + USES)
    assert report(tmp_path, good, monkeypatch, "--json", str(tmp_path / "all.json")) == 0
    assert json.loads((tmp_path / "all.json").read_text())[0]["loops"] == [[8, 8]]
    assert report(tmp_path, good + listing("g", IN_TURN), monkeypatch) == 1
    line = "!! sm_90   1 of 8 wide loads under way: g: loads wait for each other"
    assert line in capsys.readouterr().out
    assert report(tmp_path, good + listing("h", ["STL [R1], R4", *LOADS]), monkeypatch) == 1
    assert report(tmp_path, listing("f", USES), monkeypatch) == 1  # nothing was looked at


PLANTED = {
    # Each load waits for the one before: once in reconstruct_ loads had sunk behind a branch.
    "loads wait": (
        "combine.cuh",
        "reconstruct",
        "      scaled[j] = 1;\n",
        "      if (reinterpret_cast<const unsigned*>(packs + j)[0] == 12345u) return;\n"
        "      scaled[j] = 1;\n",
        [],
    ),
    "contracted": ("", "quasi_newton", "", "", ["-fmad=true"]),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_in_real_machine_code(tmp_path: Path, fault: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    header, unit, before, after, flags = PLANTED[fault]
    found = {}
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for planted in (False, True):
        if planted and header:
            path = tmp_path / "csrc/cuda" / header
            assert path.read_text().count(before) == 1
            path.write_text(path.read_text().replace(before, after))
        source, cubin = tmp_path / f"csrc/cuda/{unit}.cu", tmp_path / f"{planted}.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-cubin", "-arch=sm_90"]
        extra = flags if planted else []
        subprocess.run([*command, *extra, str(source), "-o", str(cubin)], check=True)
        try:
            text = sass_report.disassembled(cubin)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        kernels = sass_report.read_kernels(text)
        found[planted] = [text for kernel in kernels for text in kernel.wrong(6)]
    assert not found[False]
    assert any(fault in text for text in found[True])
