"""Hooks of mkdocs: which files the site is made from, and the pages that programs write.

The site has the folders of the repository, so that a relative link means the same on both.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import typer.cli
import typer.main
from mkdocs.structure.files import File, Files

from dldr_ext.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "*.md", "CITATION.cff", "docs/**/*.*", "benchmarks/README.md", "benchmarks/results/**/*.png",
    "benchmarks/results/**/*.json",
)  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Take the theme's files, the repository's pages and pictures, the examples, the command."""
    gathered = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted({path for pattern in SHOWN for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        gathered.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted(ROOT.glob("examples/*.py")):
        page = f"# {path.stem}\n\n```python\n{path.read_text()}```\n"
        gathered.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    gathered.append(File.generated(config, "docs/options.md", content=options()))
    return gathered


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead to the page of an example, not to its file."""
    return re.sub(r"(\]\([^)]*examples/\w+)\.py\)", r"\1.md)", markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Name the search, for screen readers; an empty cell is no header."""
    dialog = 'data-md-component="search" role="dialog"'
    output = output.replace(dialog, f'{dialog} aria-label="Search"')
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output)


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same in the page of what is not found."""
    return on_post_page(output_content)


def options() -> str:
    """Every command and option, as `dldr COMMAND --help` has them."""
    command = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=click.Context(command), name="dldr")
    text = html.unescape(text).replace("\b", "").replace("# `dldr`", "# Every option of `dldr`", 1)
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text)  # cut off; they follow
    return re.sub(
        r"^Examples:\n((?:  .*\n)+)",
        lambda found: f"Examples:\n\n```bash\n{dedent(found[1])}```\n",
        text,
        flags=re.MULTILINE,
    )
