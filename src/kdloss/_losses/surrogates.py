"""Per-token policy-gradient losses: what is descended so that log-probs rise where advantages are positive.

With the ratio rho_t = exp(logp_t - old_logp_t), a detached advantage A_t and a detached weight w_t, each function is
the equation in its docstring, token by token. Reduce with `token_mean` or `sequence_mean`.

An infinite ratio makes no NaN where w_t * A_t is 0 (the loss is 0) or where a clip stops the gradient (the loss has the
bound).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout, mean_of_tokens

from .estimators import difference
from .texts import LOSS_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# exp(60) saturates the sigmoid of SAPO for every temperature above 1e-24, and is still finite in float32
_SATURATED_LOG_RATIO = 60.0


class Surrogate(NamedTuple):
    """A per-token loss, and where its clips act. Only `loss` is differentiable, in logp.

    Attributes:
        loss: (T,) the loss per token, 0 at untrained tokens.
        ratio: (T,) the importance ratio before any clip, 1 at untrained tokens.
        clipped: (T,) bool, True at trained tokens where the clip acts.
        dual_clipped: (T,) bool, True at trained tokens where the dual clip acts.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
        >>> logp = old_logp + torch.tensor([1.5, 1.0]).log()
        >>> surrogate: kdloss.Surrogate = kdloss.clipped_surrogate(logp, old_logp, torch.ones(2), loss_mask=loss_mask)
        >>> surrogate.clipped.tolist(), [round(x, 4) for x in surrogate.ratio.tolist()]
        ([True, False], [1.5, 1.0])
    """

    loss: Tensor  # (T,)
    ratio: Tensor  # (T,)
    clipped: Tensor  # (T,) bool
    dual_clipped: Tensor  # (T,) bool


@documented(LOSS_ARGS)
def importance_sampled_surrogate(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    max_ratio: float | None = None,
    weights: Tensor | None = None,  # (T,)
) -> Surrogate:
    """The importance-sampled policy gradient: loss_t = -rho_t * w_t * A_t.

    With `max_ratio` c the ratio is detached and bounded: loss_t = -sg(min(rho_t, c)) * w_t * A_t * logp_t. Every token
    keeps a gradient, and its ratio counts as c at most.

    Args:
        {logp}
        {old_logp}
        {advantages}
            With `reverse_kl_reward` as advantages the loss descends the reverse KL.
        {loss_mask}
        max_ratio: absolute bound of the ratio, > 0. None: no bound.
        {weights}

    Returns:
        `Surrogate`; `clipped` marks ratios above `max_ratio`. Their gradient is scaled down, not stopped.

    Expected gradient:
        minus the policy gradient of E[A], for any policy that sampled, at the prefixes that it visited. With
        A = log p - log q: grad KL(q || p) of every next-token distribution. A `max_ratio` depends on the sampled token
        and biases that by design.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, or `max_ratio` is not > 0.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> advantages, loss_mask = torch.tensor([2.0, -1.0]), torch.tensor([True, True])
        >>> surrogate = kdloss.importance_sampled_surrogate(logp, None, advantages, loss_mask=loss_mask)
        >>> (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logp)
        >>> surrogate.loss.tolist(), gradient.tolist()
        ([-2.0, 1.0], [-2.0, 1.0])

    Source:
        KDRL (arXiv 2506.02208), J_RKL, with A = R; the bound: CISPO (arXiv 2506.13585).
    """
    _checks.positive_or_none(max_ratio=max_ratio)
    log_ratio = _log_ratio(logp, old_logp, advantages, loss_mask, weights)
    given = _given(log_ratio, advantages, loss_mask, weights, log_ratio.new_zeros(()))
    never = torch.zeros_like(loss_mask)
    clipped, bounded = never, None
    if max_ratio is not None:
        clipped, bounded = loss_mask & (given.ratio > max_ratio), given.ratio.clamp(max=max_ratio)
    loss = importance_sampled_loss(logp, given.log_ratio, -given.weighted, bounded, given.zero)
    return Surrogate(loss, given.ratio, clipped, never)


@documented(LOSS_ARGS)
def clipped_surrogate(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
) -> Surrogate:
    """PPO's clip: loss_t = w_t * max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    With `dual_clip` c > 1, where A_t < 0: loss_t = w_t * min(the above, -c A_t).

    Args:
        {logp}
        old_logp: the shape of `logp`: log-probs under the policy that the ratio is against, detached. None: on-policy,
            `logp.detach()`, so that every ratio is 1.
        {advantages}
        {loss_mask}
        {clip_low}
        {clip_high}
        {dual_clip}
        {weights}

    Returns:
        `Surrogate`; the gradient is exactly 0 where `clipped` or `dual_clipped`.

    Expected gradient:
        minus the policy gradient of E[A] while no ratio leaves the bounds (at ratio 1: always). A clip depends on the
        sampled token and biases it by design.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, a clip is negative, or `dual_clip` is not > 1.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
        >>> logp = old_logp + torch.tensor([1.5, 0.5]).log()  # ratios 1.5 and 0.5
        >>> surrogate = kdloss.clipped_surrogate(logp, old_logp, torch.ones(2), loss_mask=loss_mask)
        >>> [round(x, 4) for x in surrogate.loss.tolist()], surrogate.clipped.tolist()
        ([-1.2, -0.5], [True, False])

    Source:
        PPO (arXiv 1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv 2503.14476), eq. 10; dual clip: Ye et al.
        (arXiv 1912.09729).
    """
    _checks.ppo_clips(clip_low, clip_high, dual_clip)
    log_ratio = _log_ratio(logp, old_logp, advantages, loss_mask, weights)
    clips = Clips(clip_low, clip_high, dual_clip)
    return clipped_loss(log_ratio, advantages, loss_mask, weights, clips=clips, zero=log_ratio.new_zeros(()))


@documented(LOSS_ARGS)
def sequence_clipped_surrogate(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | None = None,  # (T,)
    group: ProcessGroup | None = None,
) -> Surrogate:
    """GSPO-token: PPO's clip on the ratio s_b of the whole response, its gradient spread over the tokens.

        s_b = exp(mean over trained t of b of logp_t - old_logp_t),  ratio_t = sg(s_b) * q_t / sg(q_t)
        loss_t = w_t * max(-ratio_t A_t, -clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)

    Args:
        logp: (T,) log-probs of the tokens under the student, nats. Differentiable.
        {old_logp}
        {advantages}
        {loss_mask}
        {cu_seqlens}
        {clip_low}
        clip_high: distance of the upper bound of the ratio above 1, >= 0.
        {weights}
        {group}
            s_b is of the whole sequence.

    Returns:
        `Surrogate` of this rank's tokens; `ratio` is s_b at every trained token of its sequence. The backward needs no
        collective, as s_b is detached.

    Expected gradient:
        At ratio 1 minus the policy gradient of E[A]. Off-policy s_b is a geometric mean and not the probability ratio
        of the response, so it is biased by design, with or without a clip. With one advantage per sequence and
        `sequence_mean` this is GSPO.

    Raises:
        TypeError: a per-token tensor is not floating-point, `loss_mask` is not bool, or `group` is not a process group.
        ValueError: shapes or devices differ, a clip is negative, a tensor is not flat or `cu_seqlens` does not fit.
            With `group` also where its backend cannot carry the tensors or, on the CPU, ranks differ in B; on the CPU
            an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
        >>> logp = old_logp + torch.tensor([4.0, 1.0]).log()  # one sequence, s_b = sqrt(4 * 1)
        >>> surrogate = kdloss.sequence_clipped_surrogate(
        ...     logp, old_logp, torch.ones(2), loss_mask=loss_mask, cu_seqlens=torch.tensor([0, 2])
        ... )
        >>> [round(x, 4) for x in surrogate.ratio.tolist()], [round(x, 4) for x in surrogate.loss.tolist()]
        ([2.0, 2.0], [-1.0004, -1.0004])

    Source:
        GSPO (arXiv 2507.18071), eqs. 5, 7 and 13.
    """
    with in_step(group, logp, agreed := {}):
        _checks.non_negative(clip_low=clip_low, clip_high=clip_high)
        _checks.packed_stream("logp", logp, cu_seqlens)
        log_ratio = _log_ratio(logp, old_logp, advantages, loss_mask, weights)
        layout = Layout(cu_seqlens, logp.shape[0])
        agreed.update({SEQUENCES: layout.size})
    mean = mean_of_tokens(log_ratio.detach(), loss_mask, layout, group).index_select(0, layout.ids)
    given = _given(log_ratio, advantages, loss_mask, weights, log_ratio.new_zeros(()), mean)
    clipped, bound, _ = _clip(given.ratio, given.advantages, clip_low, clip_high)
    dead = clipped | (given.weighted == 0)
    # log q_t - sg(log q_t) is 0 and carries the gradient; left out where it is inf - inf, as s_b is 0 or inf there
    attached = torch.where(~dead & (log_ratio.detach().abs() < math.inf), given.log_ratio, given.zero)
    live_ratio = torch.where(dead, given.zero, given.ratio.log() + (attached - attached.detach())).exp()
    loss = live_ratio * _coefficient(clipped, bound, given.weighted)
    return Surrogate(loss, given.ratio, clipped, torch.zeros_like(clipped))


@documented(LOSS_ARGS)
def cispo_surrogate(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip_low: float | None = None,
    clip_high: float,
    weights: Tensor | None = None,  # (T,)
) -> Surrogate:
    """CISPO: loss_t = -sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) * w_t * A_t * logp_t.

    Args:
        {logp}
        {old_logp}
        {advantages}
        {loss_mask}
        clip_low: distance of the lower bound of the ratio below 1, >= 0. None: no lower bound.
        clip_high: distance of the upper bound of the ratio above 1, >= 0.
        {weights}

    Returns:
        `Surrogate`; `clipped` marks ratios outside the bounds. Their gradient is bounded, not stopped.

    Expected gradient:
        minus the policy gradient of E[A] while no ratio leaves the bounds (at ratio 1: always). A clip depends on the
        sampled token and biases it by design.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, or a clip is negative.

    Example:
        >>> import torch, kdloss
        >>> old_logp, loss_mask = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
        >>> logp = (old_logp + torch.tensor([3.0, 0.5]).log()).requires_grad_()  # ratios 3 and 0.5
        >>> surrogate = kdloss.cispo_surrogate(logp, old_logp, torch.ones(2), loss_mask=loss_mask, clip_high=1.0)
        >>> (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logp)
        >>> [round(x, 4) for x in gradient.tolist()]
        [-2.0, -0.5]

    Source:
        MiniMax-M1 (arXiv 2506.13585), eq. 4.
    """
    _checks.non_negative(clip_low=0.0 if clip_low is None else clip_low, clip_high=clip_high)
    # its gradient is through log q alone
    log_ratio = _log_ratio(logp, old_logp, advantages, loss_mask, weights).detach()
    given = _given(log_ratio, advantages, loss_mask, weights, log_ratio.new_zeros(()))
    ratio = given.ratio
    bounded = ratio.clamp(min=None if clip_low is None else 1 - clip_low, max=1 + clip_high)
    clipped = (ratio > bounded) | (ratio < bounded)
    loss = importance_sampled_loss(logp, log_ratio, -given.weighted, bounded, given.zero)
    return Surrogate(loss, ratio, clipped, torch.zeros_like(loss_mask))


@documented(LOSS_ARGS)
def sapo_surrogate(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    weights: Tensor | None = None,  # (T,)
) -> Surrogate:
    """SAPO's soft gate: loss_t = -(4 / tau) * sigmoid(tau * (rho_t - 1)) * w_t * A_t.

    tau is `tau_positive` where A_t > 0, else `tau_negative`.

    Args:
        {logp}
        {old_logp}
        {advantages}
        {loss_mask}
        tau_positive, tau_negative: > 0; the larger, the faster a token's gradient fades as its ratio leaves 1.
        {weights}

    Returns:
        `Surrogate`; nothing is `clipped`: the gradient fades instead.

    Expected gradient:
        minus the policy gradient of E[A] at ratio 1. Elsewhere the ratio is weighted by 4 sigma (1 - sigma), which
        biases it by design.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, or a tau is not > 0.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> advantages, loss_mask = torch.tensor([2.0, -1.0]), torch.tensor([True, True])
        >>> surrogate = kdloss.sapo_surrogate(logp, None, advantages, loss_mask=loss_mask)
        >>> (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logp)  # at ratio 1 the gradient is -A
        >>> [round(x, 4) for x in gradient.tolist()]
        [-2.0, 1.0]

    Source:
        SAPO (arXiv 2511.20347).
    """
    _checks.positive(tau_positive=tau_positive, tau_negative=tau_negative)
    _checks.finite(tau_positive=tau_positive, tau_negative=tau_negative)
    log_ratio = _log_ratio(logp, old_logp, advantages, loss_mask, weights)
    given = _given(log_ratio, advantages, loss_mask, weights, log_ratio.new_zeros(()))
    tau = _either(given.advantages > 0, tau_positive, tau_negative, given.ratio)
    # past the bound the sigmoid is exactly 1 and its slope 0: the clamp keeps 0 * inf out of the gradient
    dead = given.weighted == 0
    live_ratio = torch.where(dead, given.zero, given.log_ratio).clamp(max=_SATURATED_LOG_RATIO).exp()
    gate = torch.sigmoid(tau * (live_ratio - 1))
    never = torch.zeros_like(loss_mask)
    return Surrogate(gate * (-4 / tau * given.weighted), given.ratio, never, never)


class Clips(NamedTuple):
    """The bounds of `clipped_surrogate`."""

    low: float
    high: float
    dual: float | None


def clipped_loss(
    log_ratio: Tensor, advantages: Tensor, loss_mask: Tensor, weights: Tensor | None, *, clips: Clips, zero: Tensor
) -> Surrogate:
    """`clipped_surrogate` of `difference(logp, old_logp)`, after its checks. `zero` () is shared between terms."""
    given = _given(log_ratio, advantages, loss_mask, weights, zero)
    clipped, bound, signed = _clip(given.ratio, given.advantages, clips.low, clips.high)
    stopped = clipped
    if clips.dual is None:
        dual_clipped = torch.zeros_like(clipped)
    else:
        dual_clipped = signed < -clips.dual
        bound = torch.where(dual_clipped, bound.new_full((), clips.dual), bound)
        stopped = clipped | dual_clipped
    live_ratio = torch.where(stopped | (given.weighted == 0), given.zero, given.log_ratio).exp()
    return Surrogate(live_ratio * _coefficient(stopped, bound, given.weighted), given.ratio, clipped, dual_clipped)


def importance_sampled_loss(
    logp: Tensor, log_ratio: Tensor, costs: Tensor, bounded: Tensor | None, zero: Tensor
) -> Tensor:
    """exp(log ratio) * cost, or sg(bounded ratio) * cost * logp if one is given, for detached costs -w_t A_t.

    0 where the cost is 0, which it is at untrained tokens.
    """
    dead = costs == 0
    if bounded is None:
        return torch.where(dead, zero, log_ratio.to(costs.dtype)).exp() * costs
    return torch.where(dead, zero, bounded * costs) * torch.where(dead, zero, logp.to(costs.dtype))


class _Given(NamedTuple):
    """What surrogates are computed from, all in the compute dtype."""

    zero: Tensor  # () 0
    log_ratio: Tensor  # attached, with what untrained tokens hold: `weighted` is 0 there
    ratio: Tensor  # detached, 1 where untrained
    advantages: Tensor  # A, detached, 0 where untrained
    weighted: Tensor  # w * A, detached, 0 where untrained


def _log_ratio(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, loss_mask: Tensor, weights: Tensor | None
) -> Tensor:
    """`difference(logp, old_logp)`, after the checks that surrogates share."""
    _checks.tensors(advantages=advantages)
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, advantages=advantages, weights=weights)
    return difference(logp, old_logp)


def _given(
    log_ratio: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    weights: Tensor | None,
    zero: Tensor,  # ()
    log_of_ratio: Tensor | None = None,  # None: log_ratio
) -> _Given:
    dtype = _checks.promoted_dtype(log_ratio, advantages, weights)
    log_ratio, zero = log_ratio.to(dtype), zero.to(dtype)
    ratio = torch.where(loss_mask, log_ratio.detach() if log_of_ratio is None else log_of_ratio.to(dtype), zero).exp()
    advantages = torch.where(loss_mask, advantages.detach().to(dtype), zero)
    weighted = advantages
    if weights is not None:
        weights = torch.where(loss_mask, weights.detach().to(dtype), zero)
        # a weight of 0 also makes an infinite advantage 0
        weighted = torch.where(weights == 0, zero, advantages * weights)
    return _Given(zero, log_ratio, ratio, advantages, weighted)


def _clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where PPO's clip stops the gradient, the bound that replaces the ratio there, and sign(A) * ratio."""
    bound = ratio.clamp(1 - clip_low, 1 + clip_high)
    sign = advantages.sign()
    # products with a sign are exact; 0 * inf is NaN, which is not greater than anything
    signed = sign * ratio
    return signed > sign * bound, bound, signed


def _coefficient(stopped: Tensor, bound: Tensor, weighted: Tensor) -> Tensor:
    """What exp(log ratio) is multiplied by, where the log ratio is 0 if it is stopped: -wA, and -bound * wA there."""
    return -torch.where(stopped, bound * weighted, weighted)


def _either(condition: Tensor, true: float, false: float, like: Tensor) -> Tensor:
    """`where` of two numbers, in the dtype of `like`; torch would make float32 of two Python numbers."""
    return torch.where(condition, like.new_full((), true), like.new_full((), false))
