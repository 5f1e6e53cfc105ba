"""`python -m benchmarks.collectives`: collectives and bytes of a step with a vocabulary-sharded head, counted.

Every path runs forward and backward on gloo ranks of this machine, beside the usual form of all-reduces, and each
collective that torch dispatches is counted with the bytes that a rank sends for it by a ring: n - 1 times its share for
an all-gather, (n - 1) / n of the tensor for a reduce-scatter, twice that for an all-reduce. Values agree, or it raises.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

import kdloss

T, V, D = 256, 1000, 64
RESULTS = Path(__file__).parent / "results" / "collectives.md"


# What a rank sends for one collective by a ring, in units of the tensor that it puts in.
RING: dict[str, Callable[[int], float]] = {
    "all_gather_into_tensor": lambda ranks: ranks - 1,
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
}
# The names by which FSDP2 and DDP call them, and at which argument the tensor is that a rank puts in.
PLAIN = {
    "_allgather_base_": ("all_gather_into_tensor", 1),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 1),
    "allreduce_": ("all_reduce", 0),
}


class Count(TorchDispatchMode):
    """Collectives, and the bytes that a rank sends for them, of each group by its ranks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.sent_in = 0, dict[tuple[int, ...], float]()

    @property
    def sent(self) -> float:
        return sum(self.sent_in.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name, *_ = str(func).split(".")
        name = name.rstrip("_") if namespace == "_c10d_functional" else name
        if namespace == "_c10d_functional" and name in RING:
            self._add(name, args[0], _resolve_process_group(args[-1]))
        elif namespace == "c10d":
            if name not in PLAIN:
                raise NotImplementedError(f"{func} is not counted")
            kind, at = PLAIN[name]
            tensors = args[at] if isinstance(args[at], list) else [args[at]]
            for x in tensors:
                self._add(kind, x, dist.ProcessGroup.unbox(args[at + 1] if name == "allreduce_" else args[2]))
        elif namespace == "_c10d_functional" and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise NotImplementedError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, x: Tensor, group: dist.ProcessGroup) -> None:
        size = RING[kind](group.size()) * x.numel() * x.element_size()
        self.number += 1
        ranks = tuple(dist.get_process_group_ranks(group))
        self.sent_in[ranks] = self.sent_in.get(ranks, 0) + size


def all_reduce(x: Tensor, operation: str) -> Tensor:
    ops = torch.ops._c10d_functional
    group = dist.group.WORLD
    assert group is not None
    found: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), operation, group.group_name))
    return found


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient, "sum")


class _Sum(torch.autograd.Function):
    """An all-reduce whose result every rank uses alike: its gradient is what comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x, "sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def all_reduce_form(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """The usual one: the largest logit, the sum of exponentials and the label's logit, an all-reduce each."""
    maximum = all_reduce(logits.detach().amax(-1), "max")
    here = labels - start
    own = (here >= 0) & (here < logits.shape[-1])
    shifted = logits - maximum[:, None]
    picked = shifted.gather(-1, here.clamp(0, logits.shape[-1] - 1)[:, None]).squeeze(-1)
    total = _Sum.apply(shifted.exp().sum(-1))  # type: ignore[no-untyped-call]
    label = _Sum.apply(torch.where(own, picked, 0))  # type: ignore[no-untyped-call]
    return label - total.log()  # type: ignore[no-any-return]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    shard = kdloss.VocabShard.even(V)
    piece = slice(shard.start, shard.stop)
    hidden, weight, teacher = normal(T, D, seed=0), normal(V, D, seed=1)[piece], normal(T, V, seed=2)[:, piece]
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(T, dtype=torch.bool)
    paths: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "logits, three all-reduces": lambda x, h, w: all_reduce_form(x, labels, shard.start),
        "`token_logprobs`": lambda x, h, w: kdloss.token_logprobs(x, labels, shard=shard),
        "hidden, three all-reduces, one of dH": lambda x, h, w: all_reduce_form(
            _SumGradients.apply(h) @ w.T,  # type: ignore[no-untyped-call]
            labels,
            shard.start,
        ),
        "`linear_token_logprobs`": lambda x, h, w: kdloss.linear_token_logprobs(h, w, labels, shard=shard),
        "`fused_linear_loss`": lambda x, h, w: (
            kdloss.fused_linear_loss(h, w, labels, lambda logp, entropy: -logp, loss_mask=mask, shard=shard).loss
        ),
        "`reverse_kl`": lambda x, h, w: kdloss.reverse_kl(x, teacher, shard=shard),
        "`generalized_jsd`": lambda x, h, w: kdloss.generalized_jsd(x, teacher, beta=0.5, shard=shard),
    }
    lines, values = [], {}
    for name, path in paths.items():
        leaves = [x.clone().requires_grad_() for x in (hidden @ weight.T, hidden, weight)]
        with Count() as forward:
            result = path(*leaves)
        with Count() as backward:
            result.sum().backward()
        values[name] = result.detach()
        lines.append(
            f"| {ranks} | {name} | {forward.number} | {forward.sent / T:.0f} | {backward.number} "
            f"| {backward.sent / T:.0f} |"
        )
    for ours, theirs in (("`token_logprobs`", "logits"), ("`linear_token_logprobs`", "hidden")):
        (other,) = (value for name, value in values.items() if name.startswith(theirs))
        torch.testing.assert_close(values[ours], other, rtol=2e-5, atol=2e-5)
    if rank == 0:
        Path(folder, "lines").write_text("\n".join(lines), encoding="utf-8")
    dist.destroy_process_group()


def table(sizes: tuple[int, ...] = (2, 4)) -> str:
    head = [
        "| ranks | path | forward | bytes a token | backward | bytes a token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ranks in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(count, (ranks, folder), nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
            head.append(Path(folder, "lines").read_text(encoding="utf-8"))
    return "\n".join(head)


def main() -> int:
    text = (
        "# Collectives and bytes of a vocabulary-sharded step\n\n"
        f"Counted on gloo, torch {torch.__version__}; float32, D = {D}, one label a token. Bytes are what a rank sends "
        f"by a ring.\n\n{table()}\n"
    )
    RESULTS.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
