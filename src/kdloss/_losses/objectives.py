"""Scalar losses: forward KL (SFT), GRPO, reverse KL on the student's own samples, and KDRL, which joins the last two.

Each is a weighted sum of per-token surrogates under one reduction. The distillation gradient is the same at every RL
weight: that of the importance-sampled surrogate on the reward R = log p - log q, whose expectation is grad KL(q || p).
The literal joint form of some trainers descends log q - log p itself: its value is the reverse KL, but its gradient
ignores the teacher. It exists for parity, as `direct_penalty=True`, and warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented
from kdloss._packing.layout import SEQUENCES, Layout
from kdloss._packing.reductions import REDUCTIONS, Reduction, SequenceMean, TokenMean, token_mean

from .estimators import difference, discounted_returns
from .surrogates import Clips, Surrogate, clipped_loss, importance_sampled_loss
from .texts import OBJECTIVE_ARGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

_DIRECT_PENALTY_WARNING = (
    "direct_penalty=True descends logp - teacher_logp itself. Its value is the reverse KL, but the teacher is not in "
    "its gradient: on-policy the expected gradient is zero (or a push on response length), so the student does not "
    "learn from the teacher. Use it only to reproduce a trainer that does this; leave it out to distill."
)


class LossOutput(NamedTuple):
    """A scalar loss, with what is worth logging beside it. Only `loss` is differentiable.

    Attributes:
        loss: () the number to descend: rl_loss_weight * rl + distill_loss_weight * kd.
        rl: () the RL term before its weight, reduced like the loss.
        kd: () the distillation term before its weight, reduced like the loss.
        reverse_kl: () logp - teacher_logp reduced like the loss, nats: an estimate of KL(student || teacher).
        ratio: (T,) the ratio of the RL surrogate before any clip, 1 at untrained tokens; 0 without an RL term.
        clipped: (T,) bool, where the clip of the RL surrogate stops the gradient.
        dual_clipped: (T,) bool, where the dual clip of the RL surrogate stops the gradient.

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp, loss_mask = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([True])
        >>> output: kdloss.LossOutput = kdloss.distillation_loss(logp, None, teacher_logp, loss_mask=loss_mask)
        >>> {"reverse_kl": output.reverse_kl.item(), "rl": output.rl.item()}
        {'reverse_kl': 2.0, 'rl': 0.0}
    """

    loss: Tensor  # ()
    rl: Tensor  # ()
    kd: Tensor  # ()
    reverse_kl: Tensor  # ()
    ratio: Tensor  # (T,)
    clipped: Tensor  # (T,) bool
    dual_clipped: Tensor  # (T,) bool


@documented(OBJECTIVE_ARGS)
def sft_loss(
    logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Forward KL by maximum likelihood: -(sum over trained t of logp_t) / normalizer, on tokens the teacher wrote.

    Args:
        {logp}
        {loss_mask}
        normalizer: the denominator in tokens, a number or a 0-dim tensor, detached. None: the trained tokens of `logp`.

    Returns:
        `LossOutput` with loss = kd; `rl`, `reverse_kl` and `ratio` are 0.

    Expected gradient:
        grad KL(p || q) where tokens are sampled from the teacher p (the entropy of p is constant).

    Raises:
        TypeError: `logp` is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes differ, or `normalizer` is negative, not finite or not 0-dim.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -3.0, -9.0], requires_grad=True)
        >>> output = kdloss.sft_loss(logp, loss_mask=torch.tensor([True, True, False]))
        >>> (gradient,) = torch.autograd.grad(output.loss, logp)
        >>> output.loss.item(), gradient.tolist()
        (2.0, [-0.5, -0.5, 0.0])

    Source:
        KDRL (arXiv 2506.02208), the SFT objective.
    """
    _checks.per_token("logp", logp, loss_mask=loss_mask)
    loss = -token_mean(logp, loss_mask=loss_mask, normalizer=normalizer)
    return _output(logp, loss, kd=loss)


