"""Holds the exact expected gradients of surrogates, advantages and importance weights, biased ones included.

`expected_gradient` lists every response of a small language and differentiates the library's loss. What it should give
is computed here without the library. Where the loss descends an objective, that is the autograd gradient of an
enumerated expectation. Where a clip, a bound or a baseline biases the loss, it comes from the equation in NumPy: the
coefficient c_t of every token in d loss / d logits = sum over t of c_t (onehot(o_t) - q_t), averaged over responses by
probability.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from enumeration import (
    assert_differs,
    assert_equal,
    assert_not_parallel,
    by_hand,
    by_hand_of_batches,
    gradient_of,
    policy_gradient,
    ppo,
    responses,
    returns_to_go,
    token_level_gradient,
)
from kdloss.testing import SequenceTree, expected_gradient

# Responses of 1 to 2 and of 1 to 3 tokens after prompts of unequal lengths, one of them a single token. One of 3 tokens
# ends a response: the last of the vocabulary in one tree, the first in the other. Masked positions hold NaN.
TREES = {
    "up to 2 tokens": SequenceTree(max_length=2, eos=2, prompt_lengths=(1, 3), seed=1),
    "up to 3 tokens": SequenceTree(max_length=3, eos=0, prompt_lengths=(2, 1), seed=2),
}
# One prompt, whose responses are a group. 7 responses, so 49 groups of two and 343 of three.
GROUP_TREE = SequenceTree(max_length=2, eos=0, prompt_lengths=(2,), seed=3)

every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


# At ratio 1: the surrogate, with bounds that act only at other ratios, and its value per token
AT_RATIO_ONE = {
    "importance-sampled": (kdloss.importance_sampled_surrogate, lambda a, logp: -a),
    "importance-sampled, max_ratio": (
        partial(kdloss.importance_sampled_surrogate, max_ratio=1.5),
        lambda a, logp: -a * logp,
    ),
    "PPO": (partial(kdloss.clipped_surrogate, dual_clip=1.5), lambda a, logp: -a),
    "GSPO-token": (kdloss.sequence_clipped_surrogate, lambda a, logp: -a),
    "CISPO": (partial(kdloss.cispo_surrogate, clip_low=0.1, clip_high=0.1), lambda a, logp: -a * logp),
    "SAPO": (kdloss.sapo_surrogate, lambda a, logp: -2 * torch.where(a > 0, a, a / 1.05)),
}


@every_tree
@pytest.mark.parametrize("name", AT_RATIO_ONE)
def test_at_ratio_one_every_surrogate_has_the_policy_gradient(tree, name):
    surrogate, value = AT_RATIO_ONE[name]
    exact = -policy_gradient(tree)
    assert_equal(expected_gradient(surrogate, tree), exact)
    assert_equal(by_hand(tree, lambda path: -path.reward), exact)

    # also without old_logp, whichever policy sampled: then the ratio is 1 by definition
    def without_old_logp(logp, advantages, loss_mask, cu_seqlens):
        rest = {"cu_seqlens": cu_seqlens} if name == "GSPO-token" else {}
        return surrogate(logp, None, advantages, loss_mask=loss_mask, **rest)

    assert_equal(expected_gradient(without_old_logp, tree), exact)

    # the values differ
    batch = tree.batch(range(len(tree.sequences)))
    m = batch.loss_mask
    rest = {"cu_seqlens": batch.cu_seqlens} if name == "GSPO-token" else {}
    out = surrogate(batch.logp, batch.old_logp, batch.advantages, loss_mask=m, **rest)
    assert_equal(out.loss[m], value(batch.advantages, batch.logp)[m])
    assert not out.loss[~m].any()


def test_the_values_at_ratio_one_are_not_all_the_same():
    batch = TREES["up to 2 tokens"].batch(range(14))
    m = batch.loss_mask
    advantages, logp = batch.advantages[m], batch.logp[m].detach()
    sums = {name: round(value(advantages, logp).sum().item(), 6) for name, (_, value) in AT_RATIO_ONE.items()}
    assert len(set(sums.values())) == 3  # -A, -A logp and that of SAPO


@every_tree
@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.3, 0.4)], ids=["GSPO's clip", "a wide clip"])
@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_gspo_token_is_gspo_for_one_advantage_a_sequence(tree, low, high, under):
    """For every token and response, and so in expectation; the clip acts on some responses and not on others."""

    def gspo(logp, old_logp, advantages, loss_mask, cu_seqlens, normalizer=None):
        """GSPO, eqs. 5 and 7: -(1 / B) sum over b of min(s_b A_b, clip(s_b) A_b), with an attached s_b."""
        losses = []
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            t = [i for i in range(start, stop) if loss_mask[i]]
            s = (logp[t] - old_logp[t]).mean().exp()
            losses.append(-torch.minimum(s * advantages[t[0]], s.clamp(1 - low, 1 + high) * advantages[t[0]]))
        return torch.stack(losses).mean()

    def gspo_token(logp, old_logp, advantages, loss_mask, cu_seqlens, normalizer=None):
        surrogate = kdloss.sequence_clipped_surrogate(
            logp, old_logp, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens, clip_low=low, clip_high=high
        )
        return kdloss.sequence_mean(surrogate.loss, loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer)

    batch = tree.batch(range(len(tree.sequences)), under=under)
    results = []
    for loss in (gspo, gspo_token):
        logp = batch.logp.detach().requires_grad_()
        value = loss(logp, batch.old_logp, batch.advantages, batch.loss_mask, batch.cu_seqlens)
        results.append((value, torch.autograd.grad(value, logp)[0]))
    assert_equal(results[1], results[0])
    silent = (results[1][1][batch.loss_mask] == 0).sum()
    assert (0 < silent < batch.loss_mask.sum()) if under == "behaviour" else silent == 0

    def coefficient(path):
        s = math.exp(np.log(path.ratio).mean())
        stopped = (path.reward > 0 and s > 1 + high) or (path.reward < 0 and s < 1 - low)
        return np.array(0.0 if stopped else -s * path.reward / len(path.q))

    exact = by_hand(tree, coefficient, under=under)
    assert_equal(expected_gradient(gspo, tree, under=under), exact)
    assert_equal(expected_gradient(gspo_token, tree, under=under, normalizer=1.0), exact)
    # a mean over the length of each response does not descend the expected reward, not even at ratio 1
    assert_not_parallel(exact, policy_gradient(tree))


@every_tree
def test_gspo_token_takes_an_advantage_per_token(tree):
    def loss(logp, old_logp, teacher_logp, loss_mask, cu_seqlens):
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        return kdloss.sequence_clipped_surrogate(
            logp, old_logp, reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, clip_low=0.3, clip_high=0.4
        )

    def coefficient(path):
        a, s = np.log(path.p / path.q), math.exp(np.log(path.ratio).mean())
        return np.where(((a > 0) & (s > 1.4)) | ((a < 0) & (s < 0.7)), 0, -s * a)

    assert_equal(expected_gradient(loss, tree, under="behaviour"), by_hand(tree, coefficient, under="behaviour"))


@every_tree
def test_token_ratios_are_unbiased_at_the_prefixes_of_the_behaviour_policy(tree):
    exact = -token_level_gradient(tree)
    assert_equal(expected_gradient(kdloss.importance_sampled_surrogate, tree, under="behaviour"), exact)
    assert_equal(by_hand(tree, lambda path: -path.ratio * path.reward, under="behaviour"), exact)
    assert_not_parallel(exact, policy_gradient(tree))  # the distribution of prefixes is not corrected


@every_tree
def test_token_ratios_are_unbiased_through_a_third_policy(tree):
    """Decoupled: ratio q / prox times the unbounded weight prox / mu is q / mu for every prox, here the teacher."""

    def loss(logp, old_logp, teacher_logp, advantages, loss_mask):
        weights = kdloss.truncated_importance_weights(teacher_logp, old_logp, loss_mask=loss_mask, max_weight=math.inf)
        return kdloss.importance_sampled_surrogate(logp, teacher_logp, advantages, loss_mask=loss_mask, weights=weights)

    assert_equal(expected_gradient(loss, tree, under="behaviour"), -token_level_gradient(tree))


def sequence_weighted(
    logp,
    old_logp,
    advantages,
    loss_mask,
    cu_seqlens,
    *,
    aggregate,
    action,
    min_weight=0.0,
    max_weight=math.inf,
    statistic="ratio",
    max_statistic=None,
):
    """One update per rollout: ratio 1, times the weight of the whole response."""
    weights = kdloss.sequence_importance_weights(
        logp,
        old_logp,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        aggregate=aggregate,
        action=action,
        min_weight=min_weight,
        max_weight=max_weight,
        statistic=statistic,
        max_statistic=max_statistic,
    )
    return kdloss.importance_sampled_surrogate(logp, None, advantages, loss_mask=loss_mask, weights=weights)


@every_tree
@pytest.mark.parametrize("action", ["truncate", "mask"])
def test_whole_sequence_importance_weights_are_unbiased_for_the_expected_reward(tree, action):
    loss = partial(sequence_weighted, aggregate="sum", action=action)
    exact = -policy_gradient(tree)
    assert_equal(expected_gradient(loss, tree, under="behaviour"), exact)
    assert_differs(expected_gradient(kdloss.importance_sampled_surrogate, tree, under="behaviour"), exact)


def distilled(logp, old_logp, teacher_logp, loss_mask, cu_seqlens, *, discount, whole_sequence):
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    returns = kdloss.discounted_returns(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, discount=discount)
    if whole_sequence:
        return sequence_weighted(logp, old_logp, returns, loss_mask, cu_seqlens, aggregate="sum", action="truncate")
    return kdloss.importance_sampled_surrogate(logp, old_logp, returns, loss_mask=loss_mask)


@every_tree
@pytest.mark.parametrize("discount", [0, 0.5, 1])  # the KL of tokens; neither; the KL of sequences
def test_what_importance_sampling_makes_of_the_reverse_kl_reward(tree, discount):
    log_q, log_p = tree.student.log_softmax(-1), tree.teacher.log_softmax(-1)
    visits = torch.zeros(len(tree.prefixes), dtype=torch.float64)
    for probability, _, rows, _ in responses(tree, "behaviour"):
        visits[rows] += probability
    token_kl = gradient_of((visits * (log_q.exp() * (log_q - log_p)).sum(-1)).sum(), tree)
    log_ratio = tree.log_probabilities(tree.student) - tree.log_probabilities(tree.teacher)
    sequence_kl = gradient_of((tree.probabilities(tree.student) * log_ratio).sum(), tree)

    returns = partial(returns_to_go, discount=discount)
    loss = partial(distilled, discount=discount)
    by_token = expected_gradient(partial(loss, whole_sequence=False), tree, under="behaviour")
    by_sequence = expected_gradient(partial(loss, whole_sequence=True), tree, under="behaviour")
    assert_equal(by_token, by_hand(tree, lambda path: -path.ratio * returns(path), under="behaviour"))
    assert_equal(by_sequence, by_hand(tree, lambda path: -path.ratio.prod() * returns(path), under="behaviour"))
    # whole-sequence weights are equivalent to sampling from the student, so they give its on-policy gradient
    assert_equal(by_sequence, expected_gradient(partial(loss, whole_sequence=False), tree))
    if discount == 0:
        assert_equal(by_token, token_kl)
    else:
        assert_not_parallel(by_token, token_kl)
    if discount == 1:
        assert_equal(by_sequence, sequence_kl)
    else:
        assert_not_parallel(by_sequence, sequence_kl)
    assert_not_parallel(by_token, sequence_kl)


def sapo(path):
    tau = 1.2 if path.reward > 0 else 2.0
    sigma = 1 / (1 + np.exp(-tau * (path.ratio - 1)))
    return -4 * sigma * (1 - sigma) * path.ratio * path.reward


def inside(weight, low, high):
    return np.where((low <= weight) & (weight <= high), weight, 0)


def by_statistic(ratio, name, bound):
    statistic = 0.5 * np.log(ratio) ** 2 if name == "k2" else ratio - 1 - np.log(ratio)
    return np.where(statistic <= bound, ratio, 0)


def through_teacher(weights_of, logp, old_logp, teacher_logp, advantages, loss_mask):
    """The ratio to a third policy, here the teacher, with bounded weights of that policy over the sampler."""
    weights = weights_of(teacher_logp, old_logp, loss_mask=loss_mask)
    return kdloss.importance_sampled_surrogate(logp, teacher_logp, advantages, loss_mask=loss_mask, weights=weights)


# Off-policy: the loss, and its coefficient d loss / d logp by the equation. Bounds lie within the range of the ratios
# (0.01 to 57 in the shorter tree, 0.2 to 7 in the longer), so each acts on some tokens and not on others.
OFF_POLICY = {
    "PPO": (
        partial(kdloss.clipped_surrogate, clip_low=0.2, clip_high=0.3),
        lambda path: ppo(path, 0.2, 0.3),
    ),
    "PPO, dual clip": (
        partial(kdloss.clipped_surrogate, clip_low=0.2, clip_high=0.3, dual_clip=1.5),
        lambda path: ppo(path, 0.2, 0.3, 1.5),
    ),
    "PPO, weighted": (  # weights scale the loss and do not move the clip
        lambda logp, old_logp, teacher_logp, advantages, loss_mask: kdloss.clipped_surrogate(
            logp, old_logp, advantages, loss_mask=loss_mask, weights=teacher_logp.exp()
        ),
        lambda path: path.p * ppo(path, 0.2, 0.2),
    ),
    "max_ratio": (
        partial(kdloss.importance_sampled_surrogate, max_ratio=1.3),
        lambda path: -np.minimum(path.ratio, 1.3) * path.reward,
    ),
    "CISPO, upper bound": (
        partial(kdloss.cispo_surrogate, clip_high=0.3),
        lambda path: -np.minimum(path.ratio, 1.3) * path.reward,
    ),
    "CISPO, both bounds": (
        partial(kdloss.cispo_surrogate, clip_low=0.2, clip_high=0.3),
        lambda path: -np.clip(path.ratio, 0.8, 1.3) * path.reward,
    ),
    "SAPO": (partial(kdloss.sapo_surrogate, tau_positive=1.2, tau_negative=2.0), sapo),
    "GSPO-token": (  # without a clip: a geometric mean is not the ratio of the probabilities
        partial(kdloss.sequence_clipped_surrogate, clip_low=1.0, clip_high=1e9),
        lambda path: -math.exp(np.log(path.ratio).mean()) * path.reward,
    ),
    "truncated weights": (
        partial(through_teacher, partial(kdloss.truncated_importance_weights, max_weight=1.3)),
        lambda path: -path.q / path.p * np.minimum(path.p / path.mu, 1.3) * path.reward,
    ),
    "masked weights": (
        partial(through_teacher, partial(kdloss.masked_importance_weights, min_weight=0.6, max_weight=1.7)),
        lambda path: -path.q / path.p * inside(path.p / path.mu, 0.6, 1.7) * path.reward,
    ),
    "masked weights, k3": (
        partial(through_teacher, partial(kdloss.masked_importance_weights, statistic="k3", max_statistic=0.3)),
        lambda path: -path.q / path.p * by_statistic(path.p / path.mu, "k3", 0.3) * path.reward,
    ),
    "sequence weights, sum, masked by k2": (
        partial(sequence_weighted, aggregate="sum", action="mask", statistic="k2", max_statistic=0.3),
        lambda path: -path.ratio.prod() * ((0.5 * np.log(path.ratio) ** 2).sum() <= 0.3) * path.reward,
    ),
    "sequence weights, sum, truncated": (
        partial(sequence_weighted, aggregate="sum", action="truncate", min_weight=0.5, max_weight=1.5),
        lambda path: -np.clip(path.ratio.prod(), 0.5, 1.5) * path.reward,
    ),
    "sequence weights, sum, masked": (
        partial(sequence_weighted, aggregate="sum", action="mask", min_weight=0.5, max_weight=1.5),
        lambda path: -inside(path.ratio.prod(), 0.5, 1.5) * path.reward,
    ),
    "sequence weights, mean, truncated": (
        partial(sequence_weighted, aggregate="mean", action="truncate", min_weight=0.7, max_weight=1.2),
        lambda path: -np.clip(math.exp(np.log(path.ratio).mean()), 0.7, 1.2) * path.reward,
    ),
    "sequence weights, mean, masked": (
        partial(sequence_weighted, aggregate="mean", action="mask", min_weight=0.7, max_weight=1.2),
        lambda path: -inside(math.exp(np.log(path.ratio).mean()), 0.7, 1.2) * path.reward,
    ),
    "sequence weights, mean, unbounded": (
        partial(sequence_weighted, aggregate="mean", action="truncate"),
        lambda path: -math.exp(np.log(path.ratio).mean()) * path.reward,
    ),
}


@every_tree
@pytest.mark.parametrize("name", OFF_POLICY)
def test_clips_and_bounded_weights_are_biased_by_exactly_this(tree, name):
    loss, coefficient = OFF_POLICY[name]
    got = expected_gradient(loss, tree, under="behaviour")
    assert_equal(got, by_hand(tree, coefficient, under="behaviour"))
    assert_differs(got, -token_level_gradient(tree), -policy_gradient(tree))


# the smallest group; one with a leave-one-out mean of more than one
GROUP_SIZES = [2, pytest.param(3, marks=pytest.mark.slow)]


def group_loss(rewards, logp, old_logp, loss_mask, cu_seqlens, normalizer, *, advantages_of):
    """As a trainer does: advantages within the group, broadcast to tokens; the loss summed, over the group size."""
    advantages = advantages_of(rewards, group_size=rewards.shape[0])
    advantages = kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=logp.shape[0])
    surrogate = kdloss.clipped_surrogate(logp, old_logp, advantages, loss_mask=loss_mask)
    return kdloss.token_mean(surrogate.loss, loss_mask=loss_mask, normalizer=normalizer)


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(
    ("advantages_of", "share"),
    [
        (partial(kdloss.group_relative_advantages, scale_by_std=False), lambda G: (G - 1) / G),
        (kdloss.leave_one_out_advantages, lambda G: 1),
    ],
    ids=["group mean", "leave-one-out"],
)
def test_share_of_the_policy_gradient_that_a_group_baseline_leaves(size, advantages_of, share):
    loss = partial(group_loss, advantages_of=advantages_of)
    got = expected_gradient(loss, GROUP_TREE, batch_size=size, normalizer=float(size))
    assert_equal(got, -share(size) * policy_gradient(GROUP_TREE))


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_division_by_the_standard_deviation_of_the_group_is_another_objective(size):
    eps = 0.1  # large enough to change the result

    def coefficients(paths):
        rewards = np.array([path.reward for path in paths])
        deviations = rewards - rewards.mean()
        if np.ptp(rewards) == 0:
            return [np.array(0.0)] * size
        return [np.array(-a / size) for a in deviations / (np.sqrt((deviations**2).sum() / (size - 1)) + eps)]

    advantages_of = partial(kdloss.group_relative_advantages, eps=eps)
    loss = partial(group_loss, advantages_of=advantages_of)
    got = expected_gradient(loss, GROUP_TREE, batch_size=size, normalizer=float(size))
    assert_equal(got, by_hand_of_batches(GROUP_TREE, coefficients, size=size))
    assert_not_parallel(got, policy_gradient(GROUP_TREE))  # neither the policy gradient nor (G - 1)/G of it


@every_tree
@pytest.mark.parametrize("name", AT_RATIO_ONE)
def test_a_baseline_of_the_prefix_does_not_change_the_gradient(tree, name):
    surrogate, _ = AT_RATIO_ONE[name]

    def with_baseline(baseline):
        def loss(logp, old_logp, advantages, loss_mask, cu_seqlens, entropy, logits):
            rest = {"cu_seqlens": cu_seqlens} if name == "GSPO-token" else {}
            shifted = advantages - baseline(logp, entropy, logits).detach()
            return surrogate(logp, old_logp, shifted, loss_mask=loss_mask, **rest)

        return loss

    of_prefix = with_baseline(lambda logp, entropy, logits: 2 * entropy + logits[:, 0])
    constant = with_baseline(lambda logp, entropy, logits: torch.full_like(logp, 3.0))
    of_token = with_baseline(lambda logp, entropy, logits: logp)
    exact = -policy_gradient(tree)
    assert_equal(expected_gradient(of_prefix, tree), exact)
    assert_equal(expected_gradient(constant, tree), exact)
    # a baseline that depends on the token is a reward: here -logp, whose objective is the entropy of every next token
    biased = expected_gradient(of_token, tree)
    assert_equal(biased, by_hand(tree, lambda path: -(path.reward - np.log(path.q))))
    assert_not_parallel(biased, exact)

    if name == "importance-sampled":
        assert_equal(expected_gradient(of_prefix, tree, under="behaviour"), -token_level_gradient(tree))
        assert_differs(expected_gradient(of_token, tree, under="behaviour"), -token_level_gradient(tree))


def taught(tree: SequenceTree, *, student: Tensor | None = None) -> SequenceTree:
    """The same language with responses sampled from the teacher."""
    return SequenceTree(
        vocab_size=tree.vocab_size,
        max_length=tree.max_length,
        eos=tree.eos,
        prompt_lengths=tree.prompt_lengths,
        student=tree.student if student is None else student,
        teacher=tree.teacher,
        behaviour=tree.teacher,
        rewards=tree.rewards,
    )


@every_tree
def test_sft_on_the_teachers_samples_is_the_forward_kl(tree):
    tree = taught(tree)
    log_p, log_q = tree.log_probabilities(tree.teacher), tree.log_probabilities(tree.student)
    forward_kl = gradient_of((tree.probabilities(tree.teacher) * (log_p - log_q)).sum(), tree)
    assert_equal(expected_gradient(kdloss.sft_loss, tree, under="behaviour", normalizer=1.0), forward_kl)
    assert_equal(by_hand(tree, lambda path: np.array(-1.0), under="behaviour"), forward_kl)

    # a local count divides by the length of the sampled response
    local = expected_gradient(kdloss.sft_loss, tree, under="behaviour")
    assert_equal(local, by_hand(tree, lambda path: np.array(-1 / len(path.q)), under="behaviour"))
    assert_not_parallel(local, forward_kl)


@every_tree
def test_sft_has_no_gradient_where_the_student_is_the_teacher(tree):
    """With a fixed normalizer the score has mean zero; a local count moves off the teacher by changing length."""
    tree = taught(tree, student=tree.teacher)
    rest = expected_gradient(kdloss.sft_loss, tree, under="behaviour", normalizer=1.0)
    assert_equal(rest, torch.zeros_like(rest))
    assert expected_gradient(kdloss.sft_loss, tree, under="behaviour").norm() > 1e-2
    # on the student's own samples the gradient is minus the score, whose mean is zero for every student
    own = expected_gradient(kdloss.sft_loss, TREES["up to 2 tokens"], normalizer=1.0)
    assert_equal(own, torch.zeros_like(own))


@every_tree
@pytest.mark.parametrize("prompt_normalizer", [1.0, 4.0])  # one per response; another only scales
def test_grpo_loss_with_a_fixed_normalizer_has_the_policy_gradient(tree, prompt_normalizer):
    got = expected_gradient(kdloss.grpo_loss, tree, normalizer=prompt_normalizer)
    assert_equal(got, -policy_gradient(tree) / prompt_normalizer)
    off_policy = expected_gradient(kdloss.grpo_loss, tree, under="behaviour", normalizer=prompt_normalizer)
    exact = by_hand(tree, lambda path: ppo(path, 0.2, 0.2), under="behaviour")
    assert_equal(off_policy, exact / prompt_normalizer)


@every_tree
def test_grpo_loss_with_sequence_means_weighs_responses_by_one_over_their_length(tree):
    loss = partial(kdloss.grpo_loss, reduction="sequence_mean")
    got = expected_gradient(loss, tree)
    assert_equal(got, by_hand(tree, lambda path: np.array(-path.reward / len(path.q))))
    assert_not_parallel(got, policy_gradient(tree))


def test_grpo_loss_with_a_local_token_count_is_biased_by_exactly_this():
    def coefficients(paths):
        count = sum(len(path.q) for path in paths)
        return [np.array(-path.reward / count) for path in paths]

    got = expected_gradient(kdloss.grpo_loss, GROUP_TREE, batch_size=2)
    assert_equal(got, by_hand_of_batches(GROUP_TREE, coefficients, size=2))
    assert_not_parallel(got, policy_gradient(GROUP_TREE))


@every_tree
def test_grpo_loss_takes_its_ratio_against_the_policy_of_this_update(tree):
    """Decoupled: PPO's clip on q / prox, times the bounded weight prox / mu; prox is the teacher."""

    def loss(logp, old_logp, teacher_logp, advantages, loss_mask, normalizer):
        weights = kdloss.truncated_importance_weights(teacher_logp, old_logp, loss_mask=loss_mask, max_weight=1.3)
        return kdloss.grpo_loss(
            logp,
            old_logp,
            advantages,
            loss_mask=loss_mask,
            prox_logp=teacher_logp,
            weights=weights,
            normalizer=normalizer,
        )

    def coefficient(path):
        return np.minimum(path.p / path.mu, 1.3) * ppo(path._replace(mu=path.p), 0.2, 0.2)

    exact = by_hand(tree, coefficient, under="behaviour")
    assert_equal(expected_gradient(loss, tree, under="behaviour", normalizer=1.0), exact)


