"""Holds the exact expected gradient of estimators and distillation losses, biased ones included.

Every expectation is an enumeration in float64, so equality is to rounding: half of the last printed digit for the
numbers of a two-step example, rtol 1e-12 between two ways to compute the same gradient.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.testing import SequenceTree, expected_gradient

STUDENT = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]
TEACHER = [[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]
REVERSE_KL_AT_ROOT = [0.3462430373, -0.2203890843, -0.1258539531]

assert_printed = functools.partial(torch.testing.assert_close, rtol=0, atol=6e-11)  # half of the last digit printed
assert_equal = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def rows(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.fixture
def example() -> SequenceTree:
    """Two steps over three tokens; the behaviour policy is uniform."""
    return SequenceTree(student=rows(STUDENT), teacher=rows(TEACHER), behaviour=torch.zeros(4, 3))


@pytest.fixture
def variable() -> SequenceTree:
    """Responses of one to three tokens after prompts of one and three; all three policies differ."""
    return SequenceTree(vocab_size=2, max_length=3, eos=0, prompt_lengths=(1, 3), seed=7)


def kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) of rows of logits."""
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def visits(tree: SequenceTree, policy: Tensor) -> Tensor:
    """(N,) the probability that a policy reaches each prefix."""
    probability = tree.probabilities(policy)
    reached = []
    for prompt, prefix in tree.prefixes:
        below = [i for i, (p, tokens) in enumerate(tree.sequences) if p == prompt and tokens[: len(prefix)] == prefix]
        reached.append(probability[below].sum())
    return torch.stack(reached)


def grad(scalar: Tensor, tree: SequenceTree) -> Tensor:
    return torch.autograd.grad(scalar, tree.student)[0]


def token_reverse_kl(tree: SequenceTree, sampler: Tensor) -> Tensor:
    """The gradient of the reverse KL of every next-token distribution, at the prefixes that `sampler` visits."""
    return grad((visits(tree, sampler).detach() * kl(tree.student, tree.teacher)).sum(), tree)


def sequence_reverse_kl(tree: SequenceTree) -> Tensor:
    log_q, log_p = tree.log_probabilities(tree.student), tree.log_probabilities(tree.teacher)
    return grad((tree.probabilities(tree.student) * (log_q - log_p)).sum(), tree)


def distillation(**options: object) -> functools.partial[object]:
    return functools.partial(kdloss.distillation_loss, **options)


def test_kl_values_of_the_example(example: SequenceTree) -> None:
    assert_printed(kl(example.student, example.teacher)[0], torch.tensor(0.2238046572, dtype=torch.float64))
    log_ratio = example.log_probabilities(example.student) - example.log_probabilities(example.teacher)
    whole = (example.probabilities(example.student) * log_ratio).sum()
    assert_printed(whole, torch.tensor(0.4537855231, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "under", "at_root"),
    [
        pytest.param(kdloss.kl_k1, "student", [0, 0, 0], id="k1"),
        pytest.param(kdloss.kl_k2, "student", REVERSE_KL_AT_ROOT, id="k2"),
        pytest.param(kdloss.kl_k3, "student", [0.3, -0.2, -0.1], id="k3"),
        pytest.param(distillation(), "student", REVERSE_KL_AT_ROOT, id="surrogate"),
        pytest.param(distillation(), "behaviour", REVERSE_KL_AT_ROOT, id="surrogate-uniform"),
        pytest.param(kdloss.kl_k2, "behaviour", [0.3054302, -0.1702752, -0.1351550], id="k2-uniform"),
        pytest.param(
            distillation(kd_discount=1.0), "student", [0.3698820405, -0.2373973055, -0.1324847350], id="discount-1"
        ),
    ],
)
def test_gradients_of_the_example(example: SequenceTree, loss: object, under: str, at_root: list[float]) -> None:
    gradient = expected_gradient(loss, example, under=under, normalizer=1)[0]
    digits = 6e-8 if under == "behaviour" and loss is kdloss.kl_k2 else 6e-11  # that row has seven digits
    torch.testing.assert_close(gradient, torch.tensor(at_root, dtype=torch.float64), rtol=0, atol=digits)


