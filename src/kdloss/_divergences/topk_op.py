"""The logits of the kept ids, and the log-sum-exp of all others, as one operator with its gradient.

    z = logits / τ,   z_S = z[ids],   rest = log sum_{v not in ids} exp z_v
    dz_v = du_k at v = ids_k,   dz_v = dr exp(z_v - rest) elsewhere

softmax([z_S, rest]) is the distribution with everything outside S in one bucket. `rest` is summed over these columns,
because 1 minus the kept mass would lose all its digits if little is left. The forward is one pass over the logits, a
block of rows at a time; the backward is another one, and writes the gradient once.

If each rank holds a slice of the vocabulary, an id is kept on the rank that has it, and `rest` is the log-sum-exp of
the rests of all ranks: one all-gather of K + 1 values per row, and none in the backward.

A scratch row has one column more than the vocabulary, at -inf: padded ids (-1) point there. If `kernels` is set,
`_triton/_topk_forward.py` and `_triton/_topk_backward.py` do the same without a scratch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.collectives import gather
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.operator import operator
from kdloss._softmax.rows import CENTRAL_SUMS, all_zero, column, flat_rows, without_shift
from kdloss._softmax.vocabulary import Softmax

# entries of a scratch, per thread on a CPU
_CPU_ENTRIES, _DEVICE_ENTRIES = 2**19, 2**24


def kept_and_rest(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K) int64, distinct and ascending within a row; -1 is padding
    softmax: Softmax,
    *,
    with_rest: bool = True,
) -> tuple[Tensor, Tensor]:  # (..., K), (...,)
    """`logits / τ` at `ids`, -inf at padding, and the log-sum-exp of all other columns, -inf if there are none.

    Without `with_rest`, the rest is -inf and this is only a `gather`; torch's own would hold a float32 copy of the
    gradient in its backward. In a row of padding only, the rest is undefined.
    """
    options = (softmax.temperature, softmax.local_size, with_rest, softmax.kernels)
    if softmax.shard is not None:
        kept, rest = _ShardedTopk.apply(logits, ids, softmax.row_temperature, options, softmax.shard)  # type: ignore[no-untyped-call]
        return kept, rest
    kept, rest = kept_and_rest_of_rows(logits, ids, softmax.row_temperature, *options)
    return kept, rest


@operator("kept_and_rest")
def kept_and_rest_of_rows(
    logits: Tensor,
    ids: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool = False,
) -> tuple[Tensor, Tensor]:
    """(kept (..., K), rest (...,))."""
    if kernels:
        from kdloss._triton._topk_forward import forward

        return forward(logits, ids, row_temperature, temperature, vocab_size, with_rest)
    dtype = _checks.promoted_dtype(logits)
    kept = torch.empty(ids.shape, dtype=dtype, device=logits.device)
    rest = torch.empty(ids.shape[:-1], dtype=dtype, device=logits.device)
    scratch = _scratch(rest.numel(), vocab_size, dtype, logits.device)
    places = _places(ids, vocab_size)
    tensors = (logits[..., :vocab_size], places, kept, rest.unsqueeze(-1), column(row_temperature, rest))
    for z, index, z_kept, z_rest, tau in flat_rows(*tensors):
        for start in range(0, z.shape[0], scratch.shape[0]):
            rows = slice(start, start + scratch.shape[0])
            divisor = temperature if row_temperature is None else tau[rows].to(dtype)
            if not with_rest:
                z_kept[rows] = z[rows].gather(-1, index[rows].clamp(max=vocab_size - 1))
                z_kept[rows] = (z_kept[rows] / divisor).masked_fill_(index[rows] == vocab_size, -math.inf)
                z_rest[rows] = -math.inf
                continue
            x = _load(z[rows], scratch, divisor)
            torch.gather(x, -1, index[rows], out=z_kept[rows])
            z_rest[rows, 0] = _log_sum_of_others(x, index[rows], z[rows], divisor)
    return kept, rest


@kept_and_rest_of_rows.register_fake
def _(logits: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = _checks.promoted_dtype(logits)
    return logits.new_empty(ids.shape, dtype=dtype), logits.new_empty(ids.shape[:-1], dtype=dtype)


@operator("kept_and_rest_backward")
def gradient_of_kept_and_rest(
    upstream_kept: Tensor,
    upstream_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    row_temperature: Tensor | None,
    rest: Tensor,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype, 0 in padding columns."""
    if kernels:
        from kdloss._triton._topk_backward import backward

        inputs = (logits, ids, row_temperature, rest)
        return backward(upstream_kept, upstream_rest, *inputs, temperature, vocab_size, with_rest)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad[..., vocab_size:] = 0
    of_rows = (ids, row_temperature, rest, temperature, with_rest)
    gradient_of_kept_and_rest_(grad[..., :vocab_size], upstream_kept, upstream_rest, logits[..., :vocab_size], *of_rows)
    return grad