# the default; distillation that outweighs RL; a negative weight; either term alone
WEIGHTS = [(1.0, 0.005), (0.5, 2.0), (1.0, -0.3), (0.0, 1.0), (1.0, 0.0)]


def folded(
    logp,
    old_logp,
    teacher_logp,
    advantages,
    loss_mask,
    cu_seqlens,
    normalizer,
    *,
    rl,
    kd,
    discount=0.0,
    clip_low=0.2,
    clip_high=0.2,
):
    """The loss of a trainer that takes only advantages."""
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    reward = kdloss.discounted_returns(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, discount=discount)
    both = kdloss.fold_kd_reward(advantages, reward, rl_loss_weight=rl, distill_loss_weight=kd)
    return kdloss.grpo_loss(
        logp, old_logp, both, loss_mask=loss_mask, normalizer=normalizer, clip_low=clip_low, clip_high=clip_high
    )


@every_tree
@pytest.mark.parametrize(("rl", "kd"), WEIGHTS)
@pytest.mark.parametrize("discount", [0, 0.5, 1])
def test_fold_kd_reward_at_ratio_one_has_the_gradient_of_kdrl_loss(tree, rl, kd, discount):
    def kdrl(logp, old_logp, teacher_logp, advantages, loss_mask, cu_seqlens, normalizer):
        return kdloss.kdrl_loss(
            logp,
            old_logp,
            teacher_logp,
            advantages,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            rl_loss_weight=rl,
            distill_loss_weight=kd,
            kd_discount=discount,
        )

    def coefficient(path):
        return -(rl * path.reward + kd * returns_to_go(path, discount))

    exact = by_hand(tree, coefficient)
    fold = partial(folded, rl=rl, kd=kd, discount=discount)
    assert_equal(expected_gradient(kdrl, tree, normalizer=1.0), exact)
    assert_equal(expected_gradient(fold, tree, normalizer=1.0), exact)


