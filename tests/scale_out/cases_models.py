"""Ten optimizer steps under FSDP2, DDP and FSDP2 x tensor parallel equal those of one process on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import kdloss
from cases import TABLE
from contract import call, public_function
from scale_out.ranks import Ranks, on
from scale_out.tiny_qwen3 import VOCABULARY, Tiny

STEPS, SEQUENCES, MAX_NORM = 10, 6, 0.05
# Bound of the difference between the parameters' change and that in one process, relative to its norm. In float64 only
# the order of sums differs: about 1e-16 per step, which Adam's division by a small gradient amplifies.
EXACT = 1e-10
# In mixed precision every rank rounds its own activations and gradients to bfloat16. Both runs then differ from the
# float64 run, by the same amount but in different directions.
AS_GOOD = 1.5


@dataclass
class Batch:
    """The packed sequences of one step, or one rank's share of them."""

    ids: Tensor
    segments: Tensor
    labels: Tensor
    loss_mask: Tensor
    old_logp: Tensor
    advantages: Tensor

    def of(self, part: int, parts: int) -> Batch:
        """Every `parts`-th sequence, of uneven lengths."""
        mine = self.segments % parts == part
        return Batch(*(x[mine] for x in vars(self).values()))


def batch(ranks: Ranks, step: int) -> Batch:
    lengths = 2 + ranks.integers(7, SEQUENCES, seed=100 + step)
    if step % 3 == 2:
        parts = 2 + step // 3
        # the last of two ranks has no token; in later steps the last of three, then of four
        lengths[parts - 1 :: parts] = 0
    cu_seqlens = kdloss.cu_seqlens_from_lengths(lengths)
    T = int(cu_seqlens[-1])
    ids = ranks.integers(VOCABULARY, T, seed=step)
    segments = kdloss.segment_ids(cu_seqlens, total_tokens=T)
    mask = kdloss.response_mask(torch.ones(SEQUENCES, dtype=torch.int64), cu_seqlens=cu_seqlens, total_tokens=T)
    if step % 3 == 1:
        mask &= segments % 2 > 0  # some of two or four ranks have nothing to train on
    return Batch(
        ids,
        segments,
        kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens),
        mask,
        -3.5 + 0.3 * ranks.normal(T, seed=200 + step, dtype=torch.float64),
        ranks.normal(T, seed=300 + step, dtype=torch.float64),
    )


def teacher_logp(teacher: nn.Module, b: Batch) -> Tensor:
    def score(hidden: Tensor, head: Tensor) -> Tensor:
        return kdloss.linear_token_logprobs(hidden, head, b.labels, loss_mask=b.loss_mask, shard=shard_of(head))

    with torch.no_grad():
        return teacher(b.ids, b.segments, score)


def two_steps(hidden: Tensor, head: Tensor, b: Batch, teacher: Tensor, normalizer: Tensor) -> Tensor:
    logp = kdloss.linear_token_logprobs(hidden, head, b.labels, loss_mask=b.loss_mask, shard=shard_of(head))
    return kdloss.kdrl_loss(
        logp,
        b.old_logp,
        teacher,
        b.advantages,
        loss_mask=b.loss_mask,
        distill_loss_weight=0.5,
        normalizer=normalizer,
    ).loss


def fused(hidden: Tensor, head: Tensor, b: Batch, teacher: Tensor, normalizer: Tensor) -> Tensor:
    def token_loss(logp, entropy, old_logp, teacher_logp, advantages, mask):
        return kdloss.kdrl_token_loss(logp, old_logp, teacher_logp, advantages, loss_mask=mask, distill_loss_weight=0.5)

    inputs = (b.old_logp, teacher, b.advantages, b.loss_mask)
    return kdloss.fused_linear_loss(
        hidden,
        head,
        b.labels,
        token_loss,
        *inputs,
        loss_mask=b.loss_mask,
        normalizer=normalizer,
        shard=shard_of(head),
    ).loss


