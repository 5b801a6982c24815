"""The `dldr` command, called in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dldr_ext.cli import main


def needs(*modules: str) -> None:
    """Skip a test of a command without the modules that it imports."""
    for name in modules:
        pytest.importorskip(name, reason=f"this command needs {name}")


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    code = exit_.value.code
    return (0 if code is None else code), captured.out, captured.err


def json_of(capsys, *arguments: str) -> Any:
    """Run a command with ``--json``; it must succeed."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def words(text: str) -> str:
    """Return a message without the box and the line breaks that rich puts it in."""
    return " ".join(text.replace("│", " ").split())
