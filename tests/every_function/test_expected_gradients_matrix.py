"""Holds every scalar loss under every denominator and both samplers: its exact expected gradient and its objective.

The matrix is (loss with its options) x (reduction, denominator) x (who samples), over every batch of sequences with
masked prompts of unequal lengths: batches of one where the denominator is fixed, of two where it depends on the batch.
Each cell is compared with `enumeration`, where a loss is its coefficient c_t = d loss / d logp_t, and with what the
docstring says: the objective that it descends, or that it is biased, that is, its gradient is not a multiple of that of
any objective that it could be mistaken for.

The last tests hold that no public loss is without a proof.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import pathlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from enumeration import (
    Path,
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
)
from kdloss.testing import SequenceTree, expected_gradient

# 8 responses, of 1, 2 and 3 tokens after prompts of 1 and 3, so 64 batches of two.
TREE = SequenceTree(vocab_size=2, max_length=3, eos=0, prompt_lengths=(1, 3), seed=7)

# --- what may be descended --------------------------------------------------------------------------------------------


def token_kl(tree: SequenceTree, under: str, *, forward: bool = False) -> Tensor:
    visits = torch.zeros(len(tree.prefixes), dtype=torch.float64)
    for probability, _, rows, _ in responses(tree, under):
        visits[rows] += probability
    log_q, log_p = tree.student.log_softmax(-1), tree.teacher.log_softmax(-1)
    each = log_p.exp() * (log_p - log_q) if forward else log_q.exp() * (log_q - log_p)
    return gradient_of((visits * each.sum(-1)).sum(), tree)


def sequence_kl(tree: SequenceTree, under: str) -> Tensor:
    log_ratio = tree.log_probabilities(tree.student) - tree.log_probabilities(tree.teacher)
    return gradient_of((tree.probabilities(tree.student) * log_ratio).sum(), tree)


def expectation(tree: SequenceTree, of: Tensor) -> Tensor:
    return gradient_of((tree.probabilities(tree.student) * of).sum(), tree)


def lengths(tree: SequenceTree) -> Tensor:
    return torch.tensor([len(tokens) for _, tokens in tree.sequences], dtype=torch.float64)


def inverse_tokens(tree: SequenceTree, under: str) -> Tensor:
    """The gradient of E[1 / tokens of a batch of two]."""
    q, n = tree.probabilities(tree.student), lengths(tree)
    return gradient_of((q[:, None] * q / (n[:, None] + n)).sum(), tree)


def log_likelihood(tree: SequenceTree, under: str) -> Tensor:
    """The gradient of E[log q]: minus that of KL(sampler || q)."""
    sampler = {"student": tree.student, "behaviour": tree.behaviour}[under].detach()
    return gradient_of((tree.probabilities(sampler) * tree.log_probabilities(tree.student)).sum(), tree)


OBJECTIVES: dict[str, Callable[[SequenceTree, str], Tensor]] = {
    "reverse KL (token)": token_kl,
    "forward KL (token)": partial(token_kl, forward=True),
    "reverse KL (sequence)": sequence_kl,
    "minus the reward": lambda tree, under: -policy_gradient(tree),
    "minus reward / length": lambda tree, under: -expectation(tree, tree.rewards / lengths(tree)),
    "1 / length": lambda tree, under: expectation(tree, 1 / lengths(tree)),
    "1 / tokens of the batch": inverse_tokens,
    "log-likelihood": log_likelihood,
    "minus log-likelihood": lambda tree, under: -log_likelihood(tree, under),
    "0.6 of minus the reward, 0.3 of reverse KL (token)": lambda tree, under: (
        -0.6 * policy_gradient(tree) + 0.3 * token_kl(tree, under)
    ),
    "0.6 of minus the reward, 0.3 of reverse KL (sequence)": lambda tree, under: (
        -0.6 * policy_gradient(tree) + 0.3 * sequence_kl(tree, under)
    ),
    "0.6 of minus reward / length, 0.3 of 1 / length": lambda tree, under: expectation(
        tree, (0.3 - 0.6 * tree.rewards) / lengths(tree)
    ),
    "0.6 of minus the reward": lambda tree, under: -0.6 * policy_gradient(tree),
    "zero": lambda tree, under: torch.zeros_like(tree.student).detach(),
}
# what a biased gradient might be mistaken for
FAMILIAR = ("reverse KL (token)", "forward KL (token)", "reverse KL (sequence)", "minus the reward")

# --- the denominators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denominator:
    reduction: str
    normalizer: float | None
    size: int  # sequences per batch

    @property
    def share(self) -> float:
        """The factor on the expected sum over a sequence."""
        return 1.0 if self.normalizer is None else self.size / self.normalizer

    def of(self, batch: list[Path], path: Path) -> float:
        if self.reduction == "token_mean":
            return self.normalizer or sum(len(member.q) for member in batch)
        return len(path.q) * (self.normalizer or len(batch))


# The fixed ones are not counts. test_expected_gradients.py tests a fixed one with larger batches.
DENOMINATORS = {
    "tokens, fixed": Denominator("token_mean", 7.0, 1),
    "tokens, local": Denominator("token_mean", None, 2),
    "sequences, fixed": Denominator("sequence_mean", 5.0, 1),
    "sequences, local": Denominator("sequence_mean", None, 2),
}

# --- the losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    call: Callable[..., Any]  # takes the fields of a batch, reduction and normalizer, by name
    coefficient: Callable[[Path], Any]  # c_t before the denominator
    descends: dict[tuple[str, str], str]  # (denominator, sampler) -> objective; biased where it is not listed


def reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A per-token loss of (logp, teacher_logp) under the library's own reductions."""

    def call(*, logp, teacher_logp, loss_mask, cu_seqlens, reduction, normalizer, **_):
        x = function(logp, teacher_logp, loss_mask=loss_mask)
        if reduction == "token_mean":
            return kdloss.token_mean(x, loss_mask=loss_mask, normalizer=normalizer)
        return kdloss.sequence_mean(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer)

    return call


