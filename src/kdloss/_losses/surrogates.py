"""Per-token policy-gradient losses: what is descended so that log-probs rise where advantages are positive.

With the ratio rho_t = exp(logp_t - old_logp_t), a detached advantage A_t and a detached weight w_t, each function is
the equation in its docstring, token by token. Reduce with `token_mean` or `sequence_mean`.

An infinite ratio makes no NaN where w_t * A_t is 0 (the loss is 0) or where a clip stops the gradient (the loss has the
bound).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import broadcast_to_tokens, segment_mean

from .estimators import masked_log_ratio
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
        >>> surrogate.loss.sum().backward()
        >>> surrogate.loss.tolist(), logp.grad.tolist()
        ([-2.0, 1.0], [-2.0, 1.0])

    Source:
        KDRL (arXiv 2506.02208), J_RKL, with A = R; the bound: CISPO (arXiv 2506.13585).
    """
    _checks.positive(max_ratio=max_ratio)
    log_ratio, ratio, advantages, weighted = _prepare(logp, old_logp, advantages, loss_mask, weights)
    never = torch.zeros_like(loss_mask)
    if max_ratio is None:
        live = weighted != 0
        return Surrogate(-torch.where(live, log_ratio, 0).exp() * weighted, ratio, never, never)
    loss = _stopped_ratio_loss(logp, ratio.clamp(max=max_ratio), weighted)
    return Surrogate(loss, ratio, loss_mask & (ratio > max_ratio), never)


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
    log_ratio, ratio, advantages, weighted = _prepare(logp, old_logp, advantages, loss_mask, weights)
    clipped, bound = _clip(ratio, advantages, clip_low, clip_high)
    dual_clipped = torch.zeros_like(clipped) if dual_clip is None else (advantages < 0) & (ratio > dual_clip)
    if dual_clip is not None:
        bound = torch.where(dual_clipped, dual_clip, bound)
    stopped = clipped | dual_clipped
    live_ratio = torch.where((weighted != 0) & ~stopped, log_ratio, 0).exp()
    return Surrogate(-torch.where(stopped, bound, live_ratio) * weighted, ratio, clipped, dual_clipped)


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
    with in_step(group, logp):
        _checks.non_negative(clip_low=clip_low, clip_high=clip_high)
        _checks.packed_stream("logp", logp, cu_seqlens)
        log_ratio, _, advantages, weighted = _prepare(logp, old_logp, advantages, loss_mask, weights)
    mean = segment_mean(log_ratio.detach(), loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=group)
    mean = broadcast_to_tokens(mean, cu_seqlens=cu_seqlens, total_tokens=logp.shape[0])
    ratio = torch.where(_checks.savable(loss_mask), mean, 0).exp()
    clipped, bound = _clip(ratio, advantages, clip_low, clip_high)
    live = (weighted != 0) & ~clipped
    # log q_t - sg(log q_t) is 0 and carries the gradient; left out where it is inf - inf, as s_b is 0 or inf there
    attached = torch.where(live & log_ratio.isfinite(), log_ratio, 0)
    live_ratio = torch.where(live, ratio.log() + (attached - attached.detach()), 0).exp()
    return Surrogate(-torch.where(clipped, bound, live_ratio) * weighted, ratio, clipped, torch.zeros_like(clipped))


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
        >>> surrogate.loss.sum().backward()
        >>> [round(x, 4) for x in logp.grad.tolist()]
        [-2.0, -0.5]

    Source:
        MiniMax-M1 (arXiv 2506.13585), eq. 4.
    """
    _checks.non_negative(clip_low=clip_low, clip_high=clip_high)
    _, ratio, _, weighted = _prepare(logp, old_logp, advantages, loss_mask, weights)
    low = None if clip_low is None else 1 - clip_low
    bounded = ratio.clamp(min=low, max=1 + clip_high)
    clipped = ratio > 1 + clip_high if low is None else (ratio > 1 + clip_high) | (ratio < low)
    loss = _stopped_ratio_loss(logp, bounded, weighted)
    return Surrogate(loss, ratio, loss_mask & clipped, torch.zeros_like(loss_mask))


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
        >>> surrogate.loss.sum().backward()  # at ratio 1 the gradient is -A
        >>> [round(x, 4) for x in logp.grad.tolist()]
        [-2.0, 1.0]

    Source:
        SAPO (arXiv 2511.20347).
    """
    _checks.positive(tau_positive=tau_positive, tau_negative=tau_negative)
    _checks.finite(tau_positive=tau_positive, tau_negative=tau_negative)
    log_ratio, ratio, advantages, weighted = _prepare(logp, old_logp, advantages, loss_mask, weights)
    tau = _either(advantages > 0, tau_positive, tau_negative, ratio)
    # past the bound the sigmoid is exactly 1 and its slope 0: the clamp keeps 0 * inf out of the gradient
    live_ratio = torch.where(weighted != 0, log_ratio, 0).clamp(max=_SATURATED_LOG_RATIO).exp()
    gate = 4 / tau * torch.sigmoid(tau * (live_ratio - 1))
    never = torch.zeros_like(loss_mask)
    return Surrogate(-gate * weighted, ratio, never, never)


def _prepare(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, loss_mask: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratio (attached), ratio, A and w * A (detached), all in the compute dtype; 0, 1, 0, 0 where untrained."""
    _checks.tensors(advantages=advantages)
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, advantages=advantages, weights=weights)
    dtype = _checks.promoted_dtype(logp, old_logp, advantages, weights)
    log_ratio = masked_log_ratio("logp", logp, loss_mask, old_logp=old_logp).to(dtype)
    advantages = torch.where(loss_mask, advantages.detach().to(dtype), 0)
    weighted = advantages
    if weights is not None:
        weights = torch.where(loss_mask, weights.detach().to(dtype), 0)
        # a weight of 0 also makes an infinite advantage 0
        weighted = torch.where(weights == 0, 0, advantages * weights)
    return log_ratio, log_ratio.detach().exp(), advantages, weighted


def _clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where PPO's clip stops the gradient, and the bound that replaces the ratio there."""
    low, high = 1 - clip_low, 1 + clip_high
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return clipped, _either(advantages > 0, high, low, ratio)


def _either(condition: Tensor, true: float, false: float, like: Tensor) -> Tensor:
    """`where` of two numbers, in the dtype of `like`; torch would make float32 of two Python numbers."""
    return torch.where(condition, like.new_full((), true), like.new_full((), false))


def _stopped_ratio_loss(logp: Tensor, ratio: Tensor, weighted: Tensor) -> Tensor:
    """-sg(ratio) * wA * logp, 0 where wA is 0."""
    live = weighted != 0
    coefficient = torch.where(live, ratio * weighted, 0)
    return -coefficient * torch.where(live, logp.to(ratio.dtype), 0)
