"""Importance weights w = exp(prox_logp - old_logp) for data that the policy at the start of the update did not sample.

Rollout engines and trainers disagree in the last digits (mismatch), and asynchronous rollouts come from older weights
(staleness). A surrogate's ratio is against `prox_logp`; these detached weights carry the rest of the way from the
policy that sampled. Exact weights are unbiased; bounding them trades bias for variance, and every function here does.

Which bound acts depends on the sampled token, so the expected gradient is biased by design; a masked token or sequence
keeps its place in the denominator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._packing.layout import broadcast_to_tokens, segment_mean, segment_sum

from .estimators import masked_log_ratio

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def truncated_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    max_weight: float = 2.0,
) -> Tensor:  # (T,)
    """TIS: w_t = min(prox_t / old_t, max_weight), detached.

    Args:
        prox_logp: per-token log-probs at the start of the update, any shape, nats.
        old_logp: the same under the policy that sampled.
        loss_mask: bool; untrained positions count as equal policies (their ratio is 1), whatever they hold.
        max_weight: absolute bound, > 0.

    Returns:
        The shape of `prox_logp`, without gradient.

    Raises:
        TypeError: a log-prob is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, or `max_weight` is not > 0.

    Source:
        Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), TIS.
    """
    _checks.positive(max_weight=max_weight)
    return _weight(prox_logp, old_logp, loss_mask).clamp(max=max_weight)


def masked_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    min_weight: float = 0.5,
    max_weight: float = 5.0,
) -> Tensor:  # (T,)
    """IcePop: w_t = prox_t / old_t inside [min_weight, max_weight], 0 outside. Detached.

    Args:
        prox_logp, old_logp, loss_mask: as in `truncated_importance_weights`.
        min_weight: absolute lower bound, >= 0.
        max_weight: absolute upper bound, >= min_weight.

    Returns:
        The shape of `prox_logp`, without gradient. A weight of 0 takes the token's gradient, not its place in a mean.

    Raises:
        TypeError, ValueError: as in `truncated_importance_weights`.

    Source:
        Ling Team, "Every Step Evolves" (arXiv 2510.18855), IcePop.
    """
    _checks.interval(("min_weight", min_weight), ("max_weight", max_weight))
    return _drop_outside(_weight(prox_logp, old_logp, loss_mask), min_weight, max_weight)


def sequence_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    aggregate: str,
    action: str,
    min_weight: float = 0.0,
    max_weight: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,)
    """One weight a sequence: W_b = exp(aggregate over trained t of log prox_t - log old_t), bounded. Detached.

    Args:
        prox_logp, old_logp: (T,) nats.
        loss_mask: (T,) bool.
        cu_seqlens: (B + 1,).
        aggregate: "sum" is the ratio of the probabilities of the whole response (unbiased before the bound, of a
            variance that grows with the length); "mean" is its geometric mean per token.
        action: "truncate" clamps W to [min_weight, max_weight]; "mask" sets it to 0 outside.
        min_weight: absolute lower bound, >= 0.
        max_weight: absolute upper bound, >= min_weight; `math.inf` for none.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`; W_b is of the whole sequence.

    Returns:
        (T,) without gradient: the weight of its sequence at every token, trained or not.

    Raises:
        TypeError: a dtype is wrong, or `group` is no process group.
        ValueError: shapes differ, `cu_seqlens` does not fit, a bound is out of order, or `aggregate` or `action` is
            none of the two; with `group` as in `segment_sum`.

    Source:
        Liu et al., "When Speed Kills Stability" (2025), sequence-level TIS and MIS; GSPO (arXiv 2507.18071) for "mean".
    """
    with in_step(group, prox_logp) as agreed:
        _checks.one_of("aggregate", aggregate, ("sum", "mean"))
        _checks.one_of("action", action, ("truncate", "mask"))
        _checks.interval(("min_weight", min_weight), ("max_weight", max_weight))
        _checks.packed_stream("prox_logp", prox_logp, cu_seqlens)
        log_ratio = _detached_log_ratio(prox_logp, old_logp, loss_mask)
        agreed.update({"aggregate": aggregate})
    reduce = segment_sum if aggregate == "sum" else segment_mean
    weight = reduce(log_ratio, loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=group).exp()
    if action == "truncate":
        weight = weight.clamp(min_weight, max_weight)
    else:
        weight = _drop_outside(weight, min_weight, max_weight)
    return broadcast_to_tokens(weight, cu_seqlens=cu_seqlens, total_tokens=prox_logp.shape[0])


def _weight(prox_logp: Tensor, old_logp: Tensor, loss_mask: Tensor) -> Tensor:
    return _detached_log_ratio(prox_logp, old_logp, loss_mask).exp()


def _detached_log_ratio(prox_logp: Tensor, old_logp: Tensor, loss_mask: Tensor) -> Tensor:
    _checks.tensors(old_logp=old_logp)
    return masked_log_ratio("prox_logp", prox_logp, loss_mask, old_logp=old_logp).detach()


def _drop_outside(weight: Tensor, min_weight: float, max_weight: float) -> Tensor:
    # tested for being outside, so that a NaN weight stays NaN instead of vanishing
    return torch.where((weight < min_weight) | (weight > max_weight), 0, weight)
