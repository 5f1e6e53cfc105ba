"""Holds docs/gradients.md and docs/joint-mode.md to the code: the generated table, and every printed output."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kdloss

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_gradient_table", DOCS / "generate_gradient_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_what_the_code_gives(generator):
    page = (DOCS / "gradients.md").read_text(encoding="utf-8")
    assert generator.updated(page) == page, "run: python docs/generate_gradient_table.py"


def test_every_loss_of_the_library_has_a_row(generator):
    names = " ".join(row.name for rows in generator.ROWS.values() for row in rows)
    endings = ("_loss", "_surrogate", "_advantages", "_weights")
    losses = [name for name in kdloss.__all__ if name.endswith(endings) or name.startswith("kl_k")]
    assert len(losses) >= 18  # the name endings still match
    assert [name for name in losses if f"`{name}`" not in names] == []


@pytest.mark.parametrize(("page", "outputs"), [("gradients.md", 4), ("joint-mode.md", 1)])
def test_the_printed_output_is_what_the_blocks_print(page, outputs):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, flags=re.DOTALL)
    assert sum(bool(printed) for _, printed in blocks) == outputs
    names: dict[str, Any] = {}
    for code, printed in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, names)
        assert rounding_hidden(output.getvalue()) == rounding_hidden(printed)


def rounding_hidden(text: str) -> str:
    """Replaces residuals of rounding, which differ from machine to machine."""
    return re.sub(r"\b\de-1[4-9]\b", "0e+00", text)
