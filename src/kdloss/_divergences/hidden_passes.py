"""How a divergence from hidden states computes one chunk of trained rows, by torch or by the Triton kernels.

    chunks.chunk(rows)                      the logits of student and teacher
    chunk.divergence(upstream, gradient)    the values (n,), and dx, the gradient of hidden @ weight.T + bias
    chunk.slice_values()                    for a slice of the vocabulary: what the other ranks need from it

Chunks share buffers: the logits and the gradient of a chunk are valid until the next chunk is computed. dx may
overwrite the logits, so `divergence` is called once per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.head import (
    Head,
    HeadGradient,
    KernelHeadGradient,
    TorchHeadGradient,
    head_product_,
    room_for_gradient,
)
from kdloss._softmax.rows import Scaling, scale_

from .rows import Form, Scratch, block_divergence, slice_gradient, slice_state, slice_terms

if TYPE_CHECKING:
    from kdloss._triton._divergences import Pair


# Logits of a chunk, per side. On a CPU 64 MiB of float32: enough rows for a matrix product to run at full speed.
_CHUNK_ENTRIES = {"cpu": 2**24, "gpu": 2**27}


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many rows a chunk has, at most."""
    return max(16, _CHUNK_ENTRIES["cpu" if device.type == "cpu" else "gpu"] // vocab_size)


class Options(NamedTuple):
    """What is computed from the logits of both sides."""

    form: Form
    temperature: float
    row_temperature: Tensor | None  # (T,)
    vocab_size: int  # of the slice, if the heads are one
    # if the heads are a slice of the vocabulary, and only once they are known: fields of `WholeDivergence`
    row_state: Tensor | None = None  # (T, 2), for the kernels (T, 4)
    slope: Tensor | None = None  # (T,)


class PairChunk(Protocol):
    """Rows whose logits have been computed for both sides."""

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        """(values (n,), or None with an upstream gradient (n,); dx times `upstream`, or times 1, if asked for)."""

    def slice_values(self) -> Tensor:
        """`slice_state` (n, 5) or, if `row_state` is known, `slice_terms` (n, 2)."""


class PairChunks(Protocol):
    """The trained rows, one chunk of at most `size` rows at a time."""

    def chunk(self, rows: Tensor) -> PairChunk: ...


class TorchPairChunks:
    """By torch. Logits are exact: half-precision operands are widened, the head one slice at a time."""

    def __init__(self, student: Head, teacher: Head, options: Options, size: int) -> None:
        self._heads = [head.without_padding(options.vocab_size) for head in (student, teacher)]
        self._options, self._dtype = options, dtype_of(student, teacher)
        self._room = student.hidden.new_empty(2, size, options.vocab_size, dtype=self._dtype)

    def chunk(self, rows: Tensor) -> TorchPairChunk:
        y, teacher_y = self._room[:, : rows.shape[0]].unbind(0)
        hidden = [head.hidden.index_select(0, rows) for head in self._heads]
        for out, x, head in zip((y, teacher_y), hidden, self._heads, strict=True):
            head_product_(out, x.to(self._dtype), head.weight, head.bias)
            Scaling(head.softcap, head.logit_scale, 1.0).apply_(out)
        tau = self._options.row_temperature
        taus = None if tau is None else tau.index_select(0, rows)
        return TorchPairChunk(rows, y, teacher_y, hidden[0], self._heads[0], taus, self._options)


class TorchPairChunk(NamedTuple):
    """Rows whose logits torch has computed."""

    rows: Tensor  # (n,) of the T
    y: Tensor  # (n, V) logits of the student
    teacher_y: Tensor  # (n, V) of the teacher
    hidden: Tensor  # (n, D) of the student, in their dtype
    student: Head
    taus: Tensor | None  # (n,)
    options: Options

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        """Blocks of rows are computed in a smaller scratch; dx overwrites the logits of the student."""
        form, temperature, _, _, shares, slope = self.options
        values, dx = [], room_for_gradient(self.y, self.student)
        for part, logits, taus in self._blocks():
            if shares is None or slope is None:
                found = block_divergence(form, *logits, **taus, value=upstream is None, gradient=gradient)
                dz = found.gradient
                if found.value is not None:
                    values.append(found.value)
            else:
                places = self.rows[part]
                dz = slice_gradient(form, *logits, **taus, shares=shares[places], slope=slope[places])
            if not gradient:
                continue
            assert dz is not None
            y = self.y[part]
            factor = torch.ones_like(y[:, :1]) if upstream is None else upstream[part].unsqueeze(-1)
            tau = temperature if self.taus is None else self.taus[part].unsqueeze(-1).to(y.dtype)
            dz = scale_(dz, factor * self.student.logit_scale, tau)
            c = self.student.softcap
            if c is not None:
                dz.mul_(y.div_(c).square_().neg_().add_(1))
            dx[part] = dz
        value = None if upstream is not None else torch.cat(values)
        if not gradient:
            return value, None
        return value, TorchHeadGradient(dx, self.hidden.to(dx.dtype), self.student.weight)

    def slice_values(self) -> Tensor:
        form, _, _, _, shares, _ = self.options
        values = []
        for part, logits, taus in self._blocks():
            if shares is None:
                values.append(slice_state(form, *logits, **taus))
            else:
                values.append(slice_terms(form, *logits, **taus, shares=shares[self.rows[part]]))
        return torch.cat(values)

    def _blocks(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Scratch], dict[str, Any]]]:
        """Yield (rows of the chunk, (student's logits, teacher's, scratch), temperatures) of each block."""
        total, vocab_size = self.y.shape
        scratch = Scratch(total, vocab_size, dtype=self.y.dtype, device=self.y.device)
        for part in scratch.blocks(total):
            taus = None if self.taus is None else self.taus[part]
            logits = (self.y[part], self.teacher_y[part], scratch)
            yield part, logits, {"temperature": self.options.temperature, "row_temperature": taus}


