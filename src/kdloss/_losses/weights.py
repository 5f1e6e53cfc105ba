"""Importance weights w = exp(prox_logp - old_logp) for data that the policy at the start of the update did not sample.

Rollout engines and trainers disagree in the last digits (mismatch), and asynchronous rollouts come from older weights
(staleness). A surrogate's ratio is against `prox_logp`; these detached weights correct for the gap between `prox_logp`
and the policy that sampled. Exact weights are unbiased. Every function here bounds them, which trades bias for
variance.

Whether a bound acts depends on the sampled token, so the expected gradient is biased by design. A masked token or
sequence still counts in the denominator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout, mean_of_tokens, sum_of_tokens
from kdloss._packing.texts import PACKING_ARGS

from .estimators import masked_log_ratio
from .texts import WEIGHT_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Aggregate = Literal["sum", "mean"]
Action = Literal["truncate", "mask"]
Statistic = Literal["ratio", "k2", "k3"]
_AGGREGATES, _ACTIONS, _STATISTICS = get_args(Aggregate), get_args(Action), get_args(Statistic)


@documented(WEIGHT_ARGS)
def truncated_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    max_weight: float = 2.0,
) -> Tensor:  # (T,)
    """TIS: w_t = min(prox_t / old_t, max_weight), detached.

    Args:
        {prox_logp}
        {old_logp}
        {loss_mask}
        max_weight: absolute bound, > 0.

    Returns:
        The shape of `prox_logp`, without gradient.

    Expected gradient:
        None of its own. As `weights` they make a loss unbiased while no ratio exceeds the bound. The bound depends on
        the sampled token and biases the loss by design.

    Raises:
        TypeError: a log-prob is not a floating-point tensor, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, or `max_weight` is not > 0.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
        >>> prox_logp = old_logp + torch.tensor([4.0, 0.5]).log()
        >>> weights = kdloss.truncated_importance_weights(prox_logp, old_logp, loss_mask=loss_mask)
        >>> [round(x, 4) for x in weights.tolist()]
        [2.0, 0.5]

    Source:
        Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), TIS.
    """
    _checks.positive(max_weight=max_weight)
    return _detached_log_ratio(prox_logp, old_logp, loss_mask).exp().clamp(max=max_weight)


@documented(WEIGHT_ARGS)
def masked_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    min_weight: float = 0.5,
    max_weight: float = 5.0,
    statistic: Statistic = "ratio",
    max_statistic: float | None = None,
) -> Tensor:  # (T,)
    """IcePop: w_t = prox_t / old_t inside [min_weight, max_weight], 0 outside. Detached.

    With another `statistic` it decides what is dropped, and the weight stays the ratio:

        w_t = prox_t / old_t where k_t <= max_statistic, else 0
        k2 = (log prox_t / old_t)² / 2,   k3 = prox_t / old_t - 1 - log prox_t / old_t

    Args:
        {prox_logp}
        {old_logp}
        {loss_mask}
        min_weight: absolute lower bound, >= 0. Not used with "k2" and "k3".
        max_weight: absolute upper bound, >= min_weight. Not used with "k2" and "k3".
        statistic: what is bounded: "ratio", "k2" or "k3". The last two are 0 where the policies agree.
        max_statistic: upper bound of "k2" or "k3", nats, >= 0; required with them. None with "ratio".

    Returns:
        The shape of `prox_logp`, without gradient. A token of weight 0 has no gradient, but still counts in a mean.

    Expected gradient:
        None of its own. As `weights` they make a loss unbiased while no ratio leaves the bounds. The bounds depend on
        the sampled token and bias the loss by design.

    Raises:
        TypeError: a log-prob is not a floating-point tensor, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, the bounds are negative or out of order, `statistic` is none of the three,
            or `max_statistic` does not go with it.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([True, True, True])
        >>> prox_logp = old_logp + torch.tensor([8.0, 2.0, 0.25]).log()
        >>> kdloss.masked_importance_weights(prox_logp, old_logp, loss_mask=loss_mask)
        tensor([0., 2., 0.])
        >>> kdloss.masked_importance_weights(  # k3 is 4.92, 0.31 and 0.64
        ...     prox_logp, old_logp, loss_mask=loss_mask, statistic="k3", max_statistic=1.0
        ... )
        tensor([0.0000, 2.0000, 0.2500])

    Source:
        Ling Team, "Every Step Evolves" (arXiv 2510.18855), IcePop. k2 and k3: Schulman, "Approximating KL Divergence"
        (2020).
    """
    _checks.interval(("min_weight", min_weight), ("max_weight", max_weight))
    bound = _bound_of(statistic, max_statistic)
    log_ratio = _detached_log_ratio(prox_logp, old_logp, loss_mask)
    if bound is None:
        return _drop_outside(log_ratio.exp(), min_weight, max_weight)
    return _drop_above(log_ratio.exp(), _of_log_ratio(statistic, log_ratio), bound)


@documented(PACKING_ARGS)
def sequence_importance_weights(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    aggregate: Aggregate,
    action: Action,
    min_weight: float = 0.0,
    max_weight: float,
    statistic: Statistic = "ratio",
    max_statistic: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,)
    """One weight per sequence: W_b = exp(aggregate over trained t of log prox_t - log old_t), bounded. Detached.

    With another `statistic` it decides which sequences are dropped, and the weight stays W_b:

        W_b where aggregate over trained t of k_t <= max_statistic, else 0
        k2 = (log prox_t / old_t)² / 2,   k3 = prox_t / old_t - 1 - log prox_t / old_t

    Args:
        prox_logp: (T,) log-probs of the tokens under the policy at the start of the update, nats.
        old_logp: (T,) log-probs of the same tokens under the policy that sampled them, nats.
        loss_mask: (T,) bool, True at trained tokens. Other tokens do not count, whatever their values.
        {cu_seqlens}
        aggregate: "sum" is the ratio of the probabilities of the whole response (unbiased before the bound; its
            variance grows with the length); "mean" is its geometric mean per token.
        action: "truncate" clamps W to [min_weight, max_weight]; "mask" sets it to 0 outside.
        min_weight: absolute lower bound, >= 0. Not used with "k2" and "k3".
        max_weight: absolute upper bound, >= min_weight; `math.inf` for none. Not used with "k2" and "k3".
        statistic: what is bounded: "ratio", "k2" or "k3". The last two need `action="mask"`, and are 0 where the
            policies agree.
        max_statistic: upper bound of "k2" or "k3", nats, >= 0; required with them. None with "ratio".
        {group}
            W_b is of the whole sequence.

    Returns:
        (T,) without gradient: the weight of its sequence at every token, trained or not.

    Expected gradient:
        None of its own. As `weights`, "sum" makes a loss unbiased while no weight leaves the bounds. "mean" and the
        bounds bias the loss by design.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, `cu_seqlens` does not fit, the bounds are negative or out of order, `aggregate` or
            `action` is neither of the two, `statistic` is none of the three, or `max_statistic` or `action` does not go
            with it. With `group` also where its backend cannot carry the tensors or, on the CPU, ranks differ in B,
            `aggregate` or `statistic`; on the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> old_logp, cu = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0, 2, 3])
        >>> prox_logp, mask = old_logp + torch.tensor([2.0, 8.0, 0.5]).log(), torch.ones(3, dtype=torch.bool)
        >>> weights = kdloss.sequence_importance_weights(  # geometric means 4 and 0.5; the products are 16 and 0.5
        ...     prox_logp, old_logp, loss_mask=mask, cu_seqlens=cu, aggregate="mean", action="mask", max_weight=5.0
        ... )
        >>> [round(x, 4) for x in weights.tolist()]
        [4.0, 4.0, 0.5]

    Source:
        Liu et al., "When Speed Kills Stability" (2025), sequence-level TIS and MIS; GSPO (arXiv 2507.18071) for "mean".
    """
    with in_step(group, prox_logp, agreed := {}):
        _checks.one_of("aggregate", aggregate, _AGGREGATES)
        _checks.one_of("action", action, _ACTIONS)
        _checks.interval(("min_weight", min_weight), ("max_weight", max_weight))
        bound = _bound_of(statistic, max_statistic)
        if bound is not None and action != "mask":
            raise ValueError(f'action must be "mask" with statistic={statistic!r}, got {action!r}')
        _checks.packed_stream("prox_logp", prox_logp, cu_seqlens)
        log_ratio = _detached_log_ratio(prox_logp, old_logp, loss_mask)
        layout = Layout(cu_seqlens, prox_logp.shape[0])
        agreed.update({"aggregate": aggregate, "statistic": statistic, SEQUENCES: layout.size})
    reduce = sum_of_tokens if aggregate == "sum" else mean_of_tokens
    weight = reduce(log_ratio, loss_mask, layout, group).exp()
    if bound is not None:
        found = reduce(_of_log_ratio(statistic, log_ratio), loss_mask, layout, group)
        weight = _drop_above(weight, found, bound)
    elif action == "truncate":
        weight = weight.clamp(min_weight, max_weight)
    else:
        weight = _drop_outside(weight, min_weight, max_weight)
    return weight.index_select(0, layout.ids)  # NaN already where cu_seqlens does not fit


def _detached_log_ratio(prox_logp: Tensor, old_logp: Tensor, loss_mask: Tensor) -> Tensor:
    _checks.tensors(old_logp=old_logp)
    return masked_log_ratio("prox_logp", prox_logp, loss_mask, old_logp=old_logp).detach()


def _drop_outside(weight: Tensor, min_weight: float, max_weight: float) -> Tensor:
    # tests for being outside the bounds, so that a NaN weight stays NaN instead of becoming 0
    return torch.where((weight < min_weight) | (weight > max_weight), weight.new_zeros(()), weight)


def _bound_of(statistic: Statistic, max_statistic: float | None) -> float | None:
    """The upper bound of "k2" or "k3"; None for "ratio", which has bounds of its own."""
    _checks.one_of("statistic", statistic, _STATISTICS)
    if max_statistic is not None:
        _checks.non_negative(max_statistic=max_statistic)
    if (statistic == "ratio") != (max_statistic is None):
        expected = "None" if max_statistic is not None else "a number"
        raise ValueError(f"max_statistic must be {expected} with statistic={statistic!r}, got {max_statistic}")
    return max_statistic


def _of_log_ratio(statistic: Statistic, log_ratio: Tensor) -> Tensor:
    if statistic == "k2":
        return 0.5 * log_ratio.square()
    # bounded, so that inf - inf is inf
    return torch.expm1(log_ratio) - log_ratio.clamp(max=torch.finfo(log_ratio.dtype).max)


def _drop_above(weight: Tensor, statistic: Tensor, bound: float) -> Tensor:
    # tests for being above the bound, so that a NaN weight stays NaN instead of becoming 0
    return torch.where(statistic > bound, weight.new_zeros(()), weight)