def kd_mask_of(batch: dict[str, Any]) -> Tensor:
    """KDRL's reward-guided mask: the distillation reward applies where the response failed."""
    return kdloss.broadcast_to_tokens(
        batch["rewards"] <= 0, cu_seqlens=batch["cu_seqlens"], total_tokens=batch["logp"].shape[0]
    )


def kd_mask_by_token(batch: dict[str, Any]) -> Tensor:
    """The distillation reward applies where the teacher is sure. Elsewhere it is 0, and the step still counts."""
    return batch["teacher_logp"] > math.log(0.5)


def reward_of(path: Path, *, mask: bool = False, sure: bool = False, clip: float = np.inf) -> np.ndarray:
    heard = (path.reward <= 0 or not mask) & ((path.p > 0.5) | (not sure))
    return heard * np.clip(np.log(path.p / path.q), -clip, clip)


def to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    return np.array([sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))])


# each bound lies within the range of what it bounds, so it acts on some tokens and not on others
BOUNDS: dict[str, tuple[dict[str, Any], Callable[..., np.ndarray], Callable[[Path], np.ndarray]]] = {
    "": ({}, reward_of, lambda path: path.ratio),
    "kd_mask by outcome": ({"kd_mask": kd_mask_of}, partial(reward_of, mask=True), lambda path: path.ratio),
    "kd_mask by token": ({"kd_mask": kd_mask_by_token}, partial(reward_of, sure=True), lambda path: path.ratio),
    "kd_reward_clip": ({"kd_reward_clip": 0.3}, partial(reward_of, clip=0.3), lambda path: path.ratio),
    "kd_max_ratio": ({"kd_max_ratio": 1.2}, reward_of, lambda path: np.minimum(path.ratio, 1.2)),
}


