"""Writes a package index (PEP 503) over a folder of wheels, for `pip install --extra-index-url`.

    python tools/wheel_index.py dist public/cu130 --wheels-url https://host/wheels

gives public/cu130/dldr-ext/index.html and public/cu130/index.html. Without --wheels-url the wheels
are linked where they lie, relative to the page.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import os
import re
from collections import defaultdict
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote
from zipfile import ZipFile


def normalise(name: str) -> str:
    """The name of a project as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requires_python(wheel: Path) -> str:
    with ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(metadata).decode())["Requires-Python"] or ""


def page(title: str, links: list[str]) -> str:
    lines = [
        "<!DOCTYPE html>",
        "<html>",
        '<head><meta charset="utf-8"><meta name="pypi:repository-version" content="1.0">',
        f"<title>{html.escape(title)}</title></head>",
        "<body>",
        *(f"{link}<br>" for link in links),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def write_index(wheels: Path, target: Path, wheels_url: str | None = None) -> list[Path]:
    """Writes the pages of all wheels in a folder; returns their paths."""
    projects: dict[str, list[str]] = defaultdict(list)
    for wheel in sorted(wheels.glob("*.whl")):
        project = normalise(wheel.name.split("-")[0])
        base = wheels_url or Path(os.path.relpath(wheels, target / project)).as_posix()
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        # quote: the "+" of a local version means a space in some servers' eyes.
        address = f"{base.rstrip('/')}/{quote(wheel.name)}#sha256={digest}"
        python = requires_python(wheel)
        wanted = f' data-requires-python="{html.escape(python)}"' if python else ""
        projects[project].append(
            f'<a href="{html.escape(address)}"{wanted}>{html.escape(wheel.name)}</a>'
        )
    if not projects:
        raise SystemExit(f"no wheels in {wheels}")
    pages = {target / "index.html": [f'<a href="{name}/">{name}</a>' for name in sorted(projects)]}
    for name, links in projects.items():
        pages[target / name / "index.html"] = links
    for path, links in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(path.parent.name, links))
    return list(pages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--wheels-url", help="address of the folder that will hold the wheels")
    options = parser.parse_args()
    for path in write_index(options.wheels, options.target, options.wheels_url):
        print(path)


if __name__ == "__main__":
    main()
