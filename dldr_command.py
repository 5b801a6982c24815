"""The program `dldr`: answers at once what needs neither torch nor an extra, and starts the rest.

Importing `dldr_ext` imports torch, which takes seconds. The version, the help and the completion of
the Tab key are in the text of `dldr_ext/cli`, which is read here and not run.
"""

import ast
import json
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

_HELP = ("-h", "--help")
_METAVARS = {"int": "INT", "float": "FLOAT", "Path": "PATH", "list[Path]": "PATH"}


class Option(NamedTuple):
    """An option of a command, or an argument: that one has no names."""

    names: list[str]
    flag: bool
    help: str
    values: list[str]
    metavar: str
    default: str  # what is shown of it

    def heading(self) -> str:
        """Return the names, short ones first, and what follows them."""
        names = ", ".join(sorted(self.names, key=lambda name: name.startswith("--")))
        return names if self.flag else f"{names} {self.metavar}"

    def text(self) -> str:
        """Return the help and the default."""
        if not self.default:
            return self.help
        required = self.default == "required"
        return f"{self.help} [{self.default if required else f'default: {self.default}'}]"


def main() -> None:
    """Answer, or hand over to the whole command."""
    arguments = sys.argv[1:]
    typer = find_spec("typer") is not None
    if "_DLDR_COMPLETE" in os.environ and typer:
        _complete()
    elif arguments == ["--version"]:
        print(f"dldr_ext {version()}")
    elif not arguments or arguments[0] in _HELP:
        print(help_text())
        sys.exit(0 if arguments else 2)
    elif arguments[0] in commands() and set(arguments) & set(_HELP):
        print(help_of(arguments[0]))
    else:
        whole = _imported(typer and find_spec("rich") is not None)
        whole(arguments)


def _imported(app: bool) -> Callable[[list[str]], None]:
    """Import the whole command, which takes seconds: Ctrl-C ends them at once, in one line."""

    def end(*_: object) -> None:  # an exception might be lost on the way out of an import
        os.write(2, b"dldr: interrupted; nothing has been written\n")
        os._exit(130)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, end)
    from dldr_ext.cli import main as whole

    if app:
        import dldr_ext.cli.app  # noqa: F401
    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return whole