def distillation(discount: float, bound: str) -> Loss:
    options, reward, ratio = BOUNDS[bound]

    def call(*, logp, old_logp, teacher_logp, loss_mask, cu_seqlens, reduction, normalizer, **rest):
        batch = {"logp": logp, "teacher_logp": teacher_logp, "cu_seqlens": cu_seqlens, **rest}
        given = {name: x(batch) if callable(x) else x for name, x in options.items()}
        return kdloss.distillation_loss(
            logp,
            old_logp,
            teacher_logp,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            reduction=reduction,
            normalizer=normalizer,
            kd_discount=discount,
            **given,
        )

    # at ratio 1 a bound of 1.2 does not act; the other bounds depend on the sampled token or the outcome
    descends = {}
    if bound in ("", "kd_max_ratio") and discount == 0:
        descends["tokens, fixed", "student"] = "reverse KL (token)"
    if bound in ("", "kd_max_ratio") and discount == 1:
        descends["tokens, fixed", "student"] = "reverse KL (sequence)"
    if bound == "" and discount == 0:
        descends["tokens, fixed", "behaviour"] = "reverse KL (token)"
    return Loss(call, lambda path: -ratio(path) * to_go(reward(path), discount), descends)


def kdrl(discount: float, *, direct: bool = False, everything: bool = False) -> Loss:
    def call(
        *, logp, old_logp, teacher_logp, advantages, loss_mask, cu_seqlens, reduction, normalizer, rewards, **_
    ) -> Any:
        options: dict[str, Any] = {"kd_discount": discount}
        if everything:  # the teacher takes the place of the policy at the start of the update
            batch = {"logp": logp, "cu_seqlens": cu_seqlens, "rewards": rewards}
            options |= {
                "prox_logp": teacher_logp,
                "weights": kdloss.truncated_importance_weights(
                    teacher_logp, old_logp, loss_mask=loss_mask, max_weight=1.1
                ),
                "dual_clip": 1.5,
                "clip_high": 0.28,
                "kd_mask": kd_mask_of(batch),
                "kd_reward_clip": 0.3,
                "kd_max_ratio": 1.2,
            }
        with warnings.catch_warnings():
            if direct:
                warnings.filterwarnings("ignore", message="direct_penalty=True descends", category=UserWarning)
            return kdloss.kdrl_loss(
                logp,
                old_logp,
                teacher_logp,
                advantages,
                loss_mask=loss_mask,
                cu_seqlens=cu_seqlens,
                reduction=reduction,
                normalizer=normalizer,
                rl_loss_weight=0.6,
                distill_loss_weight=0.3,
                direct_penalty=direct,
                **options,
            )

    def coefficient(path: Path) -> np.ndarray:
        if everything:  # only the RL term has weights and the ratio to prox
            rl = np.minimum(path.p / path.mu, 1.1) * ppo(path._replace(mu=path.p), 0.2, 0.28, 1.5)
            kd = -np.minimum(path.ratio, 1.2) * to_go(reward_of(path, mask=True, clip=0.3), discount)
        else:
            rl = ppo(path, 0.2, 0.2)
            kd = np.ones_like(path.q) if direct else -path.ratio * returns_to_go(path, discount)
        return 0.6 * rl + 0.3 * kd

    if everything:
        descends = {}
    elif direct:  # independent of the teacher
        by_length = "0.6 of minus reward / length, 0.3 of 1 / length"
        descends = {
            ("tokens, fixed", "student"): "0.6 of minus the reward",
            ("sequences, fixed", "student"): by_length,
            ("sequences, local", "student"): by_length,
        }
    else:  # off-policy, PPO's clip acts
        kind = {0: "token", 1: "sequence"}.get(discount)
        joint = {("tokens, fixed", "student"): f"0.6 of minus the reward, 0.3 of reverse KL ({kind})"}
        descends = joint if kind else {}
    return Loss(call, coefficient, descends)


