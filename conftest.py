"""What every test run shares: one thread, hypothesis profile, `gpu` marker, and the documents' code blocks as tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = Path(__file__).parent

# Tensors here are tiny and xdist already fills the cores; one thread also fixes the order of every sum.
torch.set_num_threads(1)

# In CI the same examples run every time; elsewhere each run looks at new ones, and a failure is kept and replayed.
hypothesis.settings.register_profile("kdloss", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("kdloss")

_collect_document = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The `python` blocks of README.md and docs/, but not of docs/examples/; blocks of one document share names."""
    parts = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if parts == ("README.md",) or (parts[:1] == ("docs",) and parts[:2] != ("docs", "examples")):
        return _collect_document(file_path, parent)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no GPU."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
