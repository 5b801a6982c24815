"""What the commands say in a terminal: any name, any encoding, any width, and after Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import call, json_of, needs, words

import dldr_ext
from dldr_ext.performance.timing import Spread

needs("typer", "rich", "matplotlib", "jinja2")

from dldr_ext.cli import main  # noqa: E402
from dldr_ext.cli.options import ByteBar, count, directions, one_line_errors  # noqa: E402
from dldr_ext.reporting.text import printable  # noqa: E402

# What a log gets of the progress bar.
ONE_LINE = re.compile(r"read \d+(\.\d+)? \w+ in \d+\.\d s\n")
BRACKETS = ["run[v2]", "x[/b]", "[red]", "[link=there]", ":smile:", "a b [0]"]


def checkpoints(folder: Path, name: str = "{}.pt", many: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(many):
        torch.save({"w": torch.randn(20)}, folder / "tmp")
        (folder / "tmp").rename(folder / name.format(i))
    return folder


@pytest.mark.parametrize("name", BRACKETS)
def test_brackets_are_no_markup(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "500")
    folder = checkpoints(tmp_path / name)
    out = tmp_path / "out" / name
    code, printed, err = call(capsys, "analyze", str(folder), "-o", str(out))
    assert code == 0 and ONE_LINE.fullmatch(err), err
    assert f"Open {out / 'report.html'}\n" in printed
    assert str(out / "subspace.safetensors") in printed
    target = out / "soup.safetensors"
    code, printed, err = call(capsys, "soup", str(folder), "-o", str(target))
    assert code == 0 and ONE_LINE.fullmatch(err) and f"4 checkpoints: {target}\n" in printed
    code, printed, err = call(capsys, "analyze", str(folder / "none[/b].pt"))
    assert (code, printed) == (1, "") and str(folder / "none[/b].pt") in err


NAMES = {
    b"\xe9poque_{}.pt": r"\xe9poque_0.pt",
    b"two\nlines_{}.pt": r"two\nlines_0.pt",
    b"colour\x1b[31m_{}.pt": r"colour\x1b[31m_0.pt",
    b"-dash \xff\xfe{}.pt": r"-dash \xff\xfe0.pt",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_shown_are_escaped(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "500")
    name, shown = os.fsdecode(name), NAMES[name]
    folder = checkpoints(tmp_path / "run", name)
    out = tmp_path / os.fsdecode(b"\xe0[b]\n")
    code, printed, err = call(capsys, "analyze", str(folder), "-o", str(out))
    assert code == 0 and ONE_LINE.fullmatch(err), err
    assert r"\xe0[b]\n" in printed.splitlines()[-1] and "\x1b" not in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert ("\\xe9poque_0.pt" in page) is ("poque" in name)
    listed = json.loads((out / "analysis.json").read_text())["checkpoints"]
    assert sorted(listed) == sorted(map(str, folder.iterdir())), "as Python reads them"
    twice = [str(folder / name.format(i)) for i in (0, 0, 1)]
    code, printed, err = call(
        capsys, "soup", *twice, "-o", str(tmp_path / "soup.safetensors"), "--weights", "1,1,2"
    )
    assert code == 0 and shown in printed and "\x1b" not in printed + err
    code, _, err = call(capsys, "soup", str(folder / name.format(9)))
    assert code == 1 and err.count("\n") == 1
    assert shown.replace("0.pt", "9.pt") in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("command", ["analyze", "soup", "info", "plan", "help"])
def test_encodings_that_lack_characters(tmp_path, monkeypatch, encoding, command):
    folder = checkpoints(tmp_path / "épochβ")
    arguments = {
        "analyze": ["analyze", str(folder), "-o", str(tmp_path / "β")],
        "soup": ["soup", str(folder), "-o", str(tmp_path / "β.safetensors")],
        "info": ["info"],
        "plan": ["plan", "--params", "7B", "--device", "h200", "--ranks", "4"],
        "help": ["soup", "--help"],
    }[command]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert (exit_.value.code or 0) == 0 and out
    assert err == "" or ONE_LINE.fullmatch(err), err
    if command == "soup":
        assert r"\u03b2.safetensors" in out
    if encoding == "ascii":
        assert "Error" not in out


@pytest.mark.parametrize(
    ("text", "value"),
    [("7B", 7 * 10**9), ("1.5M", 1_500_000), ("40", 40), ("7e9", 7 * 10**9), ("2k", 2000),
     ("0.5G", 5 * 10**8), ("1_000", 1000), ("11.2e6", 11_200_000), ("3 T", 3 * 10**12)],
)  # fmt: skip
def test_sizes(text, value):
    assert count(text) == value and directions(text) == value


@pytest.mark.parametrize(
    "text", ["1.5", "0", "-3", "7X", "B", "", "nan", "inf", "1e30", "1,5", "0x10"]
)
def test_what_is_no_size(text):
    with pytest.raises(Exception, match="expected a whole number of at least 1, as 7e9, got"):
        count(text)
    with pytest.raises(Exception, match="expected a number of at least 1, or auto, got"):
        directions(text)


def test_sizes_in_every_command(tmp_path, capsys):
    planned = json_of(capsys, "plan", "--params", "7B", "--dim", "4e1", "--snapshots", "0.1k",
                      "--ranks", "1e0", "--steps", "2k", "--device", "h200")  # fmt: skip
    job = planned["job"]
    assert (job["numel"], job["dim"], job["snapshots"], job["steps"]) == (7 * 10**9, 40, 100, 2000)
    folder = checkpoints(tmp_path / "run")
    found = json_of(capsys, "analyze", str(folder), "-o", str(tmp_path / "out"), "--dim", "2e0",
                    "--chunk-mb", "0.001M")  # fmt: skip
    assert found["subspace"]["dim"] == 2
    for arguments in ("bench --rounds 1", "bench --dim 2k", "demo --seeds 0", "demo --threads 0"):
        code, _, err = call(capsys, *arguments.split())
        assert code == 2 and "expected" in err and arguments.split()[1] in err


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_dtypes_in_every_command(tmp_path, capsys, name):
    folder = checkpoints(tmp_path / "run")
    found = json_of(capsys, "analyze", str(folder), "-o", str(tmp_path / "out"), "--dtype", name)
    assert found["dtype"] == "bfloat16"
    planned = json_of(capsys, "plan", "--params", "9k", "--dtype", name, "--param-dtype", name,
                      "--device", "h200")  # fmt: skip
    assert planned["job"]["dtype"] == planned["job"]["param_dtype"] == "bfloat16"


@pytest.mark.parametrize("command", ["analyze run", "plan --params 9", "demo"])
def test_a_dtype_that_is_none(capsys, command):
    code, out, err = call(capsys, *command.split(), "--dtype", "bf17[/b]")
    assert (code, out) == (2, "")
    assert "--dtype: expected one of float" in words(err) and "got bf17[/b]" in words(err)


@pytest.mark.parametrize("values", [[1.0, 100.0], [0.1, 0.2, 9.0], [5.0, 1.0, 1.0, 1.0, 1.0]])
def test_quartiles_stay_within_what_was_measured(values):
    spread = Spread.of(values)
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)


@pytest.mark.parametrize("width", [50, 64, 80])
def test_every_table_fits(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    folder = checkpoints(tmp_path / "run", many=6)
    commands = [
        ["plan", "--params", "70B", "--device", "h200", "--ranks", "8"],
        ["plan", "--params", "70B", "--device", "h100", "--storage", "disk"],
        ["info"],
        ["analyze", str(folder), "-o", str(tmp_path / "out")],
    ]
    for arguments in commands:
        code, out, _ = call(capsys, *arguments)
        assert code == 0
        # A path is not broken where it is to be copied.
        lines = [line.rstrip() for line in out.splitlines() if not line.startswith("Open ")]
        assert max(map(len, lines)) <= width and "…" not in out


@pytest.mark.parametrize("width", [50, 60, 120])
def test_tables_of_measurements_fit(monkeypatch, capsys, width):
    from dldr_ext.cli import bench, demo, terminal

    monkeypatch.setenv("COLUMNS", str(width))
    spread = {"low": 123.4, "median": 234.5, "high": 345.6}
    row = {"gb_per_second": spread, "of_ceiling": spread, "against_torch": spread}
    rows = [row | {"case": f"{op} float8_e4m3fn", "peer": "mv"} for op in ("gram", "reconstruct_")]
    about = {"device": "cpu", "threads": 2, "numel": 10, "dim": 4, "build": dldr_ext.build_info()}
    bench._print(about, rows)
    run = {"seed": 0, "dim": 40, "numel": 207018, "test_accuracy": 0.9, "data_passes": 60.0,
           "seconds": 123.4, "sampling_passes": 20.0, "explained_variance": 0.99}  # fmt: skip
    runs = [run | {"method": method} for method in demo.NAMES]
    screen = terminal.console()
    screen.print(demo._result_table({"runs": runs}, screen))
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width and "…" not in out
    assert ("[quartiles]" in out) is (width == 120)
    assert "test accuracy" in out and "234.5" in out


def test_an_error_has_no_bar_before_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes any stream for a terminal
    (tmp_path / "1.pt").write_bytes(b"")
    for command in ("analyze", "soup"):
        output = tmp_path / "out.safetensors"
        code, out, err = call(capsys, command, str(tmp_path), "-o", str(output))
        assert (code, out) == (1, "")
        assert err.startswith("dldr: ") and err.count("\n") == 1
    with ByteBar(quiet=False) as bar:
        bar("reading", 1, 2)
    assert "reading" in capsys.readouterr().err


class TestInterrupted:
    def test_says_what_is_kept(self, capsys):
        with pytest.raises(Exception) as exit_, one_line_errors("all of it"):
            raise KeyboardInterrupt
        assert exit_.value.exit_code == 130
        assert capsys.readouterr().err == "dldr: interrupted; all of it\n"

    def test_soup(self, tmp_path, capsys, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        folder = checkpoints(tmp_path / "run")
        monkeypatch.setattr(ByteBar, "__call__", interrupt)
        code, out, err = call(capsys, "soup", str(folder), "-o", str(tmp_path / "soup.safetensors"))
        assert (code, out) == (130, "")
        assert err == "dldr: interrupted; nothing has been written\n"
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_bench_shows_what_was_measured(self, capsys, monkeypatch):
        spread = {"low": 1.0, "median": 2.0, "high": 3.0}

        def rows(*_):
            yield {"case": "read", "gb_per_second": spread}
            yield {"case": "copy", "gb_per_second": spread}
            raise KeyboardInterrupt

        monkeypatch.setattr("dldr_ext.cli.bench.roofline", rows)
        code, out, err = call(capsys, "bench", "--numel", "1e4")
        assert code == 130 and "copy" in out
        assert "dldr: interrupted; 2 of 19 cases were measured" in err
        code, out, _ = call(capsys, "bench", "--numel", "1e4", "--json")
        assert code == 130 and len(json.loads(out)["results"]) == 2

    def test_plan(self, capsys, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("dldr_ext.cli.plan.measure", interrupt)
        code, out, err = call(capsys, "plan", "--params", "1M", "--device", "cpu")
        assert (code, out) == (130, "") and err.startswith("dldr: interrupted; nothing has been")

    def test_demo_keeps_the_seeds_that_were_done(self, tmp_path, capsys, monkeypatch):
        needs("sklearn")
        from dldr_ext.demo import methods

        train = methods.psgd

        def interrupted(task, subspace):
            if task.seed == 1:
                raise KeyboardInterrupt
            return train(task, subspace)

        monkeypatch.setattr(methods, "psgd", interrupted)
        out = tmp_path / "out"
        arguments = ["demo", "--data", "digits", "--dim", "2", "--epochs", "1", "--seeds", "3"]
        code, printed, err = call(capsys, *arguments, "-o", str(out))
        assert code == 130 and "P-BFGS on 2 variables" in words(printed)
        assert err.endswith(f"{out / 'report.html'} has the seeds that were done: 0\n")
        results = json.loads((out / "results.json").read_text())
        assert {run["seed"] for run in results["runs"]} == {0} and results["interrupted"]
        assert results["config"]["seeds"] == [0]


@pytest.mark.parametrize("arguments", [["info"], ["plan", "--params", "7B", "--device", "h200"]])
def test_nobody_reads_on(arguments):
    """As after `| head -1`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dldr_ext", *arguments]
    root = str(Path(dldr_ext.__file__).parents[1])
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=root)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    root = str(Path(dldr_ext.__file__).parents[1])
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dldr_ext", "info", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=root)
    assert done.returncode == 1 and done.stderr == "dldr: [Errno 28] No space left on device\n"


