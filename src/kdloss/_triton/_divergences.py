"""Launches of the kernels of `_divergence_kernels.py`: the divergence of rows of logits, and its gradient.

If rows are few, each is split between at most `_launch.SPLITS` programs, so that any number of rows fills a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._divergence_kernels import (
    divergence_gradient_kernel,
    mixture_kernel,
    pair_merge_kernel,
    pair_sum_kernel,
    state_kernel,
)
from ._row_math import LogitTransform

KLS = ("forward_kl", "reverse_kl")

# Chosen by arithmetic, not measured: each of 256 threads holds 16 logits of either side; 8 in the mixture and in the
# gradient, which are longer (with 16, one form of the mixture takes 125 registers). Half as many in state and mixture
# if there are biases or softcaps: ptxas spilled one form.
_TILE, _MIXTURE, _BLOCK = 4096, 2048, 2048


class Pair(NamedTuple):
    """Two sets of logits, and how they are compared."""

    kind: str
    share: float  # in the mixture: the student's for the skewed reverse KL, the teacher's for the others
    x: Tensor  # (R, V) of the student, with unit column stride; V is the vocabulary or more
    y: Tensor  # of the teacher, likewise
    student: LogitTransform
    teacher: LogitTransform
    temperature: float
    row_temperature: Tensor | None  # (R,) contiguous
    vocab_size: int

    @property
    def _inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.y, self.student.bias, self.teacher.bias, self.row_temperature

    @property
    def _numbers(self) -> tuple[float | None, ...]:
        return self.temperature, *self.student.numbers, *self.teacher.numbers

    @property
    def _width(self) -> int:
        """Logits in a cell: 16 bytes of the wider side."""
        return 16 // max(self.x.element_size(), self.y.element_size())

    def _block(self, most: int) -> int:
        sides = self.student, self.teacher
        return most if all(side.bias is None and side.softcap is None for side in sides) else most // 2

    def _shifted(self, leader: Tensor, *rows: Tensor) -> bool:
        """Whether rows, or a bias, begin elsewhere between multiples of a cell than the rows of `leader`."""
        biases = [x.expand(leader.shape[0], -1) for x in (self.student.bias, self.teacher.bias) if x is not None]
        return _launch.any_shifted(leader, self._width, *rows, *biases)

    @property
    def _shares(self) -> tuple[float, float, float, float]:
        """The shares of teacher and student, and their logs."""
        share, rest = self.share, 1 - self.share
        log, log_rest = math.log(share), math.log1p(-share)
        return (rest, share, log_rest, log) if self.kind == "skewed_reverse_kl" else (share, rest, log, log_rest)

    def value_(self, out: Tensor, known: Tensor) -> None:
        """Write the divergence to `out` (R,), and the five values per row that the gradient needs to `known` (5, R)."""
        self._state_(out, known)
        if self.kind not in KLS:
            self._mixture_(out, known, part=False)

    def slice_state(self) -> Tensor:
        """For logits that are a slice of the rows, (R, 5): m and -log s of both sides, and a KL's value in the slice.

        The same as `slice_state` of `_divergences/rows.py`, except that m is before the temperature.
        """
        rows = self.x.shape[0]
        value = torch.zeros(rows, dtype=torch.float32, device=self.x.device)
        known = value.new_empty(5, rows)
        self._state_(value, known)
        m_q, log_s_q, m_p, log_s_p, _ = known
        # where log s is NaN there is no maximum
        peaks = (m_q.masked_fill(log_s_q.isnan(), math.nan), -log_s_q, m_p.masked_fill(log_s_p.isnan(), math.nan))
        return torch.stack([*peaks, -log_s_p, value], -1)

    def slice_terms(self, numbers: Tensor) -> Tensor:
        """The slice's terms (R, 2) of the value and of the sum of G, from m and log s (R, 4) of whole rows."""
        rows = numbers.shape[0]
        value, known = numbers.new_empty(rows), numbers.new_empty(5, rows)
        known[:4] = numbers.T
        self._mixture_(value, known, part=True)
        return torch.stack([value, known[4]], -1)

    def _state_(self, out: Tensor, known: Tensor) -> None:
        rows = out.shape[0]
        if rows == 0:
            return
        width = self._width
        launch = _launch.pairs(rows, self.vocab_size, self._block(_TILE))
        parts = out.new_empty(5, rows, launch.splits) if launch.splits > 1 else None
        with _launch.on_device(out):
            state_kernel[(rows * launch.splits,)](
                *self._inputs,
                out,
                known[4],
                known,
                parts,
                *self._numbers,
                self.vocab_size,
                *self._strides(known),
                rows * launch.splits,
                launch.blocks,
                launch.splits,
                self.kind,
                launch.block // width,
                width,
                self._shifted(self.x, self.y),
                num_warps=launch.warps,
            )
            if parts is not None:
                pair_merge_kernel[(rows,)](
                    self.row_temperature,
                    out,
                    known[4],
                    known,
                    parts,
                    self.temperature,
                    known.stride(0),
                    rows * launch.splits,
                    launch.splits,
                    self.kind,
                    _launch.SPLITS,
                    num_warps=1,
                )

    def _mixture_(self, out: Tensor, known: Tensor, *, part: bool) -> None:
        rows = out.shape[0]
        if rows == 0:
            return
        launch = _launch.pairs(rows, self.vocab_size, self._block(_MIXTURE))
        parts = out.new_empty(2, rows, launch.splits) if launch.splits > 1 else None
        with _launch.on_device(out):
            mixture_kernel[(rows * launch.splits,)](
                *self._inputs,
                out,
                known[4],
                known,
                parts,
                *self._numbers,
                *self._shares,
                self.vocab_size,
                *self._strides(known),
                rows * launch.splits,
                launch.blocks,
                launch.splits,
                self.kind,
                launch.block // self._width,
                self._width,
                self._shifted(self.x, self.y),
                1 if part else 0,
                num_warps=launch.warps,
            )
            if parts is not None:
                pair_sum_kernel[(rows,)](
                    out,
                    known[4],
                    parts,
                    *self._shares[:2],
                    rows * launch.splits,
                    launch.splits,
                    self.kind,
                    1 if part else 0,
                    _launch.SPLITS,
                    num_warps=1,
                )

    def _strides(self, known: Tensor) -> tuple[int, int, int]:
        return known.stride(0), self.x.stride(0), self.y.stride(0)

    def gradient_(self, out: Tensor, known: Tensor, factor: Tensor) -> Tensor:
        """`factor` (R,) times the gradient of x into `out`, which may be x; 0 in columns past the vocabulary.

        If rows of `out` lie further apart than its width, the gap between them is 0, too, up to a multiple of 16.
        """
        rows, columns = out.shape
        width = self._width
        if rows:
            launch = _launch.pairs_backward(rows, columns, _BLOCK)
            with _launch.on_device(out):
                divergence_gradient_kernel[rows, launch.splits](
                    *self._inputs,
                    factor,
                    known[4],
                    known,
                    out,
                    *self._numbers,
                    *self._shares,
                    self.vocab_size,
                    _launch.writable(out),
                    *self._strides(known),
                    out.stride(0),
                    launch.blocks,
                    self.kind,
                    launch.block // width,
                    width,
                    self._shifted(out, self.x, self.y),
                    num_warps=launch.warps,
                )
        return out