@pytest.mark.parametrize("under", ["student", "behaviour"])
@pytest.mark.parametrize("batch_size", [1, 2])  # 2: with a fixed normalizer, the sequences of a batch are not coupled
def test_distillation_is_the_token_level_reverse_kl(variable: SequenceTree, under: str, batch_size: int) -> None:
    sampler = variable.student if under == "student" else variable.behaviour
    expected = token_reverse_kl(variable, sampler)
    gradient = expected_gradient(distillation(), variable, under=under, batch_size=batch_size, normalizer=batch_size)
    assert_equal(gradient, expected)


@pytest.mark.parametrize("loss", [kdloss.kl_k2, kdloss.kl_k3])
def test_the_three_that_differ_in_value_only(variable: SequenceTree, loss: object) -> None:
    """grad(rho k3) = grad(sg(rho) k2) = grad(-rho sg(R)) for every single sample; here in expectation under mu."""

    def weighted(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
        ratio = torch.where(loss_mask, logp - old_logp, 0).exp()
        estimate = loss(logp, teacher_logp, loss_mask=loss_mask)  # type: ignore[operator]
        return (ratio.detach() if loss is kdloss.kl_k2 else ratio) * estimate

    gradient = expected_gradient(weighted, variable, under="behaviour")
    assert_equal(gradient, token_reverse_kl(variable, variable.behaviour))


def test_k1_and_k3_are_what_they_are(variable: SequenceTree) -> None:
    assert_equal(expected_gradient(kdloss.kl_k1, variable), torch.zeros_like(variable.student).detach())
    reached = visits(variable, variable.student).detach()
    forward_kl = grad((reached * kl(variable.teacher, variable.student)).sum(), variable)
    assert_equal(expected_gradient(kdloss.kl_k3, variable), forward_kl)


def test_k2_off_policy_is_biased_by_this_much(variable: SequenceTree) -> None:
    """Under mu the gradient of k2 is sum_v mu_v (log q_v - log p_v) (onehot_v - q), not that of any KL."""
    q, p = variable.student.detach().log_softmax(-1), variable.teacher.log_softmax(-1)
    mu = variable.behaviour.softmax(-1)
    weight = mu * (q - p)
    per_prefix = weight - weight.sum(-1, keepdim=True) * q.exp()
    biased = visits(variable, variable.behaviour)[:, None] * per_prefix
    gradient = expected_gradient(kdloss.kl_k2, variable, under="behaviour")
    assert_equal(gradient, biased)
    assert (gradient - token_reverse_kl(variable, variable.behaviour)).abs().max() > 1e-2


def test_discount_1_is_the_kl_between_whole_sequences(variable: SequenceTree) -> None:
    gradient = expected_gradient(distillation(kd_discount=1.0), variable, normalizer=1)
    assert_equal(gradient, sequence_reverse_kl(variable))


def test_chain_rule_of_the_kl(variable: SequenceTree) -> None:
    """The KL of sequences is the sum of the visited token KLs; its gradient adds how visits change with the student."""
    moving = grad((visits(variable, variable.student) * kl(variable.student, variable.teacher)).sum(), variable)
    assert_equal(moving, sequence_reverse_kl(variable))
    assert (moving - token_reverse_kl(variable, variable.student)).abs().max() > 1e-2


@pytest.mark.parametrize("discount", [0.5, 1.0])
@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_discounted_gradient_by_hand(variable: SequenceTree, discount: float, under: str) -> None:
    """Where it is biased, the exact value, by loops: sum over sequences of P_mu * sum_t rho_t G_t * score_t."""
    sampler = variable.student.detach() if under == "student" else variable.behaviour
    probability = variable.probabilities(sampler)
    q, p, mu = (x.detach().log_softmax(-1) for x in (variable.student, variable.teacher, sampler))
    expected = torch.zeros_like(q)
    for weight, (prompt, tokens) in zip(probability, variable.sequences, strict=True):
        row = [variable.prefixes.index((prompt, tokens[:i])) for i in range(len(tokens))]
        for i, (n, v) in enumerate(zip(row, tokens, strict=True)):
            ahead = [discount ** (j - i) * (p - q)[row[j], tokens[j]] for j in range(i, len(tokens))]
            score = torch.nn.functional.one_hot(torch.tensor(v), variable.vocab_size) - q[n].exp()
            expected[n] -= weight * (q - mu)[n, v].exp() * sum(ahead) * score
    gradient = expected_gradient(distillation(kd_discount=discount), variable, under=under, normalizer=1)
    assert_equal(gradient, expected)
    if under == "behaviour" or discount < 1:
        assert (gradient - sequence_reverse_kl(variable)).abs().max() > 1e-3  # neither is exact


def reweighted(tree: SequenceTree, weight_of: object, sampler: Tensor) -> Tensor:
    """The gradient of the surrogate with each sequence's terms multiplied by weight_of(its length), B = 1."""
    total = torch.zeros_like(tree.student).detach()
    for i, probability in enumerate(tree.probabilities(sampler).detach()):
        batch = tree.batch([i], under="student" if sampler is tree.student else "behaviour")
        tokens = kdloss.importance_sampled_surrogate(
            batch.logp,
            batch.old_logp,
            kdloss.reverse_kl_reward(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask),
            loss_mask=batch.loss_mask,
        ).loss
        total += probability * weight_of(int(batch.lengths)) * grad(tokens.sum(), tree)  # type: ignore[operator]
    return total


@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_sequence_mean_weights_sequences_by_their_length(variable: SequenceTree, under: str) -> None:
    sampler = variable.student if under == "student" else variable.behaviour
    gradient = expected_gradient(
        distillation(reduction="sequence_mean"), variable, under=under, batch_size=2, normalizer=2
    )
    assert_equal(gradient, reweighted(variable, lambda length: 1 / length, sampler))
    assert (gradient - token_reverse_kl(variable, sampler)).abs().max() > 1e-2


def test_local_token_count_is_biased_less_the_larger_the_batch() -> None:
    tree = SequenceTree(vocab_size=2, max_length=2, eos=0, seed=3)
    length = (tree.probabilities(tree.student).detach() * torch.tensor([len(t) for _, t in tree.sequences])).sum()
    unbiased = token_reverse_kl(tree, tree.student) / length
    bias = [(expected_gradient(distillation(), tree, batch_size=size) - unbiased).abs().max() for size in (1, 2, 4)]
    # with one sequence per batch, the local count is the length of that sequence
    assert_equal(expected_gradient(distillation(), tree, batch_size=1), reweighted(tree, lambda n: 1 / n, tree.student))
    assert bias[0] > 1.5 * bias[1] > 2.25 * bias[2] > 0  # O(1/B)


def test_kd_mask_by_outcome_is_biased_by_this_much(variable: SequenceTree) -> None:
    """KDRL's reward-guided mask: only sequences without reward learn from the teacher."""

    def masked(
        logp: Tensor,
        old_logp: Tensor,
        teacher_logp: Tensor,
        rewards: Tensor,
        loss_mask: Tensor,
        cu_seqlens: Tensor,
        normalizer: float,
    ) -> Tensor:
        kd_mask = kdloss.broadcast_to_tokens(rewards <= 0, cu_seqlens=cu_seqlens, total_tokens=logp.shape[0])
        return kdloss.distillation_loss(
            logp, old_logp, teacher_logp, loss_mask=loss_mask, kd_mask=kd_mask, normalizer=normalizer
        ).loss

    gradient = expected_gradient(masked, variable, normalizer=1)
    expected = torch.zeros_like(gradient)
    for i, probability in enumerate(variable.probabilities(variable.student).detach()):
        if variable.rewards[i] <= 0:
            batch = variable.batch([i])
            k2 = kdloss.kl_k2(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask).sum()  # same gradient
            expected += probability * grad(k2, variable)
    assert_equal(gradient, expected)
    assert (gradient - token_reverse_kl(variable, variable.student)).abs().max() > 1e-2


def with_baseline(baseline: Callable[[Tensor, Tensor], Tensor], **options: float) -> Callable[..., Tensor]:
    """Distillation with a baseline made of the entropy of the prefix and the log-prob of the sampled token."""

    def loss(
        logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, entropy: Tensor, loss_mask: Tensor, normalizer: float
    ) -> Tensor:
        given = {"loss_mask": loss_mask, "normalizer": normalizer, **options}
        return kdloss.distillation_loss(
            logp, old_logp, teacher_logp, kd_baseline=baseline(entropy.detach(), logp.detach()), **given
        ).loss

    return loss


@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_a_baseline_of_the_prefix_moves_no_expected_gradient(variable: SequenceTree, under: str) -> None:
    sampler = variable.student if under == "student" else variable.behaviour
    expected = token_reverse_kl(variable, sampler)
    of_prefix = with_baseline(lambda entropy, logp: 1.7 * entropy - 0.4)
    assert_equal(expected_gradient(of_prefix, variable, under=under, normalizer=1), expected)
    of_token = with_baseline(lambda entropy, logp: 0.5 * logp)
    assert (expected_gradient(of_token, variable, under=under, normalizer=1) - expected).abs().max() > 1e-2


def test_a_baseline_under_a_bounded_ratio_is_biased_by_this_much(variable: SequenceTree) -> None:
    """Per prefix -sum_v mu_v min(rho_v, c) (R_v - b) (onehot_v - q), by hand."""
    q, p = variable.student.detach().log_softmax(-1), variable.teacher.log_softmax(-1)
    mu = variable.behaviour.log_softmax(-1)
    entropy = -(q.exp() * q).sum(-1, keepdim=True)
    weight = -mu.exp() * (q - mu).exp().clamp(max=0.8) * (p - q - (1.7 * entropy - 0.4))
    biased = visits(variable, variable.behaviour)[:, None] * (weight - weight.sum(-1, keepdim=True) * q.exp())
    loss = with_baseline(lambda entropy, logp: 1.7 * entropy - 0.4, kd_max_ratio=0.8)
    assert_equal(expected_gradient(loss, variable, under="behaviour", normalizer=1), biased)
    without = expected_gradient(distillation(kd_max_ratio=0.8), variable, under="behaviour", normalizer=1)
    assert (biased - without).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"kd_reward_clip": 0.3}, {"kd_max_ratio": 0.8}])
