"""`VocabShard`: which slice of the vocabulary a rank holds, of a head that is split across ranks.

Its slice is compared with those of the other ranks once, when it is made; the slice of a DTensor is read from its
placement. Hidden states pass `VocabShard.enter` before they meet a slice of the head: the same values forward, and an
all-reduce backward that sums the gradients of all slices.

Kernels know nothing of shards: they see one slice of each row, and rows are merged between the kernel and what is
computed from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import gather_objects, same


class VocabShard:
    """The slice start .. stop - 1 of the vocabulary that this rank holds, of a head split across `group`.

    Given as `shard=`, it says that `logits` or `weight` (and `bias`) are this slice. Everything else is the same on
    every rank of the group: hidden states, labels (which stay those of the whole vocabulary), masks, and the gradient
    that comes in. Results are the same on every rank, to the bit. Slices may differ in width; in which order ranks hold
    them is free.

    Making one compares it with the others' (one collective, once), so that holes and overlaps are an error on every
    rank, and no hang. Make it where the head is made, and keep it.

    Args:
        start: the first entry of the vocabulary in this slice.
        stop: one past the last.
        group: the ranks that hold the slices. None: all of them.
        sequence_parallel: hidden states come split by rows, the same number on each rank in rank order, while labels
            and masks are whole. They are gathered, and their gradient is reduced and scattered, in place of an
            all-reduce.

    Raises, on every rank:
        TypeError: `group` is no process group, or a bound no int.
        ValueError: slices overlap, leave a hole or are empty, ranks disagree, or this process is not in the group.
    """

    def __init__(
        self, start: int, stop: int, group: ProcessGroup | None = None, *, sequence_parallel: bool = False
    ) -> None:
        self._join(start, stop, group, sequence_parallel)
        self.bounds: tuple[tuple[int, int], ...] = _agreed(
            gather_objects((start, stop, None, sequence_parallel), self.group)
        )

    @classmethod
    def even(cls, vocab_size: int, group: ProcessGroup | None = None, *, sequence_parallel: bool = False) -> VocabShard:
        """This rank's slice where `torch.chunk` and `DTensor` cut: all of ceil(V / ranks) entries, the last fewer.

        Args:
            vocab_size: V, the rows of the whole head, padding included.
            group: as above.
            sequence_parallel: as above.

        Raises, on every rank:
            TypeError: `vocab_size` is no int on one of them.
            ValueError: ranks disagree on `vocab_size`, or there are so few entries that a rank has none.
        """
        shard = cls.__new__(cls)
        shard._join(0, 0, group, sequence_parallel)
        found = gather_objects((vocab_size, sequence_parallel), shard.group)  # before any check that one rank may fail
        cuts = [(*_chunk(size, rank, shard.size), size, parallel) for rank, (size, parallel) in enumerate(found)]
        shard.bounds = _agreed(cuts)
        shard.start, shard.stop = shard.bounds[shard.rank]
        return shard

    @classmethod
    def from_dtensor(cls, head: Tensor, *, sequence_parallel: bool = False) -> VocabShard:
        """The slice that a DTensor head placed `Shard(0)`, or logits placed `Shard(-1)`, hold here. No collective.

        Raises:
            TypeError: `head` is no DTensor.
            ValueError: it is split along another axis, or along more than one.
        """
        found = of_dtensor("head", head)
        if found is None:
            raise ValueError(f"head must be split along its vocabulary, got {head.placements}")  # type: ignore[attr-defined]
        found.sequence_parallel = sequence_parallel
        return found

    def _join(self, start: int, stop: int, group: ProcessGroup | None, sequence_parallel: bool) -> None:
        self.rank, self.size = _rank_and_size(group)
        group = dist.group.WORLD if group is None else group
        assert group is not None
        self.group = group
        self.group_name = self.group.group_name
        self.start, self.stop, self.sequence_parallel = start, stop, sequence_parallel
        self.gathered = False  # whether the rows of sequence-parallel hidden states have been

    def __repr__(self) -> str:
        return f"VocabShard({self.start}, {self.stop}, rank={self.rank} of {self.size})"

    @property
    def vocab_size(self) -> int:
        """V of the whole head, padding included."""
        return max(stop for _, stop in self.bounds)

    @property
    def widest(self) -> int:
        """Entries of the largest slice: what has to be the same on every rank is sized by it."""
        return max(stop - start for start, stop in self.bounds)

    def validate(self, *, vocab_size: int | None = None, total_tokens: int | None = None) -> None:
        """Compares this shard, and what is given beside it, across the group: one collective, for debugging.

        Args:
            vocab_size: the V that this rank will pass to a loss.
            total_tokens: T, the rows that this rank is about to pass to one.

        Raises, on every rank:
            ValueError: the slices no longer fit together, or ranks differ in an argument; it names who has what.
        """
        mine = (self.start, self.stop, None, self.sequence_parallel)
        found = gather_objects((mine, vocab_size, total_tokens), self.group)
        _agreed([slice_ for slice_, _, _ in found])
        same("vocab_size", [size for _, size, _ in found])
        same("total_tokens", [tokens for _, _, tokens in found])

    def local_size(self, vocab_size: int) -> int:
        """How many of this slice's entries are below `vocab_size`, the true V; the rest is padding."""
        for rank, (start, _) in enumerate(self.bounds):
            if start >= vocab_size:
                raise ValueError(
                    f"vocab_size must leave every rank of the shard an entry, got {vocab_size}, "
                    f"and rank {rank} begins at {start}"
                )
        return min(self.stop, vocab_size) - self.start

    def columns(self, columns: Tensor, local_size: int) -> Tensor:
        """Columns of the whole vocabulary as columns of this slice: -100 stays, `local_size` is in another one."""
        here = columns - self.start
        elsewhere = (here < 0) | (here >= local_size)
        return torch.where(columns < 0, columns, here.masked_fill(elsewhere, local_size))

    def with_rows_gathered(self, gathered: bool) -> VocabShard:
        """This shard for hidden states whose rows have been gathered, by what reduces and scatters their gradient."""
        shard = VocabShard.__new__(VocabShard)
        shard._join(self.start, self.stop, self.group, self.sequence_parallel)
        shard.bounds, shard.gathered = self.bounds, gathered
        return shard

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states before they meet this slice: their gradient is the sum of all slices'."""
        return _SumGradients.apply(hidden, self)  # type: ignore[no-any-return, no-untyped-call]

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden states, from each slice's share of it."""
        if gradient.numel() == 0 or self.gathered:  # of gathered rows, reducing and scattering is what sums
            return gradient
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(gradient.contiguous(), "sum", self.group_name))  # type: ignore[no-any-return]


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks: each of them knows its own slice's share alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.sum_gradients(gradient), None


