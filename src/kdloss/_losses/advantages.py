"""From rewards of whole responses to advantages, group by group, and the fold of a distillation reward into them.

A group is the set of responses to one prompt. It is given by `group_size` (consecutive responses) or by `group_ids`
(any int64, in any order; equal ids are one group). Everything here is detached: advantages are constants of the loss.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from kdloss import _checks


def group_relative_advantages(
    rewards: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:  # (B,)
    """GRPO's advantage: A_i = (r_i - mean of the group) / (std of the group + eps).

    Args:
        rewards: (B,) one reward a response.
        group_size: G, consecutive responses of one prompt; divides B.
        group_ids: (B,) integers, equal within a group, in any order. Exactly one of the two is given.
        scale_by_std: False leaves A_i = r_i - mean (Dr. GRPO).
        eps: >= 0, added to the sample standard deviation (n - 1).

    Returns:
        (B,) detached. Exactly 0 where all rewards of a group are equal (its maximum is its minimum) and in a group of
        one.

    Expected gradient:
        r_i - mean has (G - 1)/G of the policy gradient (the baseline contains the response itself); dividing by the
        std reweights prompts, and is a different objective.

    Raises:
        TypeError: `rewards` is not floating-point, `group_ids` not integer or `scale_by_std` not bool.
        ValueError: shapes disagree, both or neither of `group_size` and `group_ids` are given.

    Source:
        GRPO (arXiv 2402.03300), section 4.1.2; without the std: Dr. GRPO (arXiv 2503.20783).
    """
    _checks.non_negative(eps=eps)
    _checks.flag(scale_by_std=scale_by_std)
    groups = _Groups(rewards, group_size, group_ids)
    centred = groups.centred
    if scale_by_std:
        variance = groups.sum(centred.square()) / (groups.size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    # not a test on the std: rounding of the mean leaves 1e-9 over 1e-9
    return torch.where(groups.all_equal, 0, centred).to(groups.dtype)


def leave_one_out_advantages(
    rewards: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64
) -> Tensor:  # (B,)
    """RLOO's advantage: A_i = r_i - mean of the other responses of the group.

    Args, shapes and errors as in `group_relative_advantages`.

    Returns:
        (B,) detached; exactly 0 where all rewards of a group are equal, and in a group of one.

    Expected gradient:
        That of the expected reward, exactly: the baseline does not depend on the response that it is taken from.

    Source:
        RLOO (arXiv 2402.14740).
    """
    groups = _Groups(rewards, group_size, group_ids)
    # r_i - (S - r_i)/(n - 1) = (r_i - S/n) * n/(n - 1)
    advantages = groups.centred * groups.size / (groups.size - 1).clamp(min=1)
    return torch.where(groups.all_equal, 0, advantages).to(groups.dtype)


def fold_kd_reward(
    advantages: Tensor,  # (T,)
    kd_reward: Tensor,  # (T,)
    *,
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor,
) -> Tensor:  # (T,)
    """rl_loss_weight * A + distill_loss_weight * R, for trainers whose loss takes advantages and nothing else.

    At ratio 1 (one update a rollout) a policy-gradient loss on the folded advantages has the gradient of `kdrl_loss`.
    Once the policy has moved, the trainer's clip acts on both terms, where `kdrl_loss` clips the RL term only.

    Args:
        advantages: per-token advantages, any shape.
        kd_reward: the shape of `advantages`: `reverse_kl_reward`, or its `discounted_returns`; 0 where untrained.
        rl_loss_weight: Python number; 0 skips `advantages`, whatever they hold.
        distill_loss_weight: Python number (0 skips `kd_reward`), or a tensor of the shape of `advantages`, or 0-dim.

    Returns:
        The shape of `advantages`, detached.

    Raises:
        TypeError: a tensor is not floating-point, or a weight is not a number.
        ValueError: shapes or devices differ, or a weight is not finite.
    """
    _checks.tensors(advantages=advantages, kd_reward=kd_reward)
    _checks.floating(advantages=advantages, kd_reward=kd_reward)
    _checks.same_shape("advantages", advantages, kd_reward=kd_reward)
    _checks.finite(rl_loss_weight=rl_loss_weight)
    _checks.weight("advantages", advantages, distill_loss_weight=distill_loss_weight)
    dtype = _checks.promoted_dtype(advantages, kd_reward)
    folded = torch.zeros_like(advantages, dtype=dtype)
    if rl_loss_weight != 0:
        folded = folded + rl_loss_weight * advantages.detach().to(dtype)
    if isinstance(distill_loss_weight, Tensor):
        weight = distill_loss_weight.detach().to(dtype)
        return folded + torch.where(weight == 0, 0, weight * kd_reward.detach().to(dtype))
    return folded + distill_loss_weight * kd_reward.detach().to(dtype) if distill_loss_weight != 0 else folded


class _Groups:
    """Group sums without a device sync: at most B groups exist, so B buckets are a static shape."""

    def __init__(self, rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
        _checks.tensors(rewards=rewards)
        _checks.floating(rewards=rewards)
        if rewards.ndim != 1:
            raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
        if (group_size is None) == (group_ids is None):
            given = "neither" if group_size is None else "both"
            raise ValueError(f"exactly one of group_size and group_ids must be given, got {given}")
        self.dtype = _checks.promoted_dtype(rewards)
        rewards = rewards.detach().to(_checks.accumulator_dtype(rewards))

        # `order` brings the members of a group side by side; `bucket` numbers the groups in that order
        if group_ids is None:
            order = torch.arange(rewards.shape[0], device=rewards.device)
            bucket = _consecutive(order, group_size)
        else:
            _checks.integral(group_ids=group_ids)
            _checks.same_shape("rewards", rewards, group_ids=group_ids)
            ordered, order = torch.sort(group_ids, stable=True)
            bucket = torch.cat([ordered.new_zeros(ordered[:1].shape), ordered.diff().ne(0).cumsum(0)])
        self._bucket = torch.empty_like(order).index_copy(0, order, bucket)

        self.size = self.sum(torch.ones_like(rewards))
        centred = rewards - self.sum(rewards) / self.size
        # once more: the mean is rounded to the size of the rewards, which shows where they lie close together
        self.centred = centred - self.sum(centred) / self.size
        neighbour_differs = bucket.diff().eq(0) & rewards[order].diff().ne(0)
        differs = torch.cat([torch.zeros_like(rewards[:1]), neighbour_differs.to(rewards.dtype)])
        self.all_equal = self.sum(torch.empty_like(rewards).index_copy(0, order, differs)) == 0

    def sum(self, x: Tensor) -> Tensor:
        """(B,) -> (B,): the sum over the group of each entry."""
        return torch.zeros_like(x).index_add(0, self._bucket, x)[self._bucket]


def _consecutive(index: Tensor, group_size: int | None) -> Tensor:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size < 1 or index.shape[0] % group_size != 0:
        raise ValueError(f"group_size must be >= 1 and divide the {index.shape[0]} rewards, got {group_size}")
    prompts = torch.arange(index.shape[0] // group_size, device=index.device)
    return repeat(prompts, "prompt -> (prompt g)", g=group_size)
