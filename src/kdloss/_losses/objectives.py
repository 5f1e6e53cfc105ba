"""Scalar losses of one term: forward KL (SFT), GRPO, and reverse KL on the student's own samples.

Each is a per-token surrogate under a reduction; `kdrl_loss` joins the last two. There is one distillation gradient:
the importance-sampled surrogate on the reward R = log p - log q, whose expectation is grad KL(q || p).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._distributed.collectives import global_sum
from kdloss._packing.layout import SEQUENCES, segment_sum
from kdloss._packing.reductions import mean_of_sequences, token_mean

from .estimators import discounted_returns, kl_k1, reverse_kl_reward
from .surrogates import Surrogate, clipped_surrogate, importance_sampled_surrogate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossOutput(NamedTuple):
    """A scalar loss and what is worth logging beside it. Only `loss` is attached."""

    loss: Tensor  # () the number to descend: rl_loss_weight * rl + distill_loss_weight * kd
    rl: Tensor  # () the RL term, reduced like the loss, before its weight
    kd: Tensor  # () the distillation term, reduced like the loss, before its weight
    reverse_kl: Tensor  # () logp - teacher_logp reduced like the loss, nats: an estimate of KL(student || teacher)
    ratio: Tensor  # (T,) of the RL surrogate
    clipped: Tensor  # (T,) bool, of the RL surrogate: where the clip stops the gradient
    dual_clipped: Tensor  # (T,) bool, of the RL surrogate


def sft_loss(
    logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Forward KL by maximum likelihood: -(sum over trained t of logp_t) / normalizer, on tokens the teacher wrote.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        loss_mask: bool, the shape of `logp`.
        normalizer: as in `token_mean`.

    Returns:
        `LossOutput` with loss = kd; `rl`, `reverse_kl`, `ratio` are 0.

    Expected gradient:
        grad KL(p || q) where tokens are sampled from the teacher p (the entropy of p is constant).

    Raises:
        TypeError: `logp` is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes differ, or `normalizer` is negative, not finite or not 0-dim.

    Source:
        KDRL (arXiv 2506.02208), the SFT objective.
    """
    _checks.per_token("logp", logp, loss_mask=loss_mask)
    loss = -token_mean(logp, loss_mask=loss_mask, normalizer=normalizer)
    zero = torch.zeros_like(loss)
    return _output(loss, zero, loss, zero, _no_surrogate(logp))


def grpo_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """GRPO: `clipped_surrogate` with the ratio exp(logp - prox_logp), reduced to a scalar.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        old_logp: under the policy that sampled. None: on-policy, ratio 1.
        advantages: per token, detached; `group_relative_advantages` through `broadcast_to_tokens`.
        loss_mask: bool.
        prox_logp: under the policy at the start of this update (decoupled PPO); the ratio is against it. None:
            `old_logp`. What lies between the two is the business of `weights`.
        clip_low, clip_high, dual_clip: as in `clipped_surrogate`.
        weights: per-token factors of the loss, detached: one of the importance weights.
        reduction: "token_mean" | "sequence_mean".
        cu_seqlens: (B + 1,), for "sequence_mean".
        normalizer: the denominator, in tokens or sequences by `reduction`. None: the local count, or that of `group`.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`. `loss` and the
            scalars beside it are then this rank's shares: those of all ranks sum to the whole's.

    Returns:
        `LossOutput` with loss = rl; `kd` and `reverse_kl` are 0.

    Expected gradient:
        minus the policy gradient of E[A] at ratio 1 and a fixed token normalizer; clips and weights bias it by design
        once the policy moves, a local count by O(1/B), and "sequence_mean" weights sequences by 1/|o|.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range, or `cu_seqlens` is missing or does not
            fit; with `group` as in `segment_sum`.

    Source:
        GRPO (arXiv 2402.03300), eq. 3; token mean: DAPO (arXiv 2503.14476), eq. 8; the decoupled ratio: Hilton et al.
        (arXiv 2110.00641).
    """
    with in_step(group, logp) as agreed:
        reduce = _Reduction(reduction, logp, loss_mask, cu_seqlens, normalizer, group)
        agreed.update(reduce.agreed())
        _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, prox_logp=prox_logp)
        surrogate = clipped_surrogate(
            logp,
            old_logp if prox_logp is None else prox_logp,
            advantages,
            loss_mask=loss_mask,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            weights=weights,
        )
    loss = reduce(surrogate.loss)
    zero = torch.zeros_like(loss)
    return _output(loss, loss, zero, zero, surrogate)