def version() -> str:
    """Return ``dldr_ext.__version__``, which is written where the libraries are built."""
    try:
        build = json.loads((_package() / "_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        build = {}
    return str(build.get("version", "0+unknown"))


def commands() -> dict[str, ast.FunctionDef]:
    """Return the function of each command, in the order of the help."""
    functions: dict[str, ast.FunctionDef] = {}
    for module in _modules().values():
        functions |= {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    found = {}
    for node in _modules()["app"].body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # app.command(...)(f)
            register, function = node.value.func, node.value.args[0]
            assert isinstance(register, ast.Call) and isinstance(function, ast.Name)
            name = register.args[0] if register.args else ast.Constant(function.id)
            found[ast.literal_eval(name)] = functions[function.id]
    return found


def options(function: ast.FunctionDef) -> list[Option]:
    """Return the options and arguments of a command, in the order of its function."""
    shared: dict[str, Any] = {}  # annotations that several commands use, by name
    enums: dict[str, list[str]] = {}
    for module in _modules().values():
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                shared[node.targets[0].id] = node.value
            elif isinstance(node, ast.ClassDef) and "Enum" in ast.unparse(node):
                constants = [v.value for v in node.body if isinstance(v, ast.Assign)]
                enums[node.name] = [ast.literal_eval(value) for value in constants]
    arguments = function.args.args
    found = []
    for place, argument in enumerate(arguments, start=len(function.args.defaults)):
        annotation: Any = argument.annotation
        if isinstance(annotation, ast.Name):
            annotation = shared[annotation.id]
        kind, call = annotation.slice.elts
        default = (*[None] * len(arguments), *function.args.defaults)[place]
        found.append(_option(argument.arg, kind, call, default, enums))
    return found


def _option(
    name: str, annotation: ast.expr, call: Any, default: Any, enums: dict[str, list[str]]
) -> Option:
    kind = ast.unparse(annotation).removesuffix(" | None")
    maker = ast.unparse(call.func)  # typer.Option, typer.Argument, number or dtype_of
    constants = [one.value for one in call.args if isinstance(one, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    given: dict[str, Any] = {
        k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)
    }
    names = [text for text in texts if re.fullmatch("--?[a-z-]+", text)]
    texts = [text for text in texts if text not in names]
    flag = kind == "bool"
    if maker != "typer.Argument" and not names:
        stem = name.replace("_", "-")
        names = [f"--{stem}", f"--no-{stem}"] if flag else [f"--{stem}"]
    values = enums.get(kind, [])
    metavar = {"number": "INT", "dtype_of": "DTYPE"}.get(maker, _METAVARS.get(kind, "TEXT"))
    shown = given.get("show_default", True)
    if default is None:
        shown = "required"
    elif shown is True:
        shown = _default(default)
        if flag:
            shown = names[0].strip("-") if len(names) > 1 and shown == "True" else ""
    return Option(
        names,
        flag,
        given.get("help") or next(iter(texts), ""),
        values,
        given.get("metavar") or "|".join(values) or metavar,
        shown or "",
    )


def _default(value: ast.expr | None) -> str:
    """Return a default as it would be typed: of "x", Path("x") and Enum.x it is x."""
    if isinstance(value, ast.Call):
        value = value.args[0]
    if isinstance(value, ast.Attribute):
        return value.attr
    return str(value.value) if isinstance(value, ast.Constant) and value.value is not None else ""


def help_text() -> str:
    """Return what ``dldr --help`` prints."""
    settings: dict[str, str] = {}
    for node in ast.walk(_modules()["app"]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Typer":
            given = [k for k in node.keywords if k.arg in ("help", "epilog")]
            settings = {str(k.arg): ast.literal_eval(k.value) for k in given}
    rows = [(name, _summary(function)) for name, function in commands().items()]
    own = [("--version", "Show the version."), ("-h, --help", "Show this message.")]
    own += [("--install-completion", "Install completion for this shell.")]
    own += [("--show-completion", "Show completion for this shell.")]
    parts = ["Usage: dldr [OPTIONS] COMMAND [ARGS]...", _fold(settings["help"])]
    parts += [f"Commands:\n{_table(rows)}", f"Options:\n{_table(own)}", _fold(settings["epilog"])]
    return "\n\n".join(parts)


def help_of(command: str) -> str:
    """Return what ``dldr COMMAND --help`` prints."""
    function = commands()[command]
    given = [one for one in options(function) if one.names]
    arguments = [one for one in options(function) if not one.names]
    usage = " ".join(["Usage: dldr", command, "[OPTIONS]", *(f"{a.metavar}..." for a in arguments)])
    parts = [usage]
    for paragraph in (ast.get_docstring(function) or "").split("\n\n"):
        lines = paragraph.removeprefix("\b\n").split("\n")
        verbatim = paragraph.startswith("\b")
        parts.append("\n".join(map(_typed, lines)) if verbatim else _fold(" ".join(lines)))
    if arguments:
        parts.append(f"Arguments:\n{_table([(a.metavar, a.text()) for a in arguments])}")
    rows = [(one.heading(), one.text()) for one in given]
    parts.append(f"Options:\n{_table([*rows, ('-h, --help', 'Show this message.')])}")
    return "\n\n".join(parts)


def _complete() -> None:
    """Let typer complete a word, from the names of commands and options alone."""
    from enum import Enum
    from inspect import Parameter, Signature

    import typer

    app = typer.Typer()

    @app.callback()
    def root(version: Annotated[bool, typer.Option("--version")] = False) -> None:
        pass

    for name, function in commands().items():
        kinds: dict[str, Any] = {}
        for place, one in enumerate(one for one in options(function) if one.names):
            named = Enum("Values", [(v, v) for v in one.values], type=str)  # type: ignore[misc]
            kind: Any = bool if one.flag else named if one.values else str
            names = ["/".join(one.names)] if "--no-" in one.names[-1] else one.names
            kinds[f"o{place}"] = Annotated[kind, typer.Option(*names, help=one.help)]

        def hollow(**_: Any) -> None:
            pass

        hollow.__annotations__ = kinds
        hollow.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(o, Parameter.KEYWORD_ONLY, annotation=k) for o, k in kinds.items()]
        )
        app.command(name, short_help=_summary(function))(hollow)
    app(prog_name="dldr")


def _package() -> Path:
    spec = find_spec("dldr_ext")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _modules() -> dict[str, ast.Module]:
    if not _PARSED:
        for path in sorted((_package() / "cli").glob("*.py")):
            _PARSED[path.stem] = ast.parse(path.read_text(encoding="utf-8"))
    return _PARSED


_PARSED: dict[str, ast.Module] = {}


def _summary(function: ast.FunctionDef) -> str:
    return (ast.get_docstring(function) or "").partition("\n")[0]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _fold(text: str) -> str:
    return textwrap.fill(text, _width())


def _typed(line: str) -> str:
    """Fold a command at its words, as a shell takes it."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    lines = textwrap.wrap(
        line,
        _width() - 2,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> str:
    indent = min(24, max(len(name) for name, _ in rows) + 4)
    lines = []
    for name, text in rows:
        long = len(name) + 3 > indent
        lines += [f"  {name}"] if long else []
        start = " " * indent if long else f"  {name}".ljust(indent)
        lines.append(textwrap.fill(start + text, _width(), subsequent_indent=" " * indent))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
