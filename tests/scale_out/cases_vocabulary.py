"""Log-probs of a vocabulary-sharded head: values and gradients equal those of the whole head in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import kdloss
from kdloss._logprobs import from_hidden, fused
from scale_out.ranks import Ranks, on

V, D, T = 23, 6, 9
# Two slices of very different width; three with a single entry in the middle; four that are not in rank order.
UNEVEN = {2: [(0, 17), (17, 23)], 3: [(0, 4), (4, 5), (5, 23)], 4: [(12, 20), (3, 12), (20, 23), (0, 3)]}
# The difference between two orders of summation: a few ulps of numbers around 10; for half-precision gradients, one
# rounding of each of n partial sums.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 4e-6},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-9},
}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.dtype == expected.dtype, what
    torch.testing.assert_close(
        actual, expected, equal_nan=True, **TOLERANCES[dtype], msg=lambda text: f"{what}: {text}"
    )


def shards(ranks: Ranks) -> Iterator[kdloss.VocabShard]:
    yield kdloss.VocabShard.even(V, ranks.group)
    yield kdloss.VocabShard(*UNEVEN[ranks.size][ranks.rank], ranks.group)


def part(x: Tensor, shard: kdloss.VocabShard, axis: int) -> Tensor:
    return x.narrow(axis, shard.start, shard.stop - shard.start)


def labels_and_mask(ranks: Ranks, k: int | None) -> tuple[Tensor, Tensor]:
    labels = ranks.integers(V - 2, T, *([] if k is None else [k]), seed=3)
    labels[4] = -100
    labels[6] = 0
    mask = torch.ones(T, dtype=torch.bool)
    mask[[0, 4, 7]] = False
    return labels, mask


def differentiated(call: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, with the same upstream gradients on every rank."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = [x for x in call(*leaves) if x.numel()]
    upstream = [Ranks.normal(None, *x.shape, seed=11, dtype=x.dtype) for x in found]
    return [x.detach() for x in found], list(torch.autograd.grad(found, leaves, upstream))


@on(2, 3, 4)
def case_from_logits(ranks: Ranks) -> None:
    temperatures = torch.linspace(0.5, 2, T)
    for shard in shards(ranks):
        for dtype in TOLERANCES:
            for k, options in [
                (None, {}),
                (3, {"softcap": 2.0, "temperature": 0.7, "vocab_size": V - 2}),
                (None, {"temperature": temperatures}),
            ]:
                labels, _ = labels_and_mask(ranks, k)
                logits = ranks.normal(T, V, dtype=dtype) * 3
                logits[4] = torch.nan  # no label there
                what = f"{shard} {dtype} {options}"

                def whole(x, labels=labels, options=options):
                    return kdloss.token_logprobs_and_entropy(x, labels, **options)

                def split(x, labels=labels, options=options, shard=shard):
                    return kdloss.token_logprobs_and_entropy(x, labels, shard=shard, **options)

                expected, (gradient,) = differentiated(whole, [logits])
                found, (mine,) = differentiated(split, [part(logits, shard, -1)])
                for x, y in zip(found, expected, strict=True):
                    close(x, y, torch.float32 if dtype == torch.bfloat16 else dtype, what)
                ranks.same_bits(*found)
                close(mine, part(gradient, shard, -1), dtype, f"gradient {what}")
                alone = kdloss.token_logprobs(part(logits, shard, -1), labels, shard=shard, **options)
                assert torch.equal(alone, found[0]), what


@on(2, 3)
def case_hostile_logits(ranks: Ranks) -> None:
    """Logits far from 0 lose no precision; slices without mass, infinities and NaN behave as in one process."""
    shard = kdloss.VocabShard(*UNEVEN[ranks.size][ranks.rank], ranks.group)
    labels = torch.tensor([20, 1, 20, 4, 2, 22])
    logits = ranks.normal(6, V)
    logits[0] += 3e4
    logits[1, 4:] = -torch.inf  # all mass in the first slice
    logits[2, :20] = -torch.inf
    logits[3, 3] = torch.inf
    logits[4] = -torch.inf  # no distribution
    logits[5, 22] = -torch.inf  # the label's logit
    mine = part(logits, shard, -1)
    for x, y in zip(
        kdloss.token_logprobs_and_entropy(mine, labels, shard=shard),
        kdloss.token_logprobs_and_entropy(logits, labels),
        strict=True,
    ):
        close(x, y, torch.float32, "hostile")

    def whole(x):
        return (kdloss.token_logprobs(x, labels)[:3],)

    def split(x):
        return (kdloss.token_logprobs(x, labels, shard=shard)[:3],)

    _, (expected,) = differentiated(whole, [logits])
    _, (found,) = differentiated(split, [mine])
    close(found[:3], part(expected, shard, -1)[:3], torch.float32, "gradient")


@on(2, 3, 4)
def case_from_hidden_states(ranks: Ranks) -> None:
    for shard in shards(ranks):
        for dtype, budget, options in [
            (torch.float64, 1 << 28, {}),
            (torch.float64, 0, {"softcap": 2.0, "logit_scale": 1.3, "temperature": torch.linspace(0.5, 2, T)}),
            (torch.float32, 0, {"vocab_size": V - 2, "max_trained_tokens": 8}),
            (torch.bfloat16, 1 << 28, {}),
        ]:
            labels, mask = labels_and_mask(ranks, 2)
            hidden, weight = ranks.normal(T, D, dtype=dtype), ranks.normal(V, D, seed=1, dtype=dtype)
            bias = ranks.normal(V, seed=2, dtype=dtype)
            hidden[[0, 4]] = torch.nan
            what = f"{shard} {dtype} {options}"

            def whole(h, w, b, labels=labels, mask=mask, options=options):
                return kdloss.linear_token_logprobs_and_entropy(h, w, labels, loss_mask=mask, bias=b, **options)

            def split(h, w, b, labels=labels, mask=mask, options=options, shard=shard):
                return kdloss.linear_token_logprobs_and_entropy(
                    h, w, labels, loss_mask=mask, bias=b, shard=shard, **options
                )

            with mock.patch.object(from_hidden, "KEPT_BYTES", budget):
                expected, (dh, dw, db) = differentiated(whole, [hidden, weight, bias])
                found, mine = differentiated(split, [hidden, part(weight, shard, 0), part(bias, shard, 0)])
            for x, y in zip(found, expected, strict=True):
                close(x, y, torch.float32 if dtype == torch.bfloat16 else dtype, what)
            ranks.same_bits(*found, mine[0])
            close(mine[0], dh, dtype, f"dh {what}")
            close(mine[1], part(dw, shard, 0), dtype, f"dw {what}")
            close(mine[2], part(db, shard, 0), dtype, f"db {what}")


def token_loss(logp, entropy, old_logp, advantages):
    return -(logp - old_logp).exp() * advantages - 0.1 * entropy


@on(2, 3, 4)
def case_fused(ranks: Ranks) -> None:
    """In several chunks, the same on ranks with unequal slices. A trained token without a label has a loss, too."""
    for shard in shards(ranks):
        for dtype in TOLERANCES:
            labels, mask = labels_and_mask(ranks, None)
            hidden, weight = ranks.normal(T, D, dtype=dtype), ranks.normal(V, D, seed=1, dtype=dtype)
            inputs = (ranks.normal(T, seed=4) * 0.1 - 3, ranks.normal(T, seed=5))
            hidden[0] = torch.nan

            def loss(h, w, labels=labels, mask=mask, inputs=inputs, **options):
                return kdloss.fused_linear_loss(h, w, labels, token_loss, *inputs, loss_mask=mask, **options)

            with mock.patch.dict(fused._CHUNK_BYTES, cpu=4 * V * torch.finfo(dtype).bits // 8):
                expected, (dh, dw) = differentiated(lambda h, w, f=loss: f(h, w)[:1], [hidden, weight])
                found, mine = differentiated(
                    lambda h, w, f=loss, shard=shard: f(h, w, shard=shard)[:1], [hidden, part(weight, shard, 0)]
                )
                seen = loss(hidden, part(weight, shard, 0).requires_grad_(), shard=shard)
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            close(found[0], expected[0], wide, "loss")
            close(mine[0], dh, dtype, "dh")
            close(mine[1], part(dw, shard, 0), dtype, "dw")
            whole = loss(hidden, weight)  # two steps: nothing requires grad
            close(seen.logp, whole.logp, wide, "logp")
            close(seen.entropy, whole.entropy, wide, "entropy")
            ranks.same_bits(found[0], mine[0], seen.logp, seen.entropy)


@on(3)
def case_nothing_to_train_on(ranks: Ranks) -> None:
    """No tokens, and no trained tokens: an attached 0 on every rank, whose backward runs."""
    shard = kdloss.VocabShard.even(V, ranks.group)
    for rows in (0, 4):
        hidden = ranks.normal(rows, D).requires_grad_()
        weight = part(ranks.normal(V, D), shard, 0).clone().requires_grad_()
        labels, mask = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
        heads = {"loss_mask": mask, "shard": shard}
        for loss in (
            kdloss.token_mean(kdloss.linear_token_logprobs(hidden, weight, labels, **heads), loss_mask=mask),
            kdloss.fused_linear_loss(hidden, weight, labels, lambda lp, h: -lp, **heads).loss,
            kdloss.linear_forward_kl(hidden, weight, hidden + 1, weight, **heads).sum(),
        ):  # one at a time: a wrapper waits for the gradient of every input
            found = torch.autograd.grad(loss, [hidden, weight])
            assert not any(x.any() for x in found)
        logits = part(ranks.normal(rows, V), shard, -1).clone().requires_grad_()
        kdloss.token_logprobs(logits, labels - 100, shard=shard).sum().backward()
        assert not logits.grad.any()


@on(2, 4)
def case_sequence_parallel(ranks: Ranks) -> None:
    """Hidden states split by rows: they are all-gathered, and their gradient is reduce-scattered."""
    rows = 8
    hidden, weight = ranks.normal(rows, D, dtype=torch.float64), ranks.normal(V, D, seed=1, dtype=torch.float64)
    labels, mask = ranks.integers(V, rows, seed=3), ranks.integers(2, rows, seed=4).bool()
    shard = kdloss.VocabShard.even(V, ranks.group, sequence_parallel=True)
    mine = hidden.chunk(ranks.size)[ranks.rank]

    def logp(h, w, shard=None):
        return kdloss.linear_token_logprobs_and_entropy(h, w, labels, loss_mask=mask, shard=shard)

    def fused(h, w, shard=None):
        return kdloss.fused_linear_loss(h, w, labels, lambda lp, e: -lp * e, loss_mask=mask, shard=shard)[:1]

    for call in (logp, fused):
        expected, (dh, dw) = differentiated(call, [hidden, weight])
        found, gradients = differentiated(lambda h, w, f=call: f(h, w, shard), [mine, part(weight, shard, 0)])
        for x, y in zip(found, expected, strict=True):
            close(x, y, torch.float64, "value")
        close(gradients[0], dh.chunk(ranks.size)[ranks.rank], torch.float64, "dh")
        close(gradients[1], part(dw, shard, 0), torch.float64, "dw")
    with torch.no_grad():
        close(fused(mine, part(weight, shard, 0), shard)[0], fused(hidden, weight)[0], torch.float64, "no_grad")


@on(2, 4)
def case_dtensors(ranks: Ranks) -> None:
    """Logits placed Shard(-1) need no shard; neither does a head placed Shard(0) beside DTensor hidden states."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    logits, labels = ranks.normal(T, V, dtype=torch.float64), ranks.integers(V, T, seed=3)
    hidden, weight = ranks.normal(T, D, dtype=torch.float64), ranks.normal(V, D, seed=1, dtype=torch.float64)
    bias = ranks.normal(V, seed=2, dtype=torch.float64)

    def placed(x, placement):
        return distribute_tensor(x, mesh, [placement]).requires_grad_()

    x = placed(logits, Shard(-1))
    expected, (gradient,) = differentiated(lambda x: (kdloss.token_logprobs(x, labels),), [logits])
    upstream = Ranks.normal(None, T, seed=11, dtype=torch.float64)
    found = kdloss.token_logprobs(x, labels)
    close(found, expected[0], torch.float64, "logits")
    (found * upstream).sum().backward()
    assert x.grad.placements == x.placements
    close(x.grad.full_tensor(), gradient, torch.float64, "gradient of logits")
    for name in ("reverse_kl", "generalized_jsd"):
        options = {"beta": 0.3} if name == "generalized_jsd" else {}
        kl = getattr(kdloss, name)
        close(kl(x, placed(logits.flip(0), Shard(-1)), **options), kl(logits, logits.flip(0), **options), x.dtype, name)
    top = logits[:, :3].log_softmax(-1), torch.arange(3).expand(T, 3)
    kl = partial(kdloss.topk_forward_kl, tail="bucket")
    close(kl(x, *top), kl(logits, *top), x.dtype, "topk")

    mask, teacher_logp = torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.float64)

    def losses(h, w, b, **options):
        logp = kdloss.linear_token_logprobs(h, w, labels, bias=b, **options)
        fused = kdloss.fused_linear_loss(h, w, labels, lambda lp, e: -lp, loss_mask=mask, bias=b, **options)
        kl = kdloss.linear_forward_kl(h, w, h, w, loss_mask=mask, bias=b, teacher_bias=b, **options)
        topk = kdloss.linear_topk_forward_kl(h, w, *top, loss_mask=mask, tail="bucket", bias=b, **options)
        sampled = kdloss.linear_topk_sampled_reverse_kl(h, w, labels, teacher_logp, *top, bias=b, **options)
        return logp, fused.loss, kl, topk, sampled

    expected, gradients = differentiated(losses, [hidden, weight, bias])
    for whole in (placed(hidden, Replicate()), hidden.clone().requires_grad_()):
        w, b = placed(weight, Shard(0)), placed(bias, Shard(0))
        options = {} if isinstance(whole, DTensor) else {"shard": kdloss.VocabShard.from_dtensor(w)}
        found = losses(whole, w, b, **options)
        sum((y * Ranks.normal(None, *y.shape, seed=11, dtype=y.dtype)).sum() for y in found).backward()
        for y, z in zip(found, expected, strict=True):
            close(y.detach(), z, torch.float64, "from hidden states")
        close(w.grad.full_tensor(), gradients[1], torch.float64, "dw")
        close(b.grad.full_tensor(), gradients[2], torch.float64, "db")
        dh = whole.grad if not isinstance(whole, DTensor) else whole.grad.full_tensor()
        close(dh, gradients[0], torch.float64, "dh")

    raises(
        ValueError, "split along its vocabulary axis 1 on one", kdloss.token_logprobs, placed(logits, Shard(0)), labels
    )
    raises(ValueError, "weight is a DTensor beside a plain hidden", kdloss.linear_token_logprobs, hidden, w, labels)
    other = kdloss.VocabShard(*UNEVEN[ranks.size][ranks.rank], ranks.group)
    raises(ValueError, "shard must match the placement of logits", kdloss.token_logprobs, x, labels, shard=other)
    raises(ValueError, "hidden must be replicated", losses, placed(hidden, Shard(0)), w, b)
    raises(TypeError, "head must be a DTensor, got Tensor", kdloss.VocabShard.from_dtensor, weight)


