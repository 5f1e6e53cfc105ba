"""What `fused_linear_loss` does with one chunk of rows, on a CPU or by torch's operations, and by kernels.

    logprobs(rows)             the logits of some trained rows:  log-probs and entropies (n,)
    gradient(g, h)             of those logits, from the gradients of what `logprobs` gave, (n,) each
    into_hidden(out)           dh = dz @ w into out (n, D)
    into_weight_(total)        total (V, D) += dz.T @ h
    into_bias_(total)          total (V,) += sum_n dz

in this order, once a chunk. Labels that are ignored have log-prob and entropy 0.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed import VocabShard
from kdloss._softmax.head import Head, head_product_, times_head
from kdloss._softmax.rows import RowState, Scaling, Sums, Upstream, gradient_of
from kdloss._softmax.vocabulary import Softmax
from kdloss._softmax.whole_rows import rate_of, whole_rows


class Pass(Protocol):
    """One chunk after another."""

    def logprobs(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def gradient(self, g: Tensor, h: Tensor) -> None: ...

    def into_hidden(self, out: Tensor) -> None: ...

    def into_weight_(self, total: Tensor) -> None: ...

    def into_bias_(self, total: Tensor) -> None: ...


class TorchPass:
    """Full precision: half-precision operands are widened, the head a slice at a time."""

    def __init__(
        self,
        head: Head,  # without padding
        columns: Tensor,  # (T, 1) inside the vocabulary, or -100
        softmax: Softmax,
        size: int,  # rows of a chunk, at most
    ) -> None:
        hidden, weight, bias, softcap, logit_scale = head
        self._shard = softmax.shard
        self._hidden, self._weight, self._bias, self._columns = hidden, weight, bias, columns
        self._row_temperature = softmax.flat_temperature
        self._scaling = Scaling(softcap, logit_scale, softmax.temperature)
        dtype = _checks.promoted_dtype(hidden, weight, bias)
        self._buffers = [
            torch.empty(size, weight.shape[0], dtype=dtype, device=hidden.device)
            for _ in range(3 if softcap is None else 4)
        ]

    def logprobs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self._z, self._other, self._seeds, *self._separate = [x[: rows.shape[0]] for x in self._buffers]
        self._place = self._columns[rows]
        labelled = self._place >= 0
        self._x = self._hidden[rows].to(self._z.dtype).masked_fill_(~labelled, 0)
        self._part = self._scaling
        if self._row_temperature is not None:
            divisor = torch.where(labelled, self._row_temperature[rows].to(self._z.dtype)[:, None], 1)
            self._part = self._scaling._replace(temperature=divisor)
        self._part.apply_(head_product_(self._z, self._x, self._weight, self._bias))
        sums = Sums.empty(rows.shape[0], like=self._z, with_entropy=True)
        sums.read_(self._z, self._other, self._seeds)
        self._state = RowState.of(sums)
        local_size, shard = self._z.shape[1], self._shard
        self._here = self._place if shard is None else shard.columns(self._place, local_size)
        logp = self._state.logp(self._z.gather(-1, self._here.clamp(0, local_size - 1))).masked_fill(~labelled, 0)
        if shard is not None:
            self._state, logp = whole_rows(self._state, logp, self._place, shard)
        return logp.squeeze(-1), self._state.entropy().masked_fill(~labelled, 0).squeeze(-1)

    def gradient(self, g: Tensor, h: Tensor) -> None:
        dead = self._place < 0
        upstream = Upstream.of(
            self._state, self._here, g[:, None].masked_fill(dead, 0), h[:, None].masked_fill(dead, 0)
        ).part(0, self._z.shape[1])
        self._dz = self._separate[0] if self._separate else self._z
        gradient_of(self._z, upstream, out=self._dz, seeds=self._seeds.zero_(), scratch=self._other)
        self._part.backward_(self._dz, self._z)

    def into_hidden(self, out: Tensor) -> None:
        out.copy_(times_head(self._dz, self._weight))

    def into_weight_(self, total: Tensor) -> None:
        total.addmm_(self._dz.T, self._x)

    def into_bias_(self, total: Tensor) -> None:
        total += self._dz.sum(0)


class KernelPass:
    """By the kernels of `_triton`: in half precision where hidden states and head share one, float32 results."""

    def __init__(self, head: Head, columns: Tensor, softmax: Softmax, size: int) -> None:
        from kdloss._triton import _launch, _products
        from kdloss._triton._row_math import LogitTransform, State

        hidden, weight, shard = head.hidden, head.weight, softmax.shard
        self._hidden, self._weight = hidden, weight
        self._transform = LogitTransform.of(head.bias, head.logit_scale, head.softcap)
        self._shard, self._columns = shard, columns
        here = columns if shard is None else shard.columns(columns, weight.shape[0])
        self._state = State.empty(here, softmax.temperature, softmax.flat_temperature, with_entropy=True)
        self._logp, self._g = (torch.zeros(columns.shape, device=columns.device) for _ in range(2))
        self._entropy, self._h = (torch.zeros_like(self._state.peak) for _ in range(2))
        self._dtype = _products.product_dtype(hidden, weight)
        space = partial(_launch.room, size, weight.shape[0], device=hidden.device)
        self._room = space(dtype=torch.float32)
        # float32 gradients overwrite the logits
        self._separate = self._room if self._dtype == torch.float32 else space(dtype=self._dtype)
        self._unscaled: Tensor | None = None

    def logprobs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from kdloss._triton import _compaction, _launch, _linear, _products

        with _launch.on_device(rows):
            self._rows, self._x = rows, self._room[: rows.shape[0]]
            self._picked = _compaction.take(self._hidden, rows, self._state.columns, self._dtype)
            if self._dtype == self._weight.dtype:
                _products.product_(self._x, self._picked, self._weight.T)
            else:
                head_product_(self._x, self._picked, self._weight, None)
            _linear.fold_(
                self._logp, self._entropy, self._state, self._x, rows, self._transform, 0, first=True, last=True
            )
        if self._shard is None:
            return self._logp[rows].squeeze(-1), self._entropy[rows]
        return self._put_together(rows, self._shard)

    def _put_together(self, rows: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """The rows' states become those of whole rows, from which their log-probs and entropies are."""
        columns, (_, temperature, temperatures, *numbers) = self._columns[rows], self._state
        part = RowState(*(x[rows, None] for x in numbers if x is not None))
        rate = rate_of(temperature, None if temperatures is None else temperatures[rows], columns)
        whole, logp = whole_rows(part, self._logp[rows], columns, shard, rate)
        for mine, found in zip(numbers, whole, strict=True):
            assert mine is not None
            assert found is not None
            mine[rows] = found.squeeze(-1)
        return logp.squeeze(-1), whole.entropy().masked_fill(columns < 0, 0).squeeze(-1)

    def gradient(self, g: Tensor, h: Tensor) -> None:
        from kdloss._triton import _launch, _linear

        self._g[self._rows], self._h[self._rows] = g[:, None].float(), h.float()
        upstream = self._g, self._h
        with _launch.on_device(g):
            if self._dtype == torch.float16:
                size = self._weight.shape[0]
                factor = _linear.in_range(*upstream, self._state, self._rows, self._transform.logit_scale, size)
                self._unscaled, upstream = factor.reciprocal(), (self._g * factor, self._h * factor)
            self._dz = _linear.gradient_(
                self._separate[: len(g)], self._state, *upstream, self._x, None, self._rows, self._transform, 0
            )

    def into_hidden(self, out: Tensor) -> None:
        from kdloss._triton import _products

        if self._dtype == self._weight.dtype:
            _products.product_(out, self._dz, self._weight)
        else:
            out.copy_(times_head(self._dz, self._weight))
        if self._unscaled is not None:
            out *= self._unscaled

    def into_weight_(self, total: Tensor) -> None:
        from kdloss._triton import _products

        _products.add_product_(total, self._dz.T, self._picked, self._unscaled)

    def into_bias_(self, total: Tensor) -> None:
        found = self._dz.sum(0, dtype=torch.float32)
        total += found if self._unscaled is None else found * self._unscaled


def put_back(
    x: Tensor,  # (N, D)
    rows: Tensor,  # (N,), distinct
    tokens: int,
    dtype: torch.dtype,
    factor: Tensor,  # ()
    *,
    kernels: bool,
) -> Tensor:
    """x times `factor`, rounded once, at `rows` of zeros (T, D)."""
    if not kernels:
        scaled = (x * factor).to(dtype)
        return scaled.new_zeros(tokens, x.shape[1]).index_copy_(0, rows, scaled)
    from kdloss._triton import _compaction, _launch

    with _launch.on_device(x):
        return _compaction.put_back(x, rows, tokens, dtype, factor)
