"""The version of a source tree, and what must agree in a release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from source_version import source_version  # noqa: E402

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "CHANGELOG.md").write_text("# Changelog\n\n## 0.4.0 - 2026-01-01\n")
    return tmp_path / "source"


@pytest.fixture
def repository(tree: Path) -> Path:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    return tree


@needs_git
def test_the_version_is_that_of_the_tag(repository):
    assert source_version(repository) == "0.4.0.dev0"  # no tag at all
    git(repository, "tag", "v0.4.0")
    assert source_version(repository) == "0.4.0"
    (repository / "CHANGELOG.md").write_text("## 0.9.0\n")
    assert source_version(repository) == "0.4.1.dev0"  # changed
    git(repository, "commit", "-qam", "two")
    git(repository, "tag", "docs-2")  # another kind of tag
    assert source_version(repository) == "0.4.1.dev1"
    git(repository, "tag", "-a", "v1.0.0rc1", "-m", "candidate")
    assert source_version(repository) == "1.0.0rc1"
    git(repository, "commit", "-qm", "three", "--allow-empty")
    assert source_version(repository) == "1.0.0rc2.dev1"


@needs_git
def test_where_no_tag_can_be_seen(repository, tmp_path, monkeypatch):
    git(repository, "tag", "v0.4.0")
    git(repository, "commit", "-qm", "two", "--allow-empty")
    git(tmp_path, "clone", "-q", "--depth=1", "--no-tags", f"file://{repository}", "shallow")
    assert source_version(tmp_path / "shallow") == "0.4.0.dev0"
    monkeypatch.setenv("PATH", "")  # no git
    assert source_version(repository) == "0.4.0.dev0"


@needs_git
def test_a_tree_in_another_repository_is_not_of_its_tags(tree, tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v7.0.0")
    assert source_version(tree) == "0.4.0.dev0"


@needs_git
def test_a_source_archive_says_its_version(repository):
    git(repository, "tag", "v0.4.0")
    (repository / "PKG-INFO").write_text("Metadata-Version: 2.4\nVersion: 0.3.1+cu130\n")
    assert source_version(repository) == "0.3.1"


def test_changelog_and_citation_agree():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", one) for one in headings]
    assert dated and all(dated), headings
    version, day = dated[0].groups()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {day}\n" in citation
