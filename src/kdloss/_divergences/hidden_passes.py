"""What a divergence from hidden states does with one chunk of trained rows, by torch's operations and by kernels.

    load(rows)                    the logits of both sides
    divergence(upstream)          the values, unless they are not needed beside an upstream gradient; and dx
    hidden_gradient()             dx @ weight
    into_weight_(total)           total += dx.T @ hidden
    into_bias_(total)             total += sum dx
    slice_numbers()               what a slice of the vocabulary tells the others, in place of the divergence

in this order, once a chunk; dx is the gradient of hidden @ weight.T + bias of the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.head import Head, head_product_, times_head
from kdloss._softmax.rows import Scaling, scaled

from .rows import Form, Scratch, block, slice_gradient, slice_state, slice_terms


class Options(NamedTuple):
    """What is asked of both sides."""

    form: Form
    temperature: float
    vocab_size: int  # of the slice, where the heads are one
    shares: Tensor | None = None  # (T, 2), as in `slice_gradient`; for the kernels (T, 4), the state of whole rows
    slope: Tensor | None = None  # (T,)


class Pass(Protocol):
    """One chunk after another."""

    def load(self, rows: Tensor) -> None: ...

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> Tensor | None: ...

    def hidden_gradient(self) -> Tensor: ...

    def into_weight_(self, total: Tensor) -> None: ...

    def into_bias_(self, total: Tensor) -> None: ...

    def slice_numbers(self) -> Tensor: ...


class TorchPass:
    """In float32, or float64; half-precision heads are widened a slice at a time."""

    def __init__(
        self,
        student: Head,
        teacher: Head,
        row_temperature: Tensor | None,  # (T,)
        options: Options,
        size: int,  # rows of a chunk, at most
    ) -> None:
        self._student, self._teacher, self._options = student, teacher, options
        self._row_temperature = row_temperature
        self._dtype = dtype_of(student, teacher)
        device = student.hidden.device
        self._room = torch.empty(2, size, options.vocab_size, dtype=self._dtype, device=device)

    def load(self, rows: Tensor) -> None:
        self._rows = rows
        self._hidden = self._student.hidden.index_select(0, rows).to(self._dtype)
        self._y, self._teacher_y = self._room[:, : rows.shape[0]].unbind(0)
        self._logits(self._hidden, self._student, out=self._y)
        hidden = self._teacher.hidden.index_select(0, rows).to(self._dtype)
        self._logits(hidden, self._teacher, out=self._teacher_y)
        self._taus = None if self._row_temperature is None else self._row_temperature.index_select(0, rows)

    def _logits(self, hidden: Tensor, head: Head, *, out: Tensor) -> None:
        """`softcap(logit_scale * (hidden @ weight.T + bias))`, over the columns of `out`."""
        vocab_size = self._options.vocab_size
        head_product_(out, hidden, head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size])
        Scaling(head.softcap, head.logit_scale, 1.0).apply_(out)

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> Tensor | None:
        """In a smaller scratch; dx takes the place of the logits."""
        form, temperature, _, shares, slope = self._options
        values = []
        for rows, logits, taus in self._blocks():
            if shares is None or slope is None:
                found = block(form, *logits, **taus, value=upstream is None, gradient=gradient)
                dz = found.gradient
                if found.value is not None:
                    values.append(found.value)
            else:
                places = self._rows[rows]
                dz = slice_gradient(form, *logits, **taus, shares=shares[places], slope=slope[places])
            if not gradient:
                continue
            assert dz is not None
            y = self._y[rows]
            factor = torch.ones_like(y[:, :1]) if upstream is None else upstream[rows].unsqueeze(-1)
            tau = temperature if self._taus is None else self._taus[rows].unsqueeze(-1).to(self._dtype)
            dz = scaled(dz, factor * self._student.logit_scale, tau)
            c = self._student.softcap
            if c is None:
                y.copy_(dz)
            else:
                y.div_(c).square_().neg_().add_(1).mul_(dz)
        return None if upstream is not None else torch.cat(values)

    def slice_numbers(self) -> Tensor:
        """`slice_state` of the chunk, or, where the shares are known, `slice_terms`."""
        form, _, _, shares, _ = self._options
        numbers = []
        for rows, logits, taus in self._blocks():
            if shares is None:
                numbers.append(slice_state(form, *logits, **taus))
            else:
                numbers.append(slice_terms(form, *logits, **taus, shares=shares[self._rows[rows]]))
        return torch.cat(numbers)

    def _blocks(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Scratch], dict[str, Any]]]:
        """(rows of the chunk, their logits and a scratch, their temperatures)."""
        total = self._y.shape[0]
        scratch = Scratch(total, self._options.vocab_size, dtype=self._dtype, device=self._y.device)
        for rows in scratch.blocks(total):
            taus = None if self._taus is None else self._taus[rows]
            logits = (self._y[rows], self._teacher_y[rows], scratch)
            yield rows, logits, {"temperature": self._options.temperature, "row_temperature": taus}

    def hidden_gradient(self) -> Tensor:
        return times_head(self._y, self._student.weight[: self._options.vocab_size])

    def into_weight_(self, total: Tensor) -> None:
        total.addmm_(self._y.T, self._hidden)

    def into_bias_(self, total: Tensor) -> None:
        total += self._y.sum(0)


class KernelPass:
    """By the kernels of `_triton`, from products in half precision with float32 results where a side shares one.

    dx is rounded to bfloat16 for such products. For float16 it stays float32, and so do its products: a scaled loss and
    a log-ratio of some tens pass 65504, small masses fall below 6e-8, and unlike the gradient of a log-prob, which a
    power of two brings into range (`_triton/_linear.py`), that of a divergence has no bound that is known before.
    """

    def __init__(
        self, student: Head, teacher: Head, row_temperature: Tensor | None, options: Options, size: int
    ) -> None:
        from kdloss._triton import _launch

        self._student, self._teacher, self._options = student, teacher, options
        self._row_temperature = row_temperature
        shape, device = (size, options.vocab_size), student.hidden.device
        self._room = _launch.room(2, *shape, dtype=torch.float32, device=device)
        self._rounds = student.hidden.dtype == student.weight.dtype == torch.bfloat16
        separate = _launch.room(*shape, dtype=torch.bfloat16, device=device) if self._rounds else self._room[0]
        self._separate = separate

    def load(self, rows: Tensor) -> None:
        from kdloss._triton._divergences import Pair
        from kdloss._triton._row_math import LogitTransform

        self._rows, vocab_size = rows, self._options.vocab_size
        x, y = self._room[:, : rows.shape[0]].unbind(0)
        self._hidden = self._product_(x, self._student, rows)
        self._product_(y, self._teacher, rows)
        student, teacher = (
            LogitTransform.of(None if head.bias is None else head.bias[:vocab_size], head.logit_scale, head.softcap)
            for head in (self._student, self._teacher)
        )
        taus = None if self._row_temperature is None else self._row_temperature.index_select(0, rows)
        form, temperature, *_ = self._options
        self._pair = Pair(*form, x, y, student, teacher, temperature, taus, vocab_size)

    def _product_(self, out: Tensor, head: Head, rows: Tensor) -> Tensor:
        """`hidden @ weight.T` of some rows into `out`, and the rows as they were multiplied."""
        from kdloss._triton import _products

        hidden = head.hidden.index_select(0, rows).to(_products.product_dtype(head.hidden, head.weight))
        weight = head.weight[: self._options.vocab_size]
        if hidden.dtype == weight.dtype:
            _products.product_(out, hidden, weight.T)
        else:
            head_product_(out, hidden, weight, None)
        return hidden

    def divergence(self, upstream: Tensor | None, *, gradient: bool) -> Tensor | None:
        x, (*_, shares, slope) = self._pair.x, self._options
        value, known = x.new_empty(x.shape[0]), x.new_empty(5, x.shape[0])
        if shares is None or slope is None:
            self._pair.value_(value, known)
        else:
            known[:4], known[4] = shares[self._rows].T, slope[self._rows]
        if gradient:
            factor = torch.ones_like(value) if upstream is None else upstream.contiguous()
            self._dx = self._pair.gradient_(self._separate[: x.shape[0]], known, factor)
        return None if upstream is not None else value

    def slice_numbers(self) -> Tensor:
        shares = self._options.shares
        return self._pair.slice_state() if shares is None else self._pair.slice_terms(shares[self._rows])

    def hidden_gradient(self) -> Tensor:
        from kdloss._triton import _products

        weight = self._student.weight[: self._options.vocab_size]
        if not self._rounds:
            return times_head(self._dx, weight)
        out = torch.empty(self._dx.shape[0], weight.shape[1], dtype=torch.float32, device=weight.device)
        return _products.product_(out, self._dx, weight)

    def into_weight_(self, total: Tensor) -> None:
        from kdloss._triton import _products

        _products.add_product_(total, self._dx.T, self._hidden.to(self._dx.dtype))

    def into_bias_(self, total: Tensor) -> None:
        total += self._dx.sum(0, dtype=torch.float32)


def dtype_of(student: Head, teacher: Head) -> torch.dtype:
    """The dtype of values and sums."""
    return _checks.promoted_dtype(*student[:3], *teacher[:3])