def grpo(*, everything: bool = False) -> Loss:
    def call(*, logp, old_logp, teacher_logp, advantages, loss_mask, cu_seqlens, reduction, normalizer, **_):
        options: dict[str, Any] = {}
        if everything:
            options = {
                "prox_logp": teacher_logp,
                "weights": kdloss.masked_importance_weights(
                    teacher_logp, old_logp, loss_mask=loss_mask, max_weight=1.5
                ),
                "dual_clip": 1.5,
                "clip_high": 0.28,
            }
        return kdloss.grpo_loss(
            logp,
            old_logp,
            advantages,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            reduction=reduction,
            normalizer=normalizer,
            **options,
        )

    def coefficient(path: Path) -> np.ndarray:
        if not everything:
            return ppo(path, 0.2, 0.2)
        weight = path.p / path.mu
        return np.where((weight < 0.5) | (weight > 1.5), 0, weight) * ppo(path._replace(mu=path.p), 0.2, 0.28, 1.5)

    exact = {
        ("tokens, fixed", "student"): "minus the reward",
        ("sequences, fixed", "student"): "minus reward / length",
        ("sequences, local", "student"): "minus reward / length",
    }
    return Loss(call, coefficient, {} if everything else exact)


def sft(*, logp, loss_mask, reduction, normalizer, **_):
    return kdloss.sft_loss(logp, loss_mask=loss_mask, normalizer=normalizer)


# a loss whose per-token gradient is the score: it does not depend on the teacher, and descends the denominator
SCORE = {
    ("tokens, fixed", "student"): "zero",
    ("tokens, local", "student"): "1 / tokens of the batch",
    ("sequences, fixed", "student"): "1 / length",
    ("sequences, local", "student"): "1 / length",
    ("tokens, fixed", "behaviour"): "log-likelihood",
}
LOSSES = {
    **{
        f"distillation_loss, kd_discount={discount}{bound and ', '}{bound}": distillation(discount, bound)
        for discount in (0, 0.5, 1)
        for bound in BOUNDS
    },
    **{f"kdrl_loss, kd_discount={discount}": kdrl(discount) for discount in (0, 0.5, 1)},
    **{f"kdrl_loss, kd_discount={discount}, everything": kdrl(discount, everything=True) for discount in (0, 0.5, 1)},
    "kdrl_loss, direct_penalty": kdrl(0, direct=True),
    "grpo_loss": grpo(),
    "grpo_loss, everything": grpo(everything=True),
    "kl_k1": Loss(reduced(kdloss.kl_k1), lambda path: np.ones_like(path.q), SCORE),
    "kl_k2": Loss(
        reduced(kdloss.kl_k2),
        lambda path: np.log(path.q / path.p),
        {("tokens, fixed", "student"): "reverse KL (token)"},
    ),
    "kl_k3": Loss(
        reduced(kdloss.kl_k3),
        lambda path: 1 - path.p / path.q,
        {("tokens, fixed", "student"): "forward KL (token)"},
    ),
    "sft_loss": Loss(
        sft,
        lambda path: -np.ones_like(path.q),
        {("tokens, fixed", "student"): "zero", ("tokens, fixed", "behaviour"): "minus log-likelihood"},
    ),
}
# A cell with batches of two takes 64 gradients, one with batches of one takes 8, so the former are slow.
CELLS = [
    pytest.param(
        name,
        denominator,
        under,
        id=f"{name}-{denominator}-{under}",
        marks=[pytest.mark.slow] if DENOMINATORS[denominator].size > 1 else [],
    )
    for name in LOSSES
    for denominator in DENOMINATORS
    for under in ("student", "behaviour")
    if name != "sft_loss" or DENOMINATORS[denominator].reduction == "token_mean"  # it has no other
]