def shard_of(head: Tensor) -> kdloss.VocabShard | None:
    return kdloss.VocabShard.from_dtensor(head) if isinstance(head, DTensor) else None


def clip(parameters: list[nn.Parameter]) -> Tensor:
    """Clips to MAX_NORM. Parameters on different meshes have one norm each; the norms are combined into one."""
    meshes: dict[object, list[Tensor]] = {}
    for p in parameters:
        meshes.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p.grad)
    norms = [get_total_norm(gradients) for gradients in meshes.values()]
    norm = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in norms]).norm()
    for mesh in meshes:
        of_mesh = [p for p in parameters if (p.device_mesh if isinstance(p, DTensor) else None) == mesh]
        clip_grads_with_norm_(of_mesh, MAX_NORM, norm)
    return norm


def models() -> tuple[Tiny, Tiny]:
    torch.manual_seed(0)
    student, teacher = Tiny(16), Tiny(24)
    for p in [*student.parameters(), *teacher.parameters()]:
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    return student, teacher


Loss = Callable[..., Tensor]


def train(
    ranks: Ranks,
    student: nn.Module,
    teacher: nn.Module,
    loss: Loss,
    *,
    part: int = 0,
    parts: int = 1,
    group=None,
    mixed: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Ten steps on every `parts`-th sequence. Returns the whole final parameters and each step's unclipped norm."""
    parameters = list(student.parameters())
    # no Adam in mixed precision: it would take full-size steps on gradients that are only rounding
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9) if mixed else torch.optim.AdamW(parameters, lr=3e-3)
    norms = []
    for step in range(STEPS):
        b = batch(ranks, step).of(part, parts)
        count = b.loss_mask.sum() if group is None else kdloss.global_token_count(b.loss_mask, group=group)
        reference = teacher_logp(teacher, b)
        student(
            b.ids, b.segments, lambda h, w, b=b, r=reference, n=count: loss(h, w, b, r, n.double() / parts)
        ).backward()
        norms.append(clip(parameters).detach().double())
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > MAX_NORM, "no gradient was clipped"
    whole = [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters]
    return whole, torch.stack(norms)


class Cast(nn.Module):
    """Mixed precision in one process: parameters and their gradients are rounded to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: object) -> Tensor:
        rounded = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, rounded, arguments)


def same_way(found: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor], begin: list[Tensor]) -> None:
    # Adam and clipping remove a gradient's scale; the norms still have it
    torch.testing.assert_close(found[1], expected[1], rtol=EXACT, atol=0)
    for x, y, start in zip(found[0], expected[0], begin, strict=True):
        way = (y - start).norm()
        assert way > 0
        assert (x - y).norm() <= EXACT * way, f"{(x - y).norm() / way:.1e} of {tuple(x.shape)}"


def whole_vector(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def sharded(model: Tiny, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Tiny:
    """Shards each block by itself, and the rest with the root: the embedding (also the head) and the last norm."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@on(2, 3, 4)
def case_fsdp2(ranks: Ranks) -> None:
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    for loss in (two_steps, fused):
        student, teacher = (x.double() for x in models())
        begin = [p.detach().clone() for p in student.parameters()]
        expected = train(ranks, copy.deepcopy(student), teacher, loss)
        pair = [sharded(x, mesh, MixedPrecisionPolicy()) for x in (student, teacher)]
        found = train(ranks, *pair, loss, part=ranks.rank, parts=ranks.size, group=ranks.group)
        same_way(found, expected, begin)


