"""Oracles for RL joined with distillation, KDRL: the scalar loss and the loss per token."""

import numpy as np

from .objectives import _kd_term, _objective, _rl_term, _Term, _total
from .types import ArrayLike, FloatArray, LossOutput


def _terms(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    rl_loss_weight: ArrayLike,
    distill_loss_weight: ArrayLike,
    prox_logp: ArrayLike | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: ArrayLike | None,
    kd_mask: ArrayLike | None,
    kd_discount: float,
    kd_reward_clip: float | None,
    kd_max_ratio: float | None,
    direct_penalty: bool,
    cu_seqlens: ArrayLike | None,
) -> tuple[_Term | None, _Term | None]:
    """The RL term and the distillation term, each None at a Python weight of 0."""
    rl = _rl_term(
        rl_loss_weight,
        logp,
        old_logp,
        advantages,
        loss_mask=loss_mask,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
    )
    kd = _kd_term(
        distill_loss_weight,
        logp,
        old_logp,
        teacher_logp,
        loss_mask=loss_mask,
        kd_mask=kd_mask,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        direct_penalty=direct_penalty,
        cu_seqlens=cu_seqlens,
    )
    return rl, kd


def _kdrl(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    rl_loss_weight: ArrayLike,
    distill_loss_weight: ArrayLike,
    prox_logp: ArrayLike | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: ArrayLike | None,
    kd_mask: ArrayLike | None,
    kd_discount: float,
    kd_reward_clip: float | None,
    kd_max_ratio: float | None,
    reduction: str,
    cu_seqlens: ArrayLike | None,
    normalizer: ArrayLike | None,
    direct_penalty: bool,
) -> tuple[LossOutput, FloatArray]:
    rl, kd = _terms(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        direct_penalty=direct_penalty,
        cu_seqlens=cu_seqlens,
    )
    return _objective(
        rl, kd, logp, reduction=reduction, loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer
    )


def kdrl_loss(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike = 0.005,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    reduction: str = "token_mean",
    cu_seqlens: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    direct_penalty: bool = False,
) -> LossOutput:
    """`loss = R(rl_loss_weight * rl_t + distill_loss_weight_t * kd_t)`.

    rl_t as in `grpo_loss`, kd_t as in `distillation_loss`. The RL ratio is q / prox, the distillation ratio q / μ;
    `weights` multiply rl_t alone. With direct_penalty, `kd_t = log q - log p`, attached, 0 where kd_mask is False.
    rl, kd and reverse_kl are reduced without their weights.
    logp, old_logp, teacher_logp, advantages, prox_logp, weights: (T,) float. loss_mask, kd_mask: (T,) bool.
    rl_loss_weight: float. distill_loss_weight: float or (T,). cu_seqlens: (B+1,) int. normalizer: 0-dim.
    Returns LossOutput. Source: KDRL, arXiv 2506.02208, equation 8.
    """
    return _kdrl(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        reduction=reduction,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        direct_penalty=direct_penalty,
    )[0]


def kdrl_loss_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike = 0.005,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    reduction: str = "token_mean",
    cu_seqlens: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    direct_penalty: bool = False,
) -> FloatArray:
    """`R'_t (rl_loss_weight * rl'_t - distill_loss_weight_t * min(q / μ, kd_max_ratio) G_t)`.

    rl' as in `grpo_loss_grad`. With direct_penalty the second term is `+ distill_loss_weight_t` where kd_mask: the
    teacher drops out.
    logp, old_logp, teacher_logp, advantages, prox_logp, weights: (T,). loss_mask, kd_mask: (T,) bool.
    distill_loss_weight: float or (T,). cu_seqlens: (B+1,). Returns (T,). Source: derived from `kdrl_loss`.
    """
    return _kdrl(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        reduction=reduction,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        direct_penalty=direct_penalty,
    )[1]


def _kdrl_token(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike | None,
    rl_loss_weight: ArrayLike,
    distill_loss_weight: ArrayLike,
    prox_logp: ArrayLike | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: ArrayLike | None,
    kd_mask: ArrayLike | None,
    kd_reward_clip: float | None,
    kd_max_ratio: float | None,
    direct_penalty: bool,
) -> tuple[FloatArray, FloatArray]:
    terms = _terms(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=np.ones(np.shape(logp), np.bool_) if loss_mask is None else loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_discount=0.0,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        direct_penalty=direct_penalty,
        cu_seqlens=None,
    )
    return _total(terms, logp)


def kdrl_token_loss(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike = 0.005,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    direct_penalty: bool = False,
) -> FloatArray:
    """`rl_loss_weight * rl_t + distill_loss_weight_t * kd_t`: `kdrl_loss` before its reduction, with kd_discount 0.

    All per-token arguments: (T,). loss_mask: (T,) bool, None = every token. Returns (T,), 0 at untrained tokens.
    Source: KDRL, arXiv 2506.02208, equation 8.
    """
    return _kdrl_token(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        direct_penalty=direct_penalty,
    )[0]


def kdrl_token_loss_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    teacher_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    rl_loss_weight: ArrayLike = 1.0,
    distill_loss_weight: ArrayLike = 0.005,
    prox_logp: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
    kd_mask: ArrayLike | None = None,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    direct_penalty: bool = False,
) -> FloatArray:
    """`rl_loss_weight * rl'_t + distill_loss_weight_t * kd'_t`: `kdrl_loss_grad` with R' = 1 and kd_discount 0.

    All per-token arguments: (T,). loss_mask: (T,) bool, None = every token. Returns (T,).
    Source: derived from `kdrl_token_loss`.
    """
    return _kdrl_token(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=distill_loss_weight,
        prox_logp=prox_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_mask=kd_mask,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        direct_penalty=direct_penalty,
    )[1]
