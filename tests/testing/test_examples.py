"""Holds the docstring examples of classes and strategies; those of functions are run by `test_docstrings.py`."""

from __future__ import annotations

import doctest

import pytest

from kdloss.testing import _sequence_tree, strategies
from kdloss.testing._audit import compare, report


@pytest.mark.parametrize("module", [_sequence_tree, compare, report, strategies])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 5
    assert result.failed == 0
