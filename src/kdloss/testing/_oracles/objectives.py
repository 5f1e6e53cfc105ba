"""Oracles for the scalar losses, `loss = rl_loss_weight * rl + distill_loss_weight * kd`, and their gradients.

Each term is a per-token loss and its per-token gradient. A reduction R, linear in the tokens, takes their sum to a
scalar: `d loss / d logp_t = R'_t (rl_loss_weight * rl'_t + distill_loss_weight_t * kd'_t)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .pairs import pair
from .reductions import sequence_mean_and_grad, token_mean_and_grad
from .signals import discounted_returns, kl_k1, kl_k1_grad, reverse_kl_reward
from .surrogates import clipped_surrogate_and_grad, importance_sampled_surrogate_and_grad
from .types import ArrayLike, FloatArray, LossOutput, Surrogate, as_float, as_mask, scalar, times


class _Term(NamedTuple):
    """A per-token loss, its gradient, and what is reported of it; `weight` is a float, 0-dim or (T,)."""

    weight: ArrayLike
    loss: FloatArray
    grad: FloatArray
    surrogate: Surrogate | None = None
    reverse_kl: FloatArray | None = None


class _KD(NamedTuple):
    """Options of the distillation term."""

    kd_mask: ArrayLike | None
    kd_discount: float
    kd_reward_clip: float | None
    kd_max_ratio: float | None
    direct_penalty: bool = False
    kd_baseline: ArrayLike | None = None


def _skipped(weight: ArrayLike) -> bool:
    """Whether a weight is 0 and a Python number, not an array."""
    return not isinstance(weight, np.ndarray) and np.ndim(weight) == 0 and as_float("weight", weight) == 0


def _rl_term(
    weight: ArrayLike,
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    prox_logp: ArrayLike | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: ArrayLike | None,
) -> _Term | None:
    """The clipped surrogate with ratio q / prox, prox_logp None = old_logp; None for a Python weight of 0."""
    if _skipped(weight):
        return None
    surrogate, grad = clipped_surrogate_and_grad(
        logp,
        old_logp if prox_logp is None else prox_logp,
        advantages,
        loss_mask=loss_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
    )
    return _Term(weight, surrogate.loss, grad, surrogate=surrogate)


def _kd_term(
    weight: ArrayLike,
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    loss_mask: ArrayLike,
    cu_seqlens: ArrayLike | None,
    options: _KD,
) -> _Term | None:
    """The importance-sampled surrogate of the reverse-KL reward or its return, or k1; None for a Python weight of 0."""
    kd_mask, discount, clip, max_ratio, direct_penalty, baseline = options
    if direct_penalty and (discount != 0 or not all(x is None for x in (clip, max_ratio, baseline))):
        raise ValueError("direct_penalty takes no kd_discount, kd_reward_clip, kd_max_ratio or kd_baseline")
    if discount != 0 and baseline is not None:
        raise ValueError("a discount takes no kd_baseline")
    if _skipped(weight):
        return None
    mask = as_mask("loss_mask", loss_mask, shape=np.shape(logp))
    active = mask if kd_mask is None else mask & as_mask("kd_mask", kd_mask, shape=mask.shape)
    log_ratio = kl_k1(logp, teacher_logp, loss_mask=active)
    if direct_penalty:
        return _Term(weight, log_ratio, kl_k1_grad(logp, teacher_logp, loss_mask=active), reverse_kl=log_ratio)
    rewards = reverse_kl_reward(logp, teacher_logp, loss_mask=active, clip=clip)
    if baseline is not None:
        rewards = rewards - np.where(active, as_float("kd_baseline", baseline), 0.0)
    if discount != 0:
        if cu_seqlens is None:
            raise ValueError("kd_discount needs cu_seqlens")
        rewards = discounted_returns(rewards, loss_mask=mask, cu_seqlens=cu_seqlens, discount=discount)
    surrogate, grad = importance_sampled_surrogate_and_grad(
        logp, old_logp, rewards, loss_mask=mask, max_ratio=max_ratio
    )
    return _Term(weight, surrogate.loss, grad, reverse_kl=log_ratio)


def _weighted(weight: ArrayLike, x: FloatArray) -> FloatArray:
    """`weight * x` per token, exactly 0 if either is 0."""
    w = np.broadcast_to(as_float("weight", weight), x.shape)
    y = np.zeros(x.shape)
    for t in np.ndindex(x.shape):
        y[t] = times(float(w[t]), float(x[t]))
    return y


def _total(rl: _Term | None, kd: _Term | None, logp: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The weighted sum of the terms' per-token losses, and of their gradients."""
    loss, grad = np.zeros(np.shape(logp)), np.zeros(np.shape(logp))
    for term in (rl, kd):
        if term is not None:
            loss += _weighted(term.weight, term.loss)
            grad += _weighted(term.weight, term.grad)
    return loss, grad


