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


def test_commands_and_options_are_those_of_the_program():
    needs("typer", "rich")
    import typer.main

    from dldr_ext.cli.app import app

    whole = typer.main.get_command(app).commands
    assert [*dldr_command.commands()] == [*whole]
    for name, function in dldr_command.commands().items():
        expected = [p for p in whole[name].params if p.param_type_name == "option"]
        expected = [p for p in expected if "--help" not in p.opts]
        found = dldr_command.options(function)
        assert [one["names"] for one in found] == [[*p.opts, *p.secondary_opts] for p in expected]
        assert [one["flag"] for one in found] == [p.is_flag for p in expected]
        for one, param in zip(found, expected, strict=True):
            assert one["help"] == param.help or "..." in one["help"]
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


@pytest.mark.parametrize("command", ["info", "plan", "bench", "analyze", "soup", "demo"])
def test_help_of_a_command_without_extras(command):
    code, out, err = run(command, "--help", hidden=NOTHING)
    assert (code, err) == (0, "")
    assert f"Usage: dldr {command} [OPTIONS]" in out and f"  dldr {command}" in out
    assert "--json" in out and "\b" not in out


def test_info_without_extras():
    code, out, err = run("info", "--json", hidden=("typer", "rich", "click"))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["version"] == dldr_ext.__version__
    assert found["extras"]["cli"]["command"] == 'pip install "dldr_ext[cli]"'
    code, out, _ = run("info", hidden=("typer", "rich", "click"), COLUMNS="60")
    assert code == 0 and 'pip install --no-build-isolation ".[' in words(out)
