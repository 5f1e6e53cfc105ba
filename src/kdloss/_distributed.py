"""Every collective of the library, and `VocabShard`, the mark of a head whose vocabulary is split across ranks.

There are three of them. `gather` brings a few numbers a row (or a sequence) from each rank to all of them; what is
made of them is made in rank order, so every rank holds the same bits. Hidden states, before they meet a part of a
head, pass `VocabShard.enter`: the same values forward, the sum of all parts' gradients backward, by one all-reduce or,
where they come split by rows, by an all-gather forward and a reduce-scatter backward. `VocabShard` compares its slice
with those of the other ranks once, when it is made.

Kernels know nothing of this: they see one part of each row, and the rows are put together between the kernel and what
is computed from it. Collectives are torch's functional ones, which run as they are and compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks


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
            _gather_objects((start, stop, None, sequence_parallel), self.group)
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
        found = _gather_objects((vocab_size, sequence_parallel), shard.group)  # before any check that one rank may fail
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
        found = _of_dtensor("head", head)
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
        found = _gather_objects((mine, vocab_size, total_tokens), self.group)
        _agreed([slice_ for slice_, _, _ in found])
        _same("vocab_size", [size for _, size, _ in found])
        _same("total_tokens", [tokens for _, _, tokens in found])

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


def vocab_shard(name: str, x: Tensor, axis: int, shard: object) -> tuple[Tensor, VocabShard | None]:
    """`x` as a plain tensor, and which slice of the vocabulary axis it is; None where it is all of it."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}")
    if _is_dtensor(x):
        found = _of_dtensor(name, x, axis)
        if shard is not None and (found is None or (found.start, found.stop) != (shard.start, shard.stop)):
            raise ValueError(f"shard must be the slice that {name} is placed as, {found}, got {shard}")
        shard, x = shard or found, x.to_local()  # type: ignore[attr-defined]
    if shard is None:
        return x, None
    _checks.tensors(**{name: x})
    if x.ndim > 0 and x.shape[axis] != shard.stop - shard.start:
        raise ValueError(
            f"{name} must hold the {shard.stop - shard.start} entries of its shard {shard}, got {tuple(x.shape)}"
        )
    check_backend(name, x, shard.group)
    return x, shard


