"""Holds the generated table of docs/gradients.md to the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

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
