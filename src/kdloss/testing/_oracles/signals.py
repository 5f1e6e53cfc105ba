"""Oracles for the signals of a token: sampled KL estimators, rewards, returns, advantages, importance weights.

q the student, p the teacher; `logp = log q(token)`, `teacher_logp = log p(token)`. Per-token functions take any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .types import ArrayLike, BoolArray, FloatArray, as_float, as_int, as_mask, exp, segments, times, trained


def _per_token(
    f: Callable[[float, float], float], a: ArrayLike, b: ArrayLike, names: tuple[str, str], loss_mask: ArrayLike
) -> FloatArray:
    """`f(a_t, b_t)` at the trained tokens, 0 elsewhere."""
    first = as_float(names[0], a)
    second = as_float(names[1], b, shape=first.shape)
    y = np.zeros(first.shape)
    for t in trained(as_mask("loss_mask", loss_mask, shape=first.shape)):
        y[t] = f(float(first[t]), float(second[t]))
    return y


_STUDENT_TEACHER = ("logp", "teacher_logp")


def kl_k1(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`k1 = log q - log p`.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,), nats.
    Source: Schulman, Approximating KL Divergence, 2020.
    """
    return _per_token(lambda q, p: q - p, logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def kl_k1_grad(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`d k1 / d log q = 1`, which does not depend on the teacher.

    logp, teacher_logp: (T,). loss_mask: (T,) bool. Returns (T,). Source: derived from `kl_k1`.
    """
    return _per_token(lambda q, p: 1.0, logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def kl_k2(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`k2 = ½ (log q - log p)²`.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,), nats.
    Source: Schulman, Approximating KL Divergence, 2020.
    """
    return _per_token(lambda q, p: 0.5 * (q - p) * (q - p), logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def kl_k2_grad(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`d k2 / d log q = log q - log p`.

    logp, teacher_logp: (T,). loss_mask: (T,) bool. Returns (T,). Source: derived from `kl_k2`.
    """
    return _per_token(lambda q, p: q - p, logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def kl_k3(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`k3 = p/q - 1 - log(p/q)`.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,), nats.
    Source: Schulman, Approximating KL Divergence, 2020.
    """
    return _per_token(lambda q, p: _expm1(p - q) - (p - q), logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def kl_k3_grad(logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`d k3 / d log q = 1 - p/q`, since `d(p/q) / d log q = -p/q` and `-d log(p/q) / d log q = 1`.

    logp, teacher_logp: (T,). loss_mask: (T,) bool. Returns (T,). Source: derived from `kl_k3`.
    """
    return _per_token(lambda q, p: -_expm1(p - q), logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def _expm1(x: float) -> float:
    """e^x - 1 without cancellation near 0, inf where it overflows."""
    return math.expm1(x) if x < 700 else exp(x)


def reverse_kl_reward(
    logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike, clip: float | None = None
) -> FloatArray:
    """`R = clamp(log p - log q, -clip, clip)`, detached.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. clip: nats. Returns (T,), nats.
    Source: KDRL, arXiv 2506.02208, the reward of J_RKL.
    """

    def reward(q: float, p: float) -> float:
        r = p - q
        return r if clip is None else clip if r > clip else -clip if r < -clip else r

    return _per_token(reward, logp, teacher_logp, _STUDENT_TEACHER, loss_mask)


def discounted_returns(
    rewards: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, discount: float
) -> FloatArray:
    """`G_t = r_t + discount * G_{next trained token of the same sequence}`, detached; at discount 0, `G_t = r_t`.

    rewards: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (T,), 0 at untrained tokens.
    Source: return-to-go, Sutton and Barto, Reinforcement Learning, 2nd edition, equation 3.8.
    """
    rewards = as_float("rewards", rewards)
    mask = as_mask("loss_mask", loss_mask, shape=rewards.shape)
    returns = np.zeros(rewards.shape)
    for tokens in segments(cu_seqlens, rewards.size):
        following = 0.0
        for t in reversed(tokens):
            if mask[t]:
                following = float(rewards[t]) + times(discount, following)
                returns[t] = following
    return returns


def _groups(size: int, group_size: int | None, group_ids: ArrayLike | None) -> list[list[int]]:
    """The indices of each group, from exactly one of group_size (consecutive groups) and group_ids (any int64)."""
    if (group_size is None) == (group_ids is None):
        raise ValueError("exactly one of group_size and group_ids must be given")
    if group_size is not None:
        if group_size < 1 or size % group_size:
            raise ValueError(f"group_size must divide the {size} rewards, got {group_size}")
        return [list(range(start, start + group_size)) for start in range(0, size, group_size)]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(as_int("group_ids", [] if group_ids is None else group_ids, shape=(size,))):
        members.setdefault(int(group), []).append(i)
    return list(members.values())


def group_relative_advantages(
    rewards: ArrayLike,
    *,
    group_size: int | None = None,
    group_ids: ArrayLike | None = None,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> FloatArray:
    """`A_i = (r_i - mean) / (std + eps)`, std over n - 1; `A_i = r_i - mean` unscaled; 0 if a group's max = min.

    Scaled, also 0 if `max - min <= 4 ε max |r|`, ε the resolution of float32 (of float64 for float64 rewards).
    rewards: (B,) float. group_ids: (B,) int. Returns (B,). Source: GRPO, arXiv 2402.03300; unscaled: arXiv 2503.20783.
    """
    narrow = np.asarray(rewards).dtype in (np.float16, np.float32)
    resolution = float(np.finfo(np.float32 if narrow else np.float64).eps)
    rewards = as_float("rewards", rewards)
    advantages = np.zeros(rewards.shape)
    for members in _groups(rewards.size, group_size, group_ids):
        r = [float(rewards[i]) for i in members]
        if max(r) - min(r) <= (4 * resolution * max(map(abs, r)) if scale_by_std else 0):
            continue
        mean = math.fsum(r) / len(r)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (len(r) - 1))
        for i, x in zip(members, r, strict=True):
            advantages[i] = (x - mean) / (std + eps) if scale_by_std else x - mean
    return advantages


def leave_one_out_advantages(
    rewards: ArrayLike, *, group_size: int | None = None, group_ids: ArrayLike | None = None
) -> FloatArray:
    """`A_i = r_i - mean of the other rewards of its group`; 0 in a group of one, and if a group's max = min.

    rewards: (B,) float. group_ids: (B,) int. Returns (B,). Source: RLOO, arXiv 2402.14740.
    """
    rewards = as_float("rewards", rewards)
    advantages = np.zeros(rewards.shape)
    for members in _groups(rewards.size, group_size, group_ids):
        r = [float(rewards[i]) for i in members]
        if max(r) == min(r):
            continue
        for k, i in enumerate(members):
            others = r[:k] + r[k + 1 :]
            advantages[i] = r[k] - math.fsum(others) / len(others)
    return advantages


def fold_kd_reward(
    advantages: ArrayLike, kd_reward: ArrayLike, *, rl_loss_weight: float = 1.0, distill_loss_weight: ArrayLike
) -> FloatArray:
    """`A'_t = rl_loss_weight * A_t + distill_loss_weight * R_t`, detached; 0 times inf or NaN counts as 0.

    advantages, kd_reward: (T,) float. distill_loss_weight: float or (T,). Returns (T,).
    Source: KDRL, arXiv 2506.02208, equation 8, for a trainer whose loss is linear in the advantage.
    """
    advantages = as_float("advantages", advantages)
    rewards = as_float("kd_reward", kd_reward, shape=advantages.shape)
    beta = np.broadcast_to(as_float("distill_loss_weight", distill_loss_weight), advantages.shape)
    folded = np.zeros(advantages.shape)
    for t in np.ndindex(advantages.shape):
        folded[t] = times(rl_loss_weight, float(advantages[t])) + times(float(beta[t]), float(rewards[t]))
    return folded


def _log_ratios(prox_logp: ArrayLike, old_logp: ArrayLike, loss_mask: ArrayLike) -> tuple[FloatArray, BoolArray]:
    """`log prox - log old` at the trained tokens, 0 elsewhere; and the mask."""
    log_ratio = _per_token(lambda x, y: x - y, prox_logp, old_logp, ("prox_logp", "old_logp"), loss_mask)
    return log_ratio, as_mask("loss_mask", loss_mask, shape=log_ratio.shape)


def truncated_importance_weights(
    prox_logp: ArrayLike, old_logp: ArrayLike, *, loss_mask: ArrayLike, max_weight: float = 2.0
) -> FloatArray:
    """`w = min(prox / old, max_weight)`, detached; the ratio is 1 at untrained tokens.

    prox_logp, old_logp: (T,) float. loss_mask: (T,) bool. Returns (T,).
    Source: TIS: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025.
    """
    log_ratio, _ = _log_ratios(prox_logp, old_logp, loss_mask)
    weights = np.zeros(log_ratio.shape)
    for t in np.ndindex(log_ratio.shape):
        ratio = exp(float(log_ratio[t]))
        weights[t] = max_weight if ratio > max_weight else ratio
    return weights


def _statistic(statistic: str, log_ratio: float) -> float:
    """`k2 = ½ log² ρ` or `k3 = ρ - 1 - log ρ`."""
    return log_ratio * log_ratio / 2 if statistic == "k2" else _expm1(log_ratio) - log_ratio


def masked_importance_weights(
    prox_logp: ArrayLike,
    old_logp: ArrayLike,
    *,
    loss_mask: ArrayLike,
    min_weight: float = 0.5,
    max_weight: float = 5.0,
    statistic: str = "ratio",
    max_statistic: float | None = None,
) -> FloatArray:
    """`w = prox / old` if `min_weight <= prox / old <= max_weight`, else 0; detached. Untrained tokens have ratio 1.

    With statistic "k2" or "k3": if that is at most max_statistic, else 0.
    prox_logp, old_logp: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: IcePop, arXiv 2510.18855.
    """
    log_ratio, _ = _log_ratios(prox_logp, old_logp, loss_mask)
    weights = np.zeros(log_ratio.shape)
    for t in np.ndindex(log_ratio.shape):
        ratio = exp(float(log_ratio[t]))
        if max_statistic is None:
            kept = min_weight <= ratio <= max_weight
        else:
            kept = _statistic(statistic, float(log_ratio[t])) <= max_statistic
        weights[t] = ratio if kept else 0.0
    return weights


def sequence_importance_weights(
    prox_logp: ArrayLike,
    old_logp: ArrayLike,
    *,
    loss_mask: ArrayLike,
    cu_seqlens: ArrayLike,
    aggregate: str,
    action: str,
    min_weight: float = 0.0,
    max_weight: float,
    statistic: str = "ratio",
    max_statistic: float | None = None,
) -> FloatArray:
    """`W_b = exp(sum or mean over trained t of log prox - log old)`, then clamped, or 0 outside the bounds; detached.

    With statistic "k2" or "k3": 0 where its sum or mean exceeds max_statistic.
    prox_logp, old_logp: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. aggregate: "sum" | "mean".
    action: "truncate" | "mask". Returns (T,): W_b at every token of sequence b, where a sum over no tokens is 0.
    Source: MIS: Liu et al., When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
    Mismatch, 2025.
    """
    if aggregate not in ("sum", "mean"):
        raise ValueError(f'aggregate must be "sum" or "mean", got {aggregate!r}')
    if action not in ("truncate", "mask"):
        raise ValueError(f'action must be "truncate" or "mask", got {action!r}')
    log_ratio, mask = _log_ratios(prox_logp, old_logp, loss_mask)
    weights = np.zeros(log_ratio.shape)
    for tokens in segments(cu_seqlens, log_ratio.size):
        values = [float(log_ratio[t]) for t in tokens if mask[t]]
        count = len(values) if aggregate == "mean" and values else 1
        weight = exp(sum(values) / count)
        if max_statistic is not None:
            if sum(_statistic(statistic, x) for x in values) / count > max_statistic:
                weight = 0.0
        elif action == "truncate":
            weight = max_weight if weight > max_weight else min_weight if weight < min_weight else weight
        elif not min_weight <= weight <= max_weight and not math.isnan(weight):
            weight = 0.0
        for t in tokens:
            weights[t] = weight
    return weights