@gradient_of_kept_and_rest.register_fake
def _(upstream_kept: Tensor, upstream_rest: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.options = inputs[3:]


def _backward(ctx: Any, upstream_kept: Tensor, upstream_rest: Tensor) -> tuple[Tensor | None, ...]:
    return (gradient_of_kept_and_rest(upstream_kept, upstream_rest, *ctx.saved_tensors, *ctx.options),)


kept_and_rest_of_rows.register_autograd(_backward, _save)


class _ShardedTopk(torch.autograd.Function):
    """`kept_and_rest_of_rows` of logits that are a slice of the rows; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        row_temperature: Tensor | None,
        options: tuple[Any, ...],
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        here = ids_of_slice(ids, shard.start)
        kept, rest = kept_and_rest_of_rows(logits, here, row_temperature, *options)
        kept, rest = merge_ranks(kept, rest, shard, with_rest=options[2])
        ctx.save_for_backward(logits, here, row_temperature, rest)
        ctx.options = options
        return kept, rest

    @staticmethod
    def backward(ctx: Any, upstream_kept: Tensor, upstream_rest: Tensor) -> tuple[Tensor | None, ...]:
        grad = gradient_of_kept_and_rest(upstream_kept, upstream_rest, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None


def gradient_of_kept_and_rest_(
    out: Tensor,
    upstream_kept: Tensor,
    upstream_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    row_temperature: Tensor | None,
    rest: Tensor,
    temperature: float,
    with_rest: bool,
) -> Tensor:
    """The gradient (..., V) of the logits (..., V) into `out`, which may share their memory: row after row is read."""
    vocab_size = logits.shape[-1]
    scratch = _scratch(rest.numel(), vocab_size, rest.dtype, logits.device)
    # if nothing is left, every other z is -inf, so exp(z - 0) is 0
    shift = torch.where(rest == -math.inf, 0, rest).unsqueeze(-1)
    upstreams = torch.cat([upstream_kept, upstream_rest.unsqueeze(-1)], -1)
    tensors = (logits, _places(ids, vocab_size), shift, upstreams, out)
    for z, index, lse, upstream, result, tau in flat_rows(*tensors, column(row_temperature, rest)):
        for start in range(0, z.shape[0], scratch.shape[0]):
            rows = slice(start, start + scratch.shape[0])
            if all_zero(upstream[rows]):
                result[rows] = 0
                continue
            divisor = temperature if row_temperature is None else tau[rows].to(rest.dtype)
            incoming = upstream[rows] / divisor
            if with_rest:
                x = _load(z[rows], scratch, divisor)
                of_rows, scale = without_shift(incoming[:, -1:], lse[rows])
                if of_rows is not None:
                    x.scatter_(-1, index[rows], -math.inf).sub_(of_rows)
                x.exp_().mul_(scale)
            else:
                x = scratch[: index[rows].shape[0]].zero_()
            x.scatter_(-1, index[rows], incoming[:, :-1])
            silent = (upstream[rows] == 0).all(-1, keepdim=True)
            if silent.device.type != "cpu" or bool(silent.any()):
                x.masked_fill_(silent, 0)
            result[rows] = x[:, :-1]
    return out


def _log_sum_of_others(x: Tensor, index: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(R,) log-sum-exp of the columns of x (R, V + 1) that are not in `index`. Overwrites x, loaded from `logits`.

    A sum of e^z, without its maximum taken off, is all that it takes if none of its terms has overflowed and the
    largest have not lost digits.
    """
    if x.device.type == "cpu":
        mass = x.exp_().scatter_(-1, index, 0).sum(-1)
        low, high = CENTRAL_SUMS
        central = (mass > low) & (mass < high)
        if bool(central.all()):
            return mass.log()
        others = _load(logits, x, temperature).scatter_(-1, index, -math.inf).logsumexp(-1)
        return torch.where(central, mass.log(), others)
    return x.scatter_(-1, index, -math.inf).logsumexp(-1)


def merge_ranks(kept: Tensor, rest: Tensor, shard: VocabShard, *, with_rest: bool) -> tuple[Tensor, Tensor]:
    """The kept logits and the rest of whole rows, from those of each rank's slice."""
    if not with_rest:
        return gather(kept, shard).amax(0), rest
    parts = gather(torch.cat([kept, rest.unsqueeze(-1)], -1), shard)
    return parts[..., :-1].amax(0), parts[..., -1].logsumexp(0)


def ids_of_slice(ids: Tensor, start: int) -> Tensor:
    """`ids` as columns of a slice that begins at `start`. Ids before it become -2, because -1 is padding."""
    return torch.where(ids < 0, ids, torch.where(ids < start, -2, ids - start))


def _places(ids: Tensor, vocab_size: int) -> Tensor:
    """Columns of a scratch row: padding, and ids outside the vocabulary, become the last column, which holds -inf."""
    return torch.where((ids < 0) | (ids >= vocab_size), vocab_size, ids)


def _scratch(total_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory (R, V + 1) for R rows at a time."""
    entries = _CPU_ENTRIES * torch.get_num_threads() if device.type == "cpu" else _DEVICE_ENTRIES
    rows = max(1, min(total_rows, entries // (vocab_size + 1)))
    return torch.empty(rows, vocab_size + 1, dtype=dtype, device=device)


def _load(logits: Tensor, scratch: Tensor, temperature: float | Tensor) -> Tensor:
    """`logits / τ` in the scratch, with -inf in the last column."""
    x = scratch[: logits.shape[0]]
    x[:, :-1] = logits
    x[:, -1] = -math.inf
    return x.div_(temperature) if isinstance(temperature, Tensor) or temperature != 1 else x