@documented(OBJECTIVE_ARGS)
def grpo_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    reduction: Reduction = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """GRPO: `clipped_surrogate` with the ratio rho = exp(logp - prox_logp), reduced to a scalar.

        loss_t = w_t * max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)

    Args:
        {logp}
        {old_logp}
        {advantages}
            For GRPO they are `group_relative_advantages`.
        {loss_mask}
        {prox_logp}
        {clip_low}
        {clip_high}
        {dual_clip}
        {weights}
        {reduction}
        {cu_seqlens}
            Needed for "sequence_mean".
        {normalizer}
        {group}

    Returns:
        `LossOutput` with loss = rl; `kd` and `reverse_kl` are 0.

    Expected gradient:
        minus the policy gradient of E[A] at ratio 1 and a fixed token normalizer. Clips and weights bias it by design
        once the policy moves; a local count biases it by O(1/B); "sequence_mean" weights sequences by 1/|o|.

    Raises:
        TypeError: a per-token tensor is not floating-point, `loss_mask` is not bool, or `group` is not a process group.
        ValueError: shapes or devices differ, a hyperparameter is out of range, or `cu_seqlens` is missing or does not
            fit. With `group` also where its backend cannot carry the tensors or, on the CPU, ranks differ in B,
            `reduction` or whether `normalizer` is None; on the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> advantages, loss_mask = torch.tensor([3.0, -1.0]), torch.tensor([True, True])
        >>> output = kdloss.grpo_loss(logp, None, advantages, loss_mask=loss_mask)
        >>> (gradient,) = torch.autograd.grad(output.loss, logp)
        >>> output.loss.item(), gradient.tolist()
        (-1.0, [-1.5, 0.5])

    Source:
        GRPO (arXiv 2402.03300), eq. 3; token mean: DAPO (arXiv 2503.14476), eq. 8; the decoupled ratio: Hilton et al.
        (arXiv 2110.00641).
    """
    rl = _RL(1.0, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    return _objective(logp, old_logp, rl, None, reduce)


@documented(OBJECTIVE_ARGS)
def distillation_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: Tensor | None = None,  # (T,)
    reduction: Reduction = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """On-policy distillation: loss_t = -rho_t * sg(R_t), the importance-sampled surrogate of the reverse KL.

        rho = exp(logp - old_logp),   R = teacher_logp - logp - kd_baseline

    Args:
        {logp}
        {old_logp}
        {teacher_logp}
        {loss_mask}
        {kd_mask}
        {kd_discount}
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {reduction}
        {cu_seqlens}
            Needed for "sequence_mean" or a discount.
        {normalizer}
        {group}
            For a discount, parts follow one another in rank order.

    Returns:
        `LossOutput` with loss = kd, the surrogate's value; watch `reverse_kl` instead. `rl` and `ratio` are 0.

    Expected gradient:
        grad KL(q || p) of every next-token distribution, at the prefixes that the sampling policy visits, for any such
        policy and a fixed token normalizer. With kd_discount=1, on-policy: that of the KL between whole sequences.
        Biased by design: a discount off-policy or between 0 and 1, `kd_reward_clip`, `kd_max_ratio`, and a `kd_mask`
        or `kd_baseline` that depends on the outcome. A local count biases it by O(1/B). "sequence_mean" weights
        sequences by 1/|o|, which is the objective as KDRL writes it.

    Raises:
        TypeError: a per-token tensor is not floating-point, a mask is not bool, or `group` is not a process group.
        ValueError: shapes or devices differ, a hyperparameter is out of range, `cu_seqlens` is missing or does not fit,
            or `kd_baseline` is combined with `kd_discount`. With `group` also where its backend cannot carry the
            tensors or, on the CPU, ranks differ in B, `reduction`, `kd_discount` or whether `normalizer` is None; on
            the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> teacher_logp, loss_mask = torch.tensor([-3.0, -1.0]), torch.tensor([True, True])
        >>> output = kdloss.distillation_loss(logp, None, teacher_logp, loss_mask=loss_mask)
        >>> (gradient,) = torch.autograd.grad(output.loss, logp)
        >>> output.reverse_kl.item(), gradient.tolist()  # less of the token that the teacher finds unlikely
        (0.5, [1.0, -0.5])

    Source:
        KDRL (arXiv 2506.02208), J_RKL.
    """
    kd = _KD(1.0, teacher_logp, kd_mask, kd_discount, kd_reward_clip, kd_max_ratio, kd_baseline, False)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    return _objective(logp, old_logp, None, kd, reduce)


@documented(OBJECTIVE_ARGS)
def kdrl_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: Tensor | None = None,  # (T,)
    reduction: Reduction = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    direct_penalty: bool = False,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """KDRL: rl_loss_weight * GRPO + distill_loss_weight * reverse KL, on the same samples, under one reduction.

        rl_t = w_t * max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t),  rho = exp(logp - prox_logp)
        kd_t = -exp(logp_t - old_logp_t) * sg(R_t),  R = teacher_logp - logp - kd_baseline

    `weights` act on the RL term only, and the distillation ratio is always against `old_logp`.

    Args:
        {logp}
        {old_logp}
        {teacher_logp}
            None is allowed where distill_loss_weight is 0.
        {advantages}
            None is allowed where rl_loss_weight is 0.
        {loss_mask}
        {rl_loss_weight}
        {distill_loss_weight}
        {prox_logp}
        {clip_low}
        {clip_high}
        {dual_clip}
        {weights}
        {kd_mask}
        {kd_discount}
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {reduction}
        {cu_seqlens}
            Needed for "sequence_mean" or a discount.
        {normalizer}
        {direct_penalty}
        {group}
            For a discount, parts follow one another in rank order.

    Returns:
        `LossOutput`. `loss = rl_loss_weight * rl + distill_loss_weight * kd` in value for a scalar weight. A term that
        is skipped is 0 in all its fields, and NaN in its inputs cannot leak.

    Expected gradient:
        rl_loss_weight * (minus the policy gradient of E[A], at RL ratio 1) + distill_loss_weight * (grad KL(q || p) of
        every next-token distribution, at the prefixes that the sampling policy visits), for a fixed token normalizer.
        With kd_discount=1, on-policy, the second is that of the KL between whole sequences. Biased by design: clips and
        `weights` once the policy moves, a discount off-policy or between 0 and 1, `kd_reward_clip`, `kd_max_ratio`, and
        a `kd_mask` that depends on the outcome. A local count biases it by O(1/B). "sequence_mean" weights sequences by
        1/|o|. With `direct_penalty` the second is 0 on-policy: the teacher is in the value only.

    Raises:
        TypeError: a per-token tensor is not floating-point, a mask or `direct_penalty` is not bool, or `group` is not a
            process group.
        ValueError: shapes or devices differ, a hyperparameter is out of range (also of a skipped term), `cu_seqlens` is
            missing or does not fit, `direct_penalty` is combined with `kd_discount`, `kd_reward_clip`, `kd_max_ratio`
            or `kd_baseline`, or `kd_baseline` with `kd_discount`. With `group` also where its backend cannot carry the
            tensors or, on the CPU, ranks differ in B, `reduction`, `kd_discount`, whether `normalizer` is None or
            whether distill_loss_weight is 0; on the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> teacher_logp, advantages = torch.tensor([-3.0, -1.0]), torch.tensor([3.0, -1.0])
        >>> mask = torch.tensor([True, True])
        >>> output = kdloss.kdrl_loss(logp, None, teacher_logp, advantages, loss_mask=mask, distill_loss_weight=0.5)
        >>> (gradient,) = torch.autograd.grad(output.loss, logp)
        >>> output.rl.item(), output.kd.item(), output.loss.item(), gradient.tolist()
        (-1.0, 0.5, -0.75, [-1.0, 0.25])

    Source:
        KDRL (arXiv 2506.02208), eq. 8.
    """
    rl = _RL(rl_loss_weight, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    reward = (kd_discount, kd_reward_clip, kd_max_ratio, kd_baseline)
    kd = _KD(distill_loss_weight, teacher_logp, kd_mask, *reward, direct_penalty)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    output = _objective(logp, old_logp, rl, kd, reduce)
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    return output


@documented(OBJECTIVE_ARGS)
def kdrl_token_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: Tensor | None = None,  # (T,)
    direct_penalty: bool = False,
) -> Tensor:  # (T,)
    """`kdrl_loss` before its reduction: rl_loss_weight * rl_t + distill_loss_weight * kd_t, elementwise.

        rl_t = w_t * max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t),  rho = exp(logp - prox_logp)
        kd_t = -exp(logp_t - old_logp_t) * sg(R_t),  R = teacher_logp - logp - kd_baseline

    For code that reduces by itself, and for losses that are fused into the head. `token_mean` of it is the `loss` of
    `kdrl_loss` without a discount.

    Args:
        {logp}
        {old_logp}
        {teacher_logp}
            None is allowed where distill_loss_weight is 0.
        {advantages}
            None is allowed where rl_loss_weight is 0.
        {loss_mask}
            None: every token is trained.
        {rl_loss_weight}
        {distill_loss_weight}
        {prox_logp}
        {clip_low}
        {clip_high}
        {dual_clip}
        {weights}
        kd_mask: bool, the shape of `logp`, True where the distillation reward applies. Elsewhere it is 0, whatever the
            value of `teacher_logp`. None: everywhere.
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {direct_penalty}

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained tokens.

    Expected gradient:
        rl_loss_weight * (minus the policy gradient of E[A], at RL ratio 1) + distill_loss_weight * (grad KL(q || p) of
        every next-token distribution, at the prefixes that the sampling policy visits), for a sum over tokens with a
        fixed normalizer. Biased by design: clips and `weights` once the policy moves, `kd_reward_clip`, `kd_max_ratio`,
        and a `kd_mask` that depends on the outcome. With `direct_penalty` the second is 0 on-policy: the teacher is in
        the value only.

    Raises:
        TypeError: a per-token tensor is not floating-point, or a mask or `direct_penalty` is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range (also of a skipped term), or
            `direct_penalty` is combined with `kd_reward_clip`, `kd_max_ratio` or `kd_baseline`.

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
        >>> advantages = torch.tensor([3.0, -1.0])
        >>> kdloss.kdrl_token_loss(logp, None, teacher_logp, advantages, distill_loss_weight=0.5).tolist()
        [-2.0, 0.5]

    Source:
        KDRL (arXiv 2506.02208), eq. 8.
    """
    _checks.tensors(logp=logp)
    if loss_mask is None:
        loss_mask = torch.ones_like(logp, dtype=torch.bool)
    rl = _RL(rl_loss_weight, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    kd = _KD(distill_loss_weight, teacher_logp, kd_mask, 0.0, kd_reward_clip, kd_max_ratio, kd_baseline, direct_penalty)
    reduce = _Reduction("token_mean", loss_mask, None, None, None)
    _check_terms(logp, old_logp, rl, kd, reduce)
    logp = _widened(logp)
    surrogate, term = _terms(logp, old_logp, rl, kd, reduce)
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    if surrogate is None and term is None:
        return _attached_zeros(logp)
    rl_loss = None if surrogate is None else surrogate.loss
    kd_loss, weighted = (None, None) if term is None else (term.loss, term.weighted)
    return _weighted_sum(rl, kd, rl_loss, kd_loss, weighted)


class _RL(NamedTuple):
    """The RL term: its weight and the arguments of `clipped_surrogate`."""

    weight: float
    advantages: Tensor | None
    prox_logp: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    weights: Tensor | None


class _KD(NamedTuple):
    """The distillation term: its weight, the teacher, and the options of its reward and its ratio."""

    weight: float | Tensor
    teacher_logp: Tensor | None
    mask: Tensor | None
    discount: float
    reward_clip: float | None
    max_ratio: float | None
    baseline: Tensor | None
    direct_penalty: bool


class _Reduction:
    """`reduction` with its mask, sequences and denominator: per-token tensor -> scalar."""

    def __init__(
        self,
        form: Reduction,
        loss_mask: Tensor,
        cu_seqlens: Tensor | None,
        normalizer: float | Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        self.form, self.loss_mask, self.cu_seqlens, self.normalizer = form, loss_mask, cu_seqlens, normalizer
        self.group = group
        self._mean: Callable[[Tensor], Tensor] | None = None  # made once, for all terms

    def check(self, logp: Tensor) -> None:
        _checks.per_token("logp", logp, loss_mask=self.loss_mask)
        _checks.one_of("reduction", self.form, REDUCTIONS)
        _checks.normalizer(self.normalizer)
        if self.form == "sequence_mean":
            if self.cu_seqlens is None:
                raise ValueError('cu_seqlens must be given where reduction="sequence_mean", got None')
            _checks.packed_stream("logp", logp, self.cu_seqlens)
            _checks.cumulative_lengths(self.cu_seqlens, total_tokens=logp.shape[0])

    def agreed(self) -> dict[str, Any]:
        """The values that must be the same on all ranks that share sequences."""
        sequences = None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return {"reduction": self.form, "normalizer=None": self.normalizer is None, SEQUENCES: sequences}

    def __call__(self, x: Tensor) -> Tensor:
        """The mean of `x`, which is 0 at untrained tokens."""
        if self._mean is None:
            if self.form == "token_mean":
                self._mean = TokenMean(self.loss_mask, self.normalizer, x.dtype, self.group)
            else:
                assert self.cu_seqlens is not None
                layout = Layout(self.cu_seqlens, x.shape[0])
                self._mean = SequenceMean(self.loss_mask, layout, self.normalizer, x.dtype, self.group)
        return self._mean(x)


class _KDTerm(NamedTuple):
    loss: Tensor  # (T,) before the weight
    weighted: Tensor | None  # (T,) where the weight is a tensor, which multiplies tokens and not what is reduced
    reverse_kl: Tensor  # (T,) detached


def _objective(logp: Tensor, old_logp: Tensor | None, rl: _RL | None, kd: _KD | None, reduce: _Reduction) -> LossOutput:
    """The weighted sum of the terms that are given; None is no term."""
    with in_step(reduce.group, logp, agreed := {}):
        reduce.check(logp)
        _check_terms(logp, old_logp, rl, kd, reduce)
        agreed.update(reduce.agreed())
        if kd is not None:
            agreed.update({"kd_discount": kd.discount, "distill_loss_weight=0": _skipped(kd.weight)})
    if rl is not None and kd is not None:
        logp = _widened(logp)
    surrogate, term = _terms(logp, old_logp, rl, kd, reduce)
    # weights multiply the reduced terms, so that loss = weights * (rl, kd) holds to the last bit
    rl_loss = kd_loss = reverse_kl = weighted = None
    if surrogate is not None:
        rl_loss = reduce(surrogate.loss)
    if term is not None:
        kd_loss, reverse_kl = reduce(term.loss), reduce(term.reverse_kl)
        weighted = None if term.weighted is None else reduce(term.weighted)
    if rl_loss is None and kd_loss is None:
        loss = reduce(_attached_zeros(logp))  # reduced, because other ranks of the group may have a term to reduce
    else:
        loss = _weighted_sum(rl, kd, rl_loss, kd_loss, weighted)
    return _output(logp, loss, rl=rl_loss, kd=kd_loss, reverse_kl=reverse_kl, surrogate=surrogate)


def _weighted_sum(
    rl: _RL | None, kd: _KD | None, rl_loss: Tensor | None, kd_loss: Tensor | None, weighted: Tensor | None
) -> Tensor:
    """The weights times the terms that are not skipped, of which there is one at least."""
    parts = []
    if rl is not None and rl_loss is not None:
        parts.append(_times(rl.weight, rl_loss))
    if weighted is not None:
        parts.append(weighted)
    elif kd is not None and kd_loss is not None:
        parts.append(_times(kd.weight, kd_loss))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _times(weight: float | Tensor, x: Tensor) -> Tensor:
    """No product for a weight of 1: torch 2.14 compiles 1 * x, beside x.detach(), to a result without a gradient."""
    return x if not isinstance(weight, Tensor) and weight == 1 else weight * x


def _widened(logp: Tensor) -> Tensor:
    """In float32 or wider: gradients of the two terms are added before they are rounded to the dtype of logp."""
    return logp.to(_checks.promoted_dtype(logp))


def _check_terms(logp: Tensor, old_logp: Tensor | None, rl: _RL | None, kd: _KD | None, reduce: _Reduction) -> None:
    """Check all arguments, except the tensors of a term whose weight is 0, which are not read."""
    prox_logp = None if rl is None else rl.prox_logp
    _checks.per_token("logp", logp, loss_mask=reduce.loss_mask, old_logp=old_logp, prox_logp=prox_logp)
    # options of a skipped term too: a weight that a schedule raises later must not fail then
    if rl is not None:
        _checks.finite(rl_loss_weight=rl.weight)
        _checks.ppo_clips(rl.clip_low, rl.clip_high, rl.dual_clip)
    if kd is not None:
        _checks.weight("logp", logp, distill_loss_weight=kd.weight)
        _checks.positive_or_none(kd_reward_clip=kd.reward_clip, kd_max_ratio=kd.max_ratio)
        _checks.unit_interval(kd_discount=kd.discount)
        if kd.discount != 0 and reduce.cu_seqlens is None:
            raise ValueError(f"cu_seqlens must be given where kd_discount is not 0 (it is {kd.discount})")
        _checks.flag(direct_penalty=kd.direct_penalty)
        if kd.direct_penalty:
            _checks.no_reward_options(kd.discount, kd.reward_clip, kd.max_ratio)
        if kd.baseline is not None:
            _checks.no_baseline(kd.discount, kd.direct_penalty)

    if rl is not None and rl.weight != 0:
        if rl.advantages is None and kd is not None:
            raise ValueError(f"advantages must be given where rl_loss_weight is not 0 (it is {rl.weight})")
        _checks.tensors(advantages=rl.advantages)
        _checks.per_token("logp", logp, loss_mask=reduce.loss_mask, advantages=rl.advantages, weights=rl.weights)
    if kd is not None and not _skipped(kd.weight):
        if kd.teacher_logp is None and rl is not None:
            raise ValueError(f"teacher_logp must be given where distill_loss_weight is not 0 (it is {kd.weight})")
        _checks.tensors(teacher_logp=kd.teacher_logp)
        _checks.per_token(
            "logp", logp, loss_mask=reduce.loss_mask, teacher_logp=kd.teacher_logp, kd_baseline=kd.baseline
        )
        if kd.mask is not None:
            _checks.boolean(kd_mask=kd.mask)
            _checks.same_shape("logp", logp, kd_mask=kd.mask)
        if kd.discount != 0 and reduce.cu_seqlens is not None:
            _checks.packed_stream("logp", logp, reduce.cu_seqlens)


def _terms(
    logp: Tensor, old_logp: Tensor | None, rl: _RL | None, kd: _KD | None, reduce: _Reduction
) -> tuple[Surrogate | None, _KDTerm | None]:
    """The terms per token, before their weights; None for one that is not given or has a weight of 0."""
    surrogate = term = None
    log_ratio = difference(logp, old_logp)
    zero = log_ratio.new_zeros(())
    if rl is not None and rl.weight != 0:
        assert rl.advantages is not None
        surrogate = clipped_loss(
            log_ratio if rl.prox_logp is None else difference(logp, rl.prox_logp),
            rl.advantages,
            reduce.loss_mask,
            rl.weights,
            clips=Clips(rl.clip_low, rl.clip_high, rl.dual_clip),
            zero=zero,
        )
    if kd is not None and not _skipped(kd.weight):
        term = _kd_term(logp, log_ratio, kd, reduce, zero)
    return surrogate, term


def _kd_term(logp: Tensor, log_ratio: Tensor, kd: _KD, reduce: _Reduction, zero: Tensor) -> _KDTerm:
    assert kd.teacher_logp is not None
    teacher_mask = reduce.loss_mask if kd.mask is None else reduce.loss_mask & kd.mask
    penalty = difference(logp if kd.direct_penalty else logp.detach(), kd.teacher_logp)
    penalty = torch.where(_checks.savable(teacher_mask), penalty, zero.to(penalty.dtype))
    reverse_kl = penalty.detach()
    weight = kd.weight.detach() if isinstance(kd.weight, Tensor) else None
    if kd.direct_penalty:
        if weight is None:
            return _KDTerm(penalty, None, reverse_kl)
        weight = torch.where(teacher_mask, weight.to(penalty.dtype), zero)
        return _KDTerm(reverse_kl, weight * torch.where(weight == 0, zero, penalty), reverse_kl)

    costs = reverse_kl if kd.reward_clip is None else reverse_kl.clamp(-kd.reward_clip, kd.reward_clip)
    if kd.baseline is not None:  # a cost is minus a reward, from which the baseline is taken off
        baseline = torch.where(teacher_mask, kd.baseline.detach(), zero.to(kd.baseline.dtype))
        costs = costs + baseline.to(_checks.promoted_dtype(costs, baseline))
    if kd.discount != 0:
        assert reduce.cu_seqlens is not None
        costs = discounted_returns(
            costs, loss_mask=reduce.loss_mask, cu_seqlens=reduce.cu_seqlens, discount=kd.discount, group=reduce.group
        )
    dtype = _checks.promoted_dtype(log_ratio, costs, weight)
    costs, zero, bounded = costs.to(dtype), zero.to(dtype), None
    if kd.max_ratio is not None:
        ratio = torch.where(reduce.loss_mask, log_ratio.detach().to(dtype), zero).exp()
        bounded = ratio.clamp(max=kd.max_ratio)
    if weight is None:
        return _KDTerm(importance_sampled_loss(logp, log_ratio, costs, bounded, zero), None, reverse_kl)
    loss = importance_sampled_loss(logp.detach(), log_ratio.detach(), costs, bounded, zero)
    # per token, as a weight of 0 then also makes an infinite reward 0
    weight = torch.where(reduce.loss_mask, weight.to(dtype), zero)
    weighted = torch.where(weight == 0, zero, weight * costs)
    return _KDTerm(loss, importance_sampled_loss(logp, log_ratio, weighted, bounded, zero), reverse_kl)


def _skipped(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _output(
    logp: Tensor,
    loss: Tensor,
    *,
    rl: Tensor | None = None,
    kd: Tensor | None = None,
    reverse_kl: Tensor | None = None,
    surrogate: Surrogate | None = None,
) -> LossOutput:
    """Detach all fields but `loss`; those of a term that is not given are 0."""
    zero = torch.zeros_like(loss) if rl is None or kd is None or reverse_kl is None else loss
    rl, kd, reverse_kl = (zero if x is None else x.detach() for x in (rl, kd, reverse_kl))
    surrogate = _no_surrogate(logp) if surrogate is None else surrogate
    return LossOutput(loss, rl, kd, reverse_kl, surrogate.ratio, surrogate.clipped, surrogate.dual_clipped)


def _no_surrogate(logp: Tensor) -> Surrogate:
    zeros = torch.zeros_like(logp, dtype=_checks.promoted_dtype(logp), requires_grad=False)
    never = torch.zeros_like(logp, dtype=torch.bool)
    return Surrogate(zeros, zeros, never, never)


def _attached_zeros(logp: Tensor) -> Tensor:
    """Zeros that depend on `logp` but not on its values, so that backward runs and no NaN leaks."""
    return torch.where(torch.zeros_like(logp, dtype=torch.bool), logp, 0)
