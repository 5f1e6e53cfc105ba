"""Holds what joins reward and teacher: the exact biased gradients, infinite rewards, responses under two prompts.

Values against the oracles are in `every_function`, parts on several ranks in `scale_out`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from enumeration import assert_differs, assert_equal, by_hand, policy_gradient, token_level_gradient
from kdloss import _checks
from kdloss.testing import SequenceTree, expected_gradient

TREES = {
    "up to 2 tokens": SequenceTree(max_length=2, eos=2, prompt_lengths=(1, 3), seed=1),
    "up to 3 tokens": SequenceTree(max_length=3, eos=0, prompt_lengths=(2, 1), seed=2),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def joined(advantages_of, logp, old_logp, teacher_logp, advantages, loss_mask, cu_seqlens) -> Tensor:
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    batch = {"loss_mask": loss_mask, "cu_seqlens": cu_seqlens}
    return kdloss.importance_sampled_surrogate(
        logp, old_logp, advantages_of(reward, advantages, **batch), loss_mask=loss_mask
    ).loss


def gated(reward, advantages, loss_mask, cu_seqlens):
    return kdloss.gate_kd_reward(reward, advantages, loss_mask=loss_mask)


def modulated(reward, advantages, loss_mask, cu_seqlens):
    return kdloss.modulate_advantages(advantages, reward, loss_mask=loss_mask, mix=0.6, clip=0.3)


def early(reward, advantages, loss_mask, cu_seqlens):
    weights = kdloss.prefix_weights(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, gain=1.5)
    return torch.where(loss_mask, weights * reward, 0)


def log_ratio(path):
    return np.log(path.p / path.q)


def of_prefix(path):
    size = np.abs(log_ratio(path))
    return 1 + 1.5 * (1 - (np.cumsum(size) - size) / size.sum())


FORMS = {
    "gate": (gated, lambda path: np.where(path.reward * log_ratio(path) > 0, log_ratio(path), 0)),
    "modulated": (
        modulated,
        lambda path: path.reward * (0.4 + 0.6 * np.clip(np.exp(np.sign(path.reward) * log_ratio(path)), 0.7, 1.3)),
    ),
    "prefix": (early, lambda path: of_prefix(path) * log_ratio(path)),
}


@every_tree
@pytest.mark.parametrize("under", ["student", "behaviour"])
@pytest.mark.parametrize("name", FORMS)
def test_the_biased_gradient_is_exactly_this(tree, name, under):
    """kdloss.gate_kd_reward, kdloss.modulate_advantages, kdloss.prefix_weights."""
    advantages_of, of = FORMS[name]
    got = expected_gradient(partial(joined, advantages_of), tree, under=under)
    assert_equal(got, by_hand(tree, lambda path: -path.ratio * of(path), under=under))
    reverse_kl = by_hand(tree, lambda path: -path.ratio * log_ratio(path), under=under)
    assert_differs(got, reverse_kl, -policy_gradient(tree), -token_level_gradient(tree))


@every_tree
def test_the_gates_of_both_signs_are_the_whole_reverse_kl(tree):
    """With the outcome and with its opposite, the gated rewards sum to the reward."""

    def opposite(reward, advantages, loss_mask, cu_seqlens):
        return kdloss.gate_kd_reward(reward, -advantages, loss_mask=loss_mask)

    both = sum(expected_gradient(partial(joined, form), tree) for form in (gated, opposite))
    assert_equal(both, by_hand(tree, lambda path: -path.ratio * log_ratio(path)))


@every_tree
def test_without_a_gain_or_a_mix_nothing_changes(tree):
    def plain(reward, advantages, loss_mask, cu_seqlens):
        weights = kdloss.prefix_weights(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, gain=0.0)
        return torch.where(loss_mask, weights * reward, 0)

    def unmixed(reward, advantages, loss_mask, cu_seqlens):
        return kdloss.modulate_advantages(advantages, reward, loss_mask=loss_mask, mix=0.0, clip=0.3)

    assert_equal(
        expected_gradient(partial(joined, plain), tree), by_hand(tree, lambda path: -path.ratio * log_ratio(path))
    )
    assert_equal(expected_gradient(partial(joined, unmixed), tree), -policy_gradient(tree))


# infinite rewards, of tokens that the teacher excludes, and NaN, which stays


def test_infinite_rewards():
    inf, nan = math.inf, math.nan
    reward = torch.tensor([-inf, inf, -inf, nan, 1.0])
    advantages = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0])
    mask = torch.ones(5, dtype=torch.bool)
    found = kdloss.gate_kd_reward(reward, advantages, loss_mask=mask)
    torch.testing.assert_close(found, torch.tensor([0, 0, -inf, nan, 0]), equal_nan=True)
    found = kdloss.modulate_advantages(advantages, reward, loss_mask=mask, mix=1.0, clip=0.5)
    torch.testing.assert_close(found, torch.tensor([0.5, 0, -1.5, nan, 0]), equal_nan=True)
    options = {"loss_mask": mask, "cu_seqlens": torch.tensor([0, 5]), "gain": 1.0}
    # all of the disagreement is spent by the first infinite one
    assert kdloss.prefix_weights(torch.tensor([2.0, -inf, 1.0, 0.0, 3.0]), **options).tolist() == [2, 2, 1, 1, 1]
    assert kdloss.prefix_weights(torch.zeros(5), **options).tolist() == [2] * 5
    assert kdloss.prefix_weights(reward, **options).isnan().any()


# responses under two prompts

FROM = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1, 0]).bool()
TO = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0]).bool()
FROM_CU, TO_CU = torch.tensor([0, 6, 6, 10]), torch.tensor([0, 4, 4, 9])
MOVE = {"from_mask": FROM, "from_cu_seqlens": FROM_CU, "to_mask": TO, "to_cu_seqlens": TO_CU}


def test_responses_move_to_their_places_with_holes():
    x = torch.arange(10.0)
    assert kdloss.align_responses(x, fill=-1.0, **MOVE).tolist() == [2, 3, 4, -1, -1, -1, 6, 8, -1]
    back = {"from_mask": TO, "from_cu_seqlens": TO_CU, "to_mask": FROM, "to_cu_seqlens": FROM_CU}
    there = kdloss.align_responses(x, fill=-1.0, **MOVE)
    assert torch.equal(kdloss.align_responses(there, fill=0.0, **back), torch.where(FROM, x, 0))


def test_what_is_outside_the_responses_leaves_no_trace():
    x = torch.where(FROM, torch.arange(10.0), math.nan).requires_grad_()
    moved = kdloss.align_responses(x, fill=0.0, **MOVE)
    assert moved.isfinite().all()
    moved.square().sum().backward()
    assert torch.equal(x.grad, torch.where(FROM, 2 * torch.arange(10.0), 0))


def test_responses_of_other_lengths_are_nan_where_they_cannot_be_read(monkeypatch):
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    other = MOVE | {"to_mask": TO & (torch.arange(9) > 0)}
    assert kdloss.align_responses(torch.ones(10), fill=0.0, **other).isnan().all()
    assert not kdloss.align_responses(torch.ones(10, dtype=torch.int64), fill=5, **other).any()
    # as many responses in all, but not in each sequence
    other = MOVE | {"to_cu_seqlens": torch.tensor([0, 2, 4, 9])}
    assert kdloss.align_responses(torch.ones(10), fill=0.0, **other).isnan().all()
