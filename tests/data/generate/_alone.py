"""Running one loss file of a trainer that is not installed: packages without their `__init__`, and empty modules."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Anything:
    """Stands for whatever a file imports for its annotations, decorators and base classes."""

    def __class_getitem__(cls, _: object) -> type:
        return cls


class _Empty(types.ModuleType):
    """A package in which every name is there and nothing is in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


def enter(checkout: Path, *packages: str) -> None:
    """Packages of a checkout whose own `__init__` is not run."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = module


def empty(*names: str, **contents: Any) -> None:
    """Modules without content, but for what is given."""
    for name in names:
        module = _Empty(name)
        module.__dict__.update(contents)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(importlib.import_module(parent), child, module)


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal."""
    return torch.randn(*shape, generator=generator, dtype=dtype)


def listed(value: Any) -> Any:
    """Tensors as lists, in dicts and lists of whatever depth."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {name: listed(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [listed(x) for x in value]
    return value


def write(trainer: str, source: str, cases: list[dict[str, Any]]) -> None:
    """To `tests/data/<trainer>.json`."""
    path = Path(__file__).parents[1] / f"{trainer}.json"
    rows = ",\n".join(json.dumps(listed(case)) for case in cases)
    path.write_text(f'{{"source": {json.dumps(source)}, "cases": [\n{rows}\n]}}\n', encoding="utf-8")
