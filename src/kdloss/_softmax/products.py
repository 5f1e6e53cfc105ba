"""Matrix products of the path without kernels, by the fastest routine that the build of torch has on a CPU.

    float32     oneDNN's kernel where torch has it and the processor has no AMX. It computes in plain float32, as
                `torch.mm` does, which goes to MKL. MKL is slow on a processor of another vendor: on an AMD EPYC with
                AVX512, 97 GFLOP/s against 220. A processor with AMX is MKL's own vendor's: there oneDNN runs at 65 to
                85 % of MKL's speed.
    bfloat16    `torch.mm`, for the gradient of the logits. It sums in float32 and rounds each result once. On a
                processor with bfloat16 instructions it is 2 to 7 times as fast as float32.
    others      `torch.mm`

The choice depends on the build, the processor and the dtypes, never on a timing or a setting: the same inputs give the
same bits. Every `torch.mm` here has `out`, because autocast would round the operands of one without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A result that is allocated has at most this many entries, 8 MiB of float32, and this many columns.
_BLOCK_ENTRIES, _BLOCK_COLUMNS = 2**21, 2**12


def _has_onednn() -> bool:
    """Whether oneDNN's float32 product can be called. The operator has a private name, so it is asked for."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Where it does not, such a product is slower than float32's."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if not _has_onednn() or supported is None or not supported():
        return False
    # on x86 oneDNN also accepts a processor that has AVX512 without bfloat16, and emulates it
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return not on_x86 or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


_ONEDNN, _BFLOAT16 = _has_onednn() and not _has_amx(), _has_bfloat16()


def rounds_gradient(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the gradient of the logits is rounded to bfloat16 and multiplied in it; `dtype` is that of the logits.

    Only on a CPU, and only if hidden states and head are bfloat16, so that the results are rounded to it anyway. It has
    the exponents of float32, so an incoming gradient of any scale keeps its digits; in float16 it might not.
    """
    narrow = hidden.dtype == weight.dtype == torch.bfloat16
    return _BFLOAT16 and narrow and dtype == torch.float32 and hidden.device.type == "cpu"


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in new memory."""
    if _by_onednn(a, b):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return found
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` into `out`, of any dtype; a and b share one."""
    if out.dtype == a.dtype and not _by_onednn(a, b):
        return torch.mm(a, b, out=out)
    for rows, columns in _blocks(out):
        out[rows, columns].copy_(product(a[rows], b[:, columns]))
    return out


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b`; a and b share a dtype, and `total` may have a wider one."""
    if total.dtype == a.dtype and not _by_onednn(a, b):
        return total.addmm_(a, b)
    for rows, columns in _blocks(total):
        total[rows, columns].add_(product(a[rows], b[:, columns]))
    return total


def _blocks(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of the blocks of a result, which are allocated one by one; on an accelerator all of it."""
    rows, columns = out.shape
    width = min(max(1, columns), _BLOCK_COLUMNS) if out.device.type == "cpu" else max(1, columns)
    height = _BLOCK_ENTRIES // width if out.device.type == "cpu" else max(1, rows)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN computes `a @ b`. It refuses an inner dimension of 0."""
    return _ONEDNN and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.shape[1] > 0