@on(4)
def case_dtensors_of_two_dimensions(ranks: Ranks) -> None:
    """The vocabulary split along one axis of a mesh and replicated along the other; along both axes it is refused."""
    mesh = init_device_mesh("cpu", (2, 2))
    logits, labels = ranks.normal(T, V, dtype=torch.float64), ranks.integers(V, T, seed=3)
    hidden, weight = ranks.normal(T, D, dtype=torch.float64), ranks.normal(V, D, seed=1, dtype=torch.float64)

    def losses(x, h, w):
        return kdloss.token_logprobs(x, labels), kdloss.linear_token_logprobs(h, w, labels)

    expected, gradients = differentiated(losses, [logits, hidden, weight])
    for axis in (0, 1):
        leaves = []
        for x, split in ((logits, Shard(-1)), (hidden, Replicate()), (weight, Shard(0))):
            placements = [Replicate(), Replicate()]
            placements[axis] = split
            leaves.append(distribute_tensor(x, mesh, placements).requires_grad_())
        found = losses(*leaves)
        sum((y * Ranks.normal(None, *y.shape, seed=11, dtype=y.dtype)).sum() for y in found).backward()
        for y, z in zip(found, expected, strict=True):
            close(y.detach(), z, torch.float64, f"axis {axis}")
        for leaf, z in zip(leaves, gradients, strict=True):
            close(leaf.grad.full_tensor(), z, torch.float64, f"gradient, axis {axis}")
    head = distribute_tensor(weight, mesh, [Replicate(), Shard(0)])
    shard = kdloss.VocabShard.from_dtensor(head, sequence_parallel=True)
    even, few = hidden[: T // 2 * 2], labels[: T // 2 * 2]
    rows = distribute_tensor(even, mesh, [Replicate(), Shard(0)])
    found = kdloss.linear_token_logprobs(rows, head, few, shard=shard)
    close(found.detach(), kdloss.linear_token_logprobs(even, weight, few), torch.float64, "rows across the shard")
    rows = distribute_tensor(even, mesh, [Shard(0), Replicate()])
    refused = kdloss.linear_token_logprobs
    raises(ValueError, "hidden must be split across the ranks of its shard", refused, rows, head, few, shard=shard)
    rows = distribute_tensor(hidden[: T // 2 * 2 - 1], mesh, [Replicate(), Shard(0)])
    raises(ValueError, "hidden must hold a multiple of 2 rows", refused, rows, head, few[:-1], shard=shard)
    rows = distribute_tensor(torch.cat([even[:-1], 0 * even[:1]]), mesh, [Replicate(), Shard(0)])  # padded
    ignored = few.index_fill(0, torch.tensor([len(few) - 1]), -100)
    found = kdloss.linear_token_logprobs(rows, head, ignored, shard=shard)
    close(found.detach(), kdloss.linear_token_logprobs(even, weight, ignored), torch.float64, "padded rows")
    both = distribute_tensor(ranks.normal(T, 24), mesh, [Shard(-1), Shard(-1)])
    raises(ValueError, "split along its vocabulary axis 1 on one axis of its mesh", kdloss.token_logprobs, both, labels)


def raises(error, text, call, *arguments, **keywords):
    """Checks this rank. If the case goes on, all ranks raised and none hangs."""
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    assert text in str(caught.value), str(caught.value)


@on(2, 3, 4)
def case_bad_set_ups(ranks: Ranks) -> None:
    n, rank, group = ranks.size, ranks.rank, ranks.group
    Shard_ = kdloss.VocabShard  # noqa: N806
    raises(
        ValueError,
        "some leave out 4 .. 5, got: rank 0 holds 0 .. 4, rank 1 holds 5 .. 9",
        Shard_,
        5 * rank,
        5 * rank + 4,
        group,
    )
    raises(ValueError, "some overlap, got: rank 0 holds 0 .. 6", Shard_, 5 * rank, 5 * rank + 6, group)
    raises(ValueError, "some are empty", Shard_, min(rank, 1) * 5, 5, group)
    raises(ValueError, "leave out 0 .. 1", Shard_, 5 * rank + 1, 5 * rank + 6, group)
    raises(TypeError, "start and stop must be ints", Shard_, 5.0 * rank, 5 * rank + 5, group)
    raises(ValueError, "vocab_size must be the same on every rank", Shard_.even, 40 - rank, group)
    raises(TypeError, "vocab_size must be an int, got NoneType", Shard_.even, 40 if rank else None, group)
    raises(ValueError, "are empty", Shard_.even, n - 1, group)
    raises(
        ValueError,
        "sequence_parallel must be the same on every rank",
        lambda: Shard_.even(40, group, sequence_parallel=rank == 0),
    )
    raises(TypeError, "group must be a torch.distributed.ProcessGroup or None, got str", Shard_, 0, 5, "tensor")
    shard = Shard_.even(V, group)
    shard.validate(vocab_size=V, total_tokens=7)
    raises(
        ValueError,
        "vocab_size must be the same on every rank of the group, got 20 on rank 0",
        shard.validate,
        vocab_size=20 + rank,
    )
    raises(ValueError, "total_tokens must be the same on every rank", shard.validate, total_tokens=20 + rank)
    moved = Shard_.even(V, group)
    moved.start -= int(rank == 1)
    raises(ValueError, "some overlap, got: rank 0 holds", moved.validate)
    logits, labels = ranks.normal(3, V), ranks.integers(V, 3)
    mine = part(logits, shard, -1)
    raises(ValueError, "logits must hold the", kdloss.token_logprobs, logits, labels, shard=shard)
    raises(
        ValueError,
        "labels must be -100 (ignored) or in 0 .. 22, got 23",
        kdloss.token_logprobs,
        mine,
        labels * 0 + V,
        shard=shard,
    )
    raises(
        ValueError,
        "must leave every rank of the shard an entry, got 2",
        kdloss.token_logprobs,
        mine,
        labels * 0,
        shard=shard,
        vocab_size=2,
    )
    raises(ValueError, "vocab_size must be in 1 .. 23", kdloss.token_logprobs, mine, labels, shard=shard, vocab_size=24)
    weight = part(ranks.normal(V, D, seed=1), shard, 0)
    unlabelled, mask = labels.index_fill(0, torch.tensor([1]), -100), torch.ones(3, dtype=torch.bool)
    rows = (ranks.normal(3, D), weight)
    options = {"loss_mask": mask, "shard": shard}
    message = "loss_mask must be False where labels are -100 (ignored), got True at 1 of 3 trained tokens"
    raises(ValueError, message, kdloss.linear_token_logprobs, *rows, unlabelled, **options)
    raises(ValueError, message, kdloss.fused_linear_loss, *rows, unlabelled, lambda lp, e: -lp, **options)
    assert kdloss.linear_token_logprobs(*rows, labels, **options).isfinite().all()


@on(4)
def case_a_group_that_cannot_carry_the_tensors(ranks: Ranks) -> None:
    cuda_only = dist.new_group(backend="cuda:gloo")
    logits, labels = ranks.normal(3, 8), ranks.integers(V, 3)
    shard = kdloss.VocabShard.even(32, ranks.group)
    shard.group = cuda_only
    message = "group must have a backend for logits on cpu, got one for cuda"
    raises(ValueError, message, kdloss.token_logprobs, logits, labels, shard=shard)
    mask = torch.ones(3, dtype=torch.bool)
    raises(ValueError, "group must have a backend for", kdloss.global_token_count, mask, group=cuda_only)
    pair = dist.new_group([0, 1])
    if ranks.rank > 1:
        raises(
            ValueError,
            f"group must contain this process, but rank {ranks.rank} is not",
            kdloss.VocabShard.even,
            32,
            pair,
        )


@on(2)
def case_compiled(ranks: Ranks) -> None:
    """With fullgraph=True, forward and backward: the collectives are functional ones."""
    shard = kdloss.VocabShard.even(V, ranks.group)
    rows_cut = kdloss.VocabShard.even(V, ranks.group, sequence_parallel=True)
    labels, mask = labels_and_mask(ranks, None)
    logits, teacher = part(ranks.normal(T, V), shard, -1), part(ranks.normal(T, V, seed=9), shard, -1)
    hidden, weight = ranks.normal(T, D), part(ranks.normal(V, D, seed=1), shard, 0)
    kept = torch.arange(3).expand(T, 3)
    calls = [
        (lambda x: kdloss.token_logprobs_and_entropy(x, labels, shard=shard), [logits]),
        (
            lambda h, w: kdloss.linear_token_logprobs_and_entropy(h, w, labels, loss_mask=mask, shard=shard),
            [hidden, weight],
        ),
        (lambda x: (kdloss.generalized_jsd(x, teacher, beta=0.3, shard=shard),), [logits]),
        (
            lambda h, w: (kdloss.linear_reverse_kl(h, w, h.detach() + 1, w.detach(), loss_mask=mask, shard=shard),),
            [hidden, weight],
        ),
        (
            lambda h, w: (
                kdloss.linear_reverse_kl(h, w, h.detach() + 1, w.detach(), loss_mask=mask[1:], shard=rows_cut),
            ),
            [hidden[1:].chunk(ranks.size)[ranks.rank], weight],
        ),
        (lambda x: (kdloss.topk_reverse_kl(x, teacher[:, :3] - 4, kept, tail="bucket", shard=shard),), [logits]),
    ]
    for number, (call, leaves) in enumerate(calls):
        expected, gradients = differentiated(call, leaves)
        found, mine = differentiated(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves)
        for x, y in zip([*found, *mine], [*expected, *gradients], strict=True):
            close(x, y, torch.float32, f"call {number}")


Path = tuple[int, int, Callable[[Tensor, Tensor, Tensor], Tensor]]


def paths_of(ranks: Ranks) -> tuple[list[Path], list[Tensor]]:
    """((collectives forward, backward, a call) of each path, logits, hidden states and head for these calls)."""
    shard = kdloss.VocabShard.even(V, ranks.group)
    labels, mask = labels_and_mask(ranks, None)
    logits, teacher = part(ranks.normal(T, V), shard, -1), part(ranks.normal(T, V, seed=9), shard, -1)
    hidden, weight = ranks.normal(T, D), part(ranks.normal(V, D, seed=1), shard, 0)
    ids = torch.arange(3).expand(T, 3)
    heads = {"loss_mask": mask, "shard": shard}
    paths: list[Path] = [
        (1, 0, lambda x, h, w: kdloss.token_logprobs(x, labels, shard=shard)),
        (1, 0, lambda x, h, w: sum(kdloss.token_logprobs_and_entropy(x, labels, shard=shard))),
        (1, 1, lambda x, h, w: kdloss.linear_token_logprobs(h, w, labels, **heads)),
        (1, 1, lambda x, h, w: kdloss.fused_linear_loss(h, w, labels, lambda lp, e: -lp, **heads).loss),
        (1, 0, lambda x, h, w: kdloss.forward_kl(x, teacher, shard=shard)),
        (1, 0, lambda x, h, w: kdloss.reverse_kl(x, teacher, shard=shard)),
        (2, 0, lambda x, h, w: kdloss.generalized_jsd(x, teacher, beta=0.5, shard=shard)),
        (2, 0, lambda x, h, w: kdloss.skewed_forward_kl(x, teacher, alpha=0.5, shard=shard)),
        (1, 0, lambda x, h, w: kdloss.topk_forward_kl(x, teacher[:, :3] - 4, ids, tail="bucket", shard=shard)),
        (1, 1, lambda x, h, w: kdloss.linear_forward_kl(h, w, h + 1, w + 1, **heads)),
        (2, 1, lambda x, h, w: kdloss.linear_generalized_jsd(h, w, h + 1, w + 1, beta=0.5, **heads)),
    ]
    return paths, [logits, hidden, weight]


@on(2, 3)
def case_one_all_gather(ranks: Ranks) -> None:
    """Collectives of each path: one forward (two for a mixture), none backward but the sum of dH."""
    paths, given = paths_of(ranks)
    for number, (forward, backward, call) in enumerate(paths):
        leaves = [x.clone().requires_grad_() for x in given]
        with CommDebugMode() as seen:
            loss = call(*leaves).sum()
        assert seen.get_total_counts() == forward, (number, seen.get_comm_counts())
        with CommDebugMode() as seen:
            loss.backward()
        assert seen.get_total_counts() == backward, (number, seen.get_comm_counts())


@on(2)
def case_what_a_slice_cannot_differentiate_raises(ranks: Ranks) -> None:
    """Forward mode, `torch.func` and a second derivative, as without a shard; no rank waits for another."""
    paths, given = paths_of(ranks)
    for _, _, call in paths:

        def loss(*leaves: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*leaves).sum()

        with pytest.raises(NotImplementedError, match=r"no tangent in forward mode.*Use reverse mode"):
            torch.func.jvp(loss, tuple(given), tuple(given))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"no tangent in forward mode"):
            loss(*(forward_ad.make_dual(x, x) for x in given))
        with pytest.raises(NotImplementedError, match=r"no gradient inside torch\.func.*Use reverse mode"):
            torch.func.grad(loss, (0, 1, 2))(*given)
        leaves = [x.clone().requires_grad_() for x in given]
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        with pytest.raises(NotImplementedError, match="differentiated once"):
            (value + sum(x.square().sum() for x in first if x is not None)).backward()
