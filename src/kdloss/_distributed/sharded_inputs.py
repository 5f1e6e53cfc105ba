"""Tensors passed to a loss, plain or DTensors, as plain local tensors with the vocabulary slice that they hold.

Sequence-parallel hidden states are all-gathered here, and their gradient is reduce-scattered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdloss import _checks

from .agreement import check_backend
from .vocab_shard import VocabShard, of_dtensor


def vocab_shard(name: str, x: Tensor, axis: int, shard: object) -> tuple[Tensor, VocabShard | None]:
    """`x` as a plain tensor, and the slice that its vocabulary axis holds; None for the whole vocabulary."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}")
    if _checks.is_dtensor(x):
        found = of_dtensor(name, x, axis)
        if shard is not None and (found is None or (found.start, found.stop) != (shard.start, shard.stop)):
            raise ValueError(f"shard must match the placement of {name}, {found}, got {shard}")
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
    """Hidden states, weight and bias as plain tensors, and the vocabulary slice that the head holds."""
    if _checks.is_dtensor(weight) and not _checks.is_dtensor(hidden) and shard is None:
        raise ValueError(
            f"{side}weight is a DTensor beside a plain {side}hidden, got {weight.placements}; under FSDP2, use "  # type: ignore[attr-defined]
            "kdloss.output_head(module), or call this inside the module's forward. Under tensor parallelism, pass "
            f"shard=VocabShard.from_dtensor({side}weight) if {side}hidden is the same on all its ranks"
        )
    weight, found = vocab_shard(f"{side}weight", weight, 0, shard)
    if bias is not None and _checks.is_dtensor(bias):
        bias, _ = vocab_shard(f"{side}bias", bias, 0, found)
    if _checks.is_dtensor(hidden):
        hidden = _local_hidden(f"{side}hidden", hidden, found)
    if found is not None and found.sequence_parallel and not found.gathered:
        _checks.tensors(**{f"{side}hidden": hidden})
        hidden = _GatherSequence.apply(hidden, found.size, found.group_name)  # type: ignore[no-untyped-call]
        found = found.with_rows_gathered(True)
    return hidden, weight, bias, found


def _local_hidden(name: str, hidden: Tensor, shard: VocabShard | None) -> Tensor:
    """DTensor hidden states as a plain tensor: replicated, or split by rows across the ranks of the shard."""
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


class _GatherSequence(torch.autograd.Function):
    """All-gather the rows (T / ranks, D) of every rank to (T, D). Backward, reduce-scatter the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int, group_name: str) -> Tensor:
        ctx.size, ctx.group_name = size, group_name
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(hidden.contiguous(), size, group_name))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ops = torch.ops._c10d_functional
        scattered = ops.reduce_scatter_tensor(gradient.contiguous(), "sum", ctx.size, ctx.group_name)
        found: Tensor = ops.wait_tensor(scattered)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = _checks.refuse_second_derivative("a vocabulary-sharded head", found.detach(), gradient)
        return found, None, None
