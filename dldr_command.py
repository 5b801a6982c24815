"""The program `dldr`: answers at once what needs neither torch nor an extra, and starts the rest.

Importing `dldr_ext` imports torch, which takes seconds. The version, the help and the completion of
the Tab key are in the text of `dldr_ext/cli`, which is read here and not run.
"""

import ast
import os
import re
import shutil
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

_HELP = ("-h", "--help")


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
    elif not typer and arguments[0] in commands() and set(arguments) & set(_HELP):
        print(help_of(arguments[0]))
    else:
        from dldr_ext.cli import main as whole

        whole(arguments)


def version() -> str:
    """Return ``dldr_ext.__version__``."""
    text = (_package() / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


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


def options(function: ast.FunctionDef) -> list[dict[str, Any]]:
    """Return the names, the help and the values of each option of a command."""
    shared, enums = {}, {}
    for module in _modules().values():
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                shared[node.targets[0].id] = node.value
            elif isinstance(node, ast.ClassDef) and "Enum" in ast.unparse(node):
                values = [v.value for v in node.body if isinstance(v, ast.Assign)]
                enums[node.name] = [ast.literal_eval(value) for value in values]
    found = []
    for argument in function.args.args:
        annotation: Any = argument.annotation
        if isinstance(annotation, ast.Name):
            annotation = shared[annotation.id]
        kind, call = annotation.slice.elts
        if call.func.attr == "Argument" if isinstance(call.func, ast.Attribute) else False:
            continue
        strings = [ast.unparse(one).strip("f'\"") for one in call.args]
        names = [text for text in strings if re.fullmatch("--?[a-z-]+", text)]
        boolean = ast.unparse(kind) == "bool"
        stem = argument.arg.replace("_", "-")
        texts = [k.value for k in call.keywords if k.arg == "help"]
        texts += [one for one in call.args if isinstance(one, (ast.Constant, ast.JoinedStr))]
        texts = [t for t in texts if not (isinstance(t, ast.Constant) and t.value in names)]
        found.append(
            {
                "names": names or ([f"--{stem}", f"--no-{stem}"] if boolean else [f"--{stem}"]),
                "flag": boolean,
                "help": re.sub("{.*?}", "...", ast.unparse(texts[0]).strip("f'\""))
                if texts
                else "",
                "values": enums.get(ast.unparse(kind).partition(" ")[0], []),
            }
        )
    return found


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
    """Return the help of a command, for where typer is missing."""
    function = commands()[command]
    rows = [(", ".join(option["names"]), option["help"]) for option in options(function)]
    text = (ast.get_docstring(function) or "").replace("\b\n", "")
    return f"Usage: dldr {command} [OPTIONS] ...\n\n{text}\n\nOptions:\n{_table(rows)}"


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
        for place, one in enumerate(options(function)):
            named = Enum("Values", [(v, v) for v in one["values"]], type=str)  # type: ignore[misc]
            kind: Any = bool if one["flag"] else named if one["values"] else str
            names = ["/".join(one["names"])] if "--no-" in one["names"][-1] else one["names"]
            kinds[f"o{place}"] = Annotated[kind, typer.Option(*names, help=one["help"])]

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