@functools.cache
def cell(name: str, denominator: str, under: str) -> Tensor:
    d = DENOMINATORS[denominator]
    loss = partial(LOSSES[name].call, reduction=d.reduction)

    def named(**batch: Any) -> Any:
        return loss(**({"normalizer": None} | batch))

    return expected_gradient(named, TREE, under=under, batch_size=d.size, normalizer=d.normalizer)


@pytest.mark.parametrize(("name", "denominator", "under"), CELLS)
def test_the_expected_gradient_is_exactly_this(name: str, denominator: str, under: str):
    loss, d = LOSSES[name], DENOMINATORS[denominator]

    def coefficients(batch: list[Path]) -> list[np.ndarray]:
        return [loss.coefficient(path) / d.of(batch, path) for path in batch]

    assert_equal(cell(name, denominator, under), by_hand_of_batches(TREE, coefficients, size=d.size, under=under))


@pytest.mark.parametrize(("name", "denominator", "under"), CELLS)
def test_it_is_that_of_the_documented_objective_or_of_none(name: str, denominator: str, under: str):
    gradient, objective = cell(name, denominator, under), LOSSES[name].descends.get((denominator, under))
    if objective is not None:
        assert_equal(gradient, DENOMINATORS[denominator].share * OBJECTIVES[objective](TREE, under))
    else:
        for familiar in FAMILIAR:
            assert_not_parallel(gradient, OBJECTIVES[familiar](TREE, under))
        assert gradient.norm() > 1e-3


@pytest.mark.parametrize("name", ["kl_k1", "kdrl_loss, direct_penalty"])
@pytest.mark.parametrize("denominator", ["tokens, local", "sequences, local", "sequences, fixed"])
def test_a_penalty_without_a_teacher_lengthens_responses(name: str, denominator: str):
    """The literal joint form under denominators that depend on the sample: it moves length and ignores the teacher."""
    gradient = cell(name, denominator, "student")
    if name != "kl_k1":  # what the penalty adds to GRPO's gradient
        gradient = gradient - 0.6 * cell("grpo_loss", denominator, "student")
    drift = -(gradient * expectation(TREE, lengths(TREE))).sum()  # of the expected length under descent
    assert drift > 1e-3 * gradient.norm()
    other = SequenceTree(vocab_size=2, max_length=3, eos=0, prompt_lengths=(1, 3), seed=7, teacher=-TREE.teacher)
    d = DENOMINATORS[denominator]

    def named(**batch: Any) -> Any:
        return LOSSES[name].call(**({"normalizer": None} | batch), reduction=d.reduction)

    moved = expected_gradient(named, other, batch_size=d.size, normalizer=d.normalizer)
    assert_equal(moved, cell(name, denominator, "student"))


# --- sample by sample -------------------------------------------------------------------------------------------------


def gradients_of_single_tokens(loss: Callable[..., Tensor]) -> Tensor:
    """(tokens, N, V): the gradient of every trained token of every response, one by one, tokens from mu."""
    batch = TREE.batch(range(len(TREE.sequences)), under="behaviour")
    m = batch.loss_mask
    values = loss(batch.logp[m], batch.old_logp[m], batch.teacher_logp[m])
    return torch.stack([torch.autograd.grad(x, TREE.student, retain_graph=True)[0] for x in values])


