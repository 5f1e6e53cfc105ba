"""Reads the values that trainers' own loss functions gave; tests/data/generate made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def cases(trainer: str) -> list[Any]:
    stored = json.loads((DATA / f"{trainer}.json").read_text(encoding="utf-8"))
    return [pytest.param(case, id=case["name"]) for case in stored["cases"]]


def close(x: Tensor, expected: Any, *, rtol: float) -> None:
    """Compares entries on the scale of the largest, because those near zero are differences."""
    expected = torch.as_tensor(expected, dtype=x.dtype)
    torch.testing.assert_close(x.detach(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
