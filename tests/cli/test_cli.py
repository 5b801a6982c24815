"""The `dldr` command, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import call, needs, words

import dldr_ext
from dldr_ext.cli import requirements

ROOT = Path(dldr_ext.__file__).parents[1]


def test_info_as_json_holds_build_info(capsys):
    needs("typer", "rich")
    code, out, _ = call(capsys, "info", "--json")
    assert code == 0
    assert json.loads(out).items() >= json.loads(json.dumps(dldr_ext.build_info())).items()


def test_info_as_table_names_everything(capsys):
    needs("typer", "rich")
    code, out, _ = call(capsys, "info")
    assert code == 0
    for key in dldr_ext.build_info():
        assert key in out
    assert dldr_ext.__version__ in out


def test_module_is_the_command():
    needs("typer", "rich")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "dldr_ext", "info", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["version"] == dldr_ext.__version__


def test_version(capsys):
    needs("typer", "rich")
    assert call(capsys, "--version") == (0, f"dldr_ext {dldr_ext.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("demo", "--help")])
def test_help(capsys, arguments):
    needs("typer", "rich")
    _, out, err = call(capsys, *arguments)
    assert "demo" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "cifar"), "--data"),
        (("--dim", "0"), "--dim"),
        (("--dim", "many"), "--dim"),
        (("--seeds", "0"), "--seeds"),
        (("--epochs", "-1"), "--epochs"),
        (("--threads", "0"), "--threads"),
        (("--nonsense",), "--nonsense"),
        (("--device", "gpu"), "--device: expected cpu or cuda"),
        (("--dim", "2000"), "--dim: expected at most 1000, got 2000"),
    ],
)
def test_bad_options_write_nothing(capsys, tmp_path, arguments, message):
    needs("typer", "rich", "sklearn", "matplotlib")
    output = tmp_path / "out"
    code, out, err = call(capsys, "demo", "--data", "digits", "--output", str(output), *arguments)
    assert code == 2
    assert message in words(err)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "folder"])
def test_output_that_cannot_be_a_folder(capsys, tmp_path, inside):
    needs("typer", "rich", "sklearn", "matplotlib")
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, err = call(capsys, "demo", "--data", "digits", "--output", str(file / inside))
    assert code == 2
    assert "is not a folder" in words(err)
    assert file.read_text() == "mine"


def test_missing_extra_is_one_line(tmp_path):
    """Without typer (hidden from the import system) the entry point still answers."""
    hide = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a)\n"
        "sys.modules['typer'] = None\n"
        "from dldr_ext.cli import main\n"
        "main(['demo'])\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, "-c", hide],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "dldr: not installed: typer: pip install typer\n"
    assert list(tmp_path.iterdir()) == []


def test_missing_data_package_is_named(capsys, tmp_path, monkeypatch):
    needs("typer", "rich")
    found = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "mlxtend" else found(name)
    )
    code, out, err = call(capsys, "demo", "--output", str(tmp_path / "out"))
    assert code == 2
    assert out == ""
    assert "not installed: mlxtend: pip install mlxtend" in err
    assert list(tmp_path.iterdir()) == []


def test_demo_from_the_command_line(capsys, tmp_path):
    needs("typer", "rich", "sklearn", "matplotlib")
    output = tmp_path / "out"
    arguments = ["demo", "--data", "digits", "--dim", "5", "--epochs", "2", "--threads", "1"]
    code, out, _ = call(capsys, *arguments, "--output", str(output))
    assert code == 0
    results = json.loads((output / "results.json").read_text())
    from dldr_ext.demo.methods import NAMES

    table = out[out.index("test accuracy") :].splitlines()
    for entry in results["runs"]:
        line = next(row for row in table if row.startswith(NAMES[entry["method"]] + " "))
        assert f"{100 * entry['test_accuracy']:.2f} %" in line
        assert f" {entry['data_passes']:.1f} " in line
    assert str(output / "report.html") in out


def test_quiet_demo_says_nothing(capsys, tmp_path):
    needs("typer", "rich", "sklearn", "matplotlib")
    arguments = ["demo", "--data", "digits", "--dim", "1", "--epochs", "1", "-q"]
    arguments += ["--threads", "1"]
    code, out, err = call(capsys, *arguments, "--output", str(tmp_path / "out"))
    assert (code, out, err) == (0, "", "")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "report.html", "accuracy.png", "spectrum.png"}
