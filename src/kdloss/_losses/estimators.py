"""Per-token estimators of KL(q || p) on tokens sampled from the student q, and the reverse-KL reward.

Which of them may be *descended*? With the score s = grad log q, tokens sampled from q, and for each next-token
distribution:

    k1 = log q - log p                E[grad k1] = E[s] = 0           the teacher drops out
    k2 = (log q - log p)^2 / 2        E[grad k2] = grad KL(q || p)    on-policy only
    k3 = p/q - 1 - log(p/q)           E[grad k3] = grad KL(p || q)    the *forward* KL
    reward R = log p - log q, in -rho * sg(R)     = grad KL(q || p)   for any behaviour policy with importance ratio rho

All four estimate KL(q || p) in value (the last one negated). Only k2 and the reward descend it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout, at_starts, fits, one_or_nan
from kdloss._packing.parts import returns_of_later_parts
from kdloss._packing.texts import PACKING_ARGS

from .returns_op import discounted_scan
from .texts import LOSS_ARGS, REWARD_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@documented(LOSS_ARGS)
def kl_k1(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
) -> Tensor:  # (T,)
    """k1 = log q - log p, the unbiased estimate of KL(q || p) in nats. For logging: its gradient ignores the teacher.

        k1_t = logp_t - teacher_logp_t

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained tokens; float32 for half-precision inputs.

    Expected gradient:
        Exactly zero on-policy, so a loss that descends k1 drifts by noise alone. With a local token count, or a mean
        over each sequence's own length, it pushes on the length of the responses.

    Raises:
        TypeError: a log-prob is not a floating-point tensor, or `loss_mask` is not bool.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.zeros(2, requires_grad=True)  # q = (1/2, 1/2)
        >>> logp, teacher_logp = logits.log_softmax(0), torch.tensor([0.75, 0.25]).log()
        >>> k1 = kdloss.kl_k1(logp, teacher_logp, loss_mask=torch.tensor([True, True]))
        >>> expected = (logp.detach().exp() * k1).sum()  # over the tokens that q may sample
        >>> (gradient,) = torch.autograd.grad(expected, logits)
        >>> round(expected.item(), 4), gradient.abs().max().item() < 1e-6
        (0.1438, True)

    Source:
        Schulman, "Approximating KL Divergence" (2020), k1.
    """
    return _teacher_log_ratio(logp, teacher_logp, loss_mask)


@documented(LOSS_ARGS)
def kl_k2(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
) -> Tensor:  # (T,)
    """k2 = (log q - log p)^2 / 2, a biased, low-variance estimate of KL(q || p) whose on-policy gradient is right.

        k2_t = (logp_t - teacher_logp_t)^2 / 2

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained tokens; float32 for half-precision inputs.

    Expected gradient:
        grad KL(q || p) where tokens are sampled from q. Biased where they are sampled from another policy: multiply by
        the detached ratio, or use `importance_sampled_surrogate` on `reverse_kl_reward`, which has the same gradient.

    Raises:
        TypeError: a log-prob is not a floating-point tensor, or `loss_mask` is not bool.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.zeros(2, requires_grad=True)  # q = (1/2, 1/2)
        >>> logp, teacher_logp = logits.log_softmax(0), torch.tensor([0.75, 0.25]).log()
        >>> k2 = kdloss.kl_k2(logp, teacher_logp, loss_mask=torch.tensor([True, True]))
        >>> expected = (logp.detach().exp() * k2).sum()  # over the tokens that q may sample
        >>> (gradient,) = torch.autograd.grad(expected, logits)
        >>> [round(x, 4) for x in gradient.tolist()]  # q * (log(q / p) - KL(q || p))
        [-0.2747, 0.2747]

    Source:
        Schulman, "Approximating KL Divergence" (2020), k2.
    """
    return 0.5 * _teacher_log_ratio(logp, teacher_logp, loss_mask).square()


@documented(LOSS_ARGS)
def kl_k3(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
) -> Tensor:  # (T,)
    """k3 = p/q - 1 - log(p/q), an unbiased, non-negative estimate of KL(q || p) whose gradient is the *forward* KL's.

        k3_t = exp(teacher_logp_t - logp_t) - 1 - (teacher_logp_t - logp_t)

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained tokens; float32 for half-precision inputs.

    Expected gradient:
        grad KL(p || q) = q - p with respect to the logits, on-policy. Not that of the reverse KL.

    Raises:
        TypeError: a log-prob is not a floating-point tensor, or `loss_mask` is not bool.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.zeros(2, requires_grad=True)  # q = (1/2, 1/2)
        >>> logp, teacher_logp = logits.log_softmax(0), torch.tensor([0.75, 0.25]).log()
        >>> k3 = kdloss.kl_k3(logp, teacher_logp, loss_mask=torch.tensor([True, True]))
        >>> expected = (logp.detach().exp() * k3).sum()  # over the tokens that q may sample
        >>> (gradient,) = torch.autograd.grad(expected, logits)
        >>> [round(x, 4) for x in gradient.tolist()]  # q - p
        [-0.25, 0.25]

    Source:
        Schulman, "Approximating KL Divergence" (2020), k3; GRPO (arXiv 2402.03300), eq. 4.
    """
    log_ratio = _teacher_log_ratio(logp, teacher_logp, loss_mask)
    # expm1 keeps the digits where p and q nearly agree
    return torch.expm1(-log_ratio) + log_ratio


@documented(REWARD_ARGS)
def reverse_kl_reward(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip: float | None = None,
) -> Tensor:  # (T,)
    """R = log p - log q, the per-token reward whose policy gradient is -grad KL(q || p). Detached.

        R_t = teacher_logp_t - logp_t, clamped to [-clip, clip]

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}
        {clip}

    Returns:
        The shape of `logp`, without gradient, 0 at untrained tokens. A trained token that the teacher excludes
        (teacher_logp = -inf) has reward -inf, or -clip.

    Expected gradient:
        None of its own; as the advantage of `importance_sampled_surrogate` it gives grad KL(q || p). A clip depends on
        the sampled token and biases that by design.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -torch.inf])
        >>> loss_mask = torch.tensor([True, True, True])
        >>> kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask).tolist()
        [-0.5, 1.0, -inf]
        >>> kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask, clip=5.0).tolist()
        [-0.5, 1.0, -5.0]

    Source:
        KDRL (arXiv 2506.02208), the reward of J_RKL: R_{i,t} = log pi_T(o_{i,t}) - log pi_theta(o_{i,t}).
    """
    return clipped_reward(log_p_over_q(logp, teacher_logp, loss_mask), clip)


@documented(PACKING_ARGS)
def discounted_returns(
    rewards: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    discount: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,)
    """Return-to-go over the trained tokens of each sequence. Detached.

        R_t = r_t + discount * R_{next trained token of the sequence}

    Only trained tokens count as steps, so a tool's output or a later prompt between two of them is not discounted.

    Computed by a segmented doubling scan: ceil(log2 T) vector steps, exact to rounding at any T. A difference of two
    global cumulative sums would lose digits, and a Python loop would wait for every token. Infinite rewards stay in
    their sequence, but a sum of finite ones must not exceed float64.

    Args:
        rewards: (T,) rewards per token.
        {loss_mask}
        {cu_seqlens}
        discount: 0 .. 1. 0 returns the rewards themselves, 1 their sum to the end of the sequence.
        {group}
            Parts follow one another in rank order. One collective carries the returns of later parts.

    Returns:
        (T,) without gradient, 0 at untrained tokens.

    Expected gradient:
        None of its own. As advantages made of reverse-KL rewards: discount 0 gives the gradient of the token-level
        reverse KL; discount 1 gives, on-policy, that of the KL between whole sequences. A discount between the two, or
        above 0 off-policy, gives neither.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, the stream is not flat, `cu_seqlens` does not fit, or `discount` is outside 0 .. 1.
            With `group` also where its backend cannot carry the tensors or, on the CPU, ranks differ in B or
            `discount`; on the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> rewards, loss_mask = torch.ones(5), torch.tensor([True, True, False, True, True])
        >>> cu_seqlens = torch.tensor([0, 4, 5])
        >>> kdloss.discounted_returns(rewards, loss_mask=loss_mask, cu_seqlens=cu_seqlens, discount=0.5).tolist()
        [1.75, 1.5, 0.0, 1.0, 1.0]
    """
    with in_step(group, rewards, agreed := {}):
        _checks.per_token("rewards", rewards, loss_mask=loss_mask)
        _checks.packed_stream("rewards", rewards, cu_seqlens)
        _checks.unit_interval(discount=discount)
        _checks.cumulative_lengths(cu_seqlens, total_tokens=rewards.shape[0])
        agreed.update({SEQUENCES: cu_seqlens.shape[0] - 1, "discount": discount})

    dtype, intact = _checks.promoted_dtype(rewards), one_or_nan(fits(cu_seqlens, rewards.shape[0]))
    rewards = rewards.detach().to(dtype)
    if discount == 0:
        returns = rewards
    else:
        # float64 where the device has it: a discount rounded to float32 would add a relative error at every step
        returns = discounted_scan(rewards, loss_mask, cu_seqlens, float(discount))
        if group is not None:
            returns = returns * intact  # on every rank, if it does not fit on one
            returns = returns + _from_later_parts(returns, loss_mask, cu_seqlens, discount, group)
    # the mask before the NaN, which also goes to untrained tokens
    return (torch.where(loss_mask, returns, returns.new_zeros(())) * intact).to(dtype)


def _from_later_parts(
    returns: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, discount: float, group: ProcessGroup
) -> Tensor:
    """(T,): what later ranks' parts add to the returns within this part."""
    ids = Layout(cu_seqlens, returns.shape[0]).ids
    before = torch.cat([loss_mask.new_zeros(1, dtype=torch.int64), loss_mask.cumsum(0)])  # trained tokens before t
    ends = before.index_select(0, cu_seqlens.clamp(0, ids.shape[0]))
    head, _ = at_starts(returns, cu_seqlens)
    following = returns_of_later_parts(head, torch.full_like(head, discount).pow(ends.diff()), group)
    steps = ends[1:].index_select(0, ids) - before[:-1]
    return torch.full_like(returns, discount).pow(steps) * following.index_select(0, ids)