def test_bounds_bias_by_this_much(variable: SequenceTree, options: dict[str, float]) -> None:
    """Per prefix -sum_v mu_v min(rho_v, c) clip(R_v) (onehot_v - q), by hand."""
    q, p = variable.student.detach().log_softmax(-1), variable.teacher.log_softmax(-1)
    mu = variable.behaviour.log_softmax(-1)
    clip = options.get("kd_reward_clip", torch.inf)
    ratio = (q - mu).exp().clamp(max=options.get("kd_max_ratio", torch.inf))
    weight = -mu.exp() * ratio * (p - q).clamp(-clip, clip)
    biased = visits(variable, variable.behaviour)[:, None] * (weight - weight.sum(-1, keepdim=True) * q.exp())
    gradient = expected_gradient(distillation(**options), variable, under="behaviour", normalizer=1)
    assert_equal(gradient, biased)
    assert (gradient - token_reverse_kl(variable, variable.behaviour)).abs().max() > 1e-2


def direct(distill_loss_weight: float, rl_loss_weight: float, **options: object) -> object:
    def loss(
        logp: Tensor,
        old_logp: Tensor,
        teacher_logp: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        cu_seqlens: Tensor,
        normalizer: float | None = None,
    ) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # tested elsewhere
            return kdloss.kdrl_loss(
                logp,
                old_logp,
                teacher_logp,
                advantages,
                loss_mask=loss_mask,
                cu_seqlens=cu_seqlens,
                normalizer=normalizer,
                rl_loss_weight=rl_loss_weight,
                distill_loss_weight=distill_loss_weight,
                direct_penalty=True,
                **options,  # type: ignore[arg-type]
            ).loss

    return loss