def distillation_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """On-policy distillation: loss_t = -rho_t * sg(R_t), rho = exp(logp - old_logp), R = teacher_logp - logp.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        old_logp: under the policy that sampled. None: on-policy, ratio 1.
        teacher_logp: under the teacher, of the same tokens at the same temperature.
        loss_mask: bool.
        kd_mask: bool, True where the teacher is listened to. It zeroes rewards (and their part of `reverse_kl`)
            elsewhere, whatever `teacher_logp` holds there, and never changes a denominator. None: everywhere.
        kd_discount: 0 .. 1; above 0 the reward is replaced by its `discounted_returns` (needs `cu_seqlens`).
        kd_reward_clip: symmetric bound of R in nats, > 0.
        kd_max_ratio: bound of the ratio, > 0, as `max_ratio` of `importance_sampled_surrogate`.
        reduction: "token_mean" | "sequence_mean".
        cu_seqlens: (B + 1,), for "sequence_mean" or a discount.
        normalizer: the denominator, in tokens or sequences by `reduction`. None: the local count, or that of `group`.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`, with parts in rank order. `loss`
            and the scalars beside it are then this rank's shares: those of all ranks sum to the whole's.

    Returns:
        `LossOutput` with loss = kd, the surrogate's value; `reverse_kl` is the number to watch. `rl`, `ratio` are 0.

    Expected gradient:
        grad KL(q || p) of every next-token distribution, at the prefixes that the sampling policy visits, for any such
        policy and a fixed token normalizer. With kd_discount=1, on-policy: of the KL between whole sequences. Biased by
        design: a discount off-policy or between 0 and 1, `kd_reward_clip`, `kd_max_ratio`, a `kd_mask` that depends on
        the outcome; a local count by O(1/B); "sequence_mean" weights sequences by 1/|o|, the objective as KDRL writes
        it.

    Raises:
        TypeError: a per-token tensor is not floating-point, or a mask is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range, or `cu_seqlens` is missing or does not
            fit; with `group` as in `segment_sum`.

    Source:
        KDRL (arXiv 2506.02208), J_RKL.
    """
    with in_step(group, logp) as agreed:
        reduce = _Reduction(reduction, logp, loss_mask, cu_seqlens, normalizer, group)
        _checks.positive(kd_max_ratio=kd_max_ratio)
        teacher_mask = _teacher_mask(logp, old_logp, teacher_logp, loss_mask, kd_mask)
        reward = _kd_reward(
            logp,
            teacher_logp,
            teacher_mask=teacher_mask,
            kd_discount=kd_discount,
            kd_reward_clip=kd_reward_clip,
            cu_seqlens=cu_seqlens,
        )
        agreed.update(reduce.agreed() | {"kd_discount": kd_discount})
    returns = _kd_returns(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, kd_discount=kd_discount, group=group)
    surrogate = importance_sampled_surrogate(logp, old_logp, returns, loss_mask=loss_mask, max_ratio=kd_max_ratio)
    loss = reduce(surrogate.loss)
    reverse_kl = reduce(kl_k1(logp, teacher_logp, loss_mask=teacher_mask))
    return _output(loss, torch.zeros_like(loss), loss, reverse_kl, _no_surrogate(logp))