@on(2, 4)
def case_fsdp2_mixed_precision(ranks: Ranks) -> None:
    """Parameters, gradient sums and the optimizer in float32, everything in between in bfloat16."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for loss in (two_steps, fused):
        student, teacher = models()
        begin = whole_vector(student.parameters())
        exact = [copy.deepcopy(x).double() for x in (student, teacher)]
        truth = whole_vector(train(ranks, *exact, loss, mixed=True)[0])
        alone = [Cast(copy.deepcopy(x)) for x in (student, teacher)]
        expected, norms = train(ranks, *alone, loss, mixed=True)
        pair = [sharded(x, mesh, policy) for x in (student, teacher)]
        found, sharded_norms = train(
            ranks, *pair, loss, part=ranks.rank, parts=ranks.size, group=ranks.group, mixed=True
        )
        # ten roundings of 2**-9 and their consequences
        torch.testing.assert_close(sharded_norms, norms, rtol=2**-4, atol=0)
        assert all(x.dtype == torch.float32 for x in found)
        error, of_one = ((x - truth).norm() / (truth - begin).norm() for x in map(whole_vector, (found, expected)))
        assert of_one < 0.1
        assert error < AS_GOOD * of_one


@on(2, 3)
def case_fsdp2_gathers_the_head_once(ranks: Ranks) -> None:
    """Collectives of a step: the root, which holds the head, is gathered once, and its gradient is scattered once."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    b = batch(ranks, 0).of(ranks.rank, ranks.size)
    for loss in (two_steps, fused):
        student = sharded(models()[0].double(), mesh, MixedPrecisionPolicy())
        blocks = len(student.blocks)
        with CommDebugMode() as seen:
            x = student(b.ids, b.segments, lambda h, w, f=loss: f(h, w, b, b.old_logp, torch.tensor(5)))
        assert seen.get_total_counts() == blocks + 1, seen.get_comm_counts()
        with CommDebugMode() as seen:
            x.backward()
        assert seen.get_total_counts() == 2 * blocks + 1, seen.get_comm_counts()


@on(2, 3, 4)
def case_ddp(ranks: Ranks) -> None:
    for loss in (two_steps, fused):
        student, teacher = (x.double() for x in models())
        begin = [p.detach().clone() for p in student.parameters()]
        expected = train(ranks, copy.deepcopy(student), teacher, loss)
        wrapped = DistributedDataParallel(student, process_group=ranks.group)
        found = train(ranks, wrapped, teacher, loss, part=ranks.rank, parts=ranks.size, group=ranks.group)
        same_way(found, expected, begin)
        ranks.same_bits(*found[0])


@on(4)
def case_two_dimensions(ranks: Ranks) -> None:
    """FSDP2 over pairs of ranks; within a pair, the tied embedding and head are split along the vocabulary."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for loss in (two_steps, fused):
        student, teacher = (x.double() for x in models())
        begin = [p.detach().clone() for p in student.parameters()]
        expected = train(ranks, copy.deepcopy(student), teacher, loss)
        for model in (student, teacher):
            rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
            parallelize_module(model.embed, mesh["tensor"], rows)
            sharded(model, mesh["data"], MixedPrecisionPolicy())
        data = mesh["data"]
        found = train(
            ranks, student, teacher, loss, part=data.get_local_rank(), parts=data.size(), group=data.get_group()
        )
        same_way(found, expected, begin)
        ranks.same_bits(*found[0])


@on(4)  # the whole world, which counts are summed over
def case_a_dtensor_among_plain_tensors_is_named(ranks: Ranks) -> None:
    """In every function, for every tensor but those of a head, which may be DTensors. The advice works."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    heads = {f"{side}{name}" for side in ("", "teacher_") for name in ("logits", "hidden", "weight", "bias")}
    for name, entry in TABLE.items():
        arguments = entry.variants["base"]
        tensors = [key for key, x in arguments.items() if isinstance(x, Tensor)]
        for key in tensors:
            if key in heads or len(tensors) == 1:
                continue
            distributed = distribute_tensor(arguments[key], mesh, [Replicate()])
            try:
                call(public_function(name), arguments | {key: distributed})
            except TypeError as error:
                text = str(error)
                assert text.startswith(f"{key} must be a plain tensor beside a plain "), f"{name}({key}=): {text}"
                assert f"pass {key}.full_tensor(), or {key}.to_local()" in text, text
            else:
                raise AssertionError(f"{name} took {key} as a DTensor")
            for plain in (distributed.full_tensor(), distributed.to_local()):
                call(public_function(name), arguments | {key: plain})