@pytest.mark.parametrize("rl_loss_weight", [0.0, 1.0])
def test_direct_penalty_holds_no_teacher(variable: SequenceTree, rl_loss_weight: float) -> None:
    gradient = expected_gradient(direct(0.7, rl_loss_weight), variable, normalizer=1)  # type: ignore[arg-type]
    rl_alone = expected_gradient(functools.partial(kdloss.grpo_loss), variable, normalizer=1)
    assert_equal(gradient, rl_loss_weight * rl_alone)

    other_teacher = SequenceTree(
        vocab_size=2, max_length=3, eos=0, prompt_lengths=(1, 3), seed=7, teacher=-variable.teacher
    )
    for under in ("student", "behaviour"):  # off-policy it is not zero, but still independent of the teacher
        assert_equal(
            expected_gradient(direct(0.7, 0.0), variable, under=under, normalizer=1),  # type: ignore[arg-type]
            expected_gradient(direct(0.7, 0.0), other_teacher, under=under, normalizer=1),  # type: ignore[arg-type]
        )


def test_direct_penalty_with_sequence_means_pushes_length(variable: SequenceTree) -> None:
    """E[(1/|o|) sum_t s_t] = grad of the expected 1/|o| against its tokens, computed by loops; it is not zero."""
    loss = direct(1.0, 0.0, reduction="sequence_mean")
    gradient = expected_gradient(loss, variable, normalizer=1)  # type: ignore[arg-type]
    expected = torch.zeros_like(gradient)
    for i, probability in enumerate(variable.probabilities(variable.student).detach()):
        log_q = variable.log_probabilities(variable.student)[i]
        expected += probability / len(variable.sequences[i][1]) * grad(log_q, variable)
    assert_equal(gradient, expected)
    # this is the gradient of E[1/|o|]: descending it makes responses longer
    inverse_length = torch.tensor([1 / len(t) for _, t in variable.sequences], dtype=torch.float64)
    assert_equal(gradient, grad((variable.probabilities(variable.student) * inverse_length).sum(), variable))
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_kdrl_is_the_sum_of_its_terms(variable: SequenceTree, reduction: str) -> None:
    """grad J_KDRL = rl_loss_weight * grad J_GRPO + distill_loss_weight * grad J_RKL (KDRL, equation 8)."""
    terms = {"reduction": reduction}
    joint = functools.partial(kdloss.kdrl_loss, rl_loss_weight=0.6, distill_loss_weight=0.3, **terms)
    rl = expected_gradient(functools.partial(kdloss.grpo_loss, **terms), variable, under="behaviour", normalizer=1)
    kd = expected_gradient(distillation(**terms), variable, under="behaviour", normalizer=1)
    assert_equal(expected_gradient(joint, variable, under="behaviour", normalizer=1), 0.6 * rl + 0.3 * kd)


