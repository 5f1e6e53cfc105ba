"""Advantages from rewards of whole responses, group by group, and the fold of a distillation reward into advantages.

A group is the set of responses to one prompt. It is given by `group_size` (consecutive responses) or by `group_ids`
(integers in any order; equal ids are one group). Everything here is detached: advantages are constants of the loss.
"""

from __future__ import annotations

import torch
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
        rewards: (B,) one reward per response.
        group_size: G, the number of consecutive responses to one prompt; divides B.
        group_ids: (B,) integers, equal within a group, in any order. Give either `group_size` or `group_ids`.
        scale_by_std: False leaves A_i = r_i - mean (Dr. GRPO).
        eps: >= 0, added to the sample standard deviation (n - 1).

    Returns:
        (B,) detached. Exactly 0 in a group of one, and in a group whose rewards are all equal. With `scale_by_std`,
        rewards that differ by rounding only are equal: maximum - minimum <= 4 * eps * max |r|, where eps is that of
        float32, and of float64 for float64 rewards. So half-precision rewards are equal only where their bits are.

    Expected gradient:
        r_i - mean has (G - 1)/G of the policy gradient (the baseline contains the response itself). Dividing by the
        std reweights prompts, which is a different objective.

    Raises:
        TypeError: `rewards` is not floating-point, `group_ids` is not integer, or `scale_by_std` is not bool.
        ValueError: shapes disagree, or both or neither of `group_size` and `group_ids` are given.

    Example:
        >>> import torch, kdloss
        >>> rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])  # two responses to each of two prompts
        >>> kdloss.group_relative_advantages(rewards, group_size=2, scale_by_std=False).tolist()
        [0.5, -0.5, 0.0, 0.0]
        >>> [round(x, 4) for x in kdloss.group_relative_advantages(rewards, group_size=2).tolist()]
        [0.7071, -0.7071, 0.0, 0.0]

    Source:
        GRPO (arXiv 2402.03300), section 4.1.2; without the std: Dr. GRPO (arXiv 2503.20783).
    """
    _checks.non_negative(eps=eps)
    _checks.flag(scale_by_std=scale_by_std)
    groups = _Groups(rewards, group_size, group_ids)
    advantages = groups.centred
    # tested on the rewards, not on the std: a rounded mean can leave 1e-9 / 1e-9
    spread = groups.spread
    if scale_by_std:
        variance = groups.sum(advantages.square()) / groups.others
        advantages = advantages / (variance.sqrt() + eps)
        # one ulp between rewards of 10 is 1e-6, which the division would turn into an advantage of 0.6
        # (an infinite reward is a fault, which shows as NaN: inf - inf is not <= 0)
        spread = spread.sub(groups.largest, alpha=4 * torch.finfo(groups.dtype).eps)
    return groups.result(advantages, spread <= 0)


def leave_one_out_advantages(
    rewards: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64
) -> Tensor:  # (B,)
    """RLOO's advantage: A_i = r_i - mean of the other responses of the group.

    Args:
        rewards: (B,) one reward per response.
        group_size: G, the number of consecutive responses to one prompt; divides B.
        group_ids: (B,) integers, equal within a group, in any order. Give either `group_size` or `group_ids`.

    Returns:
        (B,) detached. Exactly 0 in a group of one, and in a group whose rewards are all equal.

    Expected gradient:
        Exactly that of the expected reward: the baseline of a response does not depend on that response.

    Raises:
        TypeError: `rewards` is not floating-point, or `group_ids` is not integer.
        ValueError: shapes disagree, or both or neither of `group_size` and `group_ids` are given.

    Example:
        >>> import torch, kdloss
        >>> rewards = torch.tensor([3.0, 0.0, 0.0])
        >>> kdloss.leave_one_out_advantages(rewards, group_size=3).tolist()
        [3.0, -1.5, -1.5]

    Source:
        RLOO (arXiv 2402.14740).
    """
    groups = _Groups(rewards, group_size, group_ids)
    # r_i - (S - r_i)/(n - 1) = (r_i - S/n) * n/(n - 1)
    advantages = groups.centred * groups.size / groups.others
    return groups.result(advantages, groups.spread <= 0)


def fold_kd_reward(
    advantages: Tensor,  # (T,)
    kd_reward: Tensor,  # (T,)
    *,
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor,
) -> Tensor:  # (T,)
    """rl_loss_weight * A + distill_loss_weight * R, for trainers whose loss takes advantages and nothing else.

    At ratio 1 (one update per rollout) a policy-gradient loss on the folded advantages has the gradient of `kdrl_loss`.
    Once the policy has moved, the trainer's clip acts on both terms, whereas `kdrl_loss` clips the RL term only.

    Compute `kd_reward` from today's log q and fold again at every update: q = p is then a fixed point, and this is what
    `kdrl_loss` does. A reward that is folded once per rollout is frozen at log p - log q_0, with q_0 the student that
    was scored. Descent then raises E_q[log p - log q_0], which is not minus the reverse KL once q has moved: its
    gradient is not 0 at q = p, and q goes on towards the token of the largest p / q_0. The more updates a rollout
    serves, the further q overshoots, and it may collapse. Importance ratios do not change this.

    Args:
        advantages: (T,) or any shape, one advantage per token.
        kd_reward: the shape of `advantages`: `reverse_kl_reward` of today's log-probs, or its `discounted_returns`; 0
            at untrained tokens.
        rl_loss_weight: Python number; 0 skips `advantages`, NaN included.
        distill_loss_weight: Python number (0 skips `kd_reward`), or a tensor, 0-dim or the shape of `advantages`.

    Returns:
        The shape of `advantages`, detached.

    Expected gradient:
        None of its own. As advantages of a policy-gradient loss at ratio 1 it gives the gradient of `kdrl_loss`:
        rl_loss_weight * (minus the policy gradient of E[A]) + distill_loss_weight * grad KL(q || p). Away from ratio 1
        the second part needs a reward of today's log-probs, and a loss whose ratio is not clipped.

    Raises:
        TypeError: a tensor is not floating-point, or a weight is not a number.
        ValueError: shapes or devices differ, or a weight is not finite.

    Example:
        >>> import torch, kdloss
        >>> advantages, kd_reward = torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 4.0])
        >>> kdloss.fold_kd_reward(advantages, kd_reward, distill_loss_weight=0.25).tolist()
        [0.5, 0.0]
    """
    _checks.tensors(advantages=advantages, kd_reward=kd_reward)
    _checks.floating(advantages=advantages, kd_reward=kd_reward)
    _checks.same_shape("advantages", advantages, kd_reward=kd_reward)
    _checks.finite(rl_loss_weight=rl_loss_weight)
    _checks.weight("advantages", advantages, distill_loss_weight=distill_loss_weight)
    dtype = _checks.promoted_dtype(advantages, kd_reward)
    parts = []
    if rl_loss_weight != 0:
        parts.append(rl_loss_weight * advantages.detach().to(dtype))
    if isinstance(distill_loss_weight, Tensor):
        weight = distill_loss_weight.detach().to(dtype)
        parts.append(torch.where(weight == 0, weight.new_zeros(()), weight * kd_reward.detach().to(dtype)))
    elif distill_loss_weight != 0:
        parts.append(distill_loss_weight * kd_reward.detach().to(dtype))
    if not parts:
        return torch.zeros_like(advantages, dtype=dtype)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _Groups:
    """Statistics of the group of each reward, without a device sync.

    Rewards of groups of one size are a (P, G) tensor, P prompts. With ids at most B groups exist, so B buckets are a
    static shape.
    """

    def __init__(self, rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
        _checks.tensors(rewards=rewards)
        _checks.floating(rewards=rewards)
        if rewards.ndim != 1:
            raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
        _checks.exactly_one(group_size=group_size, group_ids=group_ids)
        self.dtype = _checks.promoted_dtype(rewards)
        rewards = rewards.detach().to(_checks.accumulator_dtype(rewards))
        self._bucket: Tensor | None = None
        self.size: int | Tensor
        self.others: int | Tensor  # the size less 1, at least 1
        if group_ids is None:
            assert group_size is not None
            _checks.integer(group_size=group_size)
            if group_size < 1 or len(rewards) % group_size != 0:
                raise ValueError(f"group_size must be >= 1 and divide the {len(rewards)} rewards, got {group_size}")
            self.size = size = group_size
            self.others = max(size - 1, 1)
            rewards = rewards.reshape(-1, size)
            lowest, highest = rewards.aminmax(dim=1, keepdim=True)
            self.largest = torch.linalg.vector_norm(rewards, torch.inf, dim=1, keepdim=True)  # max |r|
        else:
            _checks.integral(group_ids=group_ids)
            _checks.same_shape("rewards", rewards, group_ids=group_ids)
            ordered = group_ids.sort().values
            # a group is numbered by the place of its first member
            self._bucket = torch.searchsorted(ordered, group_ids)
            self.size = (torch.searchsorted(ordered, group_ids, right=True) - self._bucket).to(rewards.dtype)
            self.others = (self.size - 1).clamp(min=1)
            both = torch.stack([rewards, -rewards])
            index = self._bucket.expand_as(both)
            ends = torch.zeros_like(both).scatter_reduce(1, index, both, "amax", include_self=False).gather(1, index)
            highest, lowest = ends[0], -ends[1]
            self.largest = ends.amax(0)

        self.spread = highest - lowest  # max r - min r
        # from the middle, because a mean has a rounding error of the size of what is summed
        rewards = rewards - torch.lerp(lowest, highest, 0.5)
        self.centred = rewards - self.sum(rewards) / self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the group of each entry."""
        if self._bucket is None:
            return x.sum(1, keepdim=True)
        return torch.zeros_like(x).index_add(0, self._bucket, x).index_select(0, self._bucket)

    def result(self, advantages: Tensor, equal: Tensor) -> Tensor:
        """(B,) advantages, 0 in groups of equal rewards."""
        return torch.where(equal, advantages.new_zeros(()), advantages).flatten().to(self.dtype)
