"""How `fused_linear_loss` computes one chunk of rows, by torch or by the Triton kernels.

    chunks.chunk(rows)      the logits of some trained rows, and log-probs and entropies (n,) from them
    chunk.gradient(g, h)    dz of these logits, from the gradients g and h (n,) of log-probs and entropies

The `HeadGradient` that is returned (`_softmax/head.py`) carries dz on to hidden states, weight and bias.

Chunks share buffers: the logits and the gradient of a chunk are valid until the next chunk is computed. Where the label
is ignored, log-prob and entropy are 0.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import (
    Head,
    HeadGradient,
    KernelHeadGradient,
    TorchHeadGradient,
    head_product_,
    room_for_gradient,
)
from kdloss._softmax.rows import RowState, Scaling, Sums, Upstream, gradient_of
from kdloss._softmax.vocabulary import Softmax
from kdloss._softmax.whole_rows import rate_of, whole_rows


class Chunk(Protocol):
    """Rows whose logits have been computed."""

    @property
    def logp(self) -> Tensor: ...  # (n,)

    @property
    def entropy(self) -> Tensor: ...  # (n,)

    def gradient(self, g: Tensor, h: Tensor) -> HeadGradient: ...


class Chunks(Protocol):
    """The trained rows, a chunk at a time."""

    def chunk(self, rows: Tensor) -> Chunk: ...


# Logits of a block of rows on a CPU, per thread: 2 MiB of float32, which stay in the cache from pass to pass.
_CPU_BLOCK = 1 << 19


class TorchChunks:
    """By torch. Logits are exact: half-precision operands are widened, the head one slice at a time."""

    def __init__(
        self,
        head: Head,  # without padding
        columns: Tensor,  # (T, 1) inside the vocabulary, or -100
        softmax: Softmax,
        size: int,  # rows of a chunk, at most
    ) -> None:
        self._head, self._columns, self._softmax = head, columns, softmax
        width, dtype = head.weight.shape[0], _checks.promoted_dtype(*head.tensors())
        self._logits = torch.empty(size, width, dtype=dtype, device=columns.device)
        threads = torch.get_num_threads()
        on_cpu = columns.device.type == "cpu"
        rows = min(size, max(threads, _CPU_BLOCK * threads // width)) if on_cpu else size
        self._scratch = [self._logits.new_empty(rows, width) for _ in range(2)]

    def chunk(self, rows: Tensor) -> TorchChunk:
        z, scratch = self._logits[: rows.shape[0]], self._scratch
        head, softmax = self._head, self._softmax
        labels = self._columns[rows]
        labelled = labels >= 0
        given = head.hidden[rows].masked_fill_(~labelled, 0)
        scaling = Scaling(head.softcap, head.logit_scale, softmax.temperature)
        if (taus := softmax.flat_temperature()) is not None:
            divisor = torch.where(labelled, taus[rows].to(z.dtype)[:, None], 1)
            scaling = scaling._replace(temperature=divisor)
        head_product_(z, given.to(z.dtype), head.weight, head.bias)
        sums = Sums.empty(rows.shape[0], like=z, with_entropy=True)
        blocks = z.split(scratch[0].shape[0])
        sizes = [len(block) for block in blocks]
        for block, part, scales in zip(blocks, sums.split(sizes), scaling.split(sizes), strict=True):
            p, shifted = (x[: len(block)] for x in scratch)
            part.read_(scales.apply_(block), p, shifted)
        state = RowState.of(sums)
        here = labels if softmax.shard is None else softmax.shard.columns(labels, z.shape[1])
        logp = state.logp(z.gather(-1, here.clamp(0, z.shape[1] - 1))).masked_fill(~labelled, 0)
        if softmax.shard is not None:
            state, logp = whole_rows(state, logp, labels, softmax.shard)
        entropy = state.entropy().masked_fill(~labelled, 0)
        return TorchChunk(logp.squeeze(-1), entropy.squeeze(-1), z, scratch, given, head, here, state, scaling)


class TorchChunk(NamedTuple):
    """Rows whose logits torch has computed."""

    logp: Tensor  # (n,)
    entropy: Tensor  # (n,)
    z: Tensor  # (n, V)
    scratch: list[Tensor]  # two blocks of rows, (r, V) each
    given: Tensor  # (n, D) the hidden states in their dtype, 0 where the label is ignored
    head: Head
    columns: Tensor  # (n, 1) labels as columns of this slice, -100 ignored
    state: RowState  # of whole rows
    scaling: Scaling

    def gradient(self, g: Tensor, h: Tensor) -> HeadGradient:
        """dz overwrites the logits."""
        ignored = self.columns < 0
        g, h = (x[:, None].masked_fill(ignored, 0) for x in (g, h))
        upstream = Upstream.of(self.state, self.columns, g, h).part(0, self.z.shape[1])
        dz, (room, scratch) = room_for_gradient(self.z, self.head), self.scratch
        blocks, targets = self.z.split(scratch.shape[0]), dz.split(scratch.shape[0])
        sizes = [len(block) for block in blocks]
        parts = zip(blocks, targets, upstream.split(sizes), self.scaling.split(sizes), strict=True)
        for z, target, incoming, scaling in parts:
            # the gradient of capped logits needs them, and one of another dtype may not be written beside them
            in_place = self.head.softcap is None and target.dtype == z.dtype
            out, free = (x[: len(z)] for x in (z if in_place else room, scratch))
            gradient_of(z, incoming, out=out, scratch=free)
            scaling.backward_(out, z)
            if not in_place:
                target.copy_(out)
        return TorchHeadGradient(dz, self.given.to(dz.dtype), self.head.weight)


class KernelChunks:
    """By the Triton kernels. Products have half-precision operands if hidden states and head share such a dtype."""

    def __init__(self, head: Head, columns: Tensor, softmax: Softmax, size: int) -> None:
        from kdloss._triton import _launch, _products
        from kdloss._triton._row_math import LogitTransform, State

        self.head, self._columns, self._shard = head, columns, softmax.shard
        self.transform = LogitTransform.of(head.bias, head.logit_scale, head.softcap)
        width = head.weight.shape[0]
        here = columns if self._shard is None else self._shard.columns(columns, width)
        self.state = State.empty(here, softmax.temperature, softmax.flat_temperature(), with_entropy=True)
        self._logp, self.g = (torch.zeros(columns.shape, device=columns.device) for _ in range(2))
        self._entropy, self.h = (torch.zeros_like(self.state.peak) for _ in range(2))
        self.dtype = _products.product_dtype(head.hidden, head.weight)
        space = partial(_launch.room, size, width, device=columns.device)
        self._room = space(dtype=torch.float32)
        # float32 gradients overwrite the logits
        self.room_for_gradient = self._room if self.dtype == torch.float32 else space(dtype=self.dtype)

    def chunk(self, rows: Tensor) -> KernelChunk:
        from kdloss._triton import _compaction, _launch, _linear, _products

        weight = self.head.weight
        with _launch.on_device(rows):
            x = self._room[: rows.shape[0]]
            hidden = _compaction.take(self.head.hidden, rows, self.state.columns, self.dtype)
            if self.dtype == weight.dtype:
                _products.product_(x, hidden, weight.T)
            else:
                head_product_(x, hidden, weight, None)
            _linear.fold_(self._logp, self._entropy, self.state, x, rows, self.transform, 0, first=True, last=True)
        if self._shard is None:
            return KernelChunk(self._logp[rows].squeeze(-1), self._entropy[rows], x, hidden, rows, self)
        return KernelChunk(*self._of_whole_rows(rows, self._shard), x, hidden, rows, self)

    def _of_whole_rows(self, rows: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """Replace the states of these rows by those of whole rows, and return their log-probs and entropies (n,)."""
        columns, (_, temperature, temperatures, *numbers) = self._columns[rows], self.state
        part = RowState(*(x[rows, None] for x in numbers if x is not None))
        rate = rate_of(temperature, None if temperatures is None else temperatures[rows], columns)
        whole, logp = whole_rows(part, self._logp[rows], columns, shard, rate)
        for mine, found in zip(numbers, whole, strict=True):
            assert mine is not None
            assert found is not None
            mine[rows] = found.squeeze(-1)
        return logp.squeeze(-1), whole.entropy().masked_fill(columns < 0, 0).squeeze(-1)


class KernelChunk(NamedTuple):
    """Rows whose logits the kernels have computed."""

    logp: Tensor  # (n,)
    entropy: Tensor  # (n,)
    x: Tensor  # (n, V) products with the head
    hidden: Tensor  # (n, D) in the dtype of the product
    rows: Tensor  # (n,)
    chunks: KernelChunks

    def gradient(self, g: Tensor, h: Tensor) -> HeadGradient:
        from kdloss._triton import _launch, _linear

        every, rows = self.chunks, self.rows
        every.g[rows], every.h[rows] = g[:, None].float(), h.float()
        upstream, unscaled = (every.g, every.h), None
        with _launch.on_device(g):
            if every.dtype == torch.float16:
                size = every.head.weight.shape[0]
                factor = _linear.in_range(*upstream, every.state, rows, every.transform.logit_scale, size)
                unscaled, upstream = factor.reciprocal(), (every.g * factor, every.h * factor)
            out = every.room_for_gradient[: len(g)]
            dz = _linear.gradient_(out, every.state, *upstream, self.x, None, rows, every.transform, 0)
        return KernelHeadGradient(dz, self.hidden, every.head.weight, unscaled)


def put_back(
    x: Tensor,  # (N, D)
    rows: Tensor,  # (N,), distinct
    tokens: int,
    dtype: torch.dtype,
    factor: Tensor,  # ()
    *,
    kernels: bool,
) -> Tensor:
    """A (T, D) tensor of zeros with x times `factor`, rounded once, in its `rows`."""
    if not kernels:
        scaled = (x * factor).to(dtype)
        return scaled.new_zeros(tokens, x.shape[1]).index_copy_(0, rows, scaled)
    from kdloss._triton import _compaction, _launch

    with _launch.on_device(x):
        return _compaction.put_back(x, rows, tokens, dtype, factor)