def head_shard(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: object, side: str = ""
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Hidden states, head and bias as plain tensors, and which slice the head is."""
    if _is_dtensor(weight) and not _is_dtensor(hidden) and shard is None:
        raise ValueError(
            f"{side}weight is a DTensor beside a plain {side}hidden, got {weight.placements}; pass "  # type: ignore[attr-defined]
            f"shard=VocabShard.from_dtensor({side}weight) where {side}hidden is the same on all its ranks (tensor "
            f"parallel). Under FSDP2 call this inside the module's forward, or pass {side}weight.full_tensor()"
        )
    weight, found = vocab_shard(f"{side}weight", weight, 0, shard)
    if bias is not None and _is_dtensor(bias):
        bias, _ = vocab_shard(f"{side}bias", bias, 0, found)
    if _is_dtensor(hidden):
        hidden = _local_hidden(f"{side}hidden", hidden, found)
    if found is not None and found.sequence_parallel and not found.gathered:
        _checks.tensors(**{f"{side}hidden": hidden})
        hidden = _GatherSequence.apply(hidden, found.size, found.group_name)  # type: ignore[no-untyped-call]
        found = found.with_rows_gathered(True)
    return hidden, weight, bias, found


def gather(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """`x` of every rank, (ranks, *x.shape) in rank order, without gradient. One collective; all have one shape."""
    if isinstance(group, VocabShard):
        size, name = group.size, group.group_name
    else:
        size, name = group.size(), group.group_name
    if x.numel() == 0:  # on every rank, as shapes are the same
        return x.new_empty(size, *x.shape)
    ops = torch.ops._c10d_functional
    found = ops.wait_tensor(ops.all_gather_into_tensor(x.detach().contiguous(), size, name))
    return found.view(size, *x.shape)  # type: ignore[no-any-return]


def ordered_sum(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """The sum of `x` over the ranks, added in their order, so that it is the same to the bit on each."""
    parts = gather(x, group).unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def in_step(group: ProcessGroup | None, x: object) -> AbstractContextManager[dict[str, Any]]:
    """This rank's checks stand inside: what one rank raises, all raise, and so where they differ in what they put in.

    A rank that raised by itself would leave the others waiting in the next collective. Telling one another takes a
    collective that waits, so it is left out where other checks of values are: off the CPU and under `torch.compile`.

    Args:
        group: None: nothing is told.
        x: the first argument of the checked function, a tensor or what came in its place.
    """
    if group is None or torch.compiler.is_compiling():
        return nullcontext({})
    like = x if isinstance(x, Tensor) else torch.empty(0)
    check_group(group, like)
    return _told(group) if _checks.value_checks_allowed(like) else nullcontext({})


@contextmanager
def _told(group: ProcessGroup) -> Iterator[dict[str, Any]]:
    agreed: dict[str, Any] = {}
    error = None
    try:
        yield agreed
    except (TypeError, ValueError) as caught:
        error = caught
    told = _gather_objects((None if error is None else (isinstance(error, TypeError), str(error)), agreed), group)
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(told):
        if failed is not None:
            raise (TypeError if failed[0] else ValueError)(f"on rank {rank} of the group: {failed[1]}")
    for name in sorted({name for _, theirs in told for name in theirs}):
        _same(name, [theirs.get(name) for _, theirs in told])


def check_group(group: object, x: Tensor, name: str = "group") -> None:
    """`group` is a process group that this process is in and that takes tensors like `x`; None is passed over."""
    if group is None or torch.compiler.is_compiling():
        return
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    check_backend("the tensors", x, group)


def check_backend(name: str, x: Tensor, group: ProcessGroup) -> None:
    """The group's backend can carry `x`: found here, on every rank, and not inside a collective."""
    if torch.compiler.is_compiling():
        return
    kinds = [device.type for device in group._device_types]
    if x.device.type not in kinds:
        raise ValueError(
            f"group must have a backend for {name} on {x.device.type}, got one for {', '.join(kinds)} "
            f"({dist.get_backend(group)}): nccl takes CUDA tensors, gloo takes tensors of the CPU"
        )


def global_token_count(
    loss_mask: Tensor,  # any shape, bool
    *,
    group: ProcessGroup | None = None,
) -> Tensor:  # () int64
    """Trained tokens of all ranks: the `normalizer` of one data-parallel step, or of one micro-batch of it.

    Args:
        loss_mask: bool, of this rank's tokens. A rank may have none.
        group: the ranks to count. None: all of them, or this process alone where torch.distributed is not in use.

    Returns:
        () int64, the same on every rank. Divide it by the world size under wrappers that average gradients.

    Raises:
        TypeError: `loss_mask` is not bool, or `group` no process group.
    """
    with in_step(all_ranks(group), loss_mask):
        _checks.tensors(loss_mask=loss_mask)
        _checks.boolean(loss_mask=loss_mask)
    return global_sum(loss_mask.sum(), group)


def all_ranks(group: ProcessGroup | None) -> ProcessGroup | None:
    """`group`, or that of all ranks where there are any."""
    return dist.group.WORLD if group is None and dist.is_available() and dist.is_initialized() else group


def global_sum(count: Tensor, group: ProcessGroup | None) -> Tensor:
    """Over `group`, or over all ranks where there are any."""
    group = all_ranks(group)
    if group is None:
        return count
    check_group(group, count)
    return ordered_sum(count.reshape(1), group).squeeze(0)


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks: each of them knows its own slice's share alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.sum_gradients(gradient), None


class _GatherSequence(torch.autograd.Function):
    """Rows (T / ranks, D) of every rank, (T, D); each rank gets the gradient of its own, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int, group_name: str) -> Tensor:
        ctx.size, ctx.group_name = size, group_name
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(hidden.contiguous(), size, group_name))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ops = torch.ops._c10d_functional
        scattered = ops.reduce_scatter_tensor(gradient.contiguous(), "sum", ctx.size, ctx.group_name)
        return ops.wait_tensor(scattered), None, None


def _is_dtensor(x: object) -> bool:
    # by its class's own module, as importing it takes a second that most users have no use for
    return type(x).__module__.startswith("torch.distributed.tensor") and type(x).__name__ == "DTensor"


def _of_dtensor(name: str, x: Tensor, axis: int | None = None) -> VocabShard | None:
    """The slice of the vocabulary axis that a DTensor holds; None where it is replicated."""
    if not _is_dtensor(x):
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


def _local_hidden(name: str, hidden: Tensor, shard: VocabShard | None) -> Tensor:
    """Replicated hidden states, or rows that are split across the shard's own ranks, as a plain tensor."""
    placements = hidden.placements  # type: ignore[attr-defined]
    split = [(at, placement) for at, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return hidden.to_local()  # type: ignore[attr-defined, no-any-return]
    if len(split) > 1 or not split[0][1].is_shard(0) or shard is None or not shard.sequence_parallel:
        raise ValueError(
            f"{name} must be replicated, or placed Shard(0) with a shard that is sequence_parallel, got {placements}"
        )
    group = hidden.device_mesh.get_group(split[0][0])  # type: ignore[attr-defined]
    if group.group_name != shard.group_name:
        ranks, own = dist.get_process_group_ranks(group), dist.get_process_group_ranks(shard.group)
        if ranks != own:
            raise ValueError(
                f"{name} must be split across the ranks of its shard, {own}, got {placements}, across ranks {ranks}"
            )
    if hidden.shape[0] % shard.size:
        rows = hidden.shape[0]
        raise ValueError(f"{name} must hold a multiple of {shard.size} rows, got {rows}: pad them, labels with -100")
    return hidden.to_local()  # type: ignore[attr-defined, no-any-return]


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


def _gather_objects(mine: Any, group: ProcessGroup) -> list[Any]:
    found = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def _agreed(slices: list[Any]) -> tuple[tuple[int, int], ...]:
    """The bounds of all ranks, where they cover 0 .. V - 1 once; every rank sees the same list and the same error."""
    holds = ", ".join(f"rank {rank} holds {start} .. {stop}" for rank, (start, stop, *_) in enumerate(slices))
    for start, stop, *_ in slices:
        if any(isinstance(x, bool) or not isinstance(x, int) for x in (start, stop)):
            raise TypeError(f"start and stop must be ints, got: {holds}")
    _same("vocab_size", [size for _, _, size, _ in slices])
    _same("sequence_parallel", [parallel for _, _, _, parallel in slices])
    end = 0
    for start, stop, *_ in sorted(slices, key=lambda x: (x[0], x[1])):
        if start != end or stop <= start:
            what = "is empty" if stop <= start else "overlap" if start < end else f"leave out {end} .. {start}"
            raise ValueError(f"shard: slices must cover the vocabulary once, but some {what}, got: {holds}")
        end = stop
    return tuple((start, stop) for start, stop, *_ in slices)


def _same(name: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        which = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(f"{name} must be the same on every rank of the group, got {which}")