@every_tree
def test_away_from_ratio_one_the_trainers_clip_acts_on_the_folded_reward_too(tree):
    rl, kd = 0.7, 0.5

    def clipped_sum(path):
        a = rl * path.reward + kd * np.log(path.p / path.q)
        stopped = ((a > 0) & (path.ratio > 1.2)) | ((a < 0) & (path.ratio < 0.8))
        return np.where(stopped, 0, -path.ratio * a)

    def sum_of_clipped(path):
        return rl * ppo(path, 0.2, 0.2) - kd * path.ratio * np.log(path.p / path.q)

    options = {"rl_loss_weight": rl, "distill_loss_weight": kd}
    fold = expected_gradient(partial(folded, rl=rl, kd=kd), tree, under="behaviour", normalizer=1.0)
    tokens = expected_gradient(partial(kdloss.kdrl_token_loss, **options), tree, under="behaviour")
    whole = expected_gradient(partial(kdloss.kdrl_loss, **options), tree, under="behaviour", normalizer=1.0)
    assert_equal(fold, by_hand(tree, clipped_sum, under="behaviour"))
    assert_equal(tokens, by_hand(tree, sum_of_clipped, under="behaviour"))
    assert_equal(whole, tokens)
    assert_differs(fold, whole)
    # with bounds that never act, the gradient is the same at every ratio
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    fold = expected_gradient(partial(folded, rl=rl, kd=kd, **wide), tree, under="behaviour", normalizer=1.0)
    assert_equal(fold, expected_gradient(partial(kdloss.kdrl_token_loss, **options, **wide), tree, under="behaviour"))


