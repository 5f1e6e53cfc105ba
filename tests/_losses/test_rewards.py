"""Holds that the surrogate on each reward descends the divergence that the reward names, exactly, by enumeration.

Also the biased gradient of a clip, what rewards are at the ends of their range, and that the reward -f(p/q), which is
the divergence itself, points elsewhere. Values against the oracles are in `every_function`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from enumeration import assert_differs, assert_equal, by_hand, gradient_of, responses
from kdloss.testing import SequenceTree, expected_gradient

TREES = {
    "up to 2 tokens": SequenceTree(max_length=2, eos=2, prompt_lengths=(1, 3), seed=1),
    "up to 3 tokens": SequenceTree(max_length=3, eos=0, prompt_lengths=(2, 1), seed=2),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name -> the reward; the divergence D(p, q) of rows; f of D = sum_v q_v f(p_v / q_v)
REWARDS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reverse KL": (kdloss.reverse_kl_reward, lambda p, q: kl(q, p), lambda u: u - 1 - u.log()),
    "forward KL": (kdloss.forward_kl_reward, kl, lambda u: u * u.log() - u + 1),
    **{
        f"JSD, beta {beta}": (
            partial(kdloss.jsd_reward, beta=beta),
            partial(jsd, beta=beta),
            lambda u, b=beta: b * u * u.log() - (b * u + 1 - b) * (b * u + 1 - b).log(),
        )
        for beta in (0.1, 0.5, 0.9)
    },
    "squared Hellinger": (
        kdloss.squared_hellinger_reward,
        lambda p, q: 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1),
        lambda u: 0.5 * (u.sqrt() - 1).square(),
    ),
    "total variation": (
        kdloss.total_variation_reward,
        lambda p, q: 0.5 * (p - q).abs().sum(-1),
        lambda u: 0.5 * (u - 1).abs(),
    ),
}
every_reward = pytest.mark.parametrize("name", REWARDS)


def surrogate(reward: Callable[..., Tensor], logp, old_logp, teacher_logp, loss_mask) -> Tensor:
    advantages = reward(logp, teacher_logp, loss_mask=loss_mask)
    return kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask).loss


def of_rows(tree: SequenceTree, divergence: Callable[[Tensor, Tensor], Tensor], under: str) -> Tensor:
    """The gradient of sum over prefixes of (the probability to visit it) * D(p, q)."""
    visits = torch.zeros(len(tree.prefixes), dtype=torch.float64)
    for probability, _, rows, _ in responses(tree, under):
        visits[rows] += probability
    return gradient_of((visits * divergence(tree.teacher.softmax(-1), tree.student.softmax(-1))).sum(), tree)


@every_tree
@every_reward
@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_the_surrogate_descends_the_divergence_that_the_reward_names(tree, name, under):
    """kdloss.forward_kl_reward, kdloss.jsd_reward, kdloss.squared_hellinger_reward, kdloss.total_variation_reward."""
    reward, divergence, f = REWARDS[name]
    u = torch.tensor([0.2, 0.9, 1.7, 4.0], dtype=torch.float64)
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    # f(1) = f'(1) = 0, so f gives D also for a p that does not sum to 1, up to that sum; here it does
    p = u * q / (u * q).sum()
    assert_equal((q * f(p / q)).sum(), divergence(p, q))
    exact = of_rows(tree, divergence, under)
    assert_equal(expected_gradient(partial(surrogate, reward), tree, under=under), exact)


@every_tree
def test_it_is_the_gradient_of_the_dense_forms(tree):
    logits, teacher = tree.student.detach().requires_grad_(), tree.teacher
    visits = torch.ones(len(tree.prefixes), dtype=torch.float64)
    dense = {
        "forward KL": kdloss.forward_kl,
        "JSD, beta 0.1": partial(kdloss.generalized_jsd, beta=0.1),
        "total variation": kdloss.total_variation,
    }
    tokens = torch.arange(logits.shape[-1])
    for name, function in dense.items():
        (expected,) = torch.autograd.grad((visits * function(logits, teacher)).sum(), logits)
        rows = logits[:, None].expand(-1, len(tokens), -1)
        logp = kdloss.token_logprobs(rows, tokens.expand(rows.shape[:-1]))
        mask = torch.ones_like(logp, dtype=torch.bool)
        loss = surrogate(REWARDS[name][0], logp, None, teacher.log_softmax(-1), mask)
        (found,) = torch.autograd.grad((logp.detach().exp() * loss).sum(), logits)
        assert_equal(found, expected)


@every_tree
@every_reward
@pytest.mark.parametrize("under", ["student", "behaviour"])
def test_a_clip_biases_by_exactly_this(tree, name, under):
    reward, divergence, _ = REWARDS[name]
    clip = {"total variation": 0.3, "JSD, beta 0.1": 0.02, "JSD, beta 0.9": 0.02}.get(name, 0.1)

    def coefficient(path):
        u = torch.from_numpy(path.p / path.q)
        ones = torch.ones_like(u, dtype=torch.bool)
        r = reward(torch.zeros_like(u), u.log(), loss_mask=ones).numpy()
        return -path.ratio * np.clip(r, -clip, clip)

    got = expected_gradient(partial(surrogate, partial(reward, clip=clip)), tree, under=under)
    assert_equal(got, by_hand(tree, coefficient, under=under))
    exact = of_rows(tree, divergence, under)
    if name == "total variation":  # every |r| is 1/2, so a clip only scales
        assert_equal(got, 2 * clip * exact)
    else:
        assert_differs(got, exact)


@every_tree
@every_reward
def test_the_divergence_itself_as_a_reward_has_another_gradient(tree, name):
    """-f(u) as a stop-gradient reward leaves the part u f' out. For the reverse KL that part is a constant."""
    _, divergence, f = REWARDS[name]

    def naive(logp, old_logp, teacher_logp, loss_mask):
        u = torch.where(loss_mask, teacher_logp - logp, 0).exp().detach()
        return kdloss.importance_sampled_surrogate(logp, old_logp, -f(u), loss_mask=loss_mask).loss

    exact, got = of_rows(tree, divergence, "student"), expected_gradient(naive, tree)
    if name == "reverse KL":  # u f' = u - 1 has the gradient of the forward KL: -f is log u + 1 - u
        assert_equal(got, exact - of_rows(tree, kl, "student"))
        return
    cosine = torch.cosine_similarity(got.flatten(), exact.flatten(), 0)
    # at a share of 0.9 the JSD is close to the reverse KL, up to a factor
    assert cosine < (0.5 if name == "JSD, beta 0.9" else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rewards_at_the_ends_of_their_range(dtype):
    """A teacher that excludes the token, one that is sure of a token that the student nearly excludes, and p = q."""
    logp = torch.tensor([-1.0, -1000.0, -2.0], dtype=dtype)
    teacher_logp = torch.tensor([-math.inf, 0.0, -2.0], dtype=dtype)
    mask = torch.ones(3, dtype=torch.bool)

    def of(reward: Callable[..., Tensor], **options: float) -> list[float]:
        return reward(logp, teacher_logp, loss_mask=mask, **options).tolist()

    assert of(kdloss.forward_kl_reward) == [-1, math.inf, 0]
    assert of(kdloss.forward_kl_reward, clip=0.5) == [-0.5, 0.5, 0]
    hellinger = 0.5 * math.exp(500) if dtype == torch.float64 else math.inf
    assert of(kdloss.squared_hellinger_reward) == pytest.approx([-0.5, hellinger, 0], rel=1e-12)
    assert of(kdloss.total_variation_reward) == [-0.5, 0.5, 0]
    expected = [0.7 * math.log(0.7), 0.7 * (1000 + math.log(0.3)), 0]
    assert of(kdloss.jsd_reward, beta=0.3) == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rewards_keep_their_digits_where_the_policies_nearly_agree(dtype):
    """Every r is f''(1) (u - 1) + O((u - 1)^2); computed from u - 1 itself."""
    size = 2.0**-20
    logp, teacher_logp = torch.zeros(2, dtype=dtype), torch.tensor([size, -size], dtype=dtype)
    mask = torch.ones(2, dtype=torch.bool)
    close = partial(torch.testing.assert_close, rtol=2 * size, atol=0)
    for reward, curvature in (
        (kdloss.forward_kl_reward, 1.0),
        (partial(kdloss.jsd_reward, beta=0.25), 0.25 * 0.75),
        (partial(kdloss.jsd_reward, beta=1e-9), 1e-9 * (1 - 1e-9)),
        (kdloss.squared_hellinger_reward, 0.25),
    ):
        close(reward(logp, teacher_logp, loss_mask=mask), curvature * teacher_logp)


def test_the_jsd_reward_tends_to_those_of_the_kls():
    logp, teacher_logp = torch.tensor([-1.0, -2.0, -0.3]).double(), torch.tensor([-2.0, -0.5, -0.4]).double()
    mask = torch.ones(3, dtype=torch.bool)
    for beta, limit in ((1e-9, kdloss.forward_kl_reward), (1 - 1e-9, kdloss.reverse_kl_reward)):
        found = kdloss.jsd_reward(logp, teacher_logp, loss_mask=mask, beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(found, limit(logp, teacher_logp, loss_mask=mask), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_reward_extrapolation_descends_the_reverse_kl_to_the_tilted_teacher(scale):
    """The recipe in docs/recipes.md: log p + (scale - 1) (log p - log r) is not normalised, and need not be."""
    rows = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, (teacher_logp, ref_logp) = rows[0].clone().requires_grad_(), rows[1:].log_softmax(-1)
    beyond = teacher_logp + (scale - 1) * (teacher_logp - ref_logp)
    tilted = (teacher_logp.exp() ** scale * ref_logp.exp() ** (1 - scale)).log()
    mask = torch.ones(7, dtype=torch.bool)
    logp = logits.log_softmax(-1)
    reward = kdloss.reverse_kl_reward(logp, beyond, loss_mask=mask)
    surrogate = kdloss.importance_sampled_surrogate(logp, None, reward, loss_mask=mask).loss
    (found,) = torch.autograd.grad((logp.detach().exp() * surrogate).sum(), logits)
    (wanted,) = torch.autograd.grad(kdloss.reverse_kl(logits, tilted), logits)
    torch.testing.assert_close(found, wanted)
    assert beyond.logsumexp(0).abs() > 0.01
