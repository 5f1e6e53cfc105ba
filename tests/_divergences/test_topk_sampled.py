"""Holds the reverse KL that is exact on the top K and sampled elsewhere: its expected gradient, by enumeration.

Every token that the behaviour policy may sample is weighted by its probability. Values against the oracles, error texts
and compilation are tested in `every_function`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._divergences import topk_sampled
from simulated_ranks import Ranks

# float64; sums of at most 49 outcomes
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
# the row of docs/gradients.md and of the README
Q, P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
Ids = Callable[[int], list[int]]


def expected(q: Tensor, p: Tensor, mu: Tensor | None, ids: Ids, **options: float) -> tuple[Tensor, Tensor]:
    """The value and its gradient, averaged over the token y that mu samples; mu = None is on-policy. S is `ids(y)`."""
    logits, total = q.log().clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for y in range(len(q)) if mu is None else mu.nonzero().flatten().tolist():
        support = torch.tensor(ids(y) or [-1])
        old_logp = None if mu is None else mu.log()[y]
        value = kdloss.topk_sampled_reverse_kl(
            logits, torch.tensor(y), p.log()[y], p.log()[support], support, old_logp=old_logp, **options
        )
        total = total + (q if mu is None else mu)[y] * value
    return total.detach(), torch.autograd.grad(total, logits)[0]


def exact(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    logits = q.log().clone().requires_grad_()
    value = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - p.log())).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mu", [None, UNIFORM, random(3, seed=4).softmax(-1)], ids=["q", "uniform", "other"])
@pytest.mark.parametrize("support", [[], [1], [0], [2, 1], [0, 1, 2]], ids=str)
def test_the_expected_gradient_is_that_of_the_reverse_kl(support: list[int], mu: Tensor | None) -> None:
    value, gradient = expected(Q, P, mu, lambda _: support)
    torch.testing.assert_close(value, torch.tensor(0.2238046571856474, dtype=torch.float64), **CLOSE)
    wanted = torch.tensor([0.3462430373, -0.2203890843, -0.1258539531], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("on_policy", [True, False])
def test_any_k_of_a_random_row(k: int, on_policy: bool) -> None:
    q, p, mu = (random(7, seed=seed).softmax(-1) for seed in range(3))
    support = p.topk(k).indices.tolist()
    for found, wanted in zip(expected(q, p, None if on_policy else mu, lambda _: support), exact(q, p), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_behaviour_policy_without_mass_on_the_support_is_enough() -> None:
    """A sampler that leaves out tokens of S changes nothing; one that leaves out another token loses its term."""
    mu = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    for found, wanted in zip(expected(Q, P, mu, lambda _: [1]), exact(Q, P), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    value, _ = expected(Q, P, mu, lambda _: [0])
    lost = Q[1] * (Q[1] / P[1]).log()
    torch.testing.assert_close(value, exact(Q, P)[0] - lost, **CLOSE)


def test_a_support_that_depends_on_the_sample_is_biased_by_exactly_this() -> None:
    """The server adds y to its top K, or the caller drops y from it: a term is multiplied by mu, or by 2 - mu."""
    for mu in (None, UNIFORM):
        m = Q if mu is None else mu
        for ids, factor in (
            (lambda y: sorted({1, y}), torch.stack([m[0], m.new_tensor(1), m[2]])),
            (lambda y: [v for v in (0, 1) if v != y], torch.stack([2 - m[0], 2 - m[1], m.new_tensor(1)])),
        ):
            cost = factor * Q * (Q / P).log()
            value, gradient = expected(Q, P, mu, ids)
            torch.testing.assert_close(value, cost.sum(), **CLOSE)
            torch.testing.assert_close(gradient, cost - Q * cost.sum(), **CLOSE)
            assert (gradient - exact(Q, P)[1]).norm() > 0.2 * exact(Q, P)[1].norm()


def test_a_bound_of_the_ratio_is_biased_by_exactly_this() -> None:
    ratio = (Q / UNIFORM).clamp(max=0.8)
    ratio[1] = 1.5 * 0.6  # of S: Q / UNIFORM, not bounded
    cost = UNIFORM * ratio * (Q / P).log()
    value, gradient = expected(Q, P, UNIFORM, lambda _: [1], max_ratio=0.8)
    torch.testing.assert_close(value, cost.sum(), **CLOSE)
    torch.testing.assert_close(gradient, cost - Q * cost.sum(), **CLOSE)


def test_several_samples_are_averaged() -> None:
    """Over both of two samples, drawn independently from mu, the expected gradient is that of one."""
    mu, kept = UNIFORM, torch.tensor([1])
    logits, total = Q.log().clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        y = torch.tensor(pair)
        value = kdloss.topk_sampled_reverse_kl(logits, y, P.log()[y], P.log()[kept], kept, old_logp=mu.log()[y])
        one = [
            kdloss.topk_sampled_reverse_kl(logits, v, P.log()[v], P.log()[kept], kept, old_logp=mu.log()[v]) for v in y
        ]
        torch.testing.assert_close(value, sum(one) / 2, **CLOSE)
        total = total + value / 9
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], exact(Q, P)[1], **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_quieter_than_one_sample_on_average(k: int) -> None:
    """The mean squared distance of the gradient to its mean, on-policy. A single row may be noisier by a little."""
    noise = torch.zeros(2, dtype=torch.float64)
    for seed in range(5):
        x = random(7, seed=seed)
        q, p = x.softmax(-1), (x + 0.5 * random(7, seed=seed + 50)).softmax(-1)
        for i, support in enumerate((p.topk(k).indices.tolist(), [])):
            each = [(expected_of_one(q, p, y, support)[1] - exact(q, p)[1]).square().sum() for y in range(7)]
            noise[i] += (q * torch.stack(each)).sum()
    assert noise[0] < noise[1]


def expected_of_one(q: Tensor, p: Tensor, y: int, support: list[int]) -> tuple[Tensor, Tensor]:
    logits, ids = q.log().clone().requires_grad_(), torch.tensor(support or [-1])
    value = kdloss.topk_sampled_reverse_kl(logits, torch.tensor(y), p.log()[y], p.log()[ids], ids)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def test_what_is_not_read_leaves_no_trace() -> None:
    """The teacher's log-prob of a sampled token that is in S, padding, and everything in a row that is not trained."""
    logits = random(3, 5).requires_grad_()
    labels, ids = torch.tensor([1, 2, -100]), torch.tensor([[1, 3], [0, -1], [0, 1]])
    log_p = random(3, 5, seed=1).log_softmax(-1)
    teacher_logp, kept = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0], log_p.gather(-1, ids.clamp(min=0))
    clean = kdloss.topk_sampled_reverse_kl(logits, labels, teacher_logp, kept, ids)
    (wanted,) = torch.autograd.grad(clean.sum(), logits)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = logits.detach().clone()
        dirty[2] = garbage
        dirty.requires_grad_()
        old_logp = dirty.detach().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        found = kdloss.topk_sampled_reverse_kl(
            dirty,
            labels,
            teacher_logp.masked_fill(torch.tensor([True, False, True]), garbage),
            kept.masked_fill(torch.tensor([[False, False], [False, True], [True, True]]), garbage),
            ids,
            old_logp=old_logp.masked_fill(torch.tensor([True, False, True]), garbage),
        )
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), dirty)[0], wanted, rtol=0, atol=1e-15)


