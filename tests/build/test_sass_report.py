"""The check of machine code: it finds loads that wait for each other, and what spills."""

from __future__ import annotations

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
    (loop,) = sass_report.streaming_loops(listing("f", body))
    assert (loop.wide, loop.under_way) == expected
    assert (loop.kernel, loop.arch, loop.local) == ("f", "90", 0)


def test_the_innermost_loop_and_each_architecture_count() -> None:
    text = listing("f", LOADS, 80) + listing("f", IN_TURN, 120)
    text += listing("short", LOADS[:3])  # no streaming loop
    text += listing("spills", ["STL [R1], R4", *LOADS, "LDL R4, [R1]"])
    found = {(loop.kernel, loop.arch): loop for loop in sass_report.streaming_loops(text)}
    assert found.keys() == {("f", "80"), ("f", "120"), ("spills", "90")}
    assert found["f", "120"].under_way == 1 and found["spills", "90"].local == 2


def report(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    (folder / "x.cubin").write_bytes(b"")
    monkeypatch.setattr(sass_report, "disassembled", lambda path: text)
    return sass_report.main([str(folder), *arguments])


def test_a_loop_that_waits_and_a_kernel_that_spills_fail(tmp_path, monkeypatch, capsys) -> None:
    good = listing("f", LOADS + USES)
    assert report(tmp_path, good, monkeypatch, "--json", str(tmp_path / "all.json")) == 0
    assert '"under_way": 8' in (tmp_path / "all.json").read_text()
    assert report(tmp_path, good + listing("g", IN_TURN), monkeypatch) == 1
    assert (
        "!! sm_90    1 of  8 wide loads under way, 0 on local memory: g" in capsys.readouterr().out
    )
    assert report(tmp_path, good + listing("h", ["STL [R1], R4", *LOADS]), monkeypatch) == 1
    assert report(tmp_path, listing("f", USES), monkeypatch) == 1  # nothing was looked at


def test_a_planted_branch_is_found_in_real_machine_code(tmp_path: Path) -> None:
    """Each load waits for the one before: once in reconstruct_ loads had sunk behind a branch."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    found = {}
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc/cuda/combine.cuh"
    for planted in (False, True):
        if planted:
            place = "      scaled[j] = 1;\n"
            branch = (
                "      if (reinterpret_cast<const unsigned*>(packs + j)[0] == 12345u) return;\n"
            )
            assert place in header.read_text()
            header.write_text(header.read_text().replace(place, branch + place))
        source, cubin = tmp_path / "csrc/cuda/reconstruct.cu", tmp_path / f"{planted}.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-cubin", "-arch=sm_90"]
        subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
        try:
            text = sass_report.disassembled(cubin)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        found[planted] = [loop.under_way for loop in sass_report.streaming_loops(text)]
    assert min(found[False]) >= 6 and min(found[True]) < 3
