"""What the program `dldr` answers before torch is imported, and without any extra."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import needs, words

import dldr_command
import dldr_ext

ROOT = Path(dldr_ext.__file__).parents[1]


def run(*arguments: str, hidden: tuple[str, ...] = ("torch",), **environment: str) -> tuple:
    """Run the program where some packages cannot be found: exit code, stdout, stderr."""
    program = (
        "import sys, importlib.util as u\n"
        f"hidden, find = {hidden!r}, u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in hidden else find(name, *a)\n"
        "sys.modules |= dict.fromkeys(hidden)\n"
        f"sys.argv = ['dldr', *{arguments!r}]\n"
        "import dldr_command\n"
        "dldr_command.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, PYTHONPATH=str(ROOT), **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_interrupted_while_it_is_imported():
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['dldr', 'soup', 'x.pt']\n"
        "import dldr_command\n"
        "dldr_command.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    ended = (done.returncode, done.stdout, done.stderr)
    assert ended == (130, "", "dldr: interrupted; nothing has been written\n")


NOTHING = ("torch", "numpy", "typer", "rich", "click")


@pytest.mark.parametrize("hidden", [("torch",), NOTHING])
def test_version_and_help_need_nothing(hidden):
    assert run("--version", hidden=hidden) == (0, f"dldr_ext {dldr_ext.__version__}\n", "")
    code, text, err = run("--help", hidden=hidden, COLUMNS="50")
    assert (code, err) == (0, "") and max(map(len, text.splitlines())) <= 50
    assert run("-h", hidden=hidden, COLUMNS="50")[1] == text
    code, bare, _ = run(hidden=hidden, COLUMNS="50")
    assert code == 2 and bare == text
    for name in ("info", "plan", "bench", "analyze", "soup", "demo"):
        assert f"\n  {name} " in text
    assert "Exit codes: 0 done, 1 failed" in words(text)


def default_of(param) -> str:
    """What typer shows of a default, in its help."""
    if param.required:
        return "required"
    if isinstance(param.show_default, str):
        return param.show_default
    if param.is_flag if param.param_type_name == "option" else False:
        return param.opts[0].strip("-") if param.default and param.secondary_opts else ""
    value = param.default
    return "" if value is None else str(getattr(value, "value", value))


def test_commands_and_options_are_those_of_the_program():
    needs("typer", "rich")
    import typer.main

    from dldr_ext.cli.app import app

    whole = typer.main.get_command(app).commands
    assert [*dldr_command.commands()] == [*whole]
    for name, function in dldr_command.commands().items():
        expected = [p for p in whole[name].params if "--help" not in p.opts]
        found = dldr_command.options(function)
        for one, param in zip(found, expected, strict=True):
            argument = param.param_type_name == "argument"
            assert one.names == ([] if argument else [*param.opts, *param.secondary_opts])
            assert one.flag == (not argument and param.is_flag), param
            assert one.help == param.help and one.default == default_of(param), param
            assert one.metavar == param.metavar or param.metavar is None, param
        summary = words(whole[name].help).partition(". ")[0]
        assert words(dldr_command.help_text()).count(summary.partition(".")[0]) == 1


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dldr pl", ["plan"]),
        ("dldr soup --sch", ["--schedule"]),
        ("dldr analyze --no", ["--no-subspace"]),
        ("dldr demo --data ", ["mnist5k", "digits"]),
        ("dldr plan --storage ", ["device", "host", "disk"]),
        ("dldr --ver", ["--version"]),
        ("dldr soup che", []),
    ],
)
def test_completion_without_torch(typed, expected):
    needs("typer")
    words_ = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    code, out, err = run(_DLDR_COMPLETE="complete_bash", **words_)
    assert (code, err, out.split()) == (0, "", expected)


@pytest.mark.parametrize("hidden", [("torch",), NOTHING])
@pytest.mark.parametrize("command", ["info", "plan", "bench", "analyze", "soup", "demo"])
def test_help_of_a_command_needs_nothing(command, hidden):
    code, out, err = run(command, "--help", hidden=hidden, COLUMNS="50")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 50
    assert f"Usage: dldr {command} [OPTIONS]" in out and f"\n  dldr {command}" in out
    assert "--json" in out and "\b" not in out
    narrow = {"COLUMNS": "50", "PYTHONIOENCODING": "ascii"}
    assert run(command, "--json", "-h", hidden=hidden, **narrow)[1] == out


def test_examples_in_a_help_are_whole_commands():
    """Folded as a shell takes them."""
    out = run("soup", "-h", COLUMNS="50")[1].replace(" \\\n", " ")
    assert "dldr soup runs/checkpoints --last 20 --schedule 1-sqrt --verify" in words(out)
    assert "--schedule mean|linear|1-sqrt|ema:B" in out and "CKPT[:WEIGHT] Files" in words(out)
    assert "[required]" in out and "[default: soup.safetensors]" in words(out)


def test_info_without_extras():
    code, out, err = run("info", "--json", hidden=("typer", "rich", "click"))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["version"] == dldr_ext.__version__
    assert found["extras"]["cli"]["command"] == "pip install typer rich"
    code, out, _ = run("info", hidden=("typer", "rich", "click"), COLUMNS="60")
    assert code == 0 and "cli: pip install typer rich" in words(out)