def _teacher_log_ratio(logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
    _checks.tensors(teacher_logp=teacher_logp)
    return masked_log_ratio("logp", logp, loss_mask, teacher_logp=teacher_logp)


def log_p_over_q(logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
    """log p - log q, 0 where untrained. Detached."""
    _checks.tensors(teacher_logp=teacher_logp)
    _checks.per_token("logp", logp, loss_mask=loss_mask, teacher_logp=teacher_logp)
    log_ratio = difference(teacher_logp.detach(), logp)
    return torch.where(loss_mask, log_ratio, log_ratio.new_zeros(()))


def clipped_reward(reward: Tensor, clip: float | None) -> Tensor:
    """`reward` inside [-clip, clip]; None: as it is."""
    _checks.positive_or_none(clip=clip)
    return reward if clip is None else reward.clamp(-clip, clip)


def masked_log_ratio(
    name: str,
    logp: Tensor,
    loss_mask: Tensor,
    **other: Tensor | None,
) -> Tensor:
    """log q - log of the one policy in `other` (None: q itself, detached), 0 where untrained. Differentiable in `logp`.

    The difference is taken in float32 or wider, and masked before any non-linearity.
    """
    _checks.per_token(name, logp, loss_mask=loss_mask, **other)
    log_ratio = difference(logp, *other.values())
    return torch.where(_checks.savable(loss_mask), log_ratio, log_ratio.new_zeros(()))


def difference(logp: Tensor, reference: Tensor | None) -> Tensor:
    """log q - log of the other policy, in float32 or wider, with what untrained tokens hold."""
    reference = logp if reference is None else reference
    dtype = _checks.promoted_dtype(logp, reference)
    return logp.to(dtype) - reference.detach().to(dtype)
