"""What a divergence from hidden states does with one chunk of trained rows, by torch's operations and by kernels.

    chunk(rows)                             the logits of both sides
    chunk.divergence(upstream, gradient)    the values (n,), and dx, the gradient of hidden @ weight.T + bias
    chunk.slice_values()                    what a slice of the vocabulary tells the other ranks, in their place

Chunks share buffers: one chunk's logits and gradient last until the next chunk is made. dx may overwrite the logits, so
`divergence` is called once per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.head import Head, HeadGradient, KernelHeadGradient, TorchHeadGradient, head_product_
from kdloss._softmax.rows import Scaling, scale_

from .rows import Form, Scratch, block, slice_gradient, slice_state, slice_terms

if TYPE_CHECKING:
    from kdloss._triton._divergences import Pair


class Options(NamedTuple):
    """What is asked of both sides."""

    form: Form
    temperature: float
    row_temperature: Tensor | None  # (T,)
    vocab_size: int  # of the slice, where the heads are one
    shares: Tensor | None = None  # (T, 2), as in `slice_gradient`; for the kernels (T, 4), the state of whole rows
    slope: Tensor | None = None  # (T,)


class Chunk(Protocol):
    """Rows whose logits have been computed, on both sides."""

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        """The values, but None beside an upstream gradient (n,); and, on request, dx times `upstream`, or times 1."""

    def slice_values(self) -> Tensor:
        """`slice_state` (n, 5); where the shares are known, `slice_terms` (n, 2)."""


class Chunks(Protocol):
    """The trained rows, a chunk at a time."""

    def chunk(self, rows: Tensor) -> Chunk: ...


class TorchChunks:
    """In float32, or float64; half-precision heads are widened a slice at a time."""

    def __init__(self, student: Head, teacher: Head, options: Options, size: int) -> None:  # at most `size` rows each
        self._heads = [head.without_padding(options.vocab_size) for head in (student, teacher)]
        self._options, self._dtype = options, dtype_of(student, teacher)
        self._room = student.hidden.new_empty(2, size, options.vocab_size, dtype=self._dtype)

    def chunk(self, rows: Tensor) -> TorchChunk:
        y, teacher_y = self._room[:, : rows.shape[0]].unbind(0)
        hidden = [head.hidden.index_select(0, rows).to(self._dtype) for head in self._heads]
        for out, x, head in zip((y, teacher_y), hidden, self._heads, strict=True):
            head_product_(out, x, head.weight, head.bias)
            Scaling(head.softcap, head.logit_scale, 1.0).apply_(out)
        tau = self._options.row_temperature
        taus = None if tau is None else tau.index_select(0, rows)
        return TorchChunk(rows, y, teacher_y, hidden[0], self._heads[0], taus, self._options)


class TorchChunk(NamedTuple):
    rows: Tensor  # (n,) of the stream
    y: Tensor  # (n, V) logits of the student
    teacher_y: Tensor  # (n, V) of the teacher
    hidden: Tensor  # (n, D) of the student
    student: Head
    taus: Tensor | None  # (n,)
    options: Options

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        """In a smaller scratch; dx takes the place of the logits."""
        form, temperature, _, _, shares, slope = self.options
        values = []
        for part, logits, taus in self._blocks():
            if shares is None or slope is None:
                found = block(form, *logits, **taus, value=upstream is None, gradient=gradient)
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
            if c is None:
                y.copy_(dz)
            else:
                y.div_(c).square_().neg_().add_(1).mul_(dz)
        value = None if upstream is not None else torch.cat(values)
        return value, TorchHeadGradient(self.y, self.hidden, self.student.weight) if gradient else None

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
        """(rows of the chunk, their logits and a scratch, their temperatures)."""
        total, vocab_size = self.y.shape
        scratch = Scratch(total, vocab_size, dtype=self.y.dtype, device=self.y.device)
        for part in scratch.blocks(total):
            taus = None if self.taus is None else self.taus[part]
            logits = (self.y[part], self.teacher_y[part], scratch)
            yield part, logits, {"temperature": self.options.temperature, "row_temperature": taus}


class KernelChunks:
    """By the kernels of `_triton`, from products in half precision with float32 results where a side shares one.

    dx is rounded to bfloat16 for such products. For float16 it stays float32, and so do its products: a scaled loss and
    a log-ratio of some tens pass 65504, small masses fall below 6e-8, and unlike the gradient of a log-prob, which a
    power of two brings into range (`_triton/_linear.py`), that of a divergence has no bound that is known before.
    """

    def __init__(self, student: Head, teacher: Head, options: Options, size: int) -> None:
        from kdloss._triton import _launch

        self._heads = [head.without_padding(options.vocab_size) for head in (student, teacher)]
        self._options = options
        shape, device = (size, options.vocab_size), student.hidden.device
        self._room = _launch.room(2, *shape, dtype=torch.float32, device=device)
        rounds = student.hidden.dtype == student.weight.dtype == torch.bfloat16
        self._room_for_gradient = _launch.room(*shape, dtype=torch.bfloat16, device=device) if rounds else self._room[0]

    def chunk(self, rows: Tensor) -> KernelChunk:
        from kdloss._triton._divergences import Pair
        from kdloss._triton._row_math import LogitTransform

        x, y = self._room[:, : rows.shape[0]].unbind(0)
        student, teacher = self._heads
        hidden = _product_(x, student, rows)
        _product_(y, teacher, rows)
        sides = [LogitTransform.of(head.bias, head.logit_scale, head.softcap) for head in self._heads]
        form, temperature, tau, vocab_size, *_ = self._options
        taus = None if tau is None else tau.index_select(0, rows)
        pair = Pair(*form, x, y, sides[0], sides[1], temperature, taus, vocab_size)
        out = self._room_for_gradient[: rows.shape[0]]
        return KernelChunk(rows, pair, out, hidden, student.weight, self._options)


class KernelChunk(NamedTuple):
    rows: Tensor  # (n,) of the stream
    pair: Pair
    out: Tensor  # (n, V), room for dx
    hidden: Tensor  # (n, D) of the student, as it was multiplied
    weight: Tensor  # (V, D)
    options: Options

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> tuple[Tensor | None, HeadGradient | None]:
        shares, slope = self.options.shares, self.options.slope
        value = self.pair.x.new_empty(self.rows.shape[0])
        known = value.new_empty(5, value.shape[0])
        if shares is None or slope is None:
            self.pair.value_(value, known)
        else:
            known[:4], known[4] = shares[self.rows].T, slope[self.rows]
        found = None if upstream is not None else value
        if not gradient:
            return found, None
        factor = torch.ones_like(value) if upstream is None else upstream.contiguous()
        return found, KernelHeadGradient(self.pair.gradient_(self.out, known, factor), self.hidden, self.weight)

    def slice_values(self) -> Tensor:
        shares = self.options.shares
        return self.pair.slice_state() if shares is None else self.pair.slice_terms(shares[self.rows])


def _product_(out: Tensor, head: Head, rows: Tensor) -> Tensor:
    """`hidden @ weight.T` of some rows into `out`, and the rows as they were multiplied."""
    from kdloss._triton import _products

    hidden = head.hidden.index_select(0, rows).to(_products.product_dtype(head.hidden, head.weight))
    if hidden.dtype == head.weight.dtype:
        _products.product_(out, hidden, head.weight.T)
    else:
        head_product_(out, hidden, head.weight, None)
    return hidden


def dtype_of(student: Head, teacher: Head) -> torch.dtype:
    """The dtype of values and sums."""
    return _checks.promoted_dtype(*student[:3], *teacher[:3])
