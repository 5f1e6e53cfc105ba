"""Holds `kdloss.testing.audit`: every known objective is recognised, and no other loss is taken for one."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch

import kdloss
from kdloss.testing import SequenceTree, audit, expected_gradient

# float64: sums over 30 sequences of values of order 1, divided by a gradient norm of order 0.1
EXACT = 1e-12


@pytest.fixture(scope="module")
def tree():
    return SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2), seed=3)


def coefficients(fit):
    return {name: pytest.approx(value, rel=1e-9) for name, value in fit.coefficients.items()}


def per_sequence(f):
    """A score-function loss with the gradient -E[f(o) grad log q(o)], where f of the whole response o is detached.

    The ratio of the whole response makes it exact for another policy's samples, too.
    """

    def loss(logp, old_logp, teacher_logp, loss_mask, rewards):  # one sequence a batch
        q, mu, p = (x[loss_mask].sum() for x in (logp, old_logp, teacher_logp))
        value = f(reward=rewards[0], length=loss_mask.sum(), log_q=q, log_mu=mu, log_p=p)
        return -((q - mu).exp() * value).detach() * q

    return loss


# Every objective over whole sequences, estimated without the closed forms that the auditor uses.
# E[f] is raised: f is minus the divergence, or the reward.
SEQUENCE_OBJECTIVES = {
    "reverse KL (sequence)": lambda *, log_q, log_p, **_: log_p - log_q,
    "forward KL (sequence)": lambda *, log_q, log_p, **_: (log_p - log_q).exp(),
    "expected reward": lambda *, reward, **_: reward,
    "expected reward / length": lambda *, reward, length, **_: reward / length.double(),
    "entropy (sequence)": lambda *, log_q, **_: -log_q,
    "expected length": lambda *, length, **_: length,
    "expected 1/length": lambda *, length, **_: -1 / length.double(),
}


@pytest.mark.parametrize("objective", SEQUENCE_OBJECTIVES)
def test_an_objective_over_sequences_is_recognised_whoever_samples(tree, objective):
    report = audit(per_sequence(SEQUENCE_OBJECTIVES[objective]), tree)
    assert coefficients(report.on_policy) == {objective: 1}
    assert coefficients(report.off_policy) == {objective: 1}
    assert max(report.on_policy.residual, report.off_policy.residual) < EXACT
    assert report.scope == "any behaviour policy"
    assert report.teacher_in_gradient == ("KL" in objective)


def ratio_times(advantage):
    """-rho * sg(advantage), per token."""
    return lambda logp, old_logp, teacher_logp: -(logp - old_logp).exp() * advantage(logp, teacher_logp).detach()


# the same for objectives per next-token distribution, at the visited prefixes
TOKEN_OBJECTIVES = {
    "reverse KL (token)": ratio_times(lambda q, p: p - q),
    "forward KL (token)": ratio_times(lambda q, p: (p - q).exp()),
    "entropy (token)": ratio_times(lambda q, p: -q),
}


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
def test_an_objective_over_tokens_is_recognised_whoever_samples(tree, objective):
    report = audit(TOKEN_OBJECTIVES[objective], tree)
    assert coefficients(report.on_policy) == coefficients(report.off_policy) == {objective: 1}
    assert report.scope == "any behaviour policy"
    assert max(report.on_policy.residual, report.off_policy.residual) < EXACT


# (loss, on-policy, off-policy), for a behaviour policy far from the student; None: none of the known objectives
def surrogate(logp, old_logp, advantages):
    return -(logp - old_logp).exp() * advantages


def surrogate_per_sequence_mean(logp, old_logp, advantages, loss_mask, cu_seqlens):
    return kdloss.sequence_mean(surrogate(logp, old_logp, advantages), loss_mask=loss_mask, cu_seqlens=cu_seqlens)


def tokens_of_the_students_prefixes(logp, old_logp, teacher_logp, loss_mask):  # one sequence a batch
    log_ratio = (logp - old_logp)[loss_mask].cumsum(0)  # up to and including the token
    return -(log_ratio.exp() * (teacher_logp - logp)[loss_mask]).detach() @ logp[loss_mask]


OFF_POLICY = [
    (lambda logp: logp, {}, {"KL (behaviour || student)": -1}),
    (lambda logp: -logp, {}, {"KL (behaviour || student)": 1}),
    (surrogate, {"expected reward": 1}, {"expected reward (token by token)": 1}),
    (
        surrogate_per_sequence_mean,
        {"expected reward / length": 1},
        {"expected reward / length (token by token)": 1},
    ),
    (
        tokens_of_the_students_prefixes,
        {"reverse KL (token)": 1},
        {"reverse KL (token, student's prefixes)": 1},
    ),
    (kdloss.kl_k2, {"reverse KL (token)": 1}, None),
    (kdloss.kl_k3, {"forward KL (token)": 1}, None),
    (
        lambda logp, old_logp, teacher_logp, advantages, entropy: (
            (surrogate(logp, old_logp, advantages) + 0.3 * surrogate(logp, old_logp, (teacher_logp - logp).detach()))
            - 0.01 * entropy
        ),
        {"reverse KL (token)": 0.3, "expected reward": 1, "entropy (token)": 0.01},
        {"reverse KL (token)": 0.3, "expected reward (token by token)": 1, "entropy (token)": 0.01},
    ),
]


@pytest.mark.parametrize(("loss", "on_policy", "off_policy"), OFF_POLICY)
def test_combinations_and_what_another_policys_samples_make_of_them(tree, loss, on_policy, off_policy):
    report = audit(loss, tree)
    assert coefficients(report.on_policy) == on_policy
    assert report.on_policy.is_zero == (on_policy == {})
    assert coefficients(report.off_policy) == (off_policy or {})
    if off_policy is None:
        assert report.off_policy.residual > 0.05  # all known objectives together do not fit
        assert report.off_policy.nearest.residual >= report.off_policy.residual
        assert not report.off_policy.is_zero
    expected = "any behaviour policy" if off_policy else "on-policy only"
    assert report.scope == (expected if on_policy else "off-policy only")


def test_the_joint_mode_of_a_trainer_has_no_teacher(tree):
    def joint(logp, old_logp, teacher_logp, advantages):
        return surrogate(logp, old_logp, advantages) + 0.3 * (logp - teacher_logp)

    report = audit(joint, tree)
    assert coefficients(report.on_policy) == {"expected reward": 1}
    assert report.teacher_in_value
    assert not report.teacher_in_gradient
    assert "the teacher does not enter this gradient" in report.verdicts


def test_a_teacher_in_the_gradient_off_policy_only_is_noticed():
    report = audit(lambda logp, old_logp, teacher_logp: (logp.detach() - old_logp) * teacher_logp * logp)
    assert report.on_policy.is_zero
    assert report.teacher_in_gradient


def test_a_teacher_in_the_gradient_on_policy_only_is_noticed():
    report = audit(
        lambda logp, old_logp, teacher_logp: torch.where(
            (logp - old_logp).abs() < 1e-9, (logp - teacher_logp) ** 2 / 2, logp
        )
    )
    assert coefficients(report.on_policy) == {"reverse KL (token)": 1}
    assert coefficients(report.off_policy) == {"KL (behaviour || student)": -1}
    assert report.teacher_in_gradient


def test_a_loss_without_the_teacher_says_so(tree):
    report = audit(surrogate, tree)
    assert not report.teacher_in_value
    assert "the teacher does not enter this loss" in report.verdicts


def test_a_per_sequence_mean_of_the_literal_penalty_pushes_length(tree):
    literal = partial(kdloss.kdrl_loss, advantages=None, rl_loss_weight=0, direct_penalty=True)
    with pytest.warns(UserWarning, match="direct_penalty"):
        report = audit(partial(literal, distill_loss_weight=1.0, reduction="sequence_mean"), tree)
    assert coefficients(report.on_policy) == {"expected 1/length": 1}
    assert report.on_policy.length_drift > 0
    assert "on-policy it pushes for longer responses" in report.verdicts


def test_a_local_count_of_the_literal_penalty_pushes_length():
    # one prompt: 225 pairs of sequences
    report = audit(
        lambda logp, teacher_logp, loss_mask: kdloss.token_mean(
            kdloss.kl_k1(logp, teacher_logp, loss_mask=loss_mask), loss_mask=loss_mask
        ),
        SequenceTree(max_length=3, eos=0),
        batch_size=2,
    )
    assert coefficients(report.on_policy) == {"expected 1/tokens of the batch": 1}
    # with three lengths, a sum of the other two length objectives is equal at this student, but at no other
    assert report.on_policy.ambiguous == ()


def test_the_drift_of_the_length_is_its_directional_derivative(tree):
    gradient = audit(surrogate, tree).on_policy
    lengths = torch.tensor([len(tokens) for _, tokens in tree.sequences], dtype=torch.float64)

    def length(step):
        return tree.probabilities(tree.student.detach() - step * gradient.gradient) @ lengths

    step = 1e-5
    assert gradient.length_drift == pytest.approx(float((length(step) - length(-step)) / (2 * step)), rel=1e-6)


def unclipped_kdrl(logp, old_logp, teacher_logp, advantages, loss_mask):
    return kdloss.kdrl_loss(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        distill_loss_weight=0.3,
        clip_low=1.0,
        clip_high=1e9,
        normalizer=1.0,
    )


def test_the_gradient_is_expected_gradients(tree):
    for loss, sequences, small in ((kdloss.kl_k2, 3, tree), (unclipped_kdrl, 1, tree)):
        report = audit(loss, small, batch_size=sequences)
        for fit, under in ((report.on_policy, "student"), (report.off_policy, "behaviour")):
            expected = expected_gradient(loss, small, under=under, batch_size=sequences)
            torch.testing.assert_close(fit.gradient, expected, rtol=EXACT, atol=1e-14)


def test_the_variance_is_that_of_one_batch():
    tree = SequenceTree(max_length=2, eos=0)
    gradients, probability = [], tree.probabilities(tree.student).detach()
    for i in range(len(tree.sequences)):
        batch = tree.batch([i])
        token_loss = kdloss.kl_k2(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
        gradients.append(torch.autograd.grad(token_loss.sum(), tree.student)[0].flatten())
    each = torch.stack(gradients)
    covariance = torch.cov(each.T, aweights=probability, correction=0)
    one = audit(kdloss.kl_k2, tree).on_policy
    assert one.variance == pytest.approx(float(covariance.trace()), rel=1e-12)

    def scalar(logp, teacher_logp, loss_mask, normalizer):
        per_token = kdloss.kl_k2(logp, teacher_logp, loss_mask=loss_mask)
        return kdloss.token_mean(per_token, loss_mask=loss_mask, normalizer=normalizer)

    # a mean over two independent sequences, as a per-token loss and as a scalar loss of whole batches
    for loss, normalizer in ((kdloss.kl_k2, None), (scalar, 2.0)):
        two = audit(loss, tree, batch_size=2, normalizer=normalizer).on_policy
        assert two.variance == pytest.approx(one.variance / 2, rel=1e-12)
        assert coefficients(two) == {"reverse KL (token)": 1}
    # a denominator scales the gradient by its inverse
    fifth = audit(kdloss.kl_k2, tree, normalizer=5.0).on_policy
    assert coefficients(fifth) == {"reverse KL (token)": 0.2}
    assert fifth.variance == pytest.approx(one.variance / 25, rel=1e-12)


def test_a_clip_out_of_reach_on_this_tree_is_not_right_for_any_behaviour_policy(tree):
    noise = torch.randn(tree.student.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = SequenceTree(
        max_length=3,
        eos=0,
        prompt_lengths=(1, 2),
        student=tree.student,
        teacher=tree.teacher,
        behaviour=tree.student.detach() + 1e-3 * noise,
        rewards=tree.rewards,
    )
    clipped = audit(partial(kdloss.grpo_loss, normalizer=1.0), near)
    assert coefficients(clipped.off_policy) == {"expected reward (token by token)": 1}
    assert clipped.scope == "on-policy only"
    assert "right on-policy only" in clipped.verdicts[1]
    assert audit(unclipped_kdrl, near).scope == "any behaviour policy"


def test_a_small_tree_does_not_explain_everything():
    """The gradient at a single prefix of three tokens has two dimensions, so any two known gradients span it."""
    tree = SequenceTree(max_length=1)
    clipped = partial(kdloss.distillation_loss, kd_reward_clip=0.1, normalizer=1.0)
    assert audit(clipped, tree).on_policy.coefficients == {}
    assert coefficients(audit(unclipped_kdrl, tree).on_policy) == {"reverse KL (token)": 0.3, "expected reward": 1}
    # if every token is a sequence, more than one combination fits, and the report says so
    report = audit(kdloss.kl_k2, tree)
    assert coefficients(report.on_policy) == {"reverse KL (token)": 1}
    assert "reverse KL (sequence)" in report.on_policy.ambiguous
    assert "one reading of several" in str(report)


def test_a_tree_of_one_length_leaves_lengths_out():
    report = audit(kdloss.kl_k2, SequenceTree(max_length=2, prompt_lengths=(1, 1)))
    assert coefficients(report.on_policy) == {"reverse KL (token)": 1}
    assert abs(report.on_policy.length_drift) < 1e-12


def test_coefficients_that_depend_on_the_student_are_no_objective():
    """A mixture whose weight depends on the student fits at one student, and with other coefficients at the next."""

    def mixture(logp, teacher_logp, advantages, loss_mask, logits):
        weight = logits[loss_mask][0].softmax(-1)[0].detach()  # of one token at the root, for all
        return -weight * advantages * logp + (1 - weight) * (logp - teacher_logp) ** 2 / 2

    report = audit(mixture, SequenceTree(max_length=3, eos=0))
    assert not report.on_policy.coefficients
    assert not report.on_policy.is_zero
    assert report.scope == "none"
    assert "none of the known objectives" in report.verdicts[0]


def test_a_teacher_that_excludes_a_token_leaves_infinite_objectives_out():
    tree = SequenceTree(max_length=2, eos=0)
    tree.teacher[0, 1] = -math.inf
    report = audit(surrogate, tree)
    assert coefficients(report.on_policy) == {"expected reward": 1}


def test_float32_losses_are_recognised(tree):
    report = audit(lambda logp, teacher_logp: (logp.float() - teacher_logp.float()) ** 2 / 2, tree)
    assert report.on_policy.coefficients == {"reverse KL (token)": pytest.approx(1, rel=1e-5)}
    assert 1e-10 < report.on_policy.residual < 1e-6  # float32 rounds at 6e-8


def test_no_gradient_at_all(tree):
    report = audit(lambda teacher_logp: teacher_logp, tree)
    assert report.on_policy.is_zero
    assert report.on_policy.variance == 0
    assert report.scope == "none"
    assert "zero gradient" in str(report)


def test_why_a_gradient_is_zero(tree):
    """A loss cut off from the student, one whose gradient is zero in every batch, and one where it cancels."""
    own = torch.ones((), dtype=torch.float64, requires_grad=True)
    for detached in (
        lambda logp, advantages: -advantages * logp.detach(),
        lambda logp, advantages: -advantages * logp.detach() * own,  # connected to a parameter of the loss alone
    ):
        report = audit(detached, tree)
        assert report.verdicts == (
            "your loss has no gradient: it is not connected to the student's logp, logits or entropy",
        )
    report = audit(lambda logp: 0 * logp, tree)
    assert report.verdicts[0] == "your loss has a gradient of zero in every batch, up to rounding"
    report = audit(lambda logp, teacher_logp: logp - teacher_logp, tree)
    assert report.verdicts == (
        "your loss has an expected gradient of zero: it is noise alone",
        "from another policy's samples it raises 1.00 × KL (behaviour || student)",  # noqa: RUF001
        "the teacher does not enter this gradient",
    )


def test_a_gradient_of_rounding_alone_is_zero(tree):
    """A teacher that is the student up to a constant in its logits: every log-ratio is a few ulp."""
    same = SequenceTree(max_length=3, eos=0, student=torch.randn(7, 3, generator=torch.Generator().manual_seed(1)))
    same.teacher = same.student.detach() + 0.1
    for loss in (kdloss.kl_k2, lambda logp, teacher_logp: (logp - teacher_logp).float() ** 2):
        report = audit(loss, same)
        assert 0 < report.on_policy.variance < 1e-25
        assert (report.on_policy.is_zero, report.off_policy.is_zero) == (True, True)
        assert report.verdicts[0] == "your loss has a gradient of zero in every batch, up to rounding"
    # small is not rounding
    report = audit(lambda logp, old_logp, advantages: 1e-17 * surrogate(logp, old_logp, advantages), tree)
    assert coefficients(report.on_policy) == {"expected reward": 1e-17}


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_of_rounding_alone_that_nothing_fits_is_zero(seed):
    """The log of a sum of probabilities is 0 at every prefix."""
    report = audit(lambda logits: logits.log_softmax(-1).logsumexp(-1), SequenceTree(max_length=2, eos=0, seed=seed))
    assert 0 < report.on_policy.variance < 1e-25
    assert (report.on_policy.is_zero, report.off_policy.is_zero) == (True, True)


@pytest.mark.parametrize("vocab", [2, 3])
def test_a_tree_on_which_no_known_objective_has_a_gradient(vocab):
    """Uniform policies and equal rewards: at a vocabulary of 2 the known gradients are 0, at 3 they are rounding."""
    uniform = torch.zeros(1, vocab)
    tree = SequenceTree(
        vocab_size=vocab,
        max_length=1,
        student=uniform,
        teacher=uniform,
        behaviour=uniform,
        rewards=torch.ones(vocab),
    )
    report = audit(lambda logits: logits[:, 0], tree)
    assert (report.on_policy.coefficients, report.on_policy.nearest, report.on_policy.residual) == ({}, None, 1)
    assert not report.on_policy.is_zero
    assert report.verdicts[0] == "your loss follows none of the known objectives"
    assert audit(lambda logits: 0 * logits[:, 0], tree).on_policy.is_zero


def unknown(logp, teacher_logp):
    """A push that is no combination of known objectives."""
    return torch.sin(3 * teacher_logp).detach() * logp


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_unknown_push_gets_no_name(size, seed):
    tree = SequenceTree(max_length=2, eos=0, seed=seed)
    report = audit(
        lambda logp, old_logp, advantages, teacher_logp: (
            surrogate(logp, old_logp, advantages) + size * unknown(logp, teacher_logp)
        ),
        tree,
    )
    assert not report.on_policy.coefficients
    assert report.on_policy.nearest.objective == "expected reward"
    assert report.on_policy.nearest.residual == pytest.approx(size, rel=1)


def test_a_small_known_push_gets_its_name_where_it_is_exact(tree):
    def loss(logp, old_logp, advantages, teacher_logp):
        return surrogate(logp, old_logp, advantages) + 1e-5 * (logp - teacher_logp) ** 2 / 2

    assert coefficients(audit(loss, tree).on_policy) == {"expected reward": 1, "reverse KL (token)": 1e-5}

    def rounded(logp, old_logp, advantages, teacher_logp):
        return loss(logp.float(), old_logp.float(), advantages.float(), teacher_logp.float())

    # float32 leaves 1e-7, a hundredth of the push: another objective would fit as well
    report = audit(rounded, tree)
    assert not report.on_policy.coefficients
    assert report.on_policy.nearest.objective == "expected reward"
    # a push that float32 resolves
    report = audit(
        lambda logp, teacher_logp, advantages: -advantages * logp + 0.01 * (logp - teacher_logp).float() ** 2 / 2, tree
    )
    assert report.on_policy.coefficients.keys() == {"expected reward", "reverse KL (token)"}


def clipped_reward(bound):
    return lambda logp, old_logp, teacher_logp: (
        -(logp - old_logp).exp() * (teacher_logp - logp).detach().clamp(-bound, bound)
    )


def masked(keep):
    def loss(logp, old_logp, teacher_logp):
        return torch.where(keep(logp - old_logp, teacher_logp), clipped_reward(99)(logp, old_logp, teacher_logp), 0.0)

    return loss


# Bounds out of reach of the default tree, whose ratios are 0.06 .. 15, whose log p - log q is -2.3 .. 2.2 and whose
# rewards are -1.8 .. 1.6. Per bound: the loss, whether it acts on the student's own samples, and what reaches it.
BOUNDS = {
    "kd_reward_clip": (partial(kdloss.distillation_loss, kd_reward_clip=5.0, normalizer=1.0), True, "teacher"),
    "a clamp of the log-ratio": (clipped_reward(10.0), True, "teacher"),
    "kd_max_ratio": (partial(kdloss.distillation_loss, kd_max_ratio=50.0, normalizer=1.0), False, "behaviour"),
    "a wide clip": (partial(kdloss.grpo_loss, clip_low=0.99, clip_high=99.0, normalizer=1.0), False, "behaviour"),
    "a truncated weight": (
        lambda logp, old_logp, advantages: -(logp - old_logp).exp().detach().clamp(max=1e3) * advantages * logp,
        False,
        "behaviour",
    ),
    "a mask of ratios": (masked(lambda log_ratio, teacher_logp: log_ratio < 5), False, "behaviour"),
    "clipped rewards": (
        lambda logp, old_logp, advantages: surrogate(logp, old_logp, advantages.clamp(-5, 5)),
        True,
        "rewards",
    ),
    "a mask of teacher log-probs": (masked(lambda log_ratio, teacher_logp: teacher_logp > -9), True, "teacher"),
    "NaN beyond it": (
        lambda logp, old_logp, teacher_logp: (
            torch.where(teacher_logp > -9, 1.0, math.nan) * clipped_reward(99)(logp, old_logp, teacher_logp)
        ),
        True,
        "teacher",
    ),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_that_never_acted_is_said_to_be_there(name):
    loss, on_policy, what = BOUNDS[name]
    report = audit(loss)
    assert len(report.on_policy.coefficients) == len(report.off_policy.coefficients) == 1
    # a student far away is far from the others, too
    assert {*report.on_policy.changes_with} - {"student"} == ({what} if on_policy else set())
    assert {*report.off_policy.changes_with} - {"student"} == {what}
    assert report.scope == ("this tree only" if on_policy else "on-policy only")
    default = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2))
    q, p, mu = (x.detach().log_softmax(-1) for x in (default.student, default.teacher, default.behaviour))
    text, values = {
        "teacher": ("a teacher farther from the student (log p - log q", p - q),
        "behaviour": ("a behaviour policy farther from the student (ratio", (q - mu).exp()),
        "rewards": ("larger rewards (reward", default.rewards),
    }[what]
    beyond = f"{text} is {values.min():.3g} .. {values.max():.3g} on this tree)"
    gradient = "gradient" if on_policy else "off-policy gradient"
    assert [s for s in report.verdicts if not s.startswith("the teacher")][1:] == [
        "right on this tree only" if on_policy else "right on-policy only",
        f"no bound acted on this tree, but the {gradient} changes with {beyond}",
    ]


def test_a_loss_that_checks_its_arguments_is_bounded():
    def checked(logp, old_logp, teacher_logp, advantages, loss_mask):
        if advantages.abs().max() > 10 or teacher_logp[loss_mask].min() < -9:
            raise ValueError("out of range")
        return surrogate(logp, old_logp, advantages) + 0.3 * (logp - teacher_logp)

    report = audit(checked)
    assert coefficients(report.on_policy) == {"expected reward": 1}
    assert {*report.on_policy.changes_with} == {"teacher", "rewards"}
    # the teacher that it takes says whether the teacher is in the gradient
    assert report.teacher_in_value
    assert not report.teacher_in_gradient


def test_a_zero_expectation_that_a_bound_breaks(tree):
    report = audit(lambda logp, teacher_logp: (logp - teacher_logp).clamp(-9, 9), tree)
    assert report.on_policy.is_zero
    assert report.on_policy.changes_with == ("teacher",)
    assert any("gradient changes with a teacher" in sentence for sentence in report.verdicts)


def test_a_coefficient_that_depends_on_the_student_is_said_to_change():
    def loss(logp, advantages, logits, cu_seqlens):
        weight = logits.detach()[cu_seqlens[:-1]].softmax(-1)[:, 0]  # of one token at the root
        return -advantages * logp * weight.repeat_interleave(cu_seqlens.diff())

    report = audit(loss, SequenceTree(max_length=2, eos=0))  # the last prompt token is the first position
    assert report.on_policy.coefficients.keys() == {"expected reward"}
    assert report.on_policy.changes_with == ("student",)
    assert report.scope == "this tree only"
    assert "no bound acted on this tree, but the on-policy gradient changes with another student" in str(report)


def test_no_bound_means_that_a_wide_range_was_tried(tree):
    report = audit(unclipped_kdrl, tree)
    assert report.on_policy.changes_with == report.off_policy.changes_with == ()
    assert report.scope == "any behaviour policy"
    tried = report.tried
    assert tried["ratio"][0] < 1e-3
    assert 1e6 < tried["ratio"][1] < 1e9  # its clip acts above
    assert tried["log p - log q"][0] < -15
    assert tried["reward"][1] > 100
    assert str(report).splitlines()[-1].startswith("tried: log p - log q -1")
    # what a loss does not take is not tried
    assert audit(kdloss.kl_k1, tree).tried.keys() == {"log p - log q", "ratio"}
    assert audit(kdloss.kl_k2, tree).tried.keys() == {"log p - log q"}  # off-policy it is nothing that could change


def test_equal_results_are_not_told_apart_by_rounding(tree):
    """In float32 the coefficients on-policy and off-policy differ in the last digits."""
    report = audit(lambda logp, old_logp, teacher_logp: clipped_reward(99)(logp, old_logp, teacher_logp).float(), tree)
    on, off = report.on_policy.coefficients, report.off_policy.coefficients
    assert on.keys() == off.keys() == {"reverse KL (token)"}
    assert on != off
    assert report.verdicts[1] == "right for any behaviour policy"
    # where a bound acts elsewhere, the sentence does not repeat the same result
    bounded = audit(
        lambda logp, old_logp, teacher_logp: (
            -(logp - old_logp).float().exp().clamp(max=100) * (teacher_logp - logp).detach()
        )
    )
    assert bounded.on_policy.coefficients != bounded.off_policy.coefficients
    assert bounded.verdicts[1] == "right on-policy only"


def test_a_coarse_rtol_does_not_make_different_coefficients_equal(tree):
    def half_off_policy(logp, old_logp, teacher_logp):
        share = torch.where((logp - old_logp).abs() < 1e-9, 1.0, 0.5)
        return -(logp - old_logp).exp() * share * (teacher_logp - logp).detach()

    report = audit(half_off_policy, tree, rtol=1e-2)
    assert coefficients(report.on_policy) == {"reverse KL (token)": 1}
    assert coefficients(report.off_policy) == {"reverse KL (token)": 0.5}
    assert report.scope == "on-policy only"
    assert report.verdicts[1] == (
        "right on-policy only; from another policy's samples it lowers 0.50 × reverse KL (token)"  # noqa: RUF001
    )


def test_a_person_can_read_it(tree):
    text = str(audit(unclipped_kdrl, tree))
    verdict, scope, *_ = text.splitlines()
    residual = verdict.split()[-1]
    said = "your loss raises 1.00 × expected reward, lowers 0.30 × reverse KL (token)"  # noqa: RUF001
    assert verdict == f"{said}; residual {residual}"
    assert float(residual) < EXACT
    assert scope == "right for any behaviour policy, token by token"
    assert [" ".join(line.split()) for line in text.splitlines() if line.endswith("it")] == [
        "the student 0.30 reverse KL (token) lowers it",
        "1.00 expected reward raises it",
        "another policy 0.30 reverse KL (token) lowers it",
        "1.00 expected reward (token by token) raises it",
    ]
    assert max(map(len, text.splitlines())) <= 100


def test_a_negative_coefficient_reads_as_the_other_direction(tree):
    report = audit(lambda logp, old_logp, advantages: -surrogate(logp, old_logp, advantages), tree)
    assert coefficients(report.on_policy) == {"expected reward": -1}
    assert str(report.on_policy) == "lowers 1.00 × expected reward"  # noqa: RUF001
    assert sum(line.endswith("lowers it") for line in str(report).splitlines()) == 2


def test_the_report_is_frozen_and_the_tree_is_left_as_it_was(tree):
    before = [x.detach().clone() for x in (tree.student, tree.teacher, tree.behaviour)]
    report = audit(kdloss.kl_k2, tree)
    for x, was in zip((tree.student, tree.teacher, tree.behaviour), before, strict=True):
        assert torch.equal(x, was)
    assert tree.student.grad is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.scope = "none"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.on_policy.residual = 0.0


@pytest.mark.parametrize(
    ("loss", "keywords", "error", "match"),
    [
        (lambda logp, loss_mask: (logp * loss_mask).sum(), {}, ValueError, "not finite.*garbage=0.0"),
        (lambda logp, loss_mask: torch.where(loss_mask, logp, 0.0).sum() * math.inf, {}, ValueError, "not finite"),
        (lambda logp: logp[:-1], {}, ValueError, r"must return \(T,\)"),
        (lambda logp, labels_of_mine: logp, {}, TypeError, "labels_of_mine"),
        (lambda logp: logp, {"batch_size": 0}, ValueError, "batch_size must be >= 1"),
        (lambda logp: logp, {"rtol": 0.0}, ValueError, "rtol in 0 .. 1"),
    ],
)
def test_errors(tree, loss, keywords, error, match):
    with pytest.raises(error, match=match):
        audit(loss, tree, **keywords)


def test_a_loss_that_takes_everything_is_asked_about_the_teacher(tree):
    report = audit(
        lambda **batch: kdloss.kl_k1(batch["logp"], batch["teacher_logp"], loss_mask=batch["loss_mask"]), tree
    )
    assert report.teacher_in_value
    assert not report.teacher_in_gradient


def test_a_local_count_of_grpo_is_the_reward_per_token_of_the_batch():
    report = audit(kdloss.grpo_loss, SequenceTree(max_length=3, eos=0), batch_size=2)
    assert coefficients(report.on_policy) == {"expected reward / tokens of the batch": 1}