def _objective(
    rl: _Term | None,
    kd: _Term | None,
    logp: ArrayLike,
    loss_mask: ArrayLike,
    reduction: str,
    cu_seqlens: ArrayLike | None,
    normalizer: ArrayLike | None,
) -> tuple[LossOutput, FloatArray]:
    """The reduced loss with its parts, and d loss / d logp. A missing term reports zeros."""

    def reduced(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The reduction of x, 0-dim, and its gradient, (T,)."""
        if reduction == "token_mean":
            return token_mean_and_grad(x, loss_mask=loss_mask, normalizer=normalizer)
        if reduction != "sequence_mean":
            raise ValueError(f'reduction must be "token_mean" or "sequence_mean", got {reduction!r}')
        if cu_seqlens is None:
            raise ValueError('reduction="sequence_mean" needs cu_seqlens')
        return sequence_mean_and_grad(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer)

    token_loss, token_grad = _total(rl, kd, logp)
    loss, reduction_grad = reduced(token_loss)
    surrogate = None if rl is None else rl.surrogate
    reverse_kl = None if kd is None else kd.reverse_kl
    output = LossOutput(
        loss=loss,
        rl=scalar(0.0) if rl is None else reduced(rl.loss)[0],
        kd=scalar(0.0) if kd is None else reduced(kd.loss)[0],
        reverse_kl=scalar(0.0) if reverse_kl is None else reduced(reverse_kl)[0],
        ratio=np.zeros(np.shape(logp)) if surrogate is None else surrogate.ratio,
        clipped=np.zeros(np.shape(logp), np.bool_) if surrogate is None else surrogate.clipped,
        dual_clipped=np.zeros(np.shape(logp), np.bool_) if surrogate is None else surrogate.dual_clipped,
    )
    return output, _weighted(reduction_grad, token_grad)


def sft_loss_and_grad(
    logp: ArrayLike, *, loss_mask: ArrayLike, normalizer: ArrayLike | None = None
) -> tuple[LossOutput, FloatArray]:
    """`loss = kd = token_mean(-log q)` on tokens that the teacher wrote; rl and reverse_kl are 0.

    logp: (T,) float. loss_mask: (T,) bool. normalizer: 0-dim. Returns LossOutput.
    Source: the negative log-likelihood of supervised fine-tuning.

    Gradient: `d loss / d logp_t = -1 / N` at trained tokens.

    logp: (T,). loss_mask: (T,) bool. normalizer: 0-dim. Returns (T,). Source: derived from `sft_loss`.
    """
    logp = as_float("logp", logp)
    mask = as_mask("loss_mask", loss_mask, shape=logp.shape)
    kd = _Term(1.0, np.where(mask, -logp, 0.0), np.where(mask, -1.0, 0.0))
    return _objective(None, kd, logp, mask, "token_mean", None, normalizer)


sft_loss, sft_loss_grad = pair(sft_loss_and_grad)


def grpo_loss_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "token_mean",
    cu_seqlens: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[LossOutput, FloatArray]:
    """`loss = rl = R(clipped_surrogate)` with ρ = exp(logp - prox_logp); kd and reverse_kl are 0.

    logp, old_logp, advantages, prox_logp, weights: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int.
    normalizer: 0-dim. Returns LossOutput. Source: GRPO, arXiv 2402.03300, equation 3; prox: arXiv 2110.00641.

    Gradient: `d loss / d logp_t = R'_t * (-ρ w A, or 0 where clipped)`, R' = 1 / N or 1 / (n_b N).

    logp, old_logp, advantages, prox_logp, weights: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). normalizer: 0-dim.
    Returns (T,). Source: derived from `grpo_loss`.
    """
    rl = _rl_term(1.0, logp, old_logp, advantages, loss_mask, prox_logp, clip_low, clip_high, dual_clip, weights)
    return _objective(rl, None, logp, loss_mask, reduction, cu_seqlens, normalizer)


grpo_loss, grpo_loss_grad = pair(grpo_loss_and_grad)


def distillation_loss_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    *,
    loss_mask: ArrayLike,
    kd_mask: ArrayLike | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: ArrayLike | None = None,
    reduction: str = "token_mean",
    cu_seqlens: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[LossOutput, FloatArray]:
    """`loss = kd = R(-ρ G)`, `ρ = q / μ`, `G_t = sum_{u >= t} kd_discount^{number of trained tokens in (t, u]} r_u`.

    `r = sg(clamp(log p - log q, ±kd_reward_clip) - kd_baseline)`, 0 where kd_mask is False; with kd_max_ratio c the
    loss is `R(-sg(min(ρ, c)) G log q)`. `reverse_kl = R(log q - log p)`, 0 per token where kd_mask is False; rl is 0.
    logp, old_logp, teacher_logp: (T,) float. loss_mask, kd_mask: (T,) bool. cu_seqlens: (B+1,) int. normalizer: 0-dim.
    Returns LossOutput. Source: KDRL, arXiv 2506.02208, J_RKL.

    Gradient: `d loss / d logp_t = -R'_t min(ρ, c) G_t`, c = kd_max_ratio or inf: the return G is stopped, dρ = ρ dlogp.

    logp, old_logp, teacher_logp: (T,). loss_mask, kd_mask: (T,) bool. cu_seqlens: (B+1,). normalizer: 0-dim.
    Returns (T,). Source: derived from `distillation_loss`.
    """
    options = _KD(kd_mask, kd_discount, kd_reward_clip, kd_max_ratio, False, kd_baseline)
    kd = _kd_term(1.0, logp, old_logp, teacher_logp, loss_mask, cu_seqlens, options)
    return _objective(None, kd, logp, loss_mask, reduction, cu_seqlens, normalizer)


distillation_loss, distillation_loss_grad = pair(distillation_loss_and_grad)


def kdrl_loss_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: ArrayLike | None = None,
    reduction: str = "token_mean",
    cu_seqlens: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    direct_penalty: bool = False,
) -> tuple[LossOutput, FloatArray]:
    """`loss = R(rl_loss_weight * rl_t + distill_loss_weight_t * kd_t)`.

    `rl_t = clipped_surrogate` with ratio q / prox, times `weights`. `kd_t = -ρ G` with ρ = q / μ and G the discounted
    return of `r = sg(clamp(log p - log q, ±kd_reward_clip) - kd_baseline)`, 0 where kd_mask is False; with kd_max_ratio
    c, `-sg(min(ρ, c)) G log q`. With direct_penalty, `kd_t = log q - log p`, attached, 0 where kd_mask is False.
    rl, kd and reverse_kl are reduced without their weights.
    logp, old_logp, teacher_logp, advantages, prox_logp, weights: (T,) float. loss_mask, kd_mask: (T,) bool.
    rl_loss_weight: float. distill_loss_weight: float or (T,). cu_seqlens: (B+1,) int. normalizer: 0-dim.
    Returns LossOutput. Source: KDRL, arXiv 2506.02208, equation 8.

    Gradient: `R'_t (rl_loss_weight * rl'_t - distill_loss_weight_t * min(q / μ, kd_max_ratio) G_t)`.

    `rl' = -ρ w A` with ρ = q / prox, 0 where clipped. With direct_penalty the second term is
    `+ distill_loss_weight_t` where kd_mask is True: it does not depend on the teacher.
    logp, old_logp, teacher_logp, advantages, prox_logp, weights: (T,). loss_mask, kd_mask: (T,) bool.
    distill_loss_weight: float or (T,). cu_seqlens: (B+1,). Returns (T,). Source: derived from `kdrl_loss`.
    """
    rl = _rl_term(
        rl_loss_weight, logp, old_logp, advantages, loss_mask, prox_logp, clip_low, clip_high, dual_clip, weights
    )
    options = _KD(kd_mask, kd_discount, kd_reward_clip, kd_max_ratio, direct_penalty, kd_baseline)
    kd = _kd_term(distill_loss_weight, logp, old_logp, teacher_logp, loss_mask, cu_seqlens, options)
    return _objective(rl, kd, logp, loss_mask, reduction, cu_seqlens, normalizer)


kdrl_loss, kdrl_loss_grad = pair(kdrl_loss_and_grad)


def kdrl_token_loss_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: ArrayLike | None = None,
    direct_penalty: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """`rl_loss_weight * rl_t + distill_loss_weight_t * kd_t`: `kdrl_loss` before its reduction, with kd_discount 0.

    All per-token arguments: (T,). loss_mask: (T,) bool, None = every token. Returns (T,), 0 at untrained tokens.
    Source: KDRL, arXiv 2506.02208, equation 8.

    Gradient: `rl_loss_weight * rl'_t + distill_loss_weight_t * kd'_t`: `kdrl_loss_grad` with R' = 1 and kd_discount 0.

    All per-token arguments: (T,). loss_mask: (T,) bool, None = every token. Returns (T,).
    Source: derived from `kdrl_token_loss`.
    """
    loss_mask = np.ones(np.shape(logp), np.bool_) if loss_mask is None else loss_mask
    rl = _rl_term(
        rl_loss_weight, logp, old_logp, advantages, loss_mask, prox_logp, clip_low, clip_high, dual_clip, weights
    )
    options = _KD(kd_mask, 0.0, kd_reward_clip, kd_max_ratio, direct_penalty, kd_baseline)
    kd = _kd_term(distill_loss_weight, logp, old_logp, teacher_logp, loss_mask, None, options)
    return _total(rl, kd, logp)


kdrl_token_loss, kdrl_token_loss_grad = pair(kdrl_token_loss_and_grad)
