"""Holds the auditor on divergences of whole distributions: f-divergences, a teacher's top K, rewards and baselines."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import kdloss
from kdloss.testing import SequenceTree, audit, expected_gradient

# three prefixes, seven responses: token and sequence forms are told apart
TREE = SequenceTree(max_length=2, eos=0, seed=3)
# two tokens of four are outside a top 2, so no tail is exact; every response is one token, which is fast
WIDE = SequenceTree(vocab_size=4, max_length=1, seed=1)
K = 2

JSD, HELLINGER, VARIATION, CHI_SQUARE = "JSD, beta 0.5", "squared Hellinger", "total variation", "chi-square"
# u f'(u) - f(u) of D = sum q f(u), u = p/q, up to a constant: the reward that descends it
REWARDS = {
    JSD: lambda u: ((1 + u) / 2).log() / 2,
    HELLINGER: lambda u: u.sqrt() / 2,
    VARIATION: lambda u: (u - 1).sign() / 2,
    CHI_SQUARE: lambda u: u**2,
}


def coefficients(fit):
    return {name: pytest.approx(value, rel=1e-8) for name, value in fit.coefficients.items()}


def of_tokens(reward):
    return lambda logp, old_logp, teacher_logp: -(logp - old_logp).exp() * reward((teacher_logp - logp).exp()).detach()


def of_responses(reward):
    def loss(logp, old_logp, teacher_logp, loss_mask):  # one sequence a batch
        q, mu, p = (x[loss_mask].sum() for x in (logp, old_logp, teacher_logp))
        return -((q - mu).exp() * reward((p - q).exp())).detach() * q

    return loss


@pytest.mark.parametrize("divergence", REWARDS)
@pytest.mark.parametrize(("form", "loss"), [("token", of_tokens), ("sequence", of_responses)])
def test_an_f_divergence_is_recognised_whoever_samples(divergence, form, loss):
    report = audit(loss(REWARDS[divergence]), TREE)
    assert coefficients(report.on_policy) == coefficients(report.off_policy) == {f"{divergence} ({form})": 1}
    assert report.scope == "any behaviour policy"
    assert report.on_policy.ambiguous == ()


def top(teacher_logits):
    return teacher_logits.log_softmax(-1).topk(K)


def of_top(function, **keywords):
    return lambda logits, teacher_logits: function(logits, *top(teacher_logits), **keywords)


def surrogate(function, **keywords):
    def loss(logp, old_logp, teacher_logp, loss_mask):
        reward = function(logp, teacher_logp, loss_mask=loss_mask, **keywords)
        return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss

    return loss


def exact_and_sampled(function, **keywords):
    def loss(logits, labels, old_logp, teacher_logp, teacher_logits):
        return function(logits, labels, teacher_logp, *top(teacher_logits), old_logp=old_logp, **keywords)

    return loss


def through_a_head(function):
    """The same of hidden states: the logits, under an identity head."""
    return lambda logits, *inputs, **keywords: function(logits, torch.eye(4, dtype=logits.dtype), *inputs, **keywords)


def with_baseline(kind, **keywords):
    def loss(logp, old_logp, teacher_logp, logits, teacher_logits, behaviour_logits, loss_mask):
        baseline = kdloss.reverse_kl_baseline(logits, teacher_logits, kind=kind, behaviour_logits=behaviour_logits)
        out = kdloss.distillation_loss(
            logp, old_logp, teacher_logp, loss_mask=loss_mask, kd_baseline=baseline, normalizer=1.0, **keywords
        )
        return out.loss

    return loss


REVERSE, FORWARD = "reverse KL (token)", "forward KL (token)"
EXACT = {
    "reverse_kl": (kdloss.reverse_kl, REVERSE),
    "forward_kl": (kdloss.forward_kl, FORWARD),
    "generalized_jsd": (partial(kdloss.generalized_jsd, beta=0.5), f"{JSD} (token)"),
    "total_variation": (kdloss.total_variation, f"{VARIATION} (token)"),
    "topk_sampled_reverse_kl": (exact_and_sampled(kdloss.topk_sampled_reverse_kl), REVERSE),
    "linear_topk_sampled_reverse_kl": (
        exact_and_sampled(through_a_head(kdloss.linear_topk_sampled_reverse_kl)),
        REVERSE,
    ),
    "forward_kl_reward": (surrogate(kdloss.forward_kl_reward), FORWARD),
    "jsd_reward": (surrogate(kdloss.jsd_reward, beta=0.5), f"{JSD} (token)"),
    "squared_hellinger_reward": (surrogate(kdloss.squared_hellinger_reward), f"{HELLINGER} (token)"),
    "total_variation_reward": (surrogate(kdloss.total_variation_reward), f"{VARIATION} (token)"),
    "reverse_kl_baseline, value": (with_baseline("value"), REVERSE),
    "reverse_kl_baseline, optimal": (with_baseline("optimal"), REVERSE),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_unbiased_loss_gets_the_name_of_its_divergence(name):
    loss, objective = EXACT[name]
    report = audit(loss, WIDE)
    assert coefficients(report.on_policy) == coefficients(report.off_policy) == {objective: 1}
    assert report.scope == "any behaviour policy"
    assert report.teacher_in_gradient


BIASED = {
    "skewed_forward_kl": partial(kdloss.skewed_forward_kl, alpha=0.1),
    "skewed_reverse_kl": partial(kdloss.skewed_reverse_kl, alpha=0.1),
    "generalized_jsd, another beta": partial(kdloss.generalized_jsd, beta=0.3),
    **{
        f"{function.__name__}, {tail}": of_top(function, tail=tail, **keywords)
        for function, keywords, tails in (
            (kdloss.topk_forward_kl, {}, ("bucket", "renormalize", "truncate", "generalized")),
            (kdloss.topk_reverse_kl, {}, ("bucket", "renormalize", "truncate", "generalized")),
            (kdloss.topk_generalized_jsd, {"beta": 0.5}, ("bucket", "renormalize", "truncate")),
        )
        for tail in tails
    },
}


@pytest.mark.parametrize("name", BIASED)
def test_a_biased_loss_gets_no_name(name):
    report = audit(BIASED[name], WIDE)
    assert report.on_policy.coefficients == report.off_policy.coefficients == {}
    assert report.on_policy.nearest.residual > 0.01
    assert report.on_policy.residual > 1e-5  # of combinations, in the three dimensions of a row at two students
    assert not report.on_policy.is_zero
    assert report.teacher_in_gradient
    assert report.scope == "none"


def test_the_bias_of_a_truncated_forward_kl_is_what_it_does_to_the_tail():
    """P q - p on the top K and P q outside, where the forward KL has q - p: it empties the tail."""
    gradient = expected_gradient(BIASED["topk_forward_kl, truncate"], WIDE)
    q, p = WIDE.student.detach().softmax(-1), WIDE.teacher.softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, top(WIDE.teacher).indices, True)
    mass = torch.where(kept, p, 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, mass * q - torch.where(kept, p, 0.0))


def test_a_tail_of_one_token_hides_nothing():
    """So a vocabulary of K + 1 cannot tell a bucket from the whole distribution."""
    report = audit(of_top(kdloss.topk_forward_kl, tail="bucket"), TREE)
    assert TREE.vocab_size == K + 1
    assert coefficients(report.on_policy) == {FORWARD: 1}


def test_a_bounded_ratio_is_biased_off_policy_only():
    report = audit(exact_and_sampled(kdloss.topk_sampled_reverse_kl, max_ratio=0.5), WIDE)
    assert report.on_policy.coefficients == report.off_policy.coefficients == {}
    report = audit(with_baseline("value", kd_max_ratio=1.0), WIDE)
    assert coefficients(report.on_policy) == {REVERSE: 1}
    assert report.off_policy.coefficients == {}
    assert report.scope == "on-policy only"


def test_combinations_with_other_objectives_are_recognised():
    def joint(logits, teacher_logits, logp, old_logp, advantages, entropy):
        policy_gradient = -(logp - old_logp).exp() * advantages
        return policy_gradient + 0.3 * kdloss.generalized_jsd(logits, teacher_logits, beta=0.5) - 0.01 * entropy

    report = audit(joint, TREE)
    assert coefficients(report.on_policy) == {"expected reward": 1, f"{JSD} (token)": 0.3, "entropy (token)": 0.01}
    assert report.scope == "any behaviour policy"
    # minus a divergence as a reward: f(u) = (sqrt u - 1)² / 2 has u/2 - sqrt u + 1/2, so it raises the forward KL
    report = audit(of_tokens(lambda u: -((u.sqrt() - 1) ** 2) / 2), TREE)
    assert coefficients(report.on_policy) == {FORWARD: -0.5, f"{HELLINGER} (token)": 2}
    assert str(report.on_policy) == "raises 0.50 × forward KL (token), lowers 2.00 × squared Hellinger (token)"  # noqa: RUF001


def test_a_divergence_near_the_student_is_not_right_elsewhere():
    """Where p is nearly q, all f-divergences have nearly the same gradient: one that is not known may get a name."""
    noise = torch.randn(TREE.student.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = SequenceTree(max_length=2, eos=0, student=TREE.student, teacher=TREE.student.detach() + 1e-4 * noise)
    report = audit(partial(kdloss.generalized_jsd, beta=0.3), near)
    assert report.scope in ("none", "this tree only")
    # known ones keep their own names there
    assert coefficients(audit(partial(kdloss.generalized_jsd, beta=0.5), near).on_policy) == {f"{JSD} (token)": 1}
    assert audit(kdloss.reverse_kl, near).on_policy.coefficients.keys() == {REVERSE}


def test_a_divergence_that_stays_finite_is_recognised_where_the_teacher_excludes_a_token():
    tree = SequenceTree(max_length=2, eos=0)
    tree.teacher[0, 1] = -math.inf
    for loss, objective in ((partial(kdloss.generalized_jsd, beta=0.5), JSD), (kdloss.total_variation, VARIATION)):
        assert coefficients(audit(loss, tree).on_policy) == {f"{objective} (token)": 1}


def test_a_batch_has_the_distributions_of_the_teacher_and_of_the_policy_that_sampled():
    everything = range(len(TREE.sequences))
    for under, policy in (("student", TREE.student), ("behaviour", TREE.behaviour)):
        batch = TREE.batch(everything, under=under)
        trained, labels = batch.loss_mask, batch.labels[batch.loss_mask, None]
        for logits, logp in (
            (batch.teacher_logits, batch.teacher_logp),
            (batch.behaviour_logits, batch.old_logp),
            (batch.logits, batch.logp),
        ):
            torch.testing.assert_close(logits[trained].log_softmax(-1).gather(-1, labels)[:, 0], logp[trained])
            assert logits[~trained].isnan().all()
        assert not batch.behaviour_logits.requires_grad
        assert torch.equal(batch.behaviour_logits[batch.cu_seqlens[:-1]], policy.detach()[[0] * len(everything)])


def test_a_teacher_in_the_value_alone_is_noticed_from_its_logits():
    report = audit(lambda logp, teacher_logits: logp - teacher_logits.logsumexp(-1), TREE)
    assert report.teacher_in_value
    assert not report.teacher_in_gradient
    report = audit(lambda logits, teacher_logits: -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1), TREE)
    assert report.teacher_in_gradient


def test_a_penalty_of_the_whole_position_as_a_reward_is_zero_in_expectation():
    """It does not depend on the token that was sampled, whoever sampled it."""

    def penalty(logp, old_logp, logits, teacher_logits):
        return (logp - old_logp).exp() * kdloss.reverse_kl(logits, teacher_logits).detach()

    report = audit(penalty, TREE)
    assert (report.on_policy.is_zero, report.off_policy.is_zero) == (True, True)
    assert not report.teacher_in_gradient
    assert report.on_policy.variance > 0
    assert expected_gradient(penalty, TREE).abs().max() < 1e-15
