"""Holds the masks of tokens: their exact biased gradient, the rule at its bound, ties, NaN, and selection by rank.

Values against the oracles are in `every_function`, parts on several ranks in `scale_out`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from enumeration import assert_differs, assert_equal, by_hand, policy_gradient, token_level_gradient
from kdloss._losses.selection import kth_largest
from kdloss.testing import SequenceTree, expected_gradient

TREES = {
    "up to 2 tokens": SequenceTree(max_length=2, eos=2, prompt_lengths=(1, 3), seed=1),
    "up to 3 tokens": SequenceTree(max_length=3, eos=0, prompt_lengths=(2, 1), seed=2),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def masked(mask_of, logp, old_logp, teacher_logp, advantages, loss_mask, cu_seqlens) -> Tensor:
    """The policy gradient with the mask as weights."""
    batch = {"logp": logp, "old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages}
    weights = mask_of(**batch, loss_mask=loss_mask, cu_seqlens=cu_seqlens).to(logp.dtype)
    return kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask, weights=weights).loss


def trust(measure, bound, logp, old_logp, advantages, loss_mask, **_):
    return kdloss.trust_region_mask(
        logp, old_logp, advantages, loss_mask=loss_mask, max_divergence=bound, measure=measure
    )


def stale(logp, old_logp, advantages, loss_mask, cu_seqlens, **_):
    return kdloss.stale_sequence_mask(
        logp, old_logp, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens, max_divergence=0.2
    )


def informative(logp, teacher_logp, loss_mask, cu_seqlens, **_):
    """With the surprise of the sampled token in place of the entropy: then the choice depends on the token."""
    return kdloss.informative_token_mask(
        -logp, (logp - teacher_logp).abs(), loss_mask=loss_mask, cu_seqlens=cu_seqlens, fraction=0.5
    )


def in_region(path, measure, bound):
    q, mu = path.q, path.mu
    distance = np.abs(q - mu) if measure == "tv" else mu * np.log(mu / q) + (1 - mu) * np.log((1 - mu) / (1 - q))
    return ~((path.reward * (q - mu) > 0) & (distance > bound))


def selected(path):
    def scaled(x):
        return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else 0 * x

    s = 1 - (1 - scaled(-np.log(path.q))) * (1 - scaled(np.abs(np.log(path.q / path.p))))
    number = max(1, math.floor(0.5 * len(s) + 0.5))
    return s >= np.sort(s)[::-1][number - 1]


MASKS = {
    "trust region, tv": (partial(trust, "tv", 0.1), lambda path: in_region(path, "tv", 0.1)),
    "trust region, kl": (partial(trust, "kl", 0.05), lambda path: in_region(path, "kl", 0.05)),
    "stale sequences": (stale, lambda path: not (path.reward < 0 and -np.log(path.ratio).mean() > 0.2)),
    "informative tokens": (informative, selected),
}


@every_tree
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_biases_the_policy_gradient_by_exactly_this(tree, name):
    """kdloss.trust_region_mask, kdloss.stale_sequence_mask, kdloss.informative_token_mask."""
    mask_of, keeps = MASKS[name]
    got = expected_gradient(partial(masked, mask_of), tree, under="behaviour")
    assert_equal(got, by_hand(tree, lambda path: -path.ratio * path.reward * keeps(path), under="behaviour"))
    assert_differs(got, -token_level_gradient(tree), -policy_gradient(tree))


@every_tree
@pytest.mark.parametrize("name", ["trust region, tv", "trust region, kl", "stale sequences"])
def test_nothing_is_dropped_on_policy(tree, name):
    got = expected_gradient(partial(masked, MASKS[name][0]), tree)
    assert_equal(got, -policy_gradient(tree))


@every_tree
def test_the_gradient_of_the_tokens_of_the_highest_entropy(tree):
    """kdloss.top_entropy_mask ranks the tokens of a batch; here a batch is one response."""

    def loss(logp, old_logp, advantages, entropy, loss_mask, normalizer=None):
        kept = kdloss.top_entropy_mask(entropy, loss_mask=loss_mask, fraction=0.4)
        surrogate = kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask).loss
        return kdloss.token_mean(torch.where(kept, surrogate, 0), loss_mask=loss_mask, normalizer=1.0)

    q = tree.student.detach().softmax(-1)
    entropies = -(q * q.log()).sum(-1)
    expected = torch.zeros_like(tree.student)
    mu = tree.behaviour.detach().softmax(-1)
    for (prompt, tokens), reward in zip(tree.sequences, tree.rewards.tolist(), strict=True):
        rows = [tree.prefixes.index((prompt, tokens[:i])) for i in range(len(tokens))]
        h = entropies[rows]
        number = max(1, math.floor(0.4 * len(rows) + 0.5))
        kept = h >= h.sort(descending=True).values[number - 1]
        probability = mu[rows, list(tokens)].prod() / len(tree.prompt_lengths)
        for row, token, keep in zip(rows, tokens, kept, strict=True):
            if keep:
                score = torch.nn.functional.one_hot(torch.tensor(token), q.shape[-1]) - q[row]
                expected[row] -= probability * q[row, token] / mu[row, token] * reward * score
    got = expected_gradient(loss, tree, under="behaviour")
    assert_equal(got, expected.detach())
    assert_differs(got, -token_level_gradient(tree))


# the rules


@pytest.mark.parametrize("measure", ["tv", "kl"])
def test_a_divergence_at_the_bound_is_kept(measure):
    logp, old_logp = torch.tensor([0.75]).double().log(), torch.tensor([0.5]).double().log()
    bound = {"tv": 0.25, "kl": 0.5 * math.log(4 / 3)}[measure]  # 1/2 log(2/3) + 1/2 log 2
    for scale, kept in ((1 + 1e-9, True), (1 - 1e-9, False)):
        mask = kdloss.trust_region_mask(
            logp,
            old_logp,
            torch.ones(1),
            loss_mask=torch.tensor([True]),
            max_divergence=bound * scale,
            measure=measure,
        )
        assert mask.item() is kept


def test_certain_and_impossible_tokens():
    """A student that is certain, a sampler that was, one that excluded its token, and log-probs a rounding above 0."""
    inf = math.inf
    logp = torch.tensor([0.0, -1.0, -1.0, 1e-8, -inf, -1.0])
    old_logp = torch.tensor([-1.0, 0.0, -inf, 1e-8, -1.0, math.nan])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    options = {"loss_mask": torch.ones(6, dtype=torch.bool)}
    for measure, bound in (("tv", 0.3), ("kl", 0.3)):
        mask = kdloss.trust_region_mask(logp, old_logp, advantages, max_divergence=bound, measure=measure, **options)
        assert mask.tolist() == [False, False, False, True, False, True], measure  # NaN is kept: the loss shows it
    # away from the policy that sampled only: none is dropped with the other sign
    towards = kdloss.trust_region_mask(logp, old_logp, -advantages, max_divergence=0.0, **options)
    assert towards.all()


def test_ties_are_kept_and_nan_is_the_largest():
    entropy = torch.tensor([1.0, 2.0, 2.0, 0.5, -0.0, 0.0])
    mask = torch.ones(6, dtype=torch.bool)
    assert kdloss.top_entropy_mask(entropy, loss_mask=mask, fraction=0.1).tolist() == [0, 1, 1, 0, 0, 0]
    assert kdloss.top_entropy_mask(entropy, loss_mask=mask, fraction=0.8).all()  # 5 of 6, and 0 ties with -0
    entropy[3] = math.nan
    assert kdloss.top_entropy_mask(entropy, loss_mask=mask, fraction=0.1).tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10, 30, 100])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_how_many_are_kept(count, fraction):
    entropy = torch.randperm(count, generator=torch.Generator().manual_seed(count)).float()
    kept = kdloss.top_entropy_mask(entropy, loss_mask=torch.ones(count, dtype=torch.bool), fraction=fraction)
    expected = max(1, round(fraction * count + 1e-9)) if fraction else 0
    assert kept.sum() == expected
    assert torch.equal(kept, entropy >= count - expected)


def test_the_largest_entropy_and_the_largest_divergence_tie():
    entropy, divergence = torch.tensor([5.0, 0.3, 0.1, 0.2]), torch.tensor([0.7, 3.0, 0.1, 0.3])
    options = {"loss_mask": torch.ones(4, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 4])}
    for x, y in ((entropy, divergence), (divergence, entropy)):
        kept = kdloss.informative_token_mask(x, y, fraction=0.01, **options)
        assert kept.tolist() == [True, True, False, False]
    # one infinite divergence leaves the others their order by entropy
    divergence[2] = math.inf
    kept = kdloss.informative_token_mask(entropy, divergence, fraction=0.75, **options)
    assert kept.tolist() == [True, True, True, False]
    constant = torch.ones(4)  # says nothing, so the other decides alone
    kept = kdloss.informative_token_mask(constant, divergence, fraction=0.25, **options)
    assert kept.tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_kth_largest_is_that_of_a_sort(dtype, data):
    """Any finite floats, subnormal ones, both zeros, infinities; NaN is above all."""
    width = 32 if dtype == torch.float32 else 64
    floats = st.floats(width=width) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])
    values = data.draw(st.lists(floats, min_size=1, max_size=12))
    x = torch.tensor([values, values[::-1]], dtype=dtype)
    ids = torch.tensor(sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    counts = torch.zeros(3, dtype=torch.int64).index_add(0, ids, kept.long())
    rank = torch.stack([counts, (counts + 1) // 2])
    found = kth_largest(x, kept, ids, rank, None)
    for n in range(2):
        for b in range(3):
            if counts[b]:
                own = x[n][kept & (ids == b)].sort(descending=True).values
                torch.testing.assert_close(found[n, b], own[rank[n, b] - 1], rtol=0, atol=0, equal_nan=True)


def test_a_statistic_bounds_what_it_names():
    """k2 and k3 are 0 on-policy, and the weight is the ratio wherever they are within the bound."""
    old_logp = torch.full((5,), -1.0).double()
    log_ratio = torch.tensor([0.0, 0.5, -0.5, math.inf, -math.inf]).double()
    options = {"loss_mask": torch.ones(5, dtype=torch.bool)}
    weights = kdloss.masked_importance_weights
    k2 = weights(old_logp + log_ratio, old_logp, statistic="k2", max_statistic=0.126, **options)
    assert_equal(k2, torch.tensor([1, math.exp(0.5), math.exp(-0.5), 0, 0], dtype=torch.float64))
    k3 = weights(old_logp + log_ratio, old_logp, statistic="k3", max_statistic=0.12, **options)  # 0.149 and 0.107
    assert_equal(k3, torch.tensor([1, 0, math.exp(-0.5), 0, 0], dtype=torch.float64))
    kept = weights(old_logp, old_logp, statistic="k3", max_statistic=0.0, **options)
    assert_equal(kept, torch.ones(5).double())
