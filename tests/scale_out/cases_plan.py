"""The calculated plan of `benchmarks/scale_plan.py`: its bytes equal those of the collectives counted here, exactly."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

import kdloss
from benchmarks import scale_plan
from benchmarks.collectives import Count
from benchmarks.scale_plan import Layout, Model, Sent
from scale_out.ranks import Ranks, on
from scale_out.tiny_qwen3 import GROUPS, HEAD_WIDTH, HEADS, VOCABULARY, Tiny

WIDTH, T = 16, 9
AXES = ("replicate", "shard", "tensor")


def sizes(layers: int) -> Model:
    """`Tiny` in the terms of the plan."""
    return Model(
        layers,
        WIDTH,
        HEADS * HEAD_WIDTH,
        GROUPS * HEAD_WIDTH,
        2 * WIDTH,
        VOCABULARY,
        tied=True,
        head_norms=2 * HEAD_WIDTH,
    )


def laid_out(model: Tiny, mesh: DeviceMesh, *, trains: bool) -> Tiny:
    """Torch's tensor parallelism, checkpointing for training, then FSDP2 with the policy of docs/fsdp.md."""
    tensor = mesh["tensor"]
    whole = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    # a norm's output is one DTensor for all matrices after it, so its gradient is summed over the ranks once
    norm = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False)
    plan = {name: ColwiseParallel() for name in ("query", "key", "value", "gate", "up")}
    plan |= {"out": RowwiseParallel(), "down": RowwiseParallel(), "before": norm, "between": norm}
    if tensor.size() > 1:
        parallelize_module(model.embed, tensor, whole)
        for block in model.blocks:
            parallelize_module(block, tensor, plan)
    if trains:
        model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in model.blocks)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    over = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
    for module in (*model.blocks, model):
        fully_shard(module, mesh=over, mp_policy=policy)
    return model


def of_axes(count: Count, mesh: DeviceMesh) -> Sent:
    groups = {axis: tuple(dist.get_process_group_ranks(mesh[axis].get_group())) for axis in AXES}
    assert {group for group, sent in count.sent_in.items() if sent} <= set(groups.values()), (count.sent_in, groups)
    return Sent(**{axis: count.sent_in.get(group, 0) for axis, group in groups.items()})


@on(4)
def case_plan_of_a_step(ranks: Ranks) -> None:
    """Training and scoring; every pair of axes, single axes, and without layers, so that only the head is left."""
    ids = ranks.integers(VOCABULARY, T)
    labels, segments = ids.roll(-1), torch.arange(T) // 4
    mask = torch.ones(T, dtype=torch.bool)
    for layers, layout in (
        (2, Layout(2, 2)),
        (3, Layout(1, 2, 2)),
        (1, Layout(2, 1, 2)),
        (1, Layout(1, 4)),
        (0, Layout(4)),
        (0, Layout(2, 2)),
    ):
        mesh = init_device_mesh("cpu", (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=AXES)
        for trains in (True, False):
            model = laid_out(Tiny(WIDTH, layers), mesh, trains=trains)

            def score(hidden: Tensor, head: Tensor) -> Tensor:
                shard = kdloss.VocabShard.from_dtensor(head) if isinstance(head, DTensor) else None
                return kdloss.linear_token_logprobs(hidden, head, labels, loss_mask=mask, shard=shard).sum()

            with Count() as count, torch.set_grad_enabled(trains):
                found = model(ids, segments, score)
                if trains:
                    found.backward()
            expected = scale_plan.sent(sizes(layers), layout, tokens=T, trains=trains)
            assert of_axes(count, mesh) == expected, (layers, layout, trains)
            if trains:
                optimizer = torch.optim.AdamW(model.parameters())
                optimizer.step()
                held = list(model.parameters())
                held += [p.grad for p in held]
                held += [x for of in optimizer.state.values() for x in (of["exp_avg"], of["exp_avg_sq"])]
                here = [x.to_local() if isinstance(x, DTensor) else x for x in held]
                assert sum(x.numel() * x.element_size() for x in here) == scale_plan.state(sizes(layers), layout)


@on(2, 3, 4)
def case_plan_of_the_losses(ranks: Ranks) -> None:
    """Bytes that each loss of the plan sends for a vocabulary split across ranks, and the head's share of a step."""
    group, n = ranks.group, ranks.size
    shard = kdloss.VocabShard.even(VOCABULARY, group)
    hidden = ranks.normal(T, WIDTH).bfloat16()
    weight = ranks.normal(VOCABULARY, WIDTH, seed=1)[shard.start : shard.stop].bfloat16()
    labels, mask = ranks.integers(VOCABULARY, T), torch.ones(T, dtype=torch.bool)
    options = {"loss_mask": mask, "shard": shard}
    losses = {
        "linear_token_logprobs": lambda h, w: kdloss.linear_token_logprobs(h, w, labels, **options),
        "fused_linear_loss": lambda h, w: kdloss.fused_linear_loss(h, w, labels, lambda lp, e: -lp, **options).loss,
        "linear_forward_kl": lambda h, w: kdloss.linear_forward_kl(h, w, hidden, weight + 1, **options),
        "linear_generalized_jsd": lambda h, w: kdloss.linear_generalized_jsd(
            h, w, hidden, weight + 1, beta=0.5, **options
        ),
    }
    assert losses.keys() == scale_plan.NUMBERS.keys()
    for name, loss in losses.items():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        for trains in (False, True):
            with Count() as count:
                found = loss(*leaves)
                if trains:
                    found.sum().backward()
            expected = scale_plan.split_vocabulary(WIDTH, T, n, name, trains=trains)
            assert count.sent == expected, (name, trains)
            of_head = scale_plan.sent_for_head(sizes(2), Layout(n), tokens=T, loss=name, trains=trains)
            assert of_head == Sent(expected, 0, 0), name