def test_three_losses_have_the_same_gradient_for_every_single_sample():
    """grad(rho k3) = grad(sg(rho) k2) = grad(-rho sg(R)) = rho (log q - log p) s, although the values differ."""
    ones = {"loss_mask": torch.ones(int(TREE.batch(range(8)).loss_mask.sum()), dtype=torch.bool)}

    def ratio(q: Tensor, mu: Tensor) -> Tensor:
        return (q - mu).exp()

    def surrogate(q: Tensor, mu: Tensor, p: Tensor) -> Tensor:
        reward = kdloss.reverse_kl_reward(q, p, **ones)
        return kdloss.importance_sampled_surrogate(q, mu, reward, **ones).loss

    losses = {
        "rho k3": lambda q, mu, p: ratio(q, mu) * kdloss.kl_k3(q, p, **ones),
        "sg(rho) k2": lambda q, mu, p: ratio(q, mu).detach() * kdloss.kl_k2(q, p, **ones),
        "surrogate": surrogate,
        "distillation_loss": lambda q, mu, p: torch.stack(
            [
                kdloss.distillation_loss(
                    q[t : t + 1], mu[t : t + 1], p[t : t + 1], loss_mask=ones["loss_mask"][:1], normalizer=1
                ).loss
                for t in range(len(q))
            ]
        ),
    }
    score = gradients_of_single_tokens(lambda q, mu, p: q)
    factor = gradients_of_single_tokens(lambda q, mu, p: (ratio(q, mu) * (q - p)).detach() * q)
    for loss in losses.values():
        assert_equal(gradients_of_single_tokens(loss), factor)
    batch = TREE.batch(range(8), under="behaviour")
    m = batch.loss_mask
    arguments = (batch.logp[m], batch.old_logp[m], batch.teacher_logp[m])
    values = [losses[name](*arguments).sum().item() for name in ("rho k3", "sg(rho) k2", "surrogate")]
    assert len({round(x, 6) for x in values}) == 3

    # rho k1 has the same mean, plus the noise rho s in every sample
    k1 = gradients_of_single_tokens(lambda q, mu, p: ratio(q, mu) * kdloss.kl_k1(q, p, **ones))
    rho = ratio(batch.logp[m], batch.old_logp[m]).detach()[:, None, None]
    assert_equal(k1 - factor, rho * score)
    weight = torch.repeat_interleave(TREE.probabilities(TREE.behaviour), batch.lengths)[:, None, None]
    assert_equal((weight * k1).sum(0), (weight * factor).sum(0))
    assert_differs((weight * k1.square()).sum(), (weight * factor.square()).sum())


def test_the_whole_distribution_has_the_same_mean_and_less_variance():
    batch = TREE.batch(range(len(TREE.sequences)))
    m = batch.loss_mask
    prefixes = [row for _, _, rows, _ in responses(TREE, "student") for row in rows]  # of every trained token
    log_p = TREE.teacher.log_softmax(-1)[prefixes]

    def whole(logits: Tensor) -> Tensor:
        log_q = logits[m].log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def per_sequence(values: Tensor) -> Tensor:
        parts = values.split(batch.lengths.tolist())
        return torch.stack([torch.autograd.grad(x.sum(), TREE.student, retain_graph=True)[0] for x in parts])

    ones = torch.ones(int(m.sum()), dtype=torch.bool)
    sampled = per_sequence(kdloss.kl_k2(batch.logp[m], batch.teacher_logp[m], loss_mask=ones))
    full = per_sequence(whole(batch.logits))
    weight = TREE.probabilities(TREE.student).detach()[:, None, None]
    mean = (weight * full).sum(0)
    assert_equal(mean, (weight * sampled).sum(0))
    assert_equal(mean, token_kl(TREE, "student"))
    assert (weight * (full - mean).square()).sum() < 0.7 * (weight * (sampled - mean).square()).sum()


