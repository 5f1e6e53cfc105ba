"""The launch parameters of each kernel for a given shape. They were chosen by arithmetic and are not measured.

The numbers follow from a GPU of 132 multiprocessors that copies 4.3 TB/s:

- One read takes 0.8 us. To keep that many bytes in flight, a multiprocessor holds about 26 KiB of loads.
- A row of 150k bf16 logits is 300 KB. With eight warps per row, 500 whole rows are in flight at a time. While the last
  ones finish, multiprocessors are idle for 2 % of the time of 8192 rows.
- Rows are therefore split if there are fewer than a few thousand, so that there are about 2000 programs for any T.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# The most labels of a row that are examined at once.
LABELS = 128

# The fewest programs that a launch should have: 16 for each of 132 multiprocessors.
PROGRAMS = 2112
# The most splits of a row: one program merges them.
SPLITS = 256
# Up to this many logits, blocks are smaller: otherwise one row would not have a block for each multiprocessor.
FEW_LOGITS = PROGRAMS * 4096


class Forward(NamedTuple):
    """How rows are read."""

    lanes: int  # states that a program keeps side by side; each takes 16 bytes of logits at a time
    width: int  # logits in 16 bytes
    splits: int  # programs per row
    warps: int

    def blocks(self, vocab_size: int) -> int:
        """Blocks per split."""
        return -(-vocab_size // (self.lanes * self.width * self.splits))


def forward(rows: int, vocab_size: int, dtype: torch.dtype, *, most: int = 1024) -> Forward:
    """Launch shape of the kernel that reads each row once, with `most` lanes at most."""
    width = 16 // dtype.itemsize
    if dtype == torch.float16:
        most = min(most, 512)  # ptxas spilled a value of the row
    few = rows * vocab_size <= FEW_LOGITS
    lanes, warps = (1024 // width, 4) if few else (most, 8)
    blocks = -(-vocab_size // (lanes * width))
    return Forward(lanes, width, -(-blocks // _blocks_a_split(blocks, rows)), warps)


def _blocks_a_split(blocks: int, rows: int) -> int:
    return max(1, blocks // -(-PROGRAMS // max(1, rows)), -(-blocks // SPLITS))


class Backward(NamedTuple):
    """How gradients are written."""

    lanes: int  # cells of 16 bytes that a program handles at a time
    width: int  # logits in a cell
    blocks: int  # blocks of lanes * width logits per program, one after the other
    chunks: int  # programs per row
    warps: int


def backward(rows: int, columns: int, dtype: torch.dtype) -> Backward:
    """Launch shape of the kernel that reads and writes each row once: a thread handles twice 16 bytes at a time."""
    width = 16 // dtype.itemsize
    few = rows * columns <= FEW_LOGITS
    lanes, warps = (1024 // width, 4) if few else (512, 8)
    blocks = -(-columns // (lanes * width))
    blocks_a_chunk = max(1, min(8, blocks * rows // PROGRAMS))
    return Backward(lanes, width, blocks_a_chunk, -(-blocks // blocks_a_chunk), warps)


class Pairs(NamedTuple):
    """How rows of two sets of logits are read together."""

    block: int  # logits of either side that a program handles at a time
    blocks: int  # blocks per program, one after the other
    splits: int  # programs per row
    warps: int


def pairs(rows: int, vocab_size: int, block: int) -> Pairs:
    """Launch shape of the kernels that read each row once for its sums."""
    block, warps = (1024, 4) if block > 1024 and rows * vocab_size <= FEW_LOGITS else (block, 8)
    blocks = -(-vocab_size // block)
    blocks_a_split = _blocks_a_split(blocks, rows)
    return Pairs(block, blocks_a_split, -(-blocks // blocks_a_split), warps)


def pairs_backward(rows: int, columns: int, block: int) -> Pairs:
    """Launch shape of the kernel that writes a gradient."""
    block, warps = (1024, 4) if rows * columns <= FEW_LOGITS else (block, 8)
    blocks = -(-columns // block)
    blocks_a_split = max(1, min(4, blocks * rows // PROGRAMS))
    return Pairs(block, blocks_a_split, -(-blocks // blocks_a_split), warps)


def block_labels(count: int, most: int = LABELS) -> int:
    """The smallest power of two that holds `count` labels, `most` at most."""
    return min(1 << max(0, count - 1).bit_length(), most)


class Piece(NamedTuple):
    """Rows that one launch can cover: row r is (r // inner, r % inner) of an (outer, inner, V) tensor."""

    x: Tensor
    rows: int
    inner: int
    strides: tuple[int, int]  # of outer and inner


def pieces(x: Tensor) -> Iterator[tuple[slice, Piece]]:
    """(which rows, piece) of a (..., V) tensor: one piece, unless the rows need more than two strides.

    A copy only if the logits of a row lie apart: each would be fetched from memory with its 32 neighbours.
    """
    start = 0
    for part in _matrices(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()):
        outer, inner, _ = part.shape
        # the stride of an axis of size 1 is never used; as 0 it is aligned and has one type for all shapes
        strides = part.stride(0) if outer > 1 else 0, part.stride(1) if inner > 1 else 0
        yield slice(start, start + outer * inner), Piece(part, outer * inner, max(1, inner), strides)
        start += outer * inner


def _matrices(x: Tensor) -> Iterator[Tensor]:
    """(outer, inner, V) views of the rows, in order."""
    if (matrix := _view(x, 1, -1)) is not None or (matrix := _view(x, -1, x.shape[-2])) is not None:
        yield matrix
        return
    for part in x.unbind(0):
        yield from _matrices(part)


def _view(x: Tensor, outer: int, inner: int) -> Tensor | None:
    try:
        return x.view(outer, inner, x.shape[-1])
    except RuntimeError:  # these strides allow no view
        return None


# Rows of our own memory begin at multiples of so many elements, as cuBLAS likes them.
_UNIT = 16


def room(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(..., V), uninitialised. Rows begin at multiples of 16 elements, and memory extends to the next multiple."""
    *rows, columns = shape
    return torch.empty(*rows, _rounded(columns), dtype=dtype, device=device)[..., :columns]


def writable(x: Tensor) -> int:
    """Number of columns of the rows (R, V) that are safe to store: a multiple of 16 if rows lie that far apart.

    Only for memory that belongs to this package, such as `room` allocates.
    """
    rounded = _rounded(x.shape[1])
    end = (x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + rounded) * x.element_size()
    return rounded if x.stride(0) >= rounded and end <= x.untyped_storage().nbytes() else x.shape[1]


def shifted(x: Tensor, y: Tensor, width: int) -> bool:
    """Whether a row of x (outer, inner, V) begins elsewhere between multiples of `width` elements than its row of y.

    y is (outer * inner, V).
    """
    outer, inner, _ = x.shape
    apart = x.data_ptr() // x.element_size() - y.data_ptr() // y.element_size()
    along = x.stride(1) - y.stride(0) if inner > 1 else 0
    across = x.stride(0) - inner * y.stride(0) if outer > 1 else 0
    return any(n % width != 0 for n in (apart, along, across))


def any_shifted(leader: Tensor, width: int, *others: Tensor | None) -> bool:
    """Whether rows (R, V) of any of the others are `shifted` against those of `leader`."""
    return any(shifted(x[None], leader, width) for x in others if x is not None)


def _rounded(columns: int) -> int:
    return -(-columns // _UNIT) * _UNIT


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
