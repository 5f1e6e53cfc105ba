"""KDRL: the RL term and the distillation term on the same samples, as a scalar and per token.

There is one distillation gradient, whatever the RL weight: that of `distillation_loss`. The literal joint form of some
trainers, which descends log q - log p itself, has the value of the reverse KL and a gradient without the teacher; it is
there for parity, as `direct_penalty=True`, and says so when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step

from .estimators import kl_k1
from .objectives import LossOutput, _kd_returns, _kd_reward, _no_surrogate, _output, _Reduction, _teacher_mask
from .surrogates import Surrogate, clipped_surrogate, importance_sampled_surrogate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIRECT_PENALTY_WARNING = (
    "direct_penalty=True descends logp - teacher_logp itself. Its value is the reverse KL, but the teacher is not in "
    "its gradient: on-policy the expected gradient is zero (or a push on response length), so the student does not "
    "learn from the teacher. Use it only to reproduce a trainer that does this; leave it out to distill."
)


def kdrl_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor = 0.005,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    direct_penalty: bool = False,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """KDRL: rl_loss_weight * GRPO + distill_loss_weight * reverse KL, on the same samples.

    `grpo_loss` and `distillation_loss` side by side, under one reduction; every keyword means what it means there.
    The RL ratio is exp(logp - prox_logp), and `weights` act on the RL term only; the distillation ratio is always
    exp(logp - old_logp).

    Args:
        logp, old_logp, teacher_logp, advantages, loss_mask: per token, as in the two. `advantages` may be None where
            rl_loss_weight is 0, `teacher_logp` where distill_loss_weight is.
        rl_loss_weight: Python number. 0 skips the term: pure distillation.
        distill_loss_weight: Python number (0 skips the term), or a detached tensor, 0-dim or of the shape of `logp`
            (several teachers). The default is the value of KDRL and of the trainers that follow it; there it was
            tuned on a penalty without a teacher gradient, so expect to want another.
        direct_penalty: descend logp - teacher_logp itself instead of the surrogate, at every RL weight. For parity
            with trainers that do; warns.
        group: the ranks that each hold a part of every sequence, as in the two; the scalars are this rank's shares.

    Returns:
        `LossOutput`. `loss = rl_loss_weight * rl + distill_loss_weight * kd` in value for a scalar weight. A term that
        is skipped reports 0 in all its fields, and NaN in its inputs cannot leak.

    Expected gradient:
        rl_loss_weight * (that of `grpo_loss`) + distill_loss_weight * (that of `distillation_loss`). With
        `direct_penalty` the second is 0 on-policy: the teacher is in the value only.

    Raises:
        TypeError: a per-token tensor is not floating-point, or a mask or `direct_penalty` is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range (of a skipped term, too), `cu_seqlens` is
            missing or does not fit, or `direct_penalty` is combined with `kd_discount`, `kd_reward_clip` or
            `kd_max_ratio`; with `group` as in `segment_sum`.

    Source:
        KDRL (arXiv 2506.02208), eq. 8.
    """
    with in_step(group, logp) as agreed:
        reduce = _Reduction(reduction, logp, loss_mask, cu_seqlens, normalizer, group)
        local = _local_terms(
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
            cu_seqlens=cu_seqlens,
            direct_penalty=direct_penalty,
        )
        agreed.update(reduce.agreed() | {"kd_discount": kd_discount, "distill_loss_weight=0": local.penalty is None})
    terms = _terms(
        local,
        old_logp,
        loss_mask=loss_mask,
        distill_loss_weight=distill_loss_weight,
        kd_discount=kd_discount,
        kd_max_ratio=kd_max_ratio,
        cu_seqlens=cu_seqlens,
        group=group,
    )
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    # reduced before they are weighted, so that the identity between loss, rl and kd holds to the last bit
    rl = reduce(terms.rl.loss)
    kd = reduce(terms.kd)
    weighted_kd = reduce(terms.weighted_kd) if isinstance(distill_loss_weight, Tensor) else distill_loss_weight * kd
    return _output(rl_loss_weight * rl + weighted_kd, rl, kd, reduce(terms.reverse_kl), terms.rl)


def kdrl_token_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor = 0.005,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    direct_penalty: bool = False,
) -> Tensor:  # (T,)
    """`kdrl_loss` before its reduction: rl_loss_weight * rl_t + distill_loss_weight * kd_t, elementwise.

    For code that reduces by itself, and for losses that are fused into the head. Arguments, errors and the expected
    gradient are those of `kdrl_loss` with kd_discount 0; `token_mean` of this is its `loss`.

    Args:
        loss_mask: None: every token is trained.

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained positions.
    """
    _checks.tensors(logp=logp)
    if loss_mask is None:
        loss_mask = torch.ones_like(logp, dtype=torch.bool)
    local = _local_terms(
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
        kd_discount=0.0,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        cu_seqlens=None,
        direct_penalty=direct_penalty,
    )
    terms = _terms(
        local,
        old_logp,
        loss_mask=loss_mask,
        distill_loss_weight=distill_loss_weight,
        kd_discount=0.0,
        kd_max_ratio=kd_max_ratio,
        cu_seqlens=None,
        group=None,
    )
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    return rl_loss_weight * terms.rl.loss + terms.weighted_kd


class _Local(NamedTuple):
    """What a rank knows by itself: the RL term, and what the distillation term is made of."""

    logp: Tensor  # (T,) widened
    rl: Surrogate
    penalty: Tensor | None  # (T,) log q - log p, attached; None: the term is skipped
    reward: Tensor | None  # (T,) detached; None: the penalty itself is descended
    teacher_mask: Tensor


class _Terms(NamedTuple):
    rl: Surrogate
    kd: Tensor  # (T,) attached where the weight is a number
    weighted_kd: Tensor  # (T,) attached
    reverse_kl: Tensor  # (T,)


def _local_terms(
    logp: Tensor,
    old_logp: Tensor | None,
    teacher_logp: Tensor | None,
    advantages: Tensor | None,
    *,
    loss_mask: Tensor,
    rl_loss_weight: float,
    distill_loss_weight: float | Tensor,
    prox_logp: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: Tensor | None,
    kd_mask: Tensor | None,
    kd_discount: float,
    kd_reward_clip: float | None,
    kd_max_ratio: float | None,
    cu_seqlens: Tensor | None,
    direct_penalty: bool,
) -> _Local:
    """All checks and all that needs no other token; a term of weight 0 has read nothing."""
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, prox_logp=prox_logp)
    # hyperparameters are checked whatever the weights: a weight that is scheduled to rise must not fail then
    _checks.finite(rl_loss_weight=rl_loss_weight)
    _checks.weight("logp", logp, distill_loss_weight=distill_loss_weight)
    _checks.ppo_clips(clip_low, clip_high, dual_clip)
    _checks.positive(kd_reward_clip=kd_reward_clip, kd_max_ratio=kd_max_ratio)
    _checks.unit_interval(kd_discount=kd_discount)
    if kd_discount != 0 and cu_seqlens is None:
        raise ValueError(f"cu_seqlens must be given where kd_discount is not 0 (it is {kd_discount})")
    _checks.flag(direct_penalty=direct_penalty)
    if direct_penalty:
        _checks.no_reward_options(kd_discount, kd_reward_clip, kd_max_ratio)

    # widened once: the gradients of both terms meet in float32 and are rounded to the dtype of logp together
    logp = logp.to(_checks.promoted_dtype(logp))
    if rl_loss_weight == 0:
        rl = _no_surrogate(logp)._replace(loss=_attached_zeros(logp))
    elif advantages is None:
        raise ValueError(f"advantages must be given where rl_loss_weight is not 0 (it is {rl_loss_weight})")
    else:
        rl = clipped_surrogate(
            logp,
            old_logp if prox_logp is None else prox_logp,
            advantages,
            loss_mask=loss_mask,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            weights=weights,
        )

    if not isinstance(distill_loss_weight, Tensor) and distill_loss_weight == 0:
        return _Local(logp, rl, None, None, loss_mask)
    if teacher_logp is None:
        raise ValueError(f"teacher_logp must be given where distill_loss_weight is not 0 (it is {distill_loss_weight})")
    teacher_mask = _teacher_mask(logp, old_logp, teacher_logp, loss_mask, kd_mask)
    penalty = kl_k1(logp, teacher_logp, loss_mask=teacher_mask)
    if direct_penalty:
        return _Local(logp, rl, penalty, None, teacher_mask)
    reward = _kd_reward(
        logp,
        teacher_logp,
        teacher_mask=teacher_mask,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        cu_seqlens=cu_seqlens,
    )
    return _Local(logp, rl, penalty, reward, teacher_mask)


def _terms(
    local: _Local,
    old_logp: Tensor | None,
    *,
    loss_mask: Tensor,
    distill_loss_weight: float | Tensor,
    kd_discount: float,
    kd_max_ratio: float | None,
    cu_seqlens: Tensor | None,
    group: ProcessGroup | None,
) -> _Terms:
    """The per-token terms of KDRL; a term of weight 0 is an attached zero."""
    logp, rl, penalty, reward, teacher_mask = local
    if penalty is None:
        nothing = _attached_zeros(logp)
        return _Terms(rl, nothing, nothing, nothing.detach())
    reverse_kl = penalty.detach()
    if reward is None:
        if isinstance(distill_loss_weight, Tensor):
            weight = torch.where(teacher_mask, distill_loss_weight.detach().to(penalty.dtype), 0)
            return _Terms(rl, reverse_kl, weight * torch.where(weight == 0, 0, penalty), reverse_kl)
        return _Terms(rl, penalty, distill_loss_weight * penalty, reverse_kl)

    returns = _kd_returns(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, kd_discount=kd_discount, group=group)
    kd = importance_sampled_surrogate(logp, old_logp, returns, loss_mask=loss_mask, max_ratio=kd_max_ratio).loss
    if isinstance(distill_loss_weight, Tensor):
        # as weights of the surrogate, a weight of 0 silences an infinite reward as well
        weighted_kd = importance_sampled_surrogate(
            logp,
            old_logp,
            returns,
            loss_mask=loss_mask,
            max_ratio=kd_max_ratio,
            weights=distill_loss_weight.expand_as(logp),
        ).loss
        return _Terms(rl, kd.detach(), weighted_kd, reverse_kl)
    return _Terms(rl, kd, distill_loss_weight * kd, reverse_kl)


def _attached_zeros(logp: Tensor) -> Tensor:
    """Zeros that hang on `logp` without having read it, so that backward runs and nothing leaks."""
    return torch.where(torch.zeros_like(logp, dtype=torch.bool), logp, 0)
