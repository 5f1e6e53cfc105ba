"""Holds the generated parts of docs/gradients.md and docs/wrong-gradients.md to the code."""

from __future__ import annotations

import pytest

import generate_gradient_table
import generate_wrong_gradients
import kdloss


@pytest.mark.parametrize("generator", [generate_gradient_table, generate_wrong_gradients], ids=lambda x: x.PAGE.stem)
def test_the_committed_page_is_what_the_code_gives(generator):
    page = generator.PAGE.read_text(encoding="utf-8")
    assert generator.updated(page) == page, f"run: python docs/{generator.__name__}.py"


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="not enough values"):
        generate_gradient_table.between_marks("<!-- generated: end -->\n", "generate_gradient_table.py", "")


def test_every_loss_of_the_library_has_a_row():
    names = " ".join(row.name for rows in generate_gradient_table.ROWS.values() for row in rows)
    endings = ("_loss", "_surrogate", "_advantages", "_weights")
    losses = [name for name in kdloss.__all__ if name.endswith(endings) or name.startswith("kl_k")]
    assert len(losses) >= 18  # the name endings still match
    assert [name for name in losses if f"`{name}`" not in names] == []
