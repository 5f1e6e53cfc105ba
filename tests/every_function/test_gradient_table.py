"""Holds the generated parts of docs/gradients.md and docs/wrong-gradients.md to the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import kdloss

DOCS = Path(__file__).parents[2] / "docs"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return loaded("generate_gradient_table")


def test_the_committed_page_of_wrong_gradients_is_what_the_code_gives():
    page = (DOCS / "wrong-gradients.md").read_text(encoding="utf-8")
    updated = loaded("generate_wrong_gradients").updated(page)
    assert updated == page, "run: python docs/generate_wrong_gradients.py"


def test_the_committed_table_is_what_the_code_gives(generator):
    page = (DOCS / "gradients.md").read_text(encoding="utf-8")
    assert generator.updated(page) == page, "run: python docs/generate_gradient_table.py"


def test_every_loss_of_the_library_has_a_row(generator):
    names = " ".join(row.name for rows in generator.ROWS.values() for row in rows)
    endings = ("_loss", "_surrogate", "_advantages", "_weights")
    losses = [name for name in kdloss.__all__ if name.endswith(endings) or name.startswith("kl_k")]
    assert len(losses) >= 18  # the name endings still match
    assert [name for name in losses if f"`{name}`" not in names] == []
