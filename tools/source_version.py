"""The version of a source tree: that of its tag, or of what comes next."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def source_version(root: Path) -> str:
    """Return the version, without a local part.

    Of a source archive what it was made as. In a git repository X.Y.Z at the tag vX.Y.Z, and
    X.Y.(Z + 1).devN with N commits since, or changes. Where no tag is there (a shallow clone, no
    git) X.Y.Z.dev0 of the newest entry of the changelog.
    """
    archive = root / "PKG-INFO"
    if archive.is_file():
        found = re.search(r"^Version: ([^+\s]+)", archive.read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, archive
        return found[1]
    described = ""
    if _git(root, "rev-parse", "--show-prefix") == "\n":  # not in a folder of another repository
        described = _git(root, "describe", "--tags", "--long", "--dirty", "--match", "v[0-9]*")
    tag = re.fullmatch(r"v(\d+\.\d+\.\d+(?:rc\d+)?)-(\d+)-g\w+(-dirty)?", described.strip())
    if tag is None:
        changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
        newest = re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
        assert newest is not None, changes[:100]
        return f"{newest[1]}.dev0"
    if tag[2] == "0" and not tag[3]:
        return tag[1]
    return re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), tag[1]) + f".dev{tag[2]}"


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints; nothing where it fails, or is missing."""
    # In a container the files may belong to somebody else.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
