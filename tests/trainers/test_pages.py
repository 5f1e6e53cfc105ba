"""Runs the `python` blocks of pages that begin with `<!-- runs in: NAME -->`, each in the environment NAME."""

import sys
from pathlib import Path

import pytest

from reader import blocks, read

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(sys.prefix).name.removeprefix(".venv-")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
HERE = [page for page in PAGES if page.read_text("utf-8").startswith(f"<!-- runs in: {ENVIRONMENT} -->")]


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_the_page_runs_for_its_reader(page, tmp_path):
    """In a separate process, because a page may change its trainer."""
    assert blocks(page.read_text("utf-8"))
    said = read(page, folder=tmp_path, timeout=1200)
    assert not said, f"{page}:\n{said}"
