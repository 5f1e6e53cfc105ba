"""`VocabShard`: the vocabulary slice that a rank holds when the output head is split across ranks.

The constructor compares the slices of all ranks once. For a DTensor, the slice is read from its placement. Hidden
states pass through `VocabShard.enter` before they are multiplied by a slice of the head: the identity forward, and an
all-reduce backward that sums the gradients of all slices.

Kernels do not know about shards: they see one slice of each row. Their per-row results are merged after the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kdloss import _checks

from .agreement import gather_objects, same


class VocabShard:
    """The slice start .. stop - 1 of the vocabulary that this rank holds, of a head split across `group`.

    Passed as `shard=`, it says that `logits` or `weight` (and `bias`) are this slice. Everything else is the same on
    every rank of the group: hidden states, labels (which refer to the whole vocabulary), masks, and the incoming
    gradient. Results are the same on every rank, to the bit. Slices may differ in width, and ranks may hold them in any
    order.

    The constructor compares the slices of all ranks (one collective), so gaps and overlaps raise on every rank instead
    of hanging. Create it once, next to the head.

    Args:
        start: the first vocabulary entry of this slice.
        stop: one past its last entry.
        group: the ranks that hold the slices. None: all ranks.
        sequence_parallel: hidden states are split by rows, the same number on each rank in rank order, while labels and
            masks are whole. The rows are all-gathered, and their gradient is reduce-scattered instead of all-reduced.

    Attributes:
        start, stop, group, sequence_parallel: as passed.
        bounds: (start, stop) of every rank, in rank order.
        rank, size: this rank in `group`, and the number of its ranks.

    Raises:
        TypeError: on every rank: a bound is not an int. On this rank: `group` is not a process group.
        ValueError: on every rank: slices overlap, leave a gap or are empty, or ranks disagree on `sequence_parallel`.
            On this rank: it is not in `group`, or torch.distributed is not initialized.

    Example:
        >>> import torch, torch.distributed as dist, kdloss
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard = kdloss.VocabShard(0, 4)  # one rank holds the whole vocabulary
        >>> logp = kdloss.token_logprobs(torch.zeros(1, 4), torch.tensor([3]), shard=shard)
        >>> round(logp.exp().item(), 4)
        0.25
        >>> dist.destroy_process_group()
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
        """This rank's slice of a vocabulary that is cut as `torch.chunk` and `DTensor` cut it.

        Ranks hold ceil(V / ranks) entries each, in rank order, and the last ranks fewer.

        Args:
            vocab_size: V, the rows of the whole head, padding included.
            group: the ranks that hold the slices. None: all ranks.
            sequence_parallel: hidden states are split by rows, the same number on each rank in rank order, while labels
                and masks are whole. The rows are all-gathered, and their gradient is reduce-scattered instead of
                all-reduced.

        Returns:
            The `VocabShard` of this rank, compared with those of the other ranks (one collective).

        Raises:
            TypeError: on every rank: `vocab_size` is not an int on one of them. On this rank: `group` is not a process
                group.
            ValueError: on every rank: ranks disagree on an argument, or V is so small that a rank gets no entry. On
                this rank: it is not in `group`, or torch.distributed is not initialized.

        Example:
            >>> import torch.distributed as dist, kdloss
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> kdloss.VocabShard.even(10)
            VocabShard(0, 10, rank=0 of 1)
            >>> dist.destroy_process_group()
        """
        shard = cls.__new__(cls)
        shard._join(0, 0, group, sequence_parallel)
        # before any check that may fail on one rank only
        found = gather_objects((vocab_size, sequence_parallel), shard.group)
        cuts = [(*_chunk(size, rank, shard.size), size, parallel) for rank, (size, parallel) in enumerate(found)]
        shard.bounds = _agreed(cuts)
        shard.start, shard.stop = shard.bounds[shard.rank]
        return shard

    @classmethod
    def from_dtensor(cls, head: Tensor, *, sequence_parallel: bool = False) -> VocabShard:
        """The slice that this rank holds of a DTensor: a head placed `Shard(0)`, or logits placed `Shard(-1)`.

        No collective.

        Args:
            head: the DTensor.
            sequence_parallel: hidden states are split by rows, the same number on each rank in rank order, while labels
                and masks are whole. The rows are all-gathered, and their gradient is reduce-scattered instead of
                all-reduced.

        Returns:
            The `VocabShard` of this rank; its group is the mesh axis that splits the vocabulary.

        Raises:
            TypeError: `head` is not a DTensor.
            ValueError: `head` is not split, or split along another axis or along more than one mesh axis, or a rank
                holds no entry.

        Example:
            >>> import torch, torch.distributed as dist, kdloss
            >>> from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> head = distribute_tensor(torch.zeros(10, 2), DeviceMesh("cpu", [0]), [Shard(0)])
            >>> kdloss.VocabShard.from_dtensor(head)
            VocabShard(0, 10, rank=0 of 1)
            >>> dist.destroy_process_group()
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
        self.gathered = False  # True: the rows of sequence-parallel hidden states are already gathered

    def __repr__(self) -> str:
        return f"VocabShard({self.start}, {self.stop}, rank={self.rank} of {self.size})"

    @property
    def vocab_size(self) -> int:
        """V, the rows of the whole head, padding included."""
        return max(stop for _, stop in self.bounds)

    @property
    def widest(self) -> int:
        """Entries of the widest slice, which sizes whatever must have the same size on every rank."""
        return max(stop - start for start, stop in self.bounds)

    def validate(self, *, vocab_size: int | None = None, total_tokens: int | None = None) -> None:
        """Compare this shard and the arguments across the group: one collective, for debugging.

        Args:
            vocab_size: the V that this rank will pass to a loss. None on every rank: not compared.
            total_tokens: T, the number of rows that this rank will pass to a loss. None on every rank: not compared.

        Raises:
            ValueError: on every rank: the slices no longer fit together, or an argument differs between ranks. The
                message lists the value of each rank.

        Example:
            >>> import torch.distributed as dist, kdloss
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> shard = kdloss.VocabShard.even(10)
            >>> shard.validate(vocab_size=9, total_tokens=128)  # every rank passes the same numbers: no error
            >>> dist.destroy_process_group()
        """
        mine = (self.start, self.stop, None, self.sequence_parallel)
        found = gather_objects((mine, vocab_size, total_tokens), self.group)
        _agreed([slice_ for slice_, _, _ in found])
        same("vocab_size", [size for _, size, _ in found])
        same("total_tokens", [tokens for _, _, tokens in found])

    def local_size(self, vocab_size: int) -> int:
        """Number of entries of this slice below `vocab_size`, the true V; the rest is padding."""
        for rank, (start, _) in enumerate(self.bounds):
            if start >= vocab_size:
                raise ValueError(
                    f"vocab_size must leave every rank of the shard an entry, got {vocab_size}, "
                    f"but rank {rank} starts at {start}"
                )
        return min(self.stop, vocab_size) - self.start

    def columns(self, columns: Tensor, local_size: int) -> Tensor:
        """Map columns of the whole vocabulary to columns of this slice.

        -100 stays; a column that another slice holds becomes `local_size`.
        """
        here = columns - self.start
        elsewhere = (here < 0) | (here >= local_size)
        return torch.where(columns < 0, columns, here.masked_fill(elsewhere, local_size))

    def with_rows_gathered(self, gathered: bool) -> VocabShard:
        """A copy of this shard. True: the rows are already gathered, and that gather's backward sums the gradient."""
        return _Regathered(self, gathered)

    def enter(self, hidden: Tensor) -> Tensor:
        """The identity on hidden states, to be applied before this slice: their gradient is summed over all slices."""
        return _SumGradients.apply(hidden, self)  # type: ignore[no-any-return, no-untyped-call]

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden states: the sum over the ranks of each slice's share."""
        if gradient.numel() == 0 or self.gathered:  # for gathered rows, the reduce-scatter sums
            return gradient
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(gradient.contiguous(), "sum", self.group_name))  # type: ignore[no-any-return]


