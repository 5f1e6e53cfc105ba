"""`output_head` outside the forward of a sharded model: the gradients are those of one process on the whole batch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import kdloss

from .ranks import Ranks, on

V, D, T = 11, 6, 5


class Outputs(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Model(nn.Module):
    """A body and a head, with the interface of a model of transformers; its logits are scaled and capped."""

    base_model_prefix = "body"

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D))
        self.lm_head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.body[0].weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, *, logits: bool = True) -> Outputs:
        hidden = self.body(input_ids)
        if not isinstance(hidden, Tensor):  # a stand-in for the body
            hidden = hidden.last_hidden_state
        return Outputs(2 * torch.tanh(0.5 * self.lm_head(hidden) / 2) if logits else hidden, hidden)


def model(**options: bool) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def loss(ranks: Ranks, whole: nn.Module, head: nn.Module, rank: int, *, logits: bool = False) -> Tensor:
    """The loss of a rank's own tokens: the body by the model's forward, the head by `output_head` after it."""
    ids, labels = (ranks.integers(V, ranks.size, T, seed=seed)[rank] for seed in (1, 2))
    hidden = whole(ids, logits=logits).hidden
    weight, bias, softcap, scale = kdloss.output_head(head)
    found = kdloss.linear_token_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=scale)
    return found.square().mean()


def gradients(of: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def truth(ranks: Ranks, plain: nn.Module, head: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """The gradients of one process on the tokens of all ranks, averaged over the ranks."""
    plain = copy.deepcopy(plain)
    for rank in range(ranks.size):
        (loss(ranks, plain, head(plain), rank) / ranks.size).backward()
    return gradients(plain)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def refused(refuse: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        refuse()


def mesh_of(ranks: Ranks) -> DeviceMesh:
    """Four ranks shard in pairs, and replicate the shards."""
    if ranks.size == 4:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return DeviceMesh.from_group(ranks.group, "cpu")


@on(2, 3, 4)
def case_head_that_is_sharded_by_itself(ranks: Ranks) -> None:
    for read, reshard, logits in (
        (lambda m: m, True, False),
        (lambda m: m.lm_head, True, False),
        (lambda m: m.lm_head, True, True),  # the forward runs the head too
        (lambda m: m, False, True),  # which leaves it gathered
    ):
        plain, sharded, mesh = model(), model(), mesh_of(ranks)
        fully_shard(sharded.lm_head, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(sharded, mesh=mesh)
        for _ in range(2):  # gradients add up
            loss(ranks, sharded, read(sharded), ranks.rank, logits=logits).backward()
        assert_same(gradients(sharded), {name: 2 * x for name, x in truth(ranks, plain, read).items()})


@on(2, 4)
def case_head_in_the_group_of_the_root(ranks: Ranks) -> None:
    for reshard in (None, True, False):
        for tied in (False, True):
            plain, sharded = model(tied=tied), model(tied=tied)
            fully_shard(sharded, mesh=mesh_of(ranks), reshard_after_forward=reshard)
            loss(ranks, sharded, sharded, ranks.rank).backward()
            assert_same(gradients(sharded), truth(ranks, plain, lambda m: m))
    # the head alone does not lead to the root, so it is refused while it is sharded
    fully_shard(again := model(), mesh=mesh_of(ranks), reshard_after_forward=True)
    way_out = "Under FSDP2, pass the whole model, or call fully_shard on the head too"
    refused(lambda: kdloss.output_head(again.lm_head), way_out)


@on(2)
def case_head_under_another_divisor(ranks: Ranks) -> None:
    plain, sharded = model(), model()
    for module in (sharded.lm_head, sharded):
        fully_shard(module, mesh=mesh_of(ranks))
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to take a factor
        module.set_gradient_divide_factor(1.0)
    loss(ranks, sharded, sharded, ranks.rank).backward()
    assert_same(gradients(sharded), {name: 2 * x for name, x in truth(ranks, plain, lambda m: m).items()})


@on(2)
def case_head_in_mixed_precision(ranks: Ranks) -> None:
    """A sharded head is gathered in float32; one that the forward has gathered is in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for alone in (True, False):
        plain, sharded = model(), model()
        if alone:
            fully_shard(sharded.lm_head, mesh=mesh_of(ranks), mp_policy=policy)
        fully_shard(sharded, mesh=mesh_of(ranks), mp_policy=policy)
        loss(ranks, sharded, sharded, ranks.rank).backward()
        assert all(x.dtype == torch.float32 for x in gradients(sharded).values())
        assert_same(gradients(sharded), truth(ranks, plain, lambda m: m), rtol=0.05, atol=0.01)
        dtype = torch.float32 if alone else torch.bfloat16
        assert kdloss.output_head(sharded).weight.dtype == torch.float32  # the backward has resharded it
        sharded(torch.arange(3), logits=False)
        assert kdloss.output_head(sharded).weight.dtype == dtype