def _kd_reward(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    teacher_mask: Tensor,
    kd_discount: float,
    kd_reward_clip: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(T,) detached: the reverse-KL reward, where it can be discounted as asked."""
    _checks.positive(kd_reward_clip=kd_reward_clip)
    reward = reverse_kl_reward(logp, teacher_logp, loss_mask=teacher_mask, clip=kd_reward_clip)
    _checks.unit_interval(kd_discount=kd_discount)
    if kd_discount != 0:
        if cu_seqlens is None:
            raise ValueError(f"cu_seqlens must be given where kd_discount is not 0 (it is {kd_discount})")
        _checks.packed_stream("logp", logp, cu_seqlens)
    return reward


def _kd_returns(
    reward: Tensor,
    *,
    loss_mask: Tensor,
    cu_seqlens: Tensor | None,
    kd_discount: float,
    group: ProcessGroup | None,
) -> Tensor:
    """(T,) detached: the reward, or its discounted return-to-go."""
    if kd_discount == 0:
        return reward
    assert cu_seqlens is not None
    return discounted_returns(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, discount=kd_discount, group=group)


def _teacher_mask(
    logp: Tensor, old_logp: Tensor | None, teacher_logp: Tensor, loss_mask: Tensor, kd_mask: Tensor | None
) -> Tensor:
    """Trained tokens at which the teacher is listened to."""
    _checks.tensors(teacher_logp=teacher_logp)
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, teacher_logp=teacher_logp)
    if kd_mask is None:
        return loss_mask
    _checks.boolean(kd_mask=kd_mask)
    _checks.same_shape("logp", logp, kd_mask=kd_mask)
    return loss_mask & kd_mask


class _Reduction:
    """`reduction` with its mask, sequences and denominator bound: per-token tensor -> scalar."""

    def __init__(
        self,
        reduction: str,
        logp: Tensor,
        loss_mask: Tensor,
        cu_seqlens: Tensor | None,
        normalizer: float | Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        _checks.per_token("logp", logp, loss_mask=loss_mask)
        _checks.one_of("reduction", reduction, ("token_mean", "sequence_mean"))
        _checks.normalizer(normalizer)
        if reduction == "sequence_mean":
            if cu_seqlens is None:
                raise ValueError('cu_seqlens must be given where reduction="sequence_mean", got None')
            _checks.packed_stream("logp", logp, cu_seqlens)
            _checks.cumulative_lengths(cu_seqlens, total_tokens=logp.shape[0])
        self.reduction, self.loss_mask, self.cu_seqlens, self.normalizer = reduction, loss_mask, cu_seqlens, normalizer
        self.group = group
        self.trained: Tensor | None = None  # tokens of each whole sequence, once they are known

    def agreed(self) -> dict[str, Any]:
        """What ranks that share sequences have to agree on."""
        sequences = None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return {"reduction": self.reduction, "normalizer=None": self.normalizer is None, SEQUENCES: sequences}

    def __call__(self, x: Tensor) -> Tensor:
        if self.reduction == "token_mean":
            if self.normalizer is None and self.group is not None:
                self.normalizer = global_sum(self.loss_mask.sum(), self.group)
            return token_mean(x, loss_mask=self.loss_mask, normalizer=self.normalizer)
        assert self.cu_seqlens is not None
        sequences = {"loss_mask": self.loss_mask, "cu_seqlens": self.cu_seqlens}
        if self.trained is None:
            self.trained = segment_sum(torch.ones_like(x), **sequences, group=self.group)
        return mean_of_sequences(x, self.trained, **sequences, normalizer=self.normalizer)


def _output(loss: Tensor, rl: Tensor, kd: Tensor, reverse_kl: Tensor, surrogate: Surrogate) -> LossOutput:
    return LossOutput(
        loss,
        rl.detach(),
        kd.detach(),
        reverse_kl.detach(),
        surrogate.ratio,
        surrogate.clipped,
        surrogate.dual_clipped,
    )


def _no_surrogate(logp: Tensor) -> Surrogate:
    zeros = torch.zeros_like(logp, dtype=_checks.promoted_dtype(logp), requires_grad=False)
    never = torch.zeros_like(logp, dtype=torch.bool)
    return Surrogate(zeros, zeros, never, never)