@every_tree
def test_a_folded_reward_that_is_frozen_at_sampling_time_pushes_the_student_past_its_teacher(tree):
    """The student is at the teacher here, so nothing should move it. log p - log mu does, with the ratio too."""

    def fold(logp, old_logp, loss_mask, *, frozen):
        teacher_logp = logp.detach()
        reward = kdloss.reverse_kl_reward(old_logp if frozen else logp, teacher_logp, loss_mask=loss_mask)
        both = kdloss.fold_kd_reward(torch.zeros_like(reward), reward, distill_loss_weight=1.0)
        return kdloss.importance_sampled_surrogate(logp, old_logp, both, loss_mask=loss_mask)

    today = expected_gradient(partial(fold, frozen=False), tree, under="behaviour")
    frozen = expected_gradient(partial(fold, frozen=True), tree, under="behaviour")
    assert all((x == 0).all() for x in today)
    # q = p, so p / mu is the ratio
    assert_equal(frozen, by_hand(tree, lambda path: -path.ratio * np.log(path.ratio), under="behaviour"))
    assert_differs(frozen, today)


@every_tree
def test_fold_kd_reward_with_a_weight_per_token(tree):
    """For several teachers. The weight is any detached per-token tensor, here the student's confidence."""

    def fold(logp, old_logp, teacher_logp, advantages, loss_mask):
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        weight = torch.where(loss_mask, logp.detach().exp(), 0)
        both = kdloss.fold_kd_reward(advantages, reward, distill_loss_weight=weight)
        return kdloss.clipped_surrogate(logp, old_logp, both, loss_mask=loss_mask)

    def kdrl(logp, old_logp, teacher_logp, advantages, loss_mask):
        weight = torch.where(loss_mask, logp.detach().exp(), 0)
        return kdloss.kdrl_token_loss(
            logp, old_logp, teacher_logp, advantages, loss_mask=loss_mask, distill_loss_weight=weight
        )

    exact = by_hand(tree, lambda path: -(path.reward + path.q * np.log(path.p / path.q)))
    assert_equal(expected_gradient(fold, tree), exact)
    assert_equal(expected_gradient(kdrl, tree), exact)