@on(2, 4)
def case_adapted_head_that_is_sharded(ranks: Ranks) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    for options in ({}, {"use_dora": True}, {"lora_bias": True}):
        both = []
        for _ in range(2):
            one = inject_adapter_in_model(LoraConfig(r=3, target_modules=["lm_head"], **options), model())
            for name, p in one.named_parameters():
                p.requires_grad_("lora_" in name or "body" in name)
                if "lora_B" in name:
                    nn.init.normal_(p, generator=torch.Generator().manual_seed(7))
            both.append(one)
        plain, sharded = both
        fully_shard(sharded.lm_head, mesh=mesh_of(ranks))
        fully_shard(sharded, mesh=mesh_of(ranks))
        loss(ranks, sharded, sharded, ranks.rank).backward()
        assert_same(gradients(sharded), truth(ranks, plain, lambda m: m))


@on(2, 3)
def case_head_of_ddp(ranks: Ranks) -> None:
    plain, replica = model(), model()
    wrapped = DistributedDataParallel(replica, process_group=ranks.group)
    loss(ranks, wrapped, wrapped, ranks.rank).backward()
    assert_same(gradients(replica), truth(ranks, plain, lambda m: m))


@on(2)
def case_head_of_tensor_parallelism_is_refused_and_its_way_out_works(ranks: Ranks) -> None:
    head, mesh = model().lm_head, DeviceMesh.from_group(ranks.group, "cpu")
    whole = [p.detach().clone().requires_grad_() for p in (head.weight, head.bias)]
    for name, p in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    hidden, labels = ranks.normal(T, D, seed=3), ranks.integers(V, T, seed=4)
    way_out = "shard=VocabShard.from_dtensor("
    refused(lambda: kdloss.output_head(head), "Under tensor parallelism, pass head.weight to the loss", way_out)
    plain_hidden = (hidden, head.weight, labels)
    refused(lambda: kdloss.linear_token_logprobs(*plain_hidden), "Under tensor parallelism, pass", way_out)
    shard = kdloss.VocabShard.from_dtensor(head.weight)
    found = kdloss.linear_token_logprobs(hidden, head.weight, labels, bias=head.bias, shard=shard)
    expected = kdloss.linear_token_logprobs(hidden, whole[0], labels, bias=whole[1])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), whole[0].grad)


@on(2)
def case_head_that_fsdp1_flattens_is_refused(ranks: Ranks) -> None:
    wrapped = FullyShardedDataParallel(model(), process_group=ranks.group, device_id=torch.device("cpu"))
    way_out = "call the loss inside the forward of the wrapped module"
    refused(lambda: kdloss.output_head(wrapped), "got FullyShardedDataParallel, which flattens", way_out)
    refused(
        lambda: kdloss.output_head(wrapped.module.lm_head),
        "got Linear with (11, 6), split or freed",
        way_out,
    )