def test_what_a_teacher_excludes() -> None:
    """+inf where the student has mass there, no term where it has none, no gradient where the caller masks the row."""
    logits = random(3, 4).masked_fill(torch.eye(4)[:3, :4].bool() & torch.tensor([[False], [True], [False]]), -math.inf)
    logits.requires_grad_()
    ids, kept = torch.tensor([[1], [1], [2]]), torch.tensor([[-math.inf], [-math.inf], [-0.5]]).double()
    teacher_logp = torch.tensor([-1.0, -2.0, -math.inf], dtype=torch.float64)
    value = kdloss.topk_sampled_reverse_kl(logits, torch.tensor([0, 2, 3]), teacher_logp, kept, ids)
    assert value.isinf().tolist() == [True, False, True]
    masked = torch.where(value.detach().isinf(), 0, value)
    (gradient,) = torch.autograd.grad(masked.sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[[0, 2]].any()


def test_an_infinite_ratio_of_a_token_on_which_both_models_agree_adds_nothing() -> None:
    logits = random(1, 4).requires_grad_()
    log_q, ids = logits.detach().log_softmax(-1), torch.tensor([[2]])
    excluded = torch.tensor([-math.inf], dtype=torch.float64)
    arguments = (torch.tensor([1]), log_q[:, 1], log_q[:, 2:3] - 0.5, ids)
    value = kdloss.topk_sampled_reverse_kl(logits, *arguments, old_logp=excluded)
    torch.testing.assert_close(value.detach(), 0.5 * log_q[:, 2].exp(), **CLOSE)
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_a_token_of_an_old_policy_that_the_student_excludes_adds_nothing() -> None:
    logits = torch.tensor([0.3, -math.inf, 0.1], dtype=torch.float64, requires_grad=True)
    ids, log_p = torch.tensor([0]), P.log()
    value = kdloss.topk_sampled_reverse_kl(logits, torch.tensor(1), log_p[1], log_p[ids], ids, old_logp=log_p[1])
    q = logits.detach().softmax(-1)
    torch.testing.assert_close(value.detach(), q[0] * (q[0] / P[0]).log(), **CLOSE)
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("bounds", [[(0, 4), (4, 9)], [(6, 9), (0, 2), (2, 6)]], ids=str)
def test_shards_give_the_values_and_gradients_of_whole_rows(bounds: list[tuple[int, int]]) -> None:
    logits, hidden, weight = random(5, 9), random(5, 4, seed=3), random(9, 4, seed=4)
    log_p = random(5, 9, seed=1).log_softmax(-1)
    ids = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(t))[:3] for t in range(5)])
    ids[1, 2:], ids[2] = -1, -1
    labels = torch.tensor([[8, 0], [3, 3], [1, -100], [-100, -100], [5, 7]])
    given = (labels, log_p.gather(-1, labels.clamp(min=0)), log_p.gather(-1, ids.clamp(min=0)), ids)
    options = {"old_logp": random(5, 2, seed=2) - 2, "max_ratio": 1.5, "temperature": 0.8}

    def of_logits(x: Tensor, shard: kdloss.VocabShard | None = None) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        value = kdloss.topk_sampled_reverse_kl(x, *given, shard=shard, **options)
        return value.detach(), torch.autograd.grad(value.sin().sum(), x)[0]

    def of_hidden(w: Tensor, shard: kdloss.VocabShard | None = None) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), w.clone().requires_grad_()
        value = kdloss.linear_topk_sampled_reverse_kl(h, w, *given, shard=shard, softcap=3.0, **options)
        return value.detach(), *torch.autograd.grad(value.sin().sum(), (w, h))

    ranks = Ranks(bounds)
    for whole, call, x in ((of_logits(logits), of_logits, logits.T), (of_hidden(weight), of_hidden, weight)):
        by_rank = ranks.run(
            lambda shard, call=call, x=x: call(
                x[shard.start : shard.stop] if call is of_hidden else x[shard.start : shard.stop].T, shard
            )
        )
        for (start, stop), found in zip(bounds, by_rank, strict=True):
            torch.testing.assert_close(found[0], whole[0], **CLOSE)
            mine = whole[1][:, start:stop] if call is of_logits else whole[1][start:stop]
            torch.testing.assert_close(found[1], mine, **CLOSE)
    torch.testing.assert_close(sum(found[2] for found in by_rank), whole[2], **CLOSE)


def test_a_row_with_bad_ids_is_nan_where_values_are_not_checked() -> None:
    logits = random(3, 5)
    labels, ids = torch.tensor([1, 2, -100]), torch.tensor([[1, 1], [0, 3], [0, 9]])
    compiled = torch.compile(kdloss.topk_sampled_reverse_kl, fullgraph=True, backend="aot_eager")
    value = compiled(logits, labels, torch.zeros(3), torch.zeros(3, 2), ids)
    assert value.isnan().tolist() == [True, False, False]


def test_opcheck() -> None:
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    torch.library.opcheck(topk_sampled._descended.overload, (logp, torch.tensor([[0.5, 0.0], [-1.0, 2.0]])))