def test_many_checkpoints(tmp_path, capsys, monkeypatch):
    """T x T matrices are in a file of their own; there may be many near-duplicates, too."""
    from safetensors.torch import load_file

    from dldr_ext.pca import metrics

    monkeypatch.setattr(metrics, "_MOST_PAIRS", 50)
    folder = tmp_path / "run"
    folder.mkdir()
    states = [torch.randn(6), *([torch.zeros(6)] * 20)]
    for i in range(130):
        torch.save({"w": states[i] if i < len(states) else torch.randn(6)}, folder / f"{i}.pt")
    out = tmp_path / "out"
    found = json_of(capsys, "analyze", str(folder), "-o", str(out))
    assert found == json.loads((out / "analysis.json").read_text())
    assert found["gram"] is None and found["cosines"]["steps"] is None
    assert len(found["near_duplicates"]) == 50 and found["near_duplicates_in_all"] == 190
    assert (out / "analysis.json").stat().st_size < 100_000
    matrices = load_file(found["matrices"])
    assert matrices["gram"].shape == (130, 130) and matrices["cosines"].shape == (129, 129)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "and 170 more pairs" in page
    few = checkpoints(tmp_path / "few")
    found = json_of(capsys, "analyze", str(few), "-o", str(out))
    assert len(found["gram"]) == 4 and found["matrices"] is None
    assert not (out / "matrices.safetensors").exists()


def test_printable():
    assert printable("épochβ [0] 1") == "épochβ [0] 1"
    assert printable("\udcff\n\x1b\t\ud800") == r"\xff\n\x1b\t\ud800"
    assert printable(Path("a") / "b") == "a/b"
