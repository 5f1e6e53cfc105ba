"""Launches of the kernels of `_divergence_kernels.py`: the divergence of rows of logits, and its gradient.

Neither splits a row between programs, so fewer than some hundred rows leave a GPU partly idle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
from torch import Tensor

from . import _launch
from ._divergence_kernels import divergence_gradient_kernel, mixture_kernel, state_kernel

KLS = ("forward_kl", "reverse_kl")

# Chosen by arithmetic, not measured: 256 threads hold 16 logits of either side each, or 8 where there are two sums.
_TILE, _BLOCK, _SPAN, _WARPS = 4096, 2048, 8192, 8


class Side(NamedTuple):
    """Logits are softcap(logit_scale (x + bias))."""

    x: Tensor  # (R, V) of unit column stride, V at least the vocabulary
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, x: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None) -> Side:
        """As the kernels read them: logits of another column stride, and such a bias, are copied."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        return cls(x, None if bias is None else bias.contiguous(), logit_scale, softcap)

    @property
    def numbers(self) -> tuple[float | None, float | None]:
        return None if self.logit_scale == 1 else self.logit_scale, self.softcap

    def columns(self, vocab_size: int) -> int:
        """That may be read, whatever they hold."""
        return _launch.readable(self.x, vocab_size)


class Pair(NamedTuple):
    """What is compared, and how."""

    kind: str
    omega: float  # the weight of the teacher in the mixture
    student: Side
    teacher: Side
    temperature: float
    row_temperature: Tensor | None  # (R,) contiguous
    vocab_size: int

    @property
    def _inputs(self) -> tuple[Tensor | None, ...]:
        return self.student.x, self.teacher.x, self.student.bias, self.teacher.bias, self.row_temperature

    @property
    def _numbers(self) -> tuple[float | None, ...]:
        return self.temperature, *self.student.numbers, *self.teacher.numbers

    @property
    def _columns(self) -> tuple[int, int, int]:
        return self.vocab_size, self.student.columns(self.vocab_size), self.teacher.columns(self.vocab_size)

    @property
    def _shares(self) -> tuple[float, float, float]:
        return self.omega, math.log(self.omega), math.log1p(-self.omega)

    def value_(self, out: Tensor, known: Tensor) -> None:
        """The divergence into `out` (R,), and what the gradient needs to know of every row into `known` (5, R)."""
        rows = out.shape[0]
        if rows == 0:
            return
        strides = known.stride(0), self.student.x.stride(0), self.teacher.x.stride(0)
        size, *bounds = self._columns
        sides = zip((self.student.x, self.teacher.x), bounds, strict=True)
        aligned = all(_launch.aligned(x, bound) for x, bound in sides)
        width = 16 // max(self.student.x.element_size(), self.teacher.x.element_size())
        with _launch.on_device(out):
            state_kernel[(rows,)](
                *self._inputs,
                out,
                known[4],
                known,
                *self._numbers,
                size,
                *bounds,
                *strides,
                self.kind,
                _TILE // width,
                width,
                aligned,
                num_warps=_WARPS,
            )
            if self.kind not in KLS:
                mixture_kernel[(rows,)](
                    *self._inputs,
                    out,
                    known[4],
                    known,
                    *self._numbers,
                    *self._shares,
                    size,
                    *bounds,
                    *strides,
                    self.kind,
                    _BLOCK,
                    num_warps=_WARPS,
                )

    def gradient_(self, out: Tensor, known: Tensor, factor: Tensor) -> Tensor:
        """`factor` (R,) times the gradient of x into `out`, which may be x; 0 in columns past the vocabulary.

        Where rows of `out` lie further apart than it is wide, so is what is between them, up to a multiple of 16.
        """
        rows, columns = out.shape
        if rows:
            with _launch.on_device(out):
                divergence_gradient_kernel[rows, triton.cdiv(columns, _SPAN)](
                    *self._inputs,
                    factor,
                    known[4],
                    known,
                    out,
                    *self._numbers,
                    *self._shares,
                    *self._columns,
                    _launch.writable(out),
                    known.stride(0),
                    self.student.x.stride(0),
                    self.teacher.x.stride(0),
                    out.stride(0),
                    self.kind,
                    _SPAN,
                    _BLOCK,
                    num_warps=_WARPS,
                )
        return out
