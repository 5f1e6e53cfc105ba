"""Tests that every page of docs/integrations is run: here, or in an environment that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_code_and_a_place_to_run_it(page):
    text = page.read_text("utf-8")
    assert "```python\n" in text
    named = re.match(r"<!-- runs in: ([a-z_]+) -->\n", text)
    if "runs in:" in text:
        assert named
        assert (ROOT / "tests" / "trainers" / named[1] / "requirements.txt").is_file()
    adapter = ROOT / "src" / "kdloss" / "integrations" / f"{page.stem}.py"
    if adapter.is_file():
        assert f"kdloss.integrations.{page.stem}" in text or f"kdloss.integrations import {page.stem}" in text


def test_every_adapter_has_a_page():
    adapters = {path.stem for path in (ROOT / "src" / "kdloss" / "integrations").glob("[a-z]*.py")}
    assert adapters <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_a_page_checks_the_first_batch(page):
    assert "check_batch(" in page.read_text("utf-8")
