"""Scalar losses: forward KL (SFT), GRPO, reverse KL on the student's own samples, and KDRL, the last two joined.

Each is a weighted sum of per-token surrogates under a reduction. There is one distillation gradient, whatever the RL
weight: the importance-sampled surrogate on the reward R = log p - log q, whose expectation is grad KL(q || p). The
literal joint form of some trainers, which descends log q - log p itself, has the value of the reverse KL and a gradient
without the teacher; it is there for parity, as `direct_penalty=True`, and says so when it runs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._distributed.collectives import global_sum
from kdloss._packing.layout import SEQUENCES, segment_sum
from kdloss._packing.reductions import mean_of_sequences, token_mean

from .estimators import discounted_returns, kl_k1, reverse_kl_reward
from .surrogates import Surrogate, clipped_surrogate, importance_sampled_surrogate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIRECT_PENALTY_WARNING = (
    "direct_penalty=True descends logp - teacher_logp itself. Its value is the reverse KL, but the teacher is not in "
    "its gradient: on-policy the expected gradient is zero (or a push on response length), so the student does not "
    "learn from the teacher. Use it only to reproduce a trainer that does this; leave it out to distill."
)


class LossOutput(NamedTuple):
    """A scalar loss and what is worth logging beside it. Only `loss` is attached."""

    loss: Tensor  # () the number to descend: rl_loss_weight * rl + distill_loss_weight * kd
    rl: Tensor  # () the RL term, reduced like the loss, before its weight
    kd: Tensor  # () the distillation term, reduced like the loss, before its weight
    reverse_kl: Tensor  # () logp - teacher_logp reduced like the loss, nats: an estimate of KL(student || teacher)
    ratio: Tensor  # (T,) of the RL surrogate
    clipped: Tensor  # (T,) bool, of the RL surrogate: where the clip stops the gradient
    dual_clipped: Tensor  # (T,) bool, of the RL surrogate


def sft_loss(
    logp: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Forward KL by maximum likelihood: -(sum over trained t of logp_t) / normalizer, on tokens the teacher wrote.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        loss_mask: bool, the shape of `logp`.
        normalizer: as in `token_mean`.

    Returns:
        `LossOutput` with loss = kd; `rl`, `reverse_kl`, `ratio` are 0.

    Expected gradient:
        grad KL(p || q) where tokens are sampled from the teacher p (the entropy of p is constant).

    Raises:
        TypeError: `logp` is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes differ, or `normalizer` is negative, not finite or not 0-dim.

    Source:
        KDRL (arXiv 2506.02208), the SFT objective.
    """
    _checks.per_token("logp", logp, loss_mask=loss_mask)
    loss = -token_mean(logp, loss_mask=loss_mask, normalizer=normalizer)
    return _output(logp, loss, kd=loss)


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
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """GRPO: `clipped_surrogate` with the ratio exp(logp - prox_logp), reduced to a scalar.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        old_logp: under the policy that sampled. None: on-policy, ratio 1.
        advantages: per token, detached; `group_relative_advantages` through `broadcast_to_tokens`.
        loss_mask: bool.
        prox_logp: under the policy at the start of this update (decoupled PPO); the ratio is against it. None:
            `old_logp`. What lies between the two is the business of `weights`.
        clip_low, clip_high, dual_clip: as in `clipped_surrogate`.
        weights: per-token factors of the loss, detached: one of the importance weights.
        reduction: "token_mean" | "sequence_mean".
        cu_seqlens: (B + 1,), for "sequence_mean".
        normalizer: the denominator, in tokens or sequences by `reduction`. None: the local count, or that of `group`.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`. `loss` and the
            scalars beside it are then this rank's shares: those of all ranks sum to the whole's.

    Returns:
        `LossOutput` with loss = rl; `kd` and `reverse_kl` are 0.

    Expected gradient:
        minus the policy gradient of E[A] at ratio 1 and a fixed token normalizer; clips and weights bias it by design
        once the policy moves, a local count by O(1/B), and "sequence_mean" weights sequences by 1/|o|.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range, or `cu_seqlens` is missing or does not
            fit; with `group` as in `segment_sum`.

    Source:
        GRPO (arXiv 2402.03300), eq. 3; token mean: DAPO (arXiv 2503.14476), eq. 8; the decoupled ratio: Hilton et al.
        (arXiv 2110.00641).
    """
    rl = _RL(1.0, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    return _objective(logp, old_logp, rl, None, reduce)


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
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """On-policy distillation: loss_t = -rho_t * sg(R_t), rho = exp(logp - old_logp), R = teacher_logp - logp.

    Args:
        logp: per-token log-probs under the student, any shape, nats. Differentiable.
        old_logp: under the policy that sampled. None: on-policy, ratio 1.
        teacher_logp: under the teacher, of the same tokens at the same temperature.
        loss_mask: bool.
        kd_mask: bool, True where the teacher is listened to. It zeroes rewards (and their part of `reverse_kl`)
            elsewhere, whatever `teacher_logp` holds there, and never changes a denominator. None: everywhere.
        kd_discount: 0 .. 1; above 0 the reward is replaced by its `discounted_returns` (needs `cu_seqlens`).
        kd_reward_clip: symmetric bound of R in nats, > 0.
        kd_max_ratio: bound of the ratio, > 0, as `max_ratio` of `importance_sampled_surrogate`.
        reduction: "token_mean" | "sequence_mean".
        cu_seqlens: (B + 1,), for "sequence_mean" or a discount.
        normalizer: the denominator, in tokens or sequences by `reduction`. None: the local count, or that of `group`.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`, with parts in rank order. `loss`
            and the scalars beside it are then this rank's shares: those of all ranks sum to the whole's.

    Returns:
        `LossOutput` with loss = kd, the surrogate's value; `reverse_kl` is the number to watch. `rl`, `ratio` are 0.

    Expected gradient:
        grad KL(q || p) of every next-token distribution, at the prefixes that the sampling policy visits, for any such
        policy and a fixed token normalizer. With kd_discount=1, on-policy: of the KL between whole sequences. Biased by
        design: a discount off-policy or between 0 and 1, `kd_reward_clip`, `kd_max_ratio`, a `kd_mask` that depends on
        the outcome; a local count by O(1/B); "sequence_mean" weights sequences by 1/|o|, the objective as KDRL writes
        it.

    Raises:
        TypeError: a per-token tensor is not floating-point, or a mask is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range, or `cu_seqlens` is missing or does not
            fit; with `group` as in `segment_sum`.

    Source:
        KDRL (arXiv 2506.02208), J_RKL.
    """
    kd = _KD(1.0, teacher_logp, kd_mask, kd_discount, kd_reward_clip, kd_max_ratio, False)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    return _objective(logp, old_logp, None, kd, reduce)


def kdrl_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor = 0.005,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    reduction: str = "token_mean",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    direct_penalty: bool = False,
    group: ProcessGroup | None = None,
) -> LossOutput:
    """KDRL: rl_loss_weight * GRPO + distill_loss_weight * reverse KL, on the same samples.

    `grpo_loss` and `distillation_loss` side by side, under one reduction; every keyword means what it means there.
    The RL ratio is exp(logp - prox_logp), and `weights` act on the RL term only; the distillation ratio is always
    exp(logp - old_logp).

    Args:
        logp, old_logp, teacher_logp, advantages, loss_mask: per token, as in the two. `advantages` may be None where
            rl_loss_weight is 0, `teacher_logp` where distill_loss_weight is.
        rl_loss_weight: Python number. 0 skips the term: pure distillation.
        distill_loss_weight: Python number (0 skips the term), or a detached tensor, 0-dim or of the shape of `logp`
            (several teachers). The default is the value of KDRL and of the trainers that follow it; there it was
            tuned on a penalty without a teacher gradient, so expect to want another.
        direct_penalty: descend logp - teacher_logp itself instead of the surrogate, at every RL weight. For parity
            with trainers that do; warns.
        group: the ranks that each hold a part of every sequence, as in the two; the scalars are this rank's shares.

    Returns:
        `LossOutput`. `loss = rl_loss_weight * rl + distill_loss_weight * kd` in value for a scalar weight. A term that
        is skipped reports 0 in all its fields, and NaN in its inputs cannot leak.

    Expected gradient:
        rl_loss_weight * (that of `grpo_loss`) + distill_loss_weight * (that of `distillation_loss`). With
        `direct_penalty` the second is 0 on-policy: the teacher is in the value only.

    Raises:
        TypeError: a per-token tensor is not floating-point, or a mask or `direct_penalty` is not bool.
        ValueError: shapes or devices differ, a hyperparameter is out of range (of a skipped term, too), `cu_seqlens` is
            missing or does not fit, or `direct_penalty` is combined with `kd_discount`, `kd_reward_clip` or
            `kd_max_ratio`; with `group` as in `segment_sum`.

    Source:
        KDRL (arXiv 2506.02208), eq. 8.
    """
    rl = _RL(rl_loss_weight, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    kd = _KD(distill_loss_weight, teacher_logp, kd_mask, kd_discount, kd_reward_clip, kd_max_ratio, direct_penalty)
    reduce = _Reduction(reduction, loss_mask, cu_seqlens, normalizer, group)
    output = _objective(logp, old_logp, rl, kd, reduce)
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    return output


def kdrl_token_loss(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    teacher_logp: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float | Tensor = 0.005,
    prox_logp: Tensor | None = None,  # (T,)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # (T,)
    kd_mask: Tensor | None = None,  # (T,) bool
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    direct_penalty: bool = False,
) -> Tensor:  # (T,)
    """`kdrl_loss` before its reduction: rl_loss_weight * rl_t + distill_loss_weight * kd_t, elementwise.

    For code that reduces by itself, and for losses that are fused into the head. Arguments, errors and the expected
    gradient are those of `kdrl_loss` with kd_discount 0; `token_mean` of this is its `loss`.

    Args:
        loss_mask: None: every token is trained.

    Returns:
        The shape of `logp`, differentiable in it, 0 at untrained positions.
    """
    _checks.tensors(logp=logp)
    if loss_mask is None:
        loss_mask = torch.ones_like(logp, dtype=torch.bool)
    rl = _RL(rl_loss_weight, advantages, prox_logp, clip_low, clip_high, dual_clip, weights)
    kd = _KD(distill_loss_weight, teacher_logp, kd_mask, 0.0, kd_reward_clip, kd_max_ratio, direct_penalty)
    reduce = _Reduction("token_mean", loss_mask, None, None, None)
    _check_terms(logp, old_logp, rl, kd, reduce)
    logp = _widened(logp)
    rl_loss, term = _rl_term(logp, old_logp, rl, reduce).loss, _kd_term(logp, old_logp, kd, reduce)
    if direct_penalty:
        _checks.warn(_DIRECT_PENALTY_WARNING)
    return rl.weight * rl_loss + (kd.weight * term.loss if term.weighted is None else term.weighted)


class _RL(NamedTuple):
    """The RL term: its weight, and what `clipped_surrogate` takes."""

    weight: float
    advantages: Tensor | None
    prox_logp: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    weights: Tensor | None


class _KD(NamedTuple):
    """The distillation term: its weight, and what shapes its reward and its ratio."""

    weight: float | Tensor
    teacher_logp: Tensor | None
    mask: Tensor | None
    discount: float
    reward_clip: float | None
    max_ratio: float | None
    direct_penalty: bool


class _Reduction:
    """`reduction` with its mask, sequences and denominator: per-token tensor -> scalar."""

    def __init__(
        self,
        form: str,
        loss_mask: Tensor,
        cu_seqlens: Tensor | None,
        normalizer: float | Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        self.form, self.loss_mask, self.cu_seqlens, self.normalizer = form, loss_mask, cu_seqlens, normalizer
        self.group = group
        self.trained: Tensor | None = None  # tokens of each whole sequence, once they are known

    def check(self, logp: Tensor) -> None:
        _checks.per_token("logp", logp, loss_mask=self.loss_mask)
        _checks.one_of("reduction", self.form, ("token_mean", "sequence_mean"))
        _checks.normalizer(self.normalizer)
        if self.form == "sequence_mean":
            if self.cu_seqlens is None:
                raise ValueError('cu_seqlens must be given where reduction="sequence_mean", got None')
            _checks.packed_stream("logp", logp, self.cu_seqlens)
            _checks.cumulative_lengths(self.cu_seqlens, total_tokens=logp.shape[0])

    def agreed(self) -> dict[str, Any]:
        """What ranks that share sequences have to agree on."""
        sequences = None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return {"reduction": self.form, "normalizer=None": self.normalizer is None, SEQUENCES: sequences}

    def __call__(self, x: Tensor) -> Tensor:
        if self.form == "token_mean":
            if self.normalizer is None and self.group is not None:
                self.normalizer = global_sum(self.loss_mask.sum(), self.group)
            return token_mean(x, loss_mask=self.loss_mask, normalizer=self.normalizer)
        assert self.cu_seqlens is not None
        sequences = {"loss_mask": self.loss_mask, "cu_seqlens": self.cu_seqlens}
        if self.trained is None:
            self.trained = segment_sum(torch.ones_like(x), **sequences, group=self.group)
        return mean_of_sequences(x, self.trained, **sequences, normalizer=self.normalizer)


class _KDTerm(NamedTuple):
    loss: Tensor  # (T,) before the weight; attached where the weight is a number
    weighted: Tensor | None  # (T,) attached, where the weight is a tensor
    reverse_kl: Tensor  # (T,) detached


def _objective(logp: Tensor, old_logp: Tensor | None, rl: _RL | None, kd: _KD | None, reduce: _Reduction) -> LossOutput:
    """The weighted sum of the terms that are not None."""
    with in_step(reduce.group, logp) as agreed:
        reduce.check(logp)
        _check_terms(logp, old_logp, rl, kd, reduce)
        agreed.update(reduce.agreed())
        if kd is not None:
            agreed.update({"kd_discount": kd.discount, "distill_loss_weight=0": _skipped(kd.weight)})
    if rl is not None and kd is not None:
        logp = _widened(logp)
    parts = []
    surrogate = rl_loss = kd_loss = reverse_kl = None
    # reduced before they are weighted, so that the identity between loss, rl and kd holds to the last bit
    if rl is not None:
        surrogate = _rl_term(logp, old_logp, rl, reduce)
        rl_loss = reduce(surrogate.loss)
        parts.append(rl.weight * rl_loss)
    if kd is not None:
        term = _kd_term(logp, old_logp, kd, reduce)
        kd_loss, reverse_kl = reduce(term.loss), reduce(term.reverse_kl)
        parts.append(kd.weight * kd_loss if term.weighted is None else reduce(term.weighted))
    loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return _output(logp, loss, rl=rl_loss, kd=kd_loss, reverse_kl=reverse_kl, surrogate=surrogate)


def _widened(logp: Tensor) -> Tensor:
    """Once for both terms: their gradients meet in float32 and are rounded to the dtype of logp together."""
    return logp.to(_checks.promoted_dtype(logp))


def _check_terms(logp: Tensor, old_logp: Tensor | None, rl: _RL | None, kd: _KD | None, reduce: _Reduction) -> None:
    """Check the arguments of both terms; of a term of weight 0 the options only, as its tensors are not read."""
    prox_logp = None if rl is None else rl.prox_logp
    _checks.per_token("logp", logp, loss_mask=reduce.loss_mask, old_logp=old_logp, prox_logp=prox_logp)
    # options are checked whatever the weights: a weight that is scheduled to rise must not fail then
    if rl is not None:
        _checks.finite(rl_loss_weight=rl.weight)
        _checks.ppo_clips(rl.clip_low, rl.clip_high, rl.dual_clip)
    if kd is not None:
        _checks.weight("logp", logp, distill_loss_weight=kd.weight)
        _checks.positive(kd_reward_clip=kd.reward_clip, kd_max_ratio=kd.max_ratio)
        _checks.unit_interval(kd_discount=kd.discount)
        if kd.discount != 0 and reduce.cu_seqlens is None:
            raise ValueError(f"cu_seqlens must be given where kd_discount is not 0 (it is {kd.discount})")
        _checks.flag(direct_penalty=kd.direct_penalty)
        if kd.direct_penalty:
            _checks.no_reward_options(kd.discount, kd.reward_clip, kd.max_ratio)

    if rl is not None and rl.weight != 0:
        if rl.advantages is None and kd is not None:
            raise ValueError(f"advantages must be given where rl_loss_weight is not 0 (it is {rl.weight})")
        _checks.tensors(advantages=rl.advantages)
        _checks.per_token("logp", logp, loss_mask=reduce.loss_mask, advantages=rl.advantages, weights=rl.weights)
    if kd is not None and not _skipped(kd.weight):
        if kd.teacher_logp is None and rl is not None:
            raise ValueError(f"teacher_logp must be given where distill_loss_weight is not 0 (it is {kd.weight})")
        _checks.tensors(teacher_logp=kd.teacher_logp)
        _checks.per_token("logp", logp, loss_mask=reduce.loss_mask, teacher_logp=kd.teacher_logp)
        if kd.mask is not None:
            _checks.boolean(kd_mask=kd.mask)
            _checks.same_shape("logp", logp, kd_mask=kd.mask)
        if kd.discount != 0 and reduce.cu_seqlens is not None:
            _checks.packed_stream("logp", logp, reduce.cu_seqlens)


def _rl_term(logp: Tensor, old_logp: Tensor | None, rl: _RL, reduce: _Reduction) -> Surrogate:
    """The per-token RL term before its weight; of weight 0 an attached zero."""
    if rl.weight == 0:
        return _no_surrogate(logp)._replace(loss=_attached_zeros(logp))
    assert rl.advantages is not None
    return clipped_surrogate(
        logp,
        old_logp if rl.prox_logp is None else rl.prox_logp,
        rl.advantages,
        loss_mask=reduce.loss_mask,
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        dual_clip=rl.dual_clip,
        weights=rl.weights,
    )


def _kd_term(logp: Tensor, old_logp: Tensor | None, kd: _KD, reduce: _Reduction) -> _KDTerm:
    """The per-token distillation term; of weight 0 an attached zero."""
    if _skipped(kd.weight):
        nothing = _attached_zeros(logp)
        return _KDTerm(nothing, None, nothing.detach())
    assert kd.teacher_logp is not None
    teacher_mask = reduce.loss_mask if kd.mask is None else reduce.loss_mask & kd.mask
    penalty = kl_k1(logp, kd.teacher_logp, loss_mask=teacher_mask)
    reverse_kl = penalty.detach()
    if kd.direct_penalty:
        if not isinstance(kd.weight, Tensor):
            return _KDTerm(penalty, None, reverse_kl)
        weight = torch.where(teacher_mask, kd.weight.detach().to(penalty.dtype), 0)
        return _KDTerm(reverse_kl, weight * torch.where(weight == 0, 0, penalty), reverse_kl)

    returns = reverse_kl_reward(logp, kd.teacher_logp, loss_mask=teacher_mask, clip=kd.reward_clip)
    if kd.discount != 0:
        assert reduce.cu_seqlens is not None
        returns = discounted_returns(
            returns,
            loss_mask=reduce.loss_mask,
            cu_seqlens=reduce.cu_seqlens,
            discount=kd.discount,
            group=reduce.group,
        )
    descend = partial(
        importance_sampled_surrogate, logp, old_logp, returns, loss_mask=reduce.loss_mask, max_ratio=kd.max_ratio
    )
    # as weights of the surrogate, a weight of 0 silences an infinite reward as well
    weighted = descend(weights=kd.weight.expand_as(logp)).loss if isinstance(kd.weight, Tensor) else None
    return _KDTerm(descend().loss, weighted, reverse_kl)


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
    """The fields beside `loss` detached, and 0 where a term is absent."""
    zero = torch.zeros_like(loss)
    rl, kd, reverse_kl = (zero if x is None else x.detach() for x in (rl, kd, reverse_kl))
    surrogate = _no_surrogate(logp) if surrogate is None else surrogate
    return LossOutput(loss, rl, kd, reverse_kl, surrogate.ratio, surrogate.clipped, surrogate.dual_clipped)


def _no_surrogate(logp: Tensor) -> Surrogate:
    zeros = torch.zeros_like(logp, dtype=_checks.promoted_dtype(logp), requires_grad=False)
    never = torch.zeros_like(logp, dtype=torch.bool)
    return Surrogate(zeros, zeros, never, never)


def _attached_zeros(logp: Tensor) -> Tensor:
    """Zeros that hang on `logp` without having read it, so that backward runs and nothing leaks."""
    return torch.where(torch.zeros_like(logp, dtype=torch.bool), logp, 0)