def is_dtensor(x: object) -> bool:
    # by its class's own module, as importing it takes a second that most users have no use for
    return type(x).__module__.startswith("torch.distributed.tensor") and type(x).__name__ == "DTensor"


def of_dtensor(name: str, x: Tensor, axis: int | None = None) -> VocabShard | None:
    """The slice of the vocabulary axis that a DTensor holds; None where it is replicated."""
    if not is_dtensor(x):
        raise TypeError(f"{name} must be a DTensor, got {type(x).__name__}")
    placements, mesh = x.placements, x.device_mesh  # type: ignore[attr-defined]
    split = [(at, placement) for at, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return None
    allowed = (0, x.ndim - 1) if axis is None else (axis % x.ndim,)
    if len(split) > 1 or not any(split[0][1].is_shard(dim) for dim in allowed):
        raise ValueError(
            f"{name} must be split along its vocabulary axis {' or '.join(map(str, allowed))} on one axis of its mesh, "
            f"got {placements}"
        )
    at, placement = split[0]
    shard = VocabShard.__new__(VocabShard)
    vocab_size, group = x.shape[placement.dim], mesh.get_group(at)
    shard._join(*_chunk(vocab_size, *_rank_and_size(group)), group, False)
    shard.bounds = tuple(_chunk(vocab_size, rank, shard.size) for rank in range(shard.size))
    _agreed([(start, stop, vocab_size, False) for start, stop in shard.bounds])
    return shard


def _chunk(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    width = -(-vocab_size // size)
    return min(rank * width, vocab_size), min((rank + 1) * width, vocab_size)


def _rank_and_size(group: object) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialized, got no process group to share a vocabulary in")
    if group is None:
        group = dist.group.WORLD
    # what `new_group` gives a process that is not in the group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must hold this process, rank {dist.get_rank()}, got one without it")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group.rank(), group.size()


def _agreed(slices: list[Any]) -> tuple[tuple[int, int], ...]:
    """The bounds of all ranks, where they cover 0 .. V - 1 once; every rank sees the same list and the same error."""
    holds = ", ".join(f"rank {rank} holds {start} .. {stop}" for rank, (start, stop, *_) in enumerate(slices))
    for start, stop, *_ in slices:
        if any(isinstance(x, bool) or not isinstance(x, int) for x in (start, stop)):
            raise TypeError(f"start and stop must be ints, got: {holds}")
    same("vocab_size", [size for _, _, size, _ in slices])
    same("sequence_parallel", [parallel for _, _, _, parallel in slices])
    end = 0
    for start, stop, *_ in sorted(slices, key=lambda x: (x[0], x[1])):
        if start != end or stop <= start:
            what = "is empty" if stop <= start else "overlap" if start < end else f"leave out {end} .. {start}"
            raise ValueError(f"shard: slices must cover the vocabulary once, but some {what}, got: {holds}")
        end = stop
    return tuple((start, stop) for start, stop, *_ in slices)
