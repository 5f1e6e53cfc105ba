"""Holds scale-out: whatever is cut across ranks gives the numbers and gradients of one process."""

from __future__ import annotations

import importlib

import pytest

from scale_out.ranks import cases, run

MODULES = [
    "scale_out.cases_vocabulary",
    "scale_out.cases_divergences",
    "scale_out.cases_context",
    "scale_out.cases_models",
    "scale_out.cases_trainers",
    "scale_out.cases_plan",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), MODULES)


@pytest.mark.parametrize("case", [name for module in MODULES for name, *_ in cases(importlib.import_module(module))])
def test_like_one_process(outcomes, case):
    assert outcomes[case] == "", outcomes[case]
