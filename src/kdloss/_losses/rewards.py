"""Rewards of a sampled token whose policy gradient descends a divergence other than the reverse KL.

    D_f = sum_v q_v f(u_v),   u = p/q,   r = -(f(u) - u f'(u)),   with f(1) = f'(1) = 0, so r = 0 where p = q

Differentiated, D_f is sum_v (f(u_v) - u_v f'(u_v)) dq_v: the part u f' is there because u depends on q too. So the
surrogate -rho * sg(r) has the expected gradient grad D_f. The reward -f(u) leaves u f' out and points elsewhere, often
the other way; the reward -D_f of the row has the expected gradient 0.

| reward | r | D_f |
|---|---|---|
| `reverse_kl_reward` (estimators.py) | log u | KL(q || p) |
| `forward_kl_reward` | u - 1 | KL(p || q) |
| `jsd_reward` | (1-β) log(1-β + β u) | β KL(p || m) + (1-β) KL(q || m), m = β p + (1-β) q |
| `squared_hellinger_reward` | (sqrt u - 1) / 2 | 1/2 sum (sqrt p - sqrt q)^2 |
| `total_variation_reward` | sign(u - 1) / 2 | 1/2 sum |p - q| |
"""

from __future__ import annotations

from torch import Tensor, expm1, log1p, where

from kdloss import _checks
from kdloss._docs import documented

from .estimators import clipped_reward, log_p_over_q
from .texts import REWARD_ARGS

# log(1-β + β u) is taken from u below this log u, and from 1/u above it; e^60 is finite in float32
_LARGE = 60.0


@documented(REWARD_ARGS)
def forward_kl_reward(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip: float | None = None,
) -> Tensor:  # (T,)
    """r = p/q - 1, the per-token reward whose policy gradient is -grad KL(p || q), the forward KL. Detached.

        r_t = exp(teacher_logp_t - logp_t) - 1, clamped to [-clip, clip]

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}
        {clip}

    Returns:
        The shape of `logp`, without gradient, 0 at untrained tokens. -1 where the teacher excludes the token; above,
        the reward is unbounded, and +inf where p/q overflows.

    Expected gradient:
        None of its own; as the advantage of `importance_sampled_surrogate` it gives ∇KL(p || q) = q - p of each
        next-token distribution, where the policy that samples has mass on every token that the teacher has. A clip
        depends on the sampled token and biases that by design: with r clamped, the gradient is -sum_v q_v r_v ∇log q_v.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.75, 0.0]).log()
        >>> loss_mask = torch.tensor([True, True, True])
        >>> reward = kdloss.forward_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        >>> [round(x, 4) for x in reward.tolist()]
        [-0.5, 2.0, -1.0]

    Source:
        f(u) = u log u - u + 1 in r = -(f(u) - u f'(u)); f-divergences as rewards: arXiv 2606.01039.
    """
    return clipped_reward(expm1(log_p_over_q(logp, teacher_logp, loss_mask)), clip)


@documented(REWARD_ARGS)
def jsd_reward(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    beta: float,
    clip: float | None = None,
) -> Tensor:  # (T,)
    """r = (1-β) log(1-β + β p/q), whose policy gradient is minus that of the generalised Jensen-Shannon divergence.

        r_t = (1-β) log(1-β + β exp(teacher_logp_t - logp_t)), clamped to [-clip, clip]

    The divergence is β KL(p || m) + (1-β) KL(q || m) with m = β p + (1-β) q. The reward is detached.

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}
        beta: β, the teacher's share of the mixture, 0 < β < 1. r / (β (1-β)) tends to the reward of the forward KL as
            β → 0 and to that of the reverse KL as β → 1; r itself goes to 0 at both ends.
        {clip}

    Returns:
        The shape of `logp`, without gradient, 0 at untrained tokens. (1-β) log(1-β), which is finite, where the teacher
        excludes the token; above, the reward grows as log p/q.

    Expected gradient:
        None of its own; as the advantage of `importance_sampled_surrogate` it gives ∇JSD of each next-token
        distribution, for any policy that samples. A clip depends on the sampled token and biases that by design: with r
        clamped, the gradient is -sum_v q_v r_v ∇log q_v.

    Raises:
        {TypeError}
        ValueError: `beta` is 0 or 1 (use the reward that the error names), shapes or devices differ, or `clip` is not
            > 0.

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
        >>> loss_mask = torch.tensor([True, True, True])
        >>> reward = kdloss.jsd_reward(logp, teacher_logp, loss_mask=loss_mask, beta=0.5)
        >>> [round(x, 4) for x in reward.tolist()]  # half of log 1, log 3/2 and log 1/2
        [0.0, 0.2027, -0.3466]

    Source:
        GKD, arXiv 2306.13649, section 3, for the divergence; f-divergences as rewards: arXiv 2606.01039.
    """
    _checks.share("beta", beta, forward_kl_reward.__name__, "reverse_kl_reward")
    log_u = log_p_over_q(logp, teacher_logp, loss_mask)
    small = log1p(beta * expm1(log_u.clamp(max=_LARGE)))  # keeps the digits of r where p and q nearly agree
    large = log_u + log1p((1 - beta) * expm1(-log_u.clamp(min=_LARGE)))
    return clipped_reward((1 - beta) * where(log_u > _LARGE, large, small), clip)