class KernelPairChunks:
    """By the Triton kernels. Products have half-precision operands if a side's hidden states and head share the dtype.

    dx is rounded to bfloat16 for bfloat16 products. For float16, dx and its products stay float32: a scaled loss times
    a log-ratio of some tens exceeds 65504, and small masses fall below 6e-8. The gradient of a log-prob is multiplied
    by a power of two that brings it into range (`_triton/_linear.py`); that of a divergence has no bound known before.
    """

    def __init__(self, student: Head, teacher: Head, options: Options, size: int) -> None:
        from kdloss._triton import _launch

        self._heads = [head.without_padding(options.vocab_size) for head in (student, teacher)]
        self._options = options
        shape, device = (size, options.vocab_size), student.hidden.device
        self._room = _launch.room(2, *shape, dtype=torch.float32, device=device)
        rounds = student.hidden.dtype == student.weight.dtype == torch.bfloat16
        self._room_for_gradient = _launch.room(*shape, dtype=torch.bfloat16, device=device) if rounds else self._room[0]

    def chunk(self, rows: Tensor) -> KernelPairChunk:
        from kdloss._triton._divergences import Pair
        from kdloss._triton._row_math import LogitTransform

        x, y = self._room[:, : rows.shape[0]].unbind(0)
        student, teacher = self._heads
        hidden = product_of_rows_(x, student, rows)
        product_of_rows_(y, teacher, rows)
        sides = [LogitTransform.of(head.bias, head.logit_scale, head.softcap) for head in self._heads]
        form, temperature, tau, vocab_size, *_ = self._options
        taus = None if tau is None else tau.index_select(0, rows)
        pair = Pair(*form, x, y, sides[0], sides[1], temperature, taus, vocab_size)
        out = self._room_for_gradient[: rows.shape[0]]
        return KernelPairChunk(rows, pair, out, hidden, student.weight, self._options)


class KernelPairChunk(NamedTuple):
    """Rows whose logits the kernels have computed."""

    rows: Tensor  # (n,) of the T
    pair: Pair
    out: Tensor  # (n, V), room for dx
    hidden: Tensor  # (n, D) of the student, in the dtype of the product
    weight: Tensor  # (V, D)
    options: Options

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        row_state, slope = self.options.row_state, self.options.slope
        value = self.pair.x.new_empty(self.rows.shape[0])
        known = value.new_empty(5, value.shape[0])
        if row_state is None or slope is None:
            self.pair.value_(value, known)
        else:
            known[:4], known[4] = row_state[self.rows].T, slope[self.rows]
        found = None if upstream is not None else value
        if not gradient:
            return found, None
        factor = torch.ones_like(value) if upstream is None else upstream.contiguous()
        return found, KernelHeadGradient(self.pair.gradient_(self.out, known, factor), self.hidden, self.weight)

    def slice_values(self) -> Tensor:
        row_state = self.options.row_state
        return self.pair.slice_state() if row_state is None else self.pair.slice_terms(row_state[self.rows])


def product_of_rows_(out: Tensor, head: Head, rows: Tensor) -> Tensor:
    """`hidden @ weight.T` of some rows into `out`; returns these hidden states in the dtype of the product."""
    from kdloss._triton import _products

    hidden = head.hidden.index_select(0, rows).to(_products.product_dtype(head.hidden, head.weight))
    if hidden.dtype == head.weight.dtype:
        _products.product_(out, hidden, head.weight.T)
    else:
        head_product_(out, hidden, head.weight, None)
    return hidden


def dtype_of(student: Head, teacher: Head) -> torch.dtype:
    """The dtype of values and sums."""
    return _checks.promoted_dtype(*student.tensors(), *teacher.tensors())
