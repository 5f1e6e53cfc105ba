"""Joining a reward and a teacher on the same tokens, and the same response under two prompts.

Gates and weights here depend on the sampled token or on the outcome, so the expected gradient is no longer that of the
reverse KL or of the expected reward, by design; each docstring says what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout, like, poison, sum_of_tokens

from .estimators import discounted_returns
from .texts import JOINING_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@documented(JOINING_ARGS)
def gate_kd_reward(
    kd_reward: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
) -> Tensor:  # (T,)
    """The teacher's reward where its sign is that of the advantage, else 0. Detached.

        out_t = s_t max(0, s_t r_t),   s_t = sign(A_t)

    So the teacher raises only tokens of responses that succeeded, and lowers only tokens of those that failed.

    Args:
        {kd_reward}
        advantages: the shape of `kd_reward`: only their signs are used, so a verifier's +-1 may stand for them. 0 gives
            0.
        {loss_mask}

    Returns:
        The shape of `kd_reward`, without gradient, 0 at untrained tokens; float32 for half-precision inputs.

    Expected gradient:
        None of its own. As the advantage of `importance_sampled_surrogate`, which without the gate has ∇KL(q || p), it
        gives -E[ρ gate(r) ∇log q]: the gate depends on the token and on the outcome, so it is biased by design towards
        the terms of the reverse KL on which teacher and outcome agree. At p = q it is 0.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> kd_reward, loss_mask = torch.tensor([0.5, -2.0, 0.5, -2.0]), torch.tensor([True, True, True, True])
        >>> advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
        >>> kdloss.gate_kd_reward(kd_reward, advantages, loss_mask=loss_mask).tolist()
        [0.5, 0.0, 0.0, -2.0]

    Source:
        OPDVR, arXiv 2608.24696.
    """
    reward, advantages = _inputs("kd_reward", kd_reward, loss_mask, advantages=advantages)
    sign = advantages.sign()
    against = (sign == 0) | (sign * reward.sign() < 0)  # False for a NaN, which stays
    return torch.where(against | ~loss_mask, reward.new_zeros(()), reward)


@documented(JOINING_ARGS)
def modulate_advantages(
    advantages: Tensor,  # (T,)
    kd_reward: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    mix: float,
    clip: float,
) -> Tensor:  # (T,)
    """RLSD: advantages whose size, and never their sign, follows the teacher. Detached.

        out_t = A_t ((1 - mix) + mix clip(exp(sign(A_t) r_t), 1 - clip, 1 + clip))

    r_t = log p_t - log q_t: of a response that succeeded, tokens that the teacher favours count more; of one that
    failed, tokens that it favours count less.

    Args:
        advantages: (T,) or any shape: one advantage per token. Detached.
        kd_reward: the shape of `advantages`: r, such as `reverse_kl_reward`, nats. Detached.
        {loss_mask}
        mix: share of the teacher's factor, 0 .. 1. 0 leaves the advantages as they are.
        clip: bound of the distance of the factor from 1, >= 0.

    Returns:
        The shape of `advantages`, without gradient, 0 at untrained tokens; float32 for half-precision inputs.

    Expected gradient:
        None of its own. In a surrogate it gives the policy gradient with every token weighted by its factor, which
        depends on the sampled token: biased by design, away from the gradient of the expected reward. It is not that of
        a divergence to the teacher either: where all advantages are 0, so is it.

    Raises:
        {TypeError}
        ValueError: shapes or devices differ, `mix` is outside 0 .. 1, or `clip` is negative.

    Example:
        >>> import torch, kdloss
        >>> advantages, kd_reward = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([9.0, 9.0, 0.0])
        >>> loss_mask = torch.ones(3, dtype=torch.bool)
        >>> modulated = kdloss.modulate_advantages(advantages, kd_reward, loss_mask=loss_mask, mix=0.5, clip=0.5)
        >>> modulated.tolist()  # factors 5/4, 3/4 and 1
        [2.5, -1.5, 2.0]

    Source:
        RLSD, arXiv 2604.03128.
    """
    _checks.unit_interval(mix=mix)
    _checks.non_negative(clip=clip)
    advantages, reward = _inputs("advantages", advantages, loss_mask, kd_reward=kd_reward)
    zero = advantages.new_zeros(())
    left_out = ~loss_mask | (advantages == 0)  # 0 times an infinite reward would be NaN
    factor = torch.where(left_out, zero, advantages.sign() * reward).exp().clamp(1 - clip, 1 + clip)
    return torch.where(left_out, zero, advantages * ((1 - mix) + mix * factor))


@documented(JOINING_ARGS)
def prefix_weights(
    kd_reward: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    gain: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,)
    """IW-OPD: weights that fall from 1 + gain to 1 as the disagreement of a response is spent. Detached.

        w_t = 1 + gain (1 - sum over j < t of |r_j| / sum over j of |r_j|),   over trained tokens of the sequence

    Tokens before a response has left the teacher count more than those that follow from where it went.

    Args:
        kd_reward: (T,) the teacher's reward per token, such as `reverse_kl_reward`, nats. Detached.
        {loss_mask}
        {cu_seqlens}
        gain: of the first tokens, >= 0.
        {group}
            Parts follow one another in rank order.

    Returns:
        (T,) without gradient, in 1 .. 1 + gain; 0 at untrained tokens; float32 for half-precision inputs. 1 + gain
        everywhere in a sequence whose rewards are all 0.

    Expected gradient:
        None of its own. As `weights` of a surrogate it weighs the terms of a response. The weight of a token depends on
        its own reward and on later ones, through the sum, so the gradient is biased by design: it is not that of a
        weighted sum of the KLs at the prefixes.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, `cu_seqlens` does not fit, or `gain` is negative. With `group` also where its backend
            cannot carry the tensors or, on the CPU, ranks differ in B or `gain`; on the CPU an error on one rank is
            raised on all.

    Example:
        >>> import torch, kdloss
        >>> kd_reward, cu_seqlens = torch.tensor([1.0, -2.0, 0.0, 1.0, 0.0]), torch.tensor([0, 4, 5])
        >>> loss_mask = torch.ones(5, dtype=torch.bool)
        >>> kdloss.prefix_weights(kd_reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, gain=2.0).tolist()
        [3.0, 2.5, 1.5, 1.5, 3.0]

    Source:
        IW-OPD, arXiv 2606.22600.
    """
    with in_step(group, kd_reward, agreed := {}):
        _checks.non_negative(gain=gain)
        _checks.per_token("kd_reward", kd_reward, loss_mask=loss_mask)
        _checks.packed_stream("kd_reward", kd_reward, cu_seqlens)
        layout = Layout(cu_seqlens, kd_reward.shape[0])
        agreed.update({SEQUENCES: layout.size, "gain": gain})
    size = kd_reward.detach().to(_checks.promoted_dtype(kd_reward)).abs()
    # what is left from t on, and not 1 minus what is spent, which would cancel
    left = discounted_returns(size, loss_mask=loss_mask, cu_seqlens=cu_seqlens, discount=1.0, group=group)
    total = sum_of_tokens(size, loss_mask, layout, group).index_select(0, layout.ids)
    share = torch.where(left == total, left.new_ones(()), left / total)  # also for 0 / 0 and inf / inf
    return torch.where(loss_mask | ~layout.fits, 1 + gain * share, left.new_zeros(()))


def align_responses(
    x: Tensor,  # (T, ...)
    *,
    from_mask: Tensor,  # (T,) bool
    from_cu_seqlens: Tensor,  # (B + 1,)
    to_mask: Tensor,  # (T',) bool
    to_cu_seqlens: Tensor,  # (B + 1,)
    fill: float,
) -> Tensor:  # (T', ...)
    """Values of responses under one prompt, moved to the places of the same responses under another prompt.

        out[the i-th response position of sequence b in the second stream] = x[the i-th one in the first]

    For self-distillation: the teacher is the same model with a prompt that tells it more (the solution, feedback), so
    its scores lie at other positions of a stream of another length.

    Args:
        x: (T, ...) of any dtype: values per token of the first stream, such as the teacher's log-probs or logits.
        from_mask: (T,) bool, True at the response positions of the first stream. At prediction positions
            `response_mask` makes it.
        from_cu_seqlens: (B + 1,) cumulative lengths of the first stream, int32 or int64, from 0 to T.
        to_mask: (T',) bool, True at the response positions of the second stream: as many in each sequence.
        to_cu_seqlens: (B + 1,) cumulative lengths of the second stream, from 0 to T'. Sequences are in the same order.
        fill: the value outside the responses.

    Returns:
        (T', ...) of the dtype of `x`, differentiable in it. Values outside the responses, NaN included, reach neither
        the result nor a gradient.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices differ, a `cu_seqlens` does not fit, B differs, or (on the CPU) a sequence does
            not have as many response positions in both masks; elsewhere the result is then NaN, or 0 for integers.

    Example:
        >>> import torch, kdloss
        >>> teacher_logp = torch.tensor([9.0, 9.0, 9.0, -1.0, -2.0, 9.0])  # a prompt of four tokens, a response of two
        >>> from_mask = torch.tensor([False, False, False, True, True, False])
        >>> to_mask = torch.tensor([True, True, False])  # a prompt of one token, the same response
        >>> cu = {"from_cu_seqlens": torch.tensor([0, 6]), "to_cu_seqlens": torch.tensor([0, 3])}
        >>> kdloss.align_responses(teacher_logp, from_mask=from_mask, to_mask=to_mask, fill=0.0, **cu).tolist()
        [-1.0, -2.0, 0.0]

    Source:
        OPSD, arXiv 2601.18734; SDFT, arXiv 2601.19897; SDPO, arXiv 2601.20802.
    """
    _checks.tensors(x=x, from_mask=from_mask, to_mask=to_mask)
    _checks.boolean(from_mask=from_mask, to_mask=to_mask)
    if x.ndim < 1:
        raise ValueError(f"x must be (T, ...), got {tuple(x.shape)}")
    if from_mask.shape != x.shape[:1]:
        raise ValueError(f"from_mask must match the tokens of x {tuple(x.shape[:1])}, got {tuple(from_mask.shape)}")
    if to_mask.ndim != 1:
        raise ValueError(f"to_mask must be (T',), got {tuple(to_mask.shape)}")
    others = {"from_cu_seqlens": from_cu_seqlens, "to_cu_seqlens": to_cu_seqlens}
    _checks.tensors(**others)
    _checks.same_device("x", x, from_mask=from_mask, to_mask=to_mask, **others)
    first = Layout(from_cu_seqlens, from_mask.shape[0], "from_cu_seqlens")
    second = Layout(to_cu_seqlens, to_mask.shape[0], "to_cu_seqlens")
    if first.size != second.size:
        raise ValueError(f"to_cu_seqlens must have the {first.size} sequences of from_cu_seqlens, got {second.size}")
    counts = [
        mask.new_zeros(layout.size, dtype=torch.int64).index_add(0, layout.ids, mask.to(torch.int64))
        for mask, layout in ((from_mask, first), (to_mask, second))
    ]
    equal = counts[0] == counts[1]
    if _checks.value_checks_allowed(x) and not equal.all():
        b = int((~equal).nonzero()[0])
        raise ValueError(
            f"to_mask must have as many response positions as from_mask in every sequence, got {int(counts[1][b])} "
            f"against {int(counts[0][b])} in sequence {b}"
        )
    fits = first.fits & second.fits & equal.all()
    if x.shape[0] == 0:  # nothing to select from; the sum of an empty tensor is an attached 0
        return poison(x.new_full((to_mask.shape[0], *x.shape[1:]), fill) + x.sum(0, dtype=x.dtype), fits)
    # responses are in the same order, so the k-th response position of one stream is the k-th of the other
    number = to_mask.cumsum(0)
    index = torch.searchsorted(from_mask.cumsum(0), number).clamp(max=x.shape[0] - 1)
    moved = x.index_select(0, index)
    chosen = like(_checks.savable(to_mask), moved)
    return poison(torch.where(chosen, moved, moved.new_full((), fill)), fits)


def _inputs(name: str, x: Tensor, loss_mask: Tensor, **other: Tensor) -> tuple[Tensor, Tensor]:
    """Both per-token tensors, checked, detached and in float32 or wider."""
    _checks.tensors(**other)
    _checks.per_token(name, x, loss_mask=loss_mask, **other)
    (y,) = other.values()
    dtype = _checks.promoted_dtype(x, y)
    return x.detach().to(dtype), y.detach().to(dtype)
