"""Sequences cut across ranks, and counts of whole steps. Each case compares random cuts with the uncut stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import kdloss
from scale_out.ranks import Ranks, on

DRAWS = 12  # number of streams and cuts; draw 0 has the corner cases, see `Cut`
# Sums are split at different places, so float64 results agree to a few roundings; float32 inputs are summed in float64.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}


class Cut:
    """One stream of B sequences, cut across the ranks at random: the whole stream and this rank's part.

    Sequences and parts may be empty; in every third draw one rank has no token at all. Draw 0 has the corner cases: an
    empty sequence, a sequence of one token, one that skips the ranks between the first and the last, one without a
    trained token, and one with trained tokens on one rank only.
    """

    def __init__(self, ranks: Ranks, draw: int) -> None:
        n, self.rank, self.group = ranks.size, ranks.rank, ranks.group
        random = torch.Generator().manual_seed(1000 * n + draw)
        self.random = random
        sequences = int(torch.randint(1, 7, (), generator=random)) if draw else 5
        lengths = torch.randint(0, 12, (sequences,), generator=random) if draw else torch.tensor([0, 1, 9, 4, 6])
        cuts = torch.randint(0, 12, (sequences, n - 1), generator=random).sort(1).values.minimum(lengths[:, None])
        if draw == 0:
            cuts[2] = 4
        if draw % 3 == 2:  # the parts of one rank are empty
            nobody = int(torch.randint(n, (), generator=random))
            bounds = torch.cat([torch.zeros(sequences, 1, dtype=torch.int64), cuts, lengths[:, None]], 1)
            bounds[:, nobody + 1 if nobody + 1 < n else nobody] = bounds[:, nobody if nobody + 1 < n else nobody + 1]
            cuts = bounds[:, 1:-1]
        self.bounds = torch.cat([torch.zeros(sequences, 1, dtype=torch.int64), cuts, lengths[:, None]], 1)
        assert (self.bounds.diff(dim=1) >= 0).all()
        self.cu = kdloss.cu_seqlens_from_lengths(lengths)
        self.total = int(lengths.sum())
        self.mask = torch.rand(self.total, generator=random) < 0.6
        if draw == 0:
            self.mask[10:14] = False
            self.mask[14:] = torch.tensor([True] + [False] * 5)
        self.cu_part = kdloss.cu_seqlens_from_lengths(self.bounds.diff(dim=1)[:, self.rank])

    def places(self, rank: int) -> Tensor:
        """Positions in the whole stream of the tokens of a rank's part."""
        starts = self.cu[:-1, None] + self.bounds
        return torch.cat([torch.arange(int(s[rank]), int(s[rank + 1])) for s in starts])

    def part(self, x: Tensor) -> Tensor:
        return x[self.places(self.rank)]

    def normal(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """(T,), the same on every rank, with NaN at untrained positions."""
        x = scale * torch.randn(self.total, generator=self.random, dtype=torch.float64)
        return torch.where(self.mask, x, math.nan).to(dtype)


def each(ranks: Ranks) -> list[tuple[Cut, torch.dtype]]:
    return [(Cut(ranks, draw), torch.float32 if draw % 4 == 1 else torch.float64) for draw in range(DRAWS)]


def close(found: Tensor, expected: Tensor, what: object = "") -> None:
    tolerance = CLOSE[expected.dtype]
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def total_of(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks, in rank order."""
    return torch.stack(ranks.all(x.detach())).sum(0)


@on(1, 2, 3, 4)
def case_sums_and_means(ranks: Ranks) -> None:
    """The whole sequence's value on every rank, to the bit. The gradient is that of the sum of all ranks' losses."""
    for draw, (cut, dtype) in enumerate(each(ranks)):
        whole = cut.normal(dtype)
        for function in (kdloss.segment_sum, kdloss.segment_mean):
            leaf, mine = whole.clone().requires_grad_(), cut.part(whole).requires_grad_()
            expected = function(leaf, loss_mask=cut.mask, cu_seqlens=cut.cu)
            found = function(mine, loss_mask=cut.part(cut.mask), cu_seqlens=cut.cu_part, group=ranks.group)
            close(found, expected, (draw, function))
            ranks.same_bits(found)
            # every rank descends a different loss
            weights = [ranks.normal(len(expected), seed=rank, dtype=dtype) for rank in range(ranks.size)]
            (expected * sum(weights)).sum().backward()
            (found * weights[ranks.rank]).sum().backward()
            close(mine.grad, cut.part(leaf.grad), (draw, function, "gradient"))


@on(1, 2, 3, 4)
def case_sequence_mean(ranks: Ranks) -> None:
    """The ranks' shares sum to the mean, with and without a normalizer."""
    for draw, (cut, dtype) in enumerate(each(ranks)):
        whole = cut.normal(dtype)
        for normalizer in (None, 7.5, torch.tensor(3), 0):
            leaf, mine = whole.clone().requires_grad_(), cut.part(whole).requires_grad_()
            expected = kdloss.sequence_mean(leaf, loss_mask=cut.mask, cu_seqlens=cut.cu, normalizer=normalizer)
            share = kdloss.sequence_mean(
                mine,
                loss_mask=cut.part(cut.mask),
                cu_seqlens=cut.cu_part,
                normalizer=normalizer,
                group=ranks.group,
            )
            close(total_of(share, ranks), expected.detach(), (draw, normalizer))
            expected.backward()
            share.backward()
            close(mine.grad, cut.part(leaf.grad), (draw, normalizer, "gradient"))


@on(1, 2, 3, 4)
def case_returns_and_labels(ranks: Ranks) -> None:
    for draw, (cut, dtype) in enumerate(each(ranks)):
        rewards = cut.normal(dtype)
        if draw % 5 == 4:
            rewards = torch.where(torch.rand(cut.total, generator=cut.random) < 0.1, -math.inf, rewards)
        for discount in (0.0, 0.3, 0.99, 1.0):
            expected = kdloss.discounted_returns(rewards, loss_mask=cut.mask, cu_seqlens=cut.cu, discount=discount)
            found = kdloss.discounted_returns(
                cut.part(rewards),
                loss_mask=cut.part(cut.mask),
                cu_seqlens=cut.cu_part,
                discount=discount,
                group=ranks.group,
            )
            close(found, cut.part(expected), (draw, discount))
        ids = torch.randint(-3, 100, (cut.total,), generator=cut.random).to(torch.int32 if draw % 2 else torch.int64)
        for ignore_index in (-100, 0):
            options = {"ignore_index": ignore_index}
            labels = kdloss.next_token_labels(ids, cu_seqlens=cut.cu, **options)
            found = kdloss.next_token_labels(cut.part(ids), cu_seqlens=cut.cu_part, group=ranks.group, **options)
            assert torch.equal(found, cut.part(labels)), (draw, found, labels)


@on(1, 2, 3, 4)
def case_ratios_and_weights(ranks: Ranks) -> None:
    """GSPO's surrogate and sequence weights on every rank are those of whole sequences."""
    for draw, (cut, dtype) in enumerate(each(ranks)):
        logp, old, advantages = (cut.normal(dtype, scale) for scale in (0.1, 0.1, 1.0))
        here = {"loss_mask": cut.part(cut.mask), "cu_seqlens": cut.cu_part, "group": ranks.group}
        for aggregate in ("sum", "mean"):
            for action in ("truncate", "mask"):
                options = {"aggregate": aggregate, "action": action, "min_weight": 0.9, "max_weight": 1.1}
                expected = kdloss.sequence_importance_weights(
                    logp, old, loss_mask=cut.mask, cu_seqlens=cut.cu, **options
                )
                found = kdloss.sequence_importance_weights(cut.part(logp), cut.part(old), **here, **options)
                close(found, cut.part(expected), (draw, options))
        leaf, mine = logp.clone().requires_grad_(), cut.part(logp).requires_grad_()
        clips = {"clip_low": 0.03, "clip_high": 0.04}
        expected = kdloss.sequence_clipped_surrogate(
            leaf, old, advantages, loss_mask=cut.mask, cu_seqlens=cut.cu, **clips
        )
        found = kdloss.sequence_clipped_surrogate(mine, cut.part(old), cut.part(advantages), **here, **clips)
        for name, x, y in zip(found._fields, found, expected, strict=True):
            if y.dtype == torch.bool:
                assert torch.equal(x, cut.part(y)), (draw, name)
            else:
                close(x, cut.part(y), (draw, name))
        upstream = ranks.normal(cut.total, seed=draw, dtype=dtype)
        (expected.loss * upstream).sum().backward()
        (found.loss * cut.part(upstream)).sum().backward()
        close(mine.grad, cut.part(leaf.grad), (draw, "gradient"))


@on(1, 2, 3, 4)
def case_prefix_weights(ranks: Ranks) -> None:
    for draw, (cut, dtype) in enumerate(each(ranks)):
        reward = cut.normal(dtype)
        if draw % 5 == 4:
            reward = torch.where(torch.rand(cut.total, generator=cut.random) < 0.1, -math.inf, reward)
        expected = kdloss.prefix_weights(reward, loss_mask=cut.mask, cu_seqlens=cut.cu, gain=1.5)
        here = {"loss_mask": cut.part(cut.mask), "cu_seqlens": cut.cu_part, "group": ranks.group}
        close(kdloss.prefix_weights(cut.part(reward), **here, gain=1.5), cut.part(expected), draw)


@on(1, 2, 3, 4)
def case_masks_of_tokens(ranks: Ranks) -> None:
    """Ranks, percentiles and means are of whole sequences, or of all tokens; the masks are equal, token for token."""
    for draw, (cut, dtype) in enumerate(each(ranks)):
        logp, old, advantages, entropy, divergence = (cut.normal(dtype, scale) for scale in (0.3, 0.3, 1.0, 1.0, 1.0))
        entropy = (4 * entropy).round() / 4  # some ties
        whole = {"loss_mask": cut.mask, "cu_seqlens": cut.cu}
        here = {"loss_mask": cut.part(cut.mask), "cu_seqlens": cut.cu_part, "group": ranks.group}
        for bound in (0.0, 0.1):
            expected = kdloss.stale_sequence_mask(logp, old, advantages, **whole, max_divergence=bound)
            mine = [cut.part(x) for x in (logp, old, advantages)]
            found = kdloss.stale_sequence_mask(*mine, **here, max_divergence=bound)
            assert torch.equal(found, cut.part(expected)), (draw, bound)
        for fraction in (0.0, 0.2, 0.5, 1.0):
            expected = kdloss.informative_token_mask(entropy, divergence, **whole, fraction=fraction)
            found = kdloss.informative_token_mask(cut.part(entropy), cut.part(divergence), **here, fraction=fraction)
            assert torch.equal(found, cut.part(expected)), (draw, fraction)
            # in a data-parallel batch, too, the parts are the ranks' tokens, in any order
            top = kdloss.top_entropy_mask(entropy, loss_mask=cut.mask, fraction=fraction)
            mine = {"loss_mask": here["loss_mask"], "fraction": fraction, "group": ranks.group}
            assert torch.equal(kdloss.top_entropy_mask(cut.part(entropy), **mine), cut.part(top)), (draw, fraction)
        for statistic, aggregate in (("k2", "mean"), ("k3", "sum")):
            options = {"aggregate": aggregate, "action": "mask", "max_weight": math.inf, "statistic": statistic}
            options["max_statistic"] = 0.08
            expected = kdloss.sequence_importance_weights(logp, old, **whole, **options)
            found = kdloss.sequence_importance_weights(cut.part(logp), cut.part(old), **here, **options)
            close(found, cut.part(expected), (draw, options))


def objectives(cut: Cut, dtype: torch.dtype) -> list[tuple[Callable[..., kdloss.LossOutput], dict[str, Any]]]:
    """Calls on the whole stream, with options that need other ranks; `in_parts` cuts the arguments."""
    logp, old, teacher, advantages, weights = (cut.normal(dtype, scale) for scale in (0.3, 0.3, 0.6, 1.0, 1.0))
    heard = torch.rand(cut.total, generator=cut.random) < 0.8
    rl = {"logp": logp, "old_logp": old, "advantages": advantages}
    kd = {"logp": logp, "old_logp": old, "teacher_logp": teacher, "kd_mask": heard, "kd_reward_clip": 0.5}
    both = {**rl, **kd, "distill_loss_weight": 0.3}
    by_sequence = {"reduction": "sequence_mean"}
    return [
        (kdloss.grpo_loss, rl),
        (kdloss.grpo_loss, rl | by_sequence),
        (kdloss.grpo_loss, rl | by_sequence | {"normalizer": 3.5}),
        (kdloss.distillation_loss, kd | by_sequence),
        (kdloss.distillation_loss, kd | {"kd_discount": 0.9}),
        (kdloss.distillation_loss, kd | by_sequence | {"kd_discount": 1.0, "normalizer": torch.tensor(4)}),
        (kdloss.kdrl_loss, both),
        (kdloss.kdrl_loss, both | by_sequence | {"kd_discount": 0.7}),
        (kdloss.kdrl_loss, both | by_sequence | {"kd_discount": 0.7, "distill_loss_weight": weights.abs()}),
        (kdloss.kdrl_loss, both | by_sequence | {"distill_loss_weight": 0}),
        (kdloss.kdrl_loss, both | by_sequence | {"kd_discount": 1.0, "rl_loss_weight": 0, "advantages": None}),
    ]


def in_parts(cut: Cut, arguments: dict[str, Any]) -> dict[str, Any]:
    per_token = {name: cut.part(x) for name, x in arguments.items() if isinstance(x, Tensor) and x.ndim == 1}
    return arguments | per_token


@on(1, 2, 3, 4)
def case_objectives(ranks: Ranks) -> None:
    """Shares of loss, rl, kd and reverse_kl sum to those of the whole stream, and `logp` gets the same gradient."""
    for draw, (cut, dtype) in enumerate(each(ranks)[::2]):
        for number, (loss, arguments) in enumerate(objectives(cut, dtype)):
            whole = arguments | {"logp": arguments["logp"].clone().requires_grad_()}
            mine = in_parts(cut, arguments)
            mine["logp"].requires_grad_()
            expected = called(loss, whole, loss_mask=cut.mask, cu_seqlens=cut.cu)
            shares = called(loss, mine, loss_mask=cut.part(cut.mask), cu_seqlens=cut.cu_part, group=ranks.group)
            what = (draw, number)
            for name in ("loss", "rl", "kd", "reverse_kl"):
                share = total_of(getattr(shares, name), ranks)
                close(share, getattr(expected, name).detach(), (*what, name))
            close(shares.ratio, cut.part(expected.ratio), (*what, "ratio"))
            assert torch.equal(shares.clipped, cut.part(expected.clipped)), what
            expected.loss.backward()
            shares.loss.backward()
            close(mine["logp"].grad, cut.part(whole["logp"].grad), (*what, "gradient"))


def called(loss: Callable[..., kdloss.LossOutput], arguments: dict[str, Any], **more: Any) -> kdloss.LossOutput:
    names = [x for x in ("logp", "old_logp", "teacher_logp", "advantages") if x in arguments]
    return loss(*[arguments[x] for x in names], **{k: x for k, x in arguments.items() if k not in names}, **more)


@on(2, 3, 4)
def case_counts_over_data_parallel_ranks(ranks: Ranks) -> None:
    """Uneven ranks and micro-batches sum to the whole batch; a rank without data still runs its backward.

    The model is one matrix, the same on every rank. Its gradients are averaged over the ranks, as in DDP.
    """
    for draw in range(DRAWS):
        random = torch.Generator().manual_seed(draw)
        parts = 2 * ranks.size  # two micro-batches per rank
        lengths = [
            torch.randint(0, 7, (int(k),), generator=random) for k in torch.randint(0, 4, (parts,), generator=random)
        ]
        if draw % 2:  # the last rank has no sequence in one micro-batch, and only empty sequences in the other
            lengths[-2:] = [lengths[-1][:0], torch.zeros(2, dtype=torch.int64)]
        cu = kdloss.cu_seqlens_from_lengths(torch.cat(lengths))
        total = int(cu[-1])
        features = torch.randn(total, 5, generator=random, dtype=torch.float64)
        teacher, advantages = torch.randn(2, total, generator=random, dtype=torch.float64)
        mask = torch.rand(total, generator=random) < 0.6
        weight = torch.randn(5, generator=random, dtype=torch.float64)
        ends = torch.tensor([0, *[int(x.sum()) for x in lengths]]).cumsum(0)
        own = [slice(int(ends[i]), int(ends[i + 1])) for i in range(parts)][2 * ranks.rank : 2 * ranks.rank + 2]
        own_cu = [kdloss.cu_seqlens_from_lengths(x) for x in lengths][2 * ranks.rank : 2 * ranks.rank + 2]

        tokens = kdloss.global_token_count(torch.cat([mask[s] for s in own]), group=ranks.group)
        sequences = kdloss.global_sequence_count(
            torch.cat([mask[s] for s in own]),
            cu_seqlens=kdloss.cu_seqlens_from_lengths(torch.cat(lengths[2 * ranks.rank : 2 * ranks.rank + 2])),
            group=ranks.group,
        )
        assert tokens.dtype == sequences.dtype == torch.int64
        assert int(tokens) == int(mask.sum())
        trained = kdloss.segment_sum(torch.ones(total), loss_mask=mask, cu_seqlens=cu)
        assert int(sequences) == int((trained > 0).sum())

        for reduction, count in (("token_mean", tokens), ("sequence_mean", sequences)):
            leaf = weight.clone().requires_grad_()
            expected = kdloss.kdrl_loss(
                -(features @ leaf).exp(),
                None,
                teacher,
                advantages,
                loss_mask=mask,
                cu_seqlens=cu,
                reduction=reduction,
                kd_discount=0.5,
                distill_loss_weight=0.005,
            ).loss
            expected.backward()
            mine, logged = weight.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
            for s, c in zip(own, own_cu, strict=True):
                loss = kdloss.kdrl_loss(
                    -(features[s] @ mine).exp(),
                    None,
                    teacher[s],
                    advantages[s],
                    loss_mask=mask[s],
                    cu_seqlens=c,
                    reduction=reduction,
                    kd_discount=0.5,
                    distill_loss_weight=0.005,
                    normalizer=count.double() / ranks.size,  # an int64 tensor divided by an int is float32
                ).loss
                loss.backward()
                logged += loss.detach()
            dist.all_reduce(mine.grad, group=ranks.group)  # fails on a rank that has not run its backward
            close(mine.grad / ranks.size, leaf.grad, (draw, reduction))
            close(total_of(logged, ranks) / ranks.size, expected.detach(), (draw, reduction))


@on(4)
def case_counts_over_two_axes(ranks: Ranks) -> None:
    """Two data-parallel pairs that split their sequences: one count per step, and the whole batch's gradient."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = ranks.rank // 2
    halves = Ranks(ranks.rank % 2, 2, pairs[pair])
    for draw in range(DRAWS):
        cuts = [Cut(halves, draw + seed) for seed in (0, 100)]
        cut = cuts[pair]
        whole, mask = [c.normal(torch.float64) for c in cuts], cut.part(cut.mask)
        tokens = kdloss.global_token_count(mask)
        sequences = kdloss.global_sequence_count(mask, cu_seqlens=cut.cu_part, split_group=pairs[pair])
        assert int(tokens) == sum(int(c.mask.sum()) for c in cuts)
        both = torch.cat([cuts[0].cu, cuts[0].total + cuts[1].cu[1:]])
        leaf = torch.cat(whole).requires_grad_()
        joined = {"loss_mask": torch.cat([c.mask for c in cuts]), "cu_seqlens": both}
        assert int(sequences) == int(kdloss.global_sequence_count(**joined, group=ranks_alone()))
        expected = kdloss.sequence_mean(leaf, **joined)
        expected.backward()
        mine = cut.part(whole[pair]).requires_grad_()
        share = kdloss.sequence_mean(
            mine, loss_mask=mask, cu_seqlens=cut.cu_part, normalizer=sequences, group=pairs[pair]
        )
        share.backward()
        close(total_of(share, ranks), expected.detach(), draw)
        start = pair * cuts[0].total
        close(mine.grad, cut.part(leaf.grad[start : start + cut.total]), (draw, "gradient"))
    alone_as_well = kdloss.global_sequence_count(
        torch.ones(2 + pair, dtype=torch.bool), cu_seqlens=torch.arange(3 + pair), group=pairs[pair]
    )
    assert int(alone_as_well) == 2 * (2 + pair)


_ALONE: list[dist.ProcessGroup] = []


def ranks_alone() -> dist.ProcessGroup:
    if not _ALONE:
        _ALONE.extend(dist.new_group([rank]) for rank in range(4))
    return _ALONE[dist.get_rank()]


def everywhere(ranks: Ranks, text: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """Every rank raises, with the same text after the part that names the rank. If the case goes on, none hangs."""
    try:
        call()
    except (TypeError, ValueError) as caught:
        found: Exception | None = caught
    else:
        found = None
    assert type(found) is error, f"{text}: {found!r}"
    assert text in str(found), str(found)
    dist.barrier(group=ranks.group)


@on(2, 3, 4)
def case_one_bad_rank(ranks: Ranks) -> None:
    last = ranks.rank == ranks.size - 1
    x, mask, cu = ranks.normal(4), torch.ones(4, dtype=torch.bool), torch.tensor([0, 1, 4])
    group = {"group": ranks.group}
    good = {"loss_mask": mask, "cu_seqlens": cu} | group
    fewer = good | {"cu_seqlens": cu[[0, 2]] if last else cu}
    off = good | {"cu_seqlens": cu.clamp(max=3) if last else cu}
    unmasked = good | {"loss_mask": mask.long() if last else mask}
    sequences = "the number of sequences of cu_seqlens must be the same on every rank of the group, got 2 on rank 0"
    kd, weight = {"reduction": "sequence_mean"}, {"distill_loss_weight": 0.005}
    weights = {"action": "mask", "max_weight": 2.0}
    calls: dict[str, Callable[..., Any]] = {
        "segment_sum": lambda **keys: kdloss.segment_sum(x, **keys),
        "segment_mean": lambda **keys: kdloss.segment_mean(x, **keys),
        "sequence_mean": lambda **keys: kdloss.sequence_mean(x, **keys),
        "discounted_returns": lambda discount=0.5, **keys: kdloss.discounted_returns(x, discount=discount, **keys),
        "gspo": lambda **keys: kdloss.sequence_clipped_surrogate(x, None, x, **keys),
        "weights": lambda aggregate="sum", **keys: kdloss.sequence_importance_weights(
            x, x, aggregate=aggregate, **weights, **keys
        ),
        "grpo_loss": lambda **keys: kdloss.grpo_loss(x, None, x, **kd | keys),
        "distillation_loss": lambda **keys: kdloss.distillation_loss(x, None, x, **kd | keys),
        "kdrl_loss": lambda **keys: kdloss.kdrl_loss(x, None, x, x, **weight | kd | keys),
    }
    for call in calls.values():
        everywhere(ranks, sequences, lambda call=call: call(**fewer))
        everywhere(ranks, "cu_seqlens must end at the number of tokens 4, got 3", lambda call=call: call(**off))
        everywhere(ranks, "loss_mask must be torch.bool", lambda call=call: call(**unmasked), TypeError)
        call(**good)
    where = "loss_mask" if last else f"on rank {ranks.size - 1} of the group: loss_mask"
    everywhere(ranks, where, lambda: calls["kdrl_loss"](**unmasked), TypeError)
    for name, changes, text in (
        ("discounted_returns", {"discount": 0.25 if last else 0.5}, "discount must be the same on every rank"),
        ("weights", {"aggregate": "mean" if last else "sum"}, "aggregate must be the same on every rank"),
        ("grpo_loss", {"reduction": "token_mean" if last else "sequence_mean"}, "reduction must be the same"),
        ("distillation_loss", {"kd_discount": 0.5 if last else 0.0}, "kd_discount must be the same"),
        ("kdrl_loss", {"kd_discount": 0.5, "distill_loss_weight": 0.0 if last else 0.1}, "distill_loss_weight=0 must"),
        ("kdrl_loss", {"reduction": "token_mean", "normalizer": 2 if last else None}, "normalizer=None must be the"),
        ("sequence_mean", {"normalizer": -1 if last else None}, "normalizer must be >= 0, got -1"),
        ("gspo", {"clip_low": -1 if last else 0.1}, "clip_low must be >= 0, got -1"),
        ("kdrl_loss", {"kd_discount": 2 if last else 0.5}, "kd_discount must be in 0 .. 1, got 2"),
        ("grpo_loss", {"weights": x[1:] if last else x}, "weights must match logp (4,), got (3,)"),
        ("distillation_loss", {"kd_discount": 0.5, "kd_mask": mask[1:] if last else mask}, "kd_mask must match logp"),
    ):
        everywhere(ranks, text, lambda name=name, changes=changes: calls[name](**good | changes))

    ids = torch.arange(4)
    labels = {"cu_seqlens": fewer["cu_seqlens"]} | group
    everywhere(ranks, sequences, lambda: kdloss.next_token_labels(ids, **labels))
    wrong = ids.double() if last else ids
    everywhere(
        ranks,
        "input_ids must be int32 or int64",
        lambda: kdloss.next_token_labels(wrong, cu_seqlens=cu, **group),
        TypeError,
    )
    everywhere(
        ranks,
        "ignore_index must be the same",
        lambda: kdloss.next_token_labels(ids, cu_seqlens=cu, ignore_index=-ranks.rank, **group),
    )
    everywhere(
        ranks,
        "loss_mask must be torch.bool",
        lambda: kdloss.global_token_count(unmasked["loss_mask"], **group),
        TypeError,
    )
    everywhere(
        ranks,
        "loss_mask must be torch.bool",
        lambda: kdloss.global_sequence_count(unmasked["loss_mask"], cu_seqlens=cu, **group),
        TypeError,
    )
    everywhere(
        ranks,
        sequences,
        lambda: kdloss.global_sequence_count(mask, cu_seqlens=fewer["cu_seqlens"], split_group=ranks.group, **group),
    )


@on(4)
def case_a_bad_pair_of_ranks(ranks: Ranks) -> None:
    """Ranks that share sequences disagree; the other pair, which counts with them, raises, too."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    lengths = torch.ones(3 if ranks.rank == 3 else 2, dtype=torch.int64)
    cu = kdloss.cu_seqlens_from_lengths(lengths)
    mask = torch.ones(int(cu[-1]), dtype=torch.bool)
    everywhere(
        ranks,
        "the number of sequences of cu_seqlens must be the same on every rank of the group, got 2 on rank 0, 3 on",
        lambda: kdloss.global_sequence_count(mask, cu_seqlens=cu, split_group=pairs[ranks.rank // 2]),
    )


@on(2)
def case_compiled_context(ranks: Ranks) -> None:
    """With fullgraph=True, forward and backward."""
    cut = Cut(ranks, 0)
    mask, where = cut.part(cut.mask), {"cu_seqlens": cut.cu_part, "group": ranks.group}
    x, old, teacher, advantages = (cut.part(cut.normal(torch.float32, 0.3)) for _ in range(4))
    weight = {"distill_loss_weight": 0.005}
    calls = [
        lambda x: kdloss.segment_mean(x, loss_mask=mask, **where),
        lambda x: kdloss.sequence_clipped_surrogate(x, old, advantages, loss_mask=mask, **where).loss,
        lambda x: (
            kdloss.kdrl_loss(
                x,
                old,
                teacher,
                advantages,
                loss_mask=mask,
                reduction="sequence_mean",
                kd_discount=0.5,
                **weight,
                **where,
            ).loss
        ),
        lambda x: (
            x.nansum() * kdloss.next_token_labels(torch.arange(x.shape[0]), **where).sum()
            + kdloss.global_token_count(mask, group=ranks.group)
            + kdloss.global_sequence_count(mask, **where)
        ),
    ]
    for number, call in enumerate(calls):
        found = []
        for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.sum().backward()
            found.append((y.detach(), leaf.grad))
        for a, b in zip(*found, strict=True):
            close(b, a, number)


@on(2, 3)
def case_collectives_of_a_step(ranks: Ranks) -> None:
    """One collective forward for a sum, a mean, returns or all reductions of a loss; one backward for sum and mean."""
    cut = Cut(ranks, 1)
    mask, where = cut.part(cut.mask), {"cu_seqlens": cut.cu_part, "group": ranks.group}
    x = cut.part(cut.normal(torch.float64)).nan_to_num()
    by_sequence, weight = {"reduction": "sequence_mean"}, {"distill_loss_weight": 0.005}
    paths = [
        (1, 1, lambda x: kdloss.segment_sum(x, loss_mask=mask, **where)),
        (1, 1, lambda x: kdloss.segment_mean(x, loss_mask=mask, **where)),
        (1, 0, lambda x: kdloss.sequence_mean(x, loss_mask=mask, **where)),
        (1, 0, lambda x: x * kdloss.discounted_returns(x, loss_mask=mask, discount=0.9, **where)),
        (1, 0, lambda x: kdloss.sequence_clipped_surrogate(x, None, x, loss_mask=mask, **where).loss),
        (1, 0, lambda x: kdloss.grpo_loss(x, None, x, loss_mask=mask, **by_sequence, **where).loss),
        (1, 0, lambda x: kdloss.kdrl_loss(x, None, x + 1, x, loss_mask=mask, **weight, **where).loss),
        (
            2,
            0,
            lambda x: (
                kdloss.kdrl_loss(x, None, x, x, loss_mask=mask, kd_discount=0.9, **by_sequence, **weight, **where).loss
            ),
        ),
    ]
    for number, (forward, backward, call) in enumerate(paths):
        leaf = x.clone().requires_grad_()
        loss, forward_found = counted(lambda call=call, leaf=leaf: call(leaf).sum())
        _, backward_found = counted(loss.backward)
        assert (forward_found, backward_found) == (forward, backward), number


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """The number of collectives of a call, without those that exchange errors of checks (on the CPU only)."""
    with CommDebugMode() as seen:
        result = call()
    return result, sum(n for op, n in seen.get_comm_counts().items() if "c10d_functional" in str(op))


@on(2)
def case_second_derivatives_across_ranks(ranks: Ranks) -> None:
    """Twice differentiable, as in one process: a penalty on the gradient of a square."""
    x = ranks.normal(8, dtype=torch.float64)
    mask, bounds = torch.ones(8, dtype=torch.bool), torch.tensor([0, 5, 8])

    def penalised(x: Tensor, bounds: Tensor, **group: object) -> Tensor:
        leaf = x.clone().requires_grad_()
        sums = kdloss.segment_sum(leaf, loss_mask=mask[: len(x)], cu_seqlens=bounds, **group)
        (first,) = torch.autograd.grad(sums.square().sum() / ranks.size, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    def summed(x: Tensor) -> Tensor:
        return kdloss.segment_sum(x, loss_mask=mask, cu_seqlens=bounds, group=ranks.group).sum()

    with pytest.raises(NotImplementedError, match="a sum over ranks has no tangent in forward mode"):
        torch.func.jvp(summed, (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"a sum over ranks has no gradient inside torch\.func"):
        torch.func.grad(summed)(x)
    mine = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    parts = (bounds - 4 * ranks.rank).clamp(0, 4)
    whole = penalised(x, bounds)
    found = penalised(x[mine], parts, group=ranks.group)
    # every rank's loss is the whole one divided by the ranks, so that gradients add up to one process's; the penalty
    # takes the squares of these gradients on each rank
    assert found.abs().sum() > 0
    reference = x.clone().requires_grad_()
    sums = torch.stack([reference[:5].sum(), reference[5:].sum()])
    (first,) = torch.autograd.grad(sums.square().sum(), reference, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), reference)
    torch.testing.assert_close(found, expected[mine])
    torch.testing.assert_close(whole * ranks.size**2, expected)