@documented(REWARD_ARGS)
def squared_hellinger_reward(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip: float | None = None,
) -> Tensor:  # (T,)
    """r = (sqrt(p/q) - 1) / 2, whose policy gradient is minus that of the squared Hellinger distance. Detached.

        r_t = (exp((teacher_logp_t - logp_t) / 2) - 1) / 2, clamped to [-clip, clip]

    The distance is H² = 1/2 sum_v (sqrt(p_v) - sqrt(q_v))².

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}
        {clip}

    Returns:
        The shape of `logp`, without gradient, 0 at untrained tokens. -1/2 where the teacher excludes the token; above,
        the reward is unbounded.

    Expected gradient:
        None of its own; as the advantage of `importance_sampled_surrogate` it gives ∇H² of each next-token
        distribution, for any policy that samples. A clip depends on the sampled token and biases that by design: with r
        clamped, the gradient is -sum_v q_v r_v ∇log q_v.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([0.5, 0.125, 0.375]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
        >>> loss_mask = torch.tensor([True, True, True])
        >>> reward = kdloss.squared_hellinger_reward(logp, teacher_logp, loss_mask=loss_mask)
        >>> [round(x, 4) for x in reward.tolist()]
        [0.0, 0.5, -0.5]

    Source:
        f(u) = (sqrt(u) - 1)² / 2 in r = -(f(u) - u f'(u)); f-divergences as rewards: arXiv 2606.01039.
    """
    return clipped_reward(0.5 * expm1(0.5 * log_p_over_q(logp, teacher_logp, loss_mask)), clip)


@documented(REWARD_ARGS)
def total_variation_reward(
    logp: Tensor,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    clip: float | None = None,
) -> Tensor:  # (T,)
    """r = sign(p - q) / 2, the per-token reward whose policy gradient is minus that of the total variation. Detached.

        r_t = sign(teacher_logp_t - logp_t) / 2, clamped to [-clip, clip]

    The total variation is 1/2 sum_v |p_v - q_v|.

    Args:
        {logp}
        {teacher_logp}
        {loss_mask}
        clip: symmetric bound of the reward, > 0. |r| is 1/2, so a bound of 1/2 or more has no effect. None: no bound.

    Returns:
        The shape of `logp`, without gradient: 1/2, -1/2, or 0 where p = q and at untrained tokens.

    Expected gradient:
        None of its own; as the advantage of `importance_sampled_surrogate` it gives the gradient of the total variation
        of each next-token distribution, for any policy that samples. A clip below 1/2 scales it by 2 * clip.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
        >>> loss_mask = torch.tensor([True, True, True])
        >>> kdloss.total_variation_reward(logp, teacher_logp, loss_mask=loss_mask).tolist()
        [0.0, 0.5, -0.5]

    Source:
        f(u) = |u - 1| / 2 in r = -(f(u) - u f'(u)); f-divergences as rewards: arXiv 2606.01039.
    """
    return clipped_reward(0.5 * log_p_over_q(logp, teacher_logp, loss_mask).sign(), clip)