class _Regathered(VocabShard):
    """A copy, made by a constructor because torch 2.6 does not compile `__new__`."""

    def __init__(self, shard: VocabShard, gathered: bool) -> None:
        self.rank, self.size, self.group, self.group_name = shard.rank, shard.size, shard.group, shard.group_name
        self.start, self.stop, self.bounds = shard.start, shard.stop, shard.bounds
        self.sequence_parallel, self.gathered = shard.sequence_parallel, gathered


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks: each rank computes only its own slice's share."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = ctx.shard.sum_gradients(gradient)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            summed = _checks.refuse_second_derivative("a vocabulary-sharded head", summed.detach(), gradient)
        return summed, None


def of_dtensor(name: str, x: Tensor, axis: int | None = None) -> VocabShard | None:
    """This rank's slice of a DTensor along `axis` (None: the first or the last one); None if `x` is replicated."""
    if not _checks.is_dtensor(x):
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
    _checks.integer(vocab_size=vocab_size)
    width = -(-vocab_size // size)
    return min(rank * width, vocab_size), min((rank + 1) * width, vocab_size)


def _rank_and_size(group: object) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialized, so no process group can split a vocabulary")
    if group is None:
        group = dist.group.WORLD
    # what `new_group` returns to a process that is not in the group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must contain this process, but rank {dist.get_rank()} is not a member of it")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group.rank(), group.size()


def _agreed(slices: list[Any]) -> tuple[tuple[int, int], ...]:
    """The bounds of all ranks, checked to cover 0 .. V - 1 exactly once.

    A slice is (start, stop, vocab_size, sequence_parallel). Every rank gets the same list, so all raise the same error.
    """
    holds = ", ".join(f"rank {rank} holds {start} .. {stop}" for rank, (start, stop, *_) in enumerate(slices))
    for start, stop, *_ in slices:
        if any(isinstance(x, bool) or not isinstance(x, int) for x in (start, stop)):
            raise TypeError(f"start and stop must be ints, got: {holds}")
    same("vocab_size", [size for _, _, size, _ in slices])
    same("sequence_parallel", [parallel for _, _, _, parallel in slices])
    end = 0
    for start, stop, *_ in sorted(slices, key=lambda x: (x[0], x[1])):
        if start != end or stop <= start:
            what = "are empty" if stop <= start else "overlap" if start < end else f"leave out {end} .. {start}"
            raise ValueError(f"shard: slices must cover the vocabulary once, but some {what}, got: {holds}")
        end = stop
    return tuple((start, stop) for start, stop, *_ in slices)
