"""Matrix products that keep a tensor core's float32 accumulator, and the slices of the vocabulary that they work on.

A product of half-precision matrices is accumulated in float32 and rounded when it is written to memory. Logits must not
be rounded: in bfloat16 that costs 3e-2 nats of log-prob. Neither may a gradient that is summed over slices. So these
functions write float32 from half-precision operands where torch can (on CUDA: into a new matrix from torch 2.8, added
to an existing one from 2.10). Elsewhere they widen the operands, which gives the same number for more work.

All results go to `out=`, which also keeps `torch.autocast` from casting the operands of the widened products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a slice of float32 logits. Every slice adds one pass over the gradient of the hidden states, (N, D) float32
# read and written, and one launch of each kernel, so slices should be wide and few. Not yet tuned on a device.
SLICE_BYTES = 1 << 29

# With fewer columns a product no longer fills a device, however many rows it has. Above 131072 tokens, a slice is
# this wide and exceeds the budget: 4 KiB per token. Above 32768 tokens, it is also narrower than the 4096 columns
# that a program of `fold` takes at a time: half of its lanes are idle at 65536 tokens, three of four from 131072 on.
LEAST_WIDTH = 1024

HALF = (torch.bfloat16, torch.float16)
_TENSOR_CORES = ("cuda", "meta")  # meta stands for cuda where only shapes are computed


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden states meet the head: their half-precision dtype if they share one, else float32."""
    return hidden.dtype if hidden.dtype == weight.dtype and hidden.dtype in HALF else torch.float32


def product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` into `out`, which is float32 or has the operands' dtype; rounded once."""
    if a.dtype == out.dtype and (a.dtype not in HALF or a.device.type in _TENSOR_CORES):
        return torch.mm(a, b, out=out)
    if _writes_float32(a) and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if out.dtype == torch.float32:
        return torch.mm(a.float(), b.float(), out=out)
    return out.copy_(product_(torch.empty_like(out, dtype=torch.float32), a, b))


def add_product_(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> Tensor:
    """`total += factor * (a @ b)`, where `total` is float32 and `factor` is () on the device."""
    if factor is not None:  # no product of torch takes a factor on the device
        for rows in slices(total.shape[1], total.shape[0]):
            part = product_(torch.empty_like(total[rows]), a[rows], b)
            torch.addcmul(total[rows], part, factor, out=total[rows])
        return total
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)
    if _writes_float32(a) and torch.__version__ >= "2.10":
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if _writes_float32(a):
        return total.add_(product_(torch.empty_like(total), a, b))
    return torch.addmm(total, a.float(), b.float(), out=total)


def slices(tokens: int, vocab_size: int) -> Iterator[slice]:
    """The vocabulary cut evenly, in multiples of 256 columns, so that (tokens, width) float32 fits the budget.

    `tokens` counts all tokens of the input, not only the trained ones: the cut, and with it the last bit of a result,
    depends on shapes alone.
    """
    widest = max(LEAST_WIDTH, SLICE_BYTES // (4 * max(1, tokens)))
    width = math.ceil(vocab_size / math.ceil(vocab_size / widest) / 256) * 256
    for start in range(0, vocab_size, width):
        yield slice(start, min(start + width, vocab_size))


def widest_slice(tokens: int, vocab_size: int) -> int:
    return next((part.stop for part in slices(tokens, vocab_size)), 0)


def _writes_float32(a: Tensor) -> bool:
    return a.dtype in HALF and a.device.type in _TENSOR_CORES and torch.__version__ >= "2.8"