def test_kdrl_token_loss_and_fold_agree_on_policy(variable: SequenceTree) -> None:
    def folded(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        both = kdloss.fold_kd_reward(advantages, reward, rl_loss_weight=0.6, distill_loss_weight=0.3)
        return kdloss.clipped_surrogate(logp, old_logp, both, loss_mask=loss_mask).loss

    joint = functools.partial(kdloss.kdrl_token_loss, rl_loss_weight=0.6, distill_loss_weight=0.3)
    assert_equal(expected_gradient(folded, variable), expected_gradient(joint, variable))


def test_reward_extrapolation_has_its_fixed_point(example: SequenceTree) -> None:
    """teacher_logp + (scale - 1) (teacher_logp - ref_logp) as the teacher: q stops at that, normalised."""
    scale, reference = 1.7, SequenceTree(seed=11).teacher.log_softmax(-1)
    p = example.teacher.log_softmax(-1)
    target = p + (scale - 1) * (p - reference)
    at_fixed_point = SequenceTree(student=target, teacher=target)
    assert_equal(expected_gradient(distillation(), at_fixed_point, normalizer=1), torch.zeros_like(target), atol=1e-12)
    elsewhere = SequenceTree(student=rows(STUDENT), teacher=target)
    assert expected_gradient(distillation(), elsewhere, normalizer=1).abs().max() > 1e-2


def test_sft_on_teacher_samples_is_the_forward_kl(variable: SequenceTree) -> None:
    """The teacher writes the tokens: the behaviour policy is the teacher."""
    tree = SequenceTree(vocab_size=2, max_length=3, eos=0, prompt_lengths=(1, 3), seed=7, behaviour=variable.teacher)
    gradient = expected_gradient(kdloss.sft_loss, tree, under="behaviour", normalizer=1)
    assert_equal(gradient, grad((visits(tree, tree.teacher) * kl(tree.teacher, tree.student)).sum(), tree))


@pytest.mark.parametrize("loss", [kdloss.kl_k2, kdloss.kl_k3, kdloss.kl_k1])
def test_values_estimate_what_they_say(variable: SequenceTree, loss: object) -> None:
    """k1 and k3 average to the KL in value. k2 does not, although it is the one with the right gradient."""
    whole = variable.batch(range(len(variable.sequences)))
    weight = variable.probabilities(variable.student).repeat_interleave(whole.cu_seqlens.diff())
    value = (weight * loss(whole.logp, whole.teacher_logp, loss_mask=whole.loss_mask)).sum()  # type: ignore[operator]
    exact = (visits(variable, variable.student) * kl(variable.student, variable.teacher)).sum()
    if loss is kdloss.kl_k2:
        assert (value - exact).abs() > 1e-3
    else:
        assert_equal(value, exact)


def test_expected_gradient_calls_by_name_and_says_what_is_missing(variable: SequenceTree) -> None:
    with pytest.raises(TypeError, match="the loss needs ref_logp"):
        expected_gradient(lambda logp, ref_logp: logp - ref_logp, variable)
    with pytest.raises(ValueError, match="under must be"):
        expected_gradient(kdloss.kl_k1, variable, under="teacher")
    with pytest.raises(ValueError, match="the loss must return"):
        expected_gradient(lambda logp: logp[:2], variable)
    positional_only = expected_gradient(
        lambda logp, /, *, teacher_logp, loss_mask: kdloss.kl_k2(logp, teacher_logp, loss_mask=loss_mask), variable
    )
    assert_equal(positional_only, expected_gradient(kdloss.kl_k2, variable))
    assert_equal(
        expected_gradient(
            lambda **batch: kdloss.kl_k2(batch["logp"], batch["teacher_logp"], loss_mask=batch["loss_mask"]), variable
        ),
        positional_only,
    )
    assert expected_gradient(lambda advantages: advantages.sum() * 0, variable).abs().max() == 0


def test_tree_lists_every_sequence_once(variable: SequenceTree) -> None:
    for policy in (variable.student, variable.teacher, variable.behaviour):
        assert_equal(variable.probabilities(policy).sum(), torch.tensor(1.0, dtype=torch.float64))
    assert sorted(len(tokens) for _, tokens in variable.sequences) == [1, 1, 2, 2, 3, 3, 3, 3]
    batch = variable.batch([0, 5])
    assert batch.loss_mask.sum() == batch.lengths.sum()
    assert batch.logp.isnan().equal(~batch.loss_mask)  # garbage at masked positions only
    assert (batch.labels == -100).equal(~batch.loss_mask)
    with pytest.raises(ValueError, match="prompt_lengths must be >= 1"):
        SequenceTree(prompt_lengths=(0,))
    with pytest.raises(ValueError, match=r"teacher must be one row of logits per prefix \(4, 3\), got \(1, 3\)"):
        SequenceTree(teacher=torch.zeros(1, 3))
