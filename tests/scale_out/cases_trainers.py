"""Cases of adapters whose trainer passes sharded parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, init_device_mesh

from kdloss.integrations.trl import chunked_divergence_loss

from .ranks import Ranks, on


@on(2, 4)
def case_trl_head_that_is_sharded_by_itself(ranks: Ranks) -> None:
    """Each rank has its own tokens; head and bias get the mean gradient over the ranks. Four ranks shard in pairs."""
    hidden, teacher_hidden = (ranks.normal(ranks.size, 2, 5, 6, seed=seed) for seed in (1, 2))
    teacher, mask = ranks.normal(11, 6, seed=3), torch.arange(10).reshape(2, 5) != 4
    head = torch.nn.Linear(6, 11)
    plain = [p.detach().clone().requires_grad_() for p in (head.weight, head.bias)]

    def loss(weight: Tensor, bias: Tensor, rank: int) -> Tensor:
        states = hidden[rank], teacher_hidden[rank]
        return chunked_divergence_loss(*states, weight, teacher, mask, 1.0, 7, student_lm_head_bias=bias)[0]

    sum(loss(*plain, rank) for rank in range(ranks.size)).div(ranks.size).backward()
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    if ranks.size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(head, mesh=mesh)
    loss(head.weight, head.bias, ranks.rank).backward()
    for mine, expected in zip((head.weight, head.bias), plain, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), expected.grad)
