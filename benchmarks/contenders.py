"""A contender is a named function; a variant is what it is called with; a run binds the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .truth import Truth

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """An implementation in the run. `function(*arguments)` gives a tuple of outputs to differentiate."""

    name: str
    function: Function
    ours: bool = False
    variant: str = ""  # which of the problem's inputs it gets
    compiled: bool = False
    overwrites: bool = False  # writes into its first argument, which is therefore cloned before each call, untimed
    scale: float = 1.0  # its time counts this many times: a gather of fewer tokens than it stands for
    work: float = 1.0  # the share of the case's floor that is its own; 0: none is known
    units: float = 3.0  # memory that it is expected to need, in units of the logits: decides whether it is tried

    def build(self) -> Function:
        return torch.compile(self.function, dynamic=False) if self.compiled else self.function


@dataclass(frozen=True)
class Variant:
    """Inputs of a path, what is differentiated by what, and the truth to hold the results against."""

    arguments: tuple[Any, ...]
    leaves: tuple[Tensor, ...]  # among the arguments
    upstream: tuple[Tensor, ...]  # one an output
    truth: Truth | None = None


Problem = dict[str, Variant]


@dataclass(frozen=True)
class Run:
    """A contender with its inputs, ready to be called."""

    contender: Contender
    function: Function
    variant: Variant

    def fresh_arguments(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Arguments and leaves of one call."""
        arguments, leaves = self.variant.arguments, self.variant.leaves
        if not self.contender.overwrites:
            return arguments, leaves
        written = arguments[0].detach().clone().requires_grad_()
        return (written, *arguments[1:]), tuple(written if x is arguments[0] else x for x in leaves)

    def forward(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return self.function(*arguments)

    def backward(self, outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        upstream = tuple(g.to(out.dtype) for g, out in zip(self.variant.upstream, outputs, strict=True))
        return torch.autograd.grad(outputs, leaves, upstream)