@pytest.mark.parametrize("under", ["student", "behaviour"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_distillation_weight_per_token(under: str, direct: bool):
    """For several teachers. Here the weight is the teacher's probability of the token, so it depends on the outcome."""

    def loss(logp, old_logp, teacher_logp, advantages, loss_mask, normalizer):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="direct_penalty=True descends", category=UserWarning)
            return kdloss.kdrl_loss(
                logp,
                old_logp,
                teacher_logp,
                advantages,
                loss_mask=loss_mask,
                rl_loss_weight=0.6,
                distill_loss_weight=teacher_logp.exp(),
                direct_penalty=direct,
                normalizer=normalizer,
            )

    def coefficient(path: Path) -> np.ndarray:
        kd = 1.0 if direct else -path.ratio * np.log(path.p / path.q)
        return 0.6 * ppo(path, 0.2, 0.2) + path.p * kd

    got = expected_gradient(loss, TREE, under=under, normalizer=1.0)
    assert_equal(got, by_hand(TREE, coefficient, under=under))


@pytest.mark.parametrize("under", ["student", "behaviour"])
@pytest.mark.parametrize("normalizer", [1.0, 7.0])
def test_the_fused_loss_has_the_gradient_of_the_loss_that_it_is_given(under: str, normalizer: float):
    """The student's logits are the hidden states, under an identity head."""
    identity = torch.eye(TREE.vocab_size, dtype=torch.float64)

    def token_loss(logp, entropy, old_logp, teacher_logp, advantages):
        return kdloss.kdrl_token_loss(
            logp, old_logp, teacher_logp, advantages, rl_loss_weight=0.6, distill_loss_weight=0.3
        )

    def loss(logits, labels, old_logp, teacher_logp, advantages, loss_mask, normalizer):
        return kdloss.fused_linear_loss(
            logits,
            identity,
            labels,
            token_loss,
            old_logp,
            teacher_logp,
            advantages,
            loss_mask=loss_mask,
            normalizer=normalizer,
        )

    def coefficient(path: Path) -> np.ndarray:
        rl, kd = ppo(path, 0.2, 0.2), -path.ratio * np.log(path.p / path.q)
        return (0.6 * rl + 0.3 * kd) / normalizer

    got = expected_gradient(loss, TREE, under=under, normalizer=normalizer)
    assert_equal(got, by_hand(TREE, coefficient, under=under))


# --- the list ---------------------------------------------------------------------------------------------------------

# Public function -> the tests that prove its expected gradient, on-policy and off-policy, exact and biased. Every
# function of sampled log-probs whose docstring states an expected gradient, and that is not only for logging, must be
# listed.
SURROGATES, HERE = "every_function.test_expected_gradients_surrogates", "every_function.test_expected_gradients_matrix"
OFF_POLICY = f"{SURROGATES}.test_clips_and_bounded_weights_are_biased_by_exactly_this"
RATIO_ONE = f"{SURROGATES}.test_at_ratio_one_every_surrogate_has_the_policy_gradient"
MATRIX = f"{HERE}.test_the_expected_gradient_is_exactly_this"
PROOFS = {
    **dict.fromkeys(("kl_k1", "kl_k2", "kl_k3", "sft_loss", "grpo_loss", "distillation_loss", "kdrl_loss"), (MATRIX,)),
    "kdrl_token_loss": (
        f"{SURROGATES}.test_away_from_ratio_one_the_trainers_clip_acts_on_the_folded_reward_too",
        f"{SURROGATES}.test_fold_kd_reward_with_a_weight_per_token",
    ),
    "fused_linear_loss": (f"{HERE}.test_the_fused_loss_has_the_gradient_of_the_loss_that_it_is_given",),
    "output_head": ("_softmax.test_output_head_models.test_a_model_gives_the_log_probs_of_its_own_logits",),
    "token_mean": (MATRIX,),
    "sequence_mean": (MATRIX,),
    "reverse_kl_reward": (f"{SURROGATES}.test_what_importance_sampling_makes_of_the_reverse_kl_reward",),
    "reverse_kl_baseline": (
        "_divergences.test_baseline.test_no_constant_is_quieter_than_the_optimal_one_and_none_moves_the_mean",
    ),
    **dict.fromkeys(
        ("forward_kl_reward", "jsd_reward", "squared_hellinger_reward", "total_variation_reward"),
        (
            "_losses.test_rewards.test_the_surrogate_descends_the_divergence_that_the_reward_names",
            "_losses.test_rewards.test_a_clip_biases_by_exactly_this",
        ),
    ),
    **dict.fromkeys(
        ("trust_region_mask", "stale_sequence_mask", "informative_token_mask"),
        ("_losses.test_token_masks.test_a_mask_biases_the_policy_gradient_by_exactly_this",),
    ),
    "top_entropy_mask": ("_losses.test_token_masks.test_the_gradient_of_the_tokens_of_the_highest_entropy",),
    **dict.fromkeys(
        ("gate_kd_reward", "modulate_advantages", "prefix_weights"),
        ("_losses.test_joining.test_the_biased_gradient_is_exactly_this",),
    ),
    "discounted_returns": (f"{SURROGATES}.test_what_importance_sampling_makes_of_the_reverse_kl_reward",),
    "importance_sampled_surrogate": (
        RATIO_ONE,
        OFF_POLICY,
        f"{SURROGATES}.test_token_ratios_are_unbiased_at_the_prefixes_of_the_behaviour_policy",
    ),
    "clipped_surrogate": (RATIO_ONE, OFF_POLICY),
    "sequence_clipped_surrogate": (
        RATIO_ONE,
        OFF_POLICY,
        f"{SURROGATES}.test_gspo_token_is_gspo_for_one_advantage_a_sequence",
    ),
    "cispo_surrogate": (RATIO_ONE, OFF_POLICY),
    "sapo_surrogate": (RATIO_ONE, OFF_POLICY),
    "truncated_importance_weights": (OFF_POLICY,),
    "masked_importance_weights": (OFF_POLICY,),
    "sequence_importance_weights": (
        OFF_POLICY,
        f"{SURROGATES}.test_whole_sequence_importance_weights_are_unbiased_for_the_expected_reward",
    ),
    "group_relative_advantages": (
        f"{SURROGATES}.test_share_of_the_policy_gradient_that_a_group_baseline_leaves",
        f"{SURROGATES}.test_division_by_the_standard_deviation_of_the_group_is_another_objective",
    ),
    "leave_one_out_advantages": (f"{SURROGATES}.test_share_of_the_policy_gradient_that_a_group_baseline_leaves",),
    "fold_kd_reward": (
        f"{SURROGATES}.test_fold_kd_reward_at_ratio_one_has_the_gradient_of_kdrl_loss",
        f"{SURROGATES}.test_away_from_ratio_one_the_trainers_clip_acts_on_the_folded_reward_too",
        f"{SURROGATES}.test_a_folded_reward_that_is_frozen_at_sampling_time_pushes_the_student_past_its_teacher",
    ),
}


def unproven() -> list[str]:
    """Functions that are part of a loss, by name or by docstring, and that `PROOFS` names no test for."""
    part_of_a_loss = re.compile(r"(_loss|_surrogate|_advantages|_weights)$|^kl_k")
    found = []
    for name, function in sampled_losses().items():
        doc = str(function.__doc__)
        stated = "Expected gradient:" in doc and "None: for logging" not in doc
        if (stated or part_of_a_loss.search(name)) and name not in PROOFS:
            found.append(name)
    return found


def sampled_losses() -> dict[str, Callable[..., Any]]:
    """Public functions of log-probs, rewards and advantages. Those of logits and hidden states take no samples."""
    functions = {name: getattr(kdloss, name) for name in kdloss.__all__ if inspect.isfunction(getattr(kdloss, name))}
    distributions = ("logits", "hidden")
    return {n: f for n, f in functions.items() if not any(p in inspect.signature(f).parameters for p in distributions)}


def test_no_public_loss_without_a_proof():
    assert unproven() == []
    assert sorted(set(PROOFS) - set(kdloss.__all__)) == []


@pytest.mark.parametrize("name", PROOFS)
def test_a_named_proof_exists_and_uses_the_function(name: str):
    for proof in PROOFS[name]:
        module, _, test = proof.rpartition(".")
        spec = importlib.util.find_spec(module)  # not imported: it may need packages of other environments
        source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
        assert f"def {test}(" in source
        assert f"kdloss.{name}" in source
