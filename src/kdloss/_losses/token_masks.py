"""Which tokens to train on: boolean masks for `loss_mask` and `kd_mask`, or, as floats, for `weights`.

A mask in `loss_mask` also shrinks a local denominator; `kd_mask` and `weights` leave it as it is. Every mask here
depends on the sampled tokens, so the expected gradient of a loss that takes it is biased by design: it is that of the
loss with the dropped tokens' terms left out.

Selections by rank ("the top fifth") compare with a threshold, the k-th largest value. It is found digit by digit
(`selection.py`), exactly, also where ranks hold parts of the batch or of the sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout, mean_of_tokens, trained_tokens
from kdloss._packing.parts import sum_of_parts

from .estimators import masked_log_ratio
from .selection import kth_largest
from .texts import MASK_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Measure = Literal["tv", "kl"]
_MEASURES = get_args(Measure)

# of a response's entropies and divergences, clipped before they are scaled to 0 .. 1 (TIP)
_CLIPPED = 0.02


@documented(MASK_ARGS)
def trust_region_mask(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    max_divergence: float,
    measure: Measure = "tv",
) -> Tensor:  # (T,) bool
    """DPPO's mask: False where the student has left the trust region and the update would push it further away.

        keep_t = not (D_t > max_divergence and A_t log(q_t / μ_t) > 0)
        D_t = |q_t - μ_t| ("tv"),  or μ_t log(μ_t / q_t) + (1 - μ_t) log((1 - μ_t) / (1 - q_t)) ("kl")

    q_t and μ_t are the probabilities of the sampled token under the student and under the policy that sampled it: D is
    the divergence of "this token or another one", at most that of the whole distributions. A ratio says nothing of
    rare tokens, whose probability may double without a change of the policy; D does.

    Args:
        {logp}
        {old_logp}
        {advantages}
        {loss_mask}
        max_divergence: the bound of D, >= 0: a probability for "tv", nats for "kl".
        measure: "tv" or "kl".

    Returns:
        The shape of `logp`, bool: the trained tokens that are kept. A token whose log-prob is NaN is kept, so that the
        loss shows it.

    Expected gradient:
        None of its own. As `loss_mask` or `weights` of a surrogate it leaves out the terms of the dropped tokens, which
        biases the policy gradient by design; on-policy D is 0 and nothing is dropped.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, `max_divergence` is negative, or `measure` is neither of the two.

    Example:
        >>> import torch, kdloss
        >>> logp, old_logp = torch.tensor([0.9, 0.9, 0.02]).log(), torch.tensor([0.5, 0.5, 0.01]).log()
        >>> advantages, loss_mask = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([True, True, True])
        >>> kept = kdloss.trust_region_mask(logp, old_logp, advantages, loss_mask=loss_mask, max_divergence=0.2)
        >>> kept.tolist()
        [False, True, True]

    Source:
        DPPO, arXiv 2602.04879, with the binary divergences of the sampled token.
    """
    _checks.one_of("measure", measure, _MEASURES)
    _checks.non_negative(max_divergence=max_divergence)
    _checks.tensors(advantages=advantages)
    _checks.per_token("logp", logp, loss_mask=loss_mask, advantages=advantages)
    log_ratio = masked_log_ratio("logp", logp, loss_mask, old_logp=old_logp).detach()
    zero = log_ratio.new_zeros(())
    # log μ is 0 at untrained tokens, where the ratio is 1
    log_q = torch.where(loss_mask, logp.detach().to(log_ratio.dtype), zero)
    log_mu = log_q if old_logp is None else torch.where(loss_mask, old_logp.detach().to(log_ratio.dtype), zero)
    q, mu = log_q.exp(), log_mu.exp()
    if measure == "tv":
        divergence = (q - mu).abs()
    else:
        # 1 - x from its log, with all digits of a small rest; a log-prob above 0 by rounding is 0
        rest, mu_rest = -torch.expm1(log_q.clamp(max=0)), -torch.expm1(log_mu.clamp(max=0))
        taken = torch.where(mu == 0, zero, -mu * log_ratio)
        others = torch.where(mu_rest == 0, zero, mu_rest * (mu_rest.log() - rest.log()))
        divergence = taken + others
    away = advantages.detach().sign() * log_ratio.sign() > 0
    return loss_mask & ~(away & (divergence > max_divergence))


@documented(MASK_ARGS)
def stale_sequence_mask(
    logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    max_divergence: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,) bool
    """Off-policy sequence mask: False at tokens of negative advantage in a sequence that the student no longer samples.

        keep_t = not (A_t < 0 and mean over trained s of the sequence of (log μ_s - log q_s) > max_divergence)

    A failed response teaches the student what to avoid only while it is one that the student would write.

    Args:
        logp: (T,) log-probs of the tokens under the student, nats. Detached.
        old_logp: (T,) log-probs of the same tokens under the policy that sampled them, nats. Detached.
        advantages: (T,) one advantage per token.
        {loss_mask}
        {cu_seqlens}
        max_divergence: nats a token, >= 0.
        {group}
            The mean is of the whole sequence.

    Returns:
        (T,) bool: the trained tokens that are kept. All False where `cu_seqlens` does not fit and cannot be read.

    Expected gradient:
        None of its own. As `loss_mask` or `weights` it leaves out the terms of the dropped tokens, which biases the
        policy gradient by design; on-policy the mean is 0 and nothing is dropped.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, `cu_seqlens` does not fit, or `max_divergence` is negative. With `group` also where
            its backend cannot carry the tensors or, on the CPU, ranks differ in B or `max_divergence`; on the CPU an
            error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> logp, old_logp = torch.tensor([-2.0, -2.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0, -1.0])
        >>> advantages, mask = torch.tensor([-1.0, -1.0, 1.0, 1.0]), torch.ones(4, dtype=torch.bool)
        >>> kept = kdloss.stale_sequence_mask(
        ...     logp, old_logp, advantages, loss_mask=mask, cu_seqlens=torch.tensor([0, 2, 4]), max_divergence=0.1
        ... )
        >>> kept.tolist()
        [False, False, True, True]

    Source:
        DeepSeek-V3.2, arXiv 2512.02556, eq. 9.
    """
    with in_step(group, logp, agreed := {}):
        _checks.non_negative(max_divergence=max_divergence)
        _checks.tensors(old_logp=old_logp, advantages=advantages)
        _checks.per_token("logp", logp, loss_mask=loss_mask, advantages=advantages)
        _checks.packed_stream("logp", logp, cu_seqlens)
        log_ratio = masked_log_ratio("logp", logp, loss_mask, old_logp=old_logp).detach()
        layout = Layout(cu_seqlens, logp.shape[0])
        agreed.update({SEQUENCES: layout.size, "max_divergence": max_divergence})
    mean = mean_of_tokens(-log_ratio, loss_mask, layout, group)  # NaN where cu_seqlens does not fit
    stale = (mean > max_divergence).index_select(0, layout.ids)
    return loss_mask & ~(stale & (advantages.detach() < 0)) & layout.fits


@documented(MASK_ARGS)
def top_entropy_mask(
    entropy: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    fraction: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,) bool
    """The trained tokens of the highest entropy: those at least as large as the k-th largest of n trained tokens.

        keep_t = entropy_t >= k-th largest,   k = max(1, fraction * n to the nearest integer)

    Args:
        entropy: (T,) or any shape: entropy of the student's next-token distributions, nats. Detached.
        loss_mask: bool, the shape of `entropy`, True at trained tokens. Values at other tokens have no effect.
        fraction: of the trained tokens to keep, 0 .. 1; 0.2 in the paper. 0 keeps none.
        group: the ranks whose trained tokens are ranked together: parts of one batch, or parts of its sequences, of any
            sizes. None: the tokens of this call.

    Returns:
        The shape of `entropy`, bool. Ties with the k-th largest are all kept, so the order of the tokens does not
        matter. A NaN at a trained token counts as the largest and is kept, so that the loss shows it.

    Expected gradient:
        None of its own. The entropy of a position does not depend on the token that is sampled there, but the threshold
        does. A loss with this mask has the gradient of the kept positions alone, by design.

    Raises:
        TypeError: `entropy` is not floating-point, `loss_mask` is not bool, or `group` is not a process group.
        ValueError: shapes or devices differ, or `fraction` is outside 0 .. 1. With `group` also where its backend
            cannot carry the tensors or, on the CPU, ranks differ in `fraction` or the dtype; on the CPU an error on
            one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> entropy, loss_mask = torch.tensor([0.1, 2.0, 0.5, 9.0, 1.0]), torch.tensor([True, True, True, False, True])
        >>> kdloss.top_entropy_mask(entropy, loss_mask=loss_mask, fraction=0.5).tolist()
        [False, True, False, False, True]

    Source:
        Beyond the 80/20 Rule, arXiv 2506.01939.
    """
    with in_step(group, entropy, agreed := {}):
        _checks.unit_interval(fraction=fraction)
        _checks.per_token("entropy", entropy, loss_mask=loss_mask)
        agreed.update({"fraction": fraction, "the dtype of entropy": _checks.promoted_dtype(entropy)})
    x = entropy.detach().to(_checks.promoted_dtype(entropy))
    mask = loss_mask.reshape(-1)
    number = sum_of_parts(mask.sum().to(_checks.accumulator_dtype(entropy)).reshape(1), group)
    rank = _kept(fraction, number)
    lowest = kth_largest(x.reshape(1, -1), mask, torch.zeros_like(mask, dtype=torch.int64), rank[None], group)
    return loss_mask & (rank > 0) & ((x >= lowest[0]) | x.isnan())


@documented(MASK_ARGS)
def informative_token_mask(
    entropy: Tensor,  # (T,)
    divergence: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    fraction: float,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,) bool
    """TIP: in each response the tokens where the student is uncertain, or sure and at odds with the teacher.

        s = h + d - h d,   keep_t = s_t >= k-th largest s of the response,   k = max(1, fraction * n to the nearest)

    h and d are entropy and divergence, clipped at the 98th percentile of the n trained tokens of the response and
    scaled to 0 .. 1 over them (0 where all are equal). s is high where either is, and 1 at the largest of either.

    Args:
        entropy: (T,) entropy of the student's next-token distributions, nats. Detached.
        divergence: (T,) divergence between student and teacher, such as `reverse_kl` of each position, nats. Detached.
        {loss_mask}
        {cu_seqlens}
        fraction: of each response's trained tokens to keep, 0 .. 1. 0 keeps none.
        {group}
            Percentiles and ranks are of the whole sequence.

    Returns:
        (T,) bool: the trained tokens that are kept, at least one of each response that has one. Ties with the k-th
        largest are all kept, and so is a trained token whose entropy or divergence is NaN, so that the loss shows it.
        All False where `cu_seqlens` does not fit and cannot be read.

    Expected gradient:
        None of its own. Entropy and divergence of a position do not depend on the token that is sampled there, but the
        threshold does. A loss with this mask has the gradient of the kept positions alone, by design.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, `cu_seqlens` does not fit, or `fraction` is outside 0 .. 1. With `group` also where
            its backend cannot carry the tensors or, on the CPU, ranks differ in B, `fraction` or the dtype; on the CPU
            an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> entropy, divergence = torch.tensor([2.0, 0.1, 0.1, 0.2]), torch.tensor([0.1, 3.0, 0.1, 0.2])
        >>> loss_mask, cu = torch.ones(4, dtype=torch.bool), torch.tensor([0, 4])
        >>> kept = kdloss.informative_token_mask(entropy, divergence, loss_mask=loss_mask, cu_seqlens=cu, fraction=0.5)
        >>> kept.tolist()
        [True, True, False, False]

    Source:
        TIP, arXiv 2604.14084, eq. 7.
    """
    with in_step(group, entropy, agreed := {}):
        _checks.unit_interval(fraction=fraction)
        _checks.tensors(divergence=divergence)
        _checks.per_token("entropy", entropy, loss_mask=loss_mask, divergence=divergence)
        _checks.packed_stream("entropy", entropy, cu_seqlens)
        layout = Layout(cu_seqlens, entropy.shape[0])
        dtype = _checks.promoted_dtype(entropy, divergence)
        agreed.update({SEQUENCES: layout.size, "fraction": fraction, "the dtype of entropy and divergence": dtype})
    ids = layout.ids
    number = trained_tokens(loss_mask, layout, group)  # NaN where cu_seqlens does not fit
    both = torch.stack([entropy.detach().to(dtype), divergence.detach().to(dtype)])

    def ranked(x: Tensor, rank: Tensor) -> Tensor:
        """(N, T): of (N, T) values the one of (N, B) rank in its sequence, the first being the largest."""
        return kth_largest(x, loss_mask, ids, rank, group).index_select(1, ids)

    ends = torch.stack([1 + torch.floor(_CLIPPED * number), number]).nan_to_num(0).to(torch.int64)
    high, low = ranked(both.repeat(2, 1), ends.repeat_interleave(2, 0)).reshape(2, 2, -1).unbind(0)
    scaled = torch.where(both >= high, both.new_ones(()), (both - low) / (high - low))
    h, d = torch.where(high == low, both.new_zeros(()), scaled).unbind(0)
    score = -(1 - h) * (1 - d)  # s - 1, which is exactly 0 where h or d is 1, so that such tokens tie
    rank = _kept(fraction, number)
    lowest = ranked(score[None], rank[None])[0]
    return loss_mask & (rank > 0).index_select(0, ids) & ((score >= lowest) | score.isnan())


def _kept(fraction: float, number: Tensor) -> Tensor:
    """int64: `fraction` of the numbers to the nearest integer, at least 1 of one or more; 0 for NaN."""
    rank = torch.floor(fraction * number + 0.5).clamp(min=1 if fraction > 0 else 0).minimum(number)
    return rank.nan_to_num(0).to(torch.int64)
