"""Divergences from a teacher that gives K log-probs per token, as scoring servers do.

    S = the ids of a row,   P = sum of p over S,   Q = sum of q over S,   q = softmax(logits / τ)

| tail | compares | a divergence? |
|---|---|---|
| "bucket" | (p_S, 1 - P) with (q_S, 1 - Q): all others in one bucket | yes; at most the full one, equal at K = V |
| "renormalize" | p_S / P with q_S / Q: inside S only | yes, but blind to Q; identically 0 at K = 1 |
| "truncate" | the sum over S of the full form's terms | no: it may be negative, and is not clamped |
| "generalized" (KLs) | the sum over S of terms that are >= 0 each | yes, of masses on S; blind to the rest |

Use "bucket" by default: at its optimum q = p on S, and the mass outside S is right. "renormalize" never moves mass into
S or out of it. The minimum of "truncate" is not at the teacher: the forward KL moves all mass into S, and the reverse
KL leaves q = p / e on S. Each function's docstring has the gradient.

Rows with fewer ids are padded with id -1, where log-probs are not read. A row of padding only is 0 without gradient. A
row in which either side excludes all of S cannot be renormalised: it is NaN. S may be the teacher's top K or the
student's. The choice of S carries no gradient.

A teacher's log-probs are rounded, so they may leave no tail, or a spurious one of 1e-8. A tail below 8 epsilons of the
computation's dtype counts as 0 in a numerator and as 8 epsilons in a denominator, so rounding alone makes nothing
infinite. Keep the log-probs in float32: rounded to bf16 they are off by 1 %, and so is their tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl
from kdloss._softmax.vocabulary import LOGITS_ARGS, Softmax, prepare_logits

from .logits_op import divergence
from .rows import FORWARD_KL, GENERALIZED_JSD, REVERSE_KL, Form
from .topk_op import kept_and_rest

PADDING = -1
Tail = Literal["bucket", "renormalize", "truncate", "generalized"]
JSDTail = Literal["bucket", "renormalize", "truncate"]
_TAILS, _JSD_TAILS = get_args(Tail), get_args(JSDTail)
# beyond ± this, the sigmoid of a log-ratio is 0 or 1
_SATURATED = 1e4

TOPK_ARGS = LOGITS_ARGS | {
    "teacher_topk_logp": """(..., K) nats, the teacher's log-probs of the ids, at the sampling temperature, normalised
        over the whole vocabulary. Detached. -inf is legal.""",
    "teacher_topk_ids": "(..., K) int32 or int64, distinct within a row, in any order; -1 is padding.",
    "temperature": """τ > 0, a number or one value per row, for the student only: the teacher's log-probs already
        have it. It carries no gradient.""",
    "ValueError": """shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
        run, or (on the CPU) an id is twice in a row or outside the vocabulary. Elsewhere, and under `torch.compile`,
        such a row is NaN.""",
}


@documented(TOPK_ARGS)
def topk_forward_kl(
    logits: Tensor,  # (..., V)
    teacher_topk_logp: Tensor,  # (..., K)
    teacher_topk_ids: Tensor,  # (..., K) int
    *,
    tail: Tail,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Forward KL from a teacher's K log-probs: sum_S p (log p - log q), and a tail.

    Args:
        {logits}
        {teacher_topk_logp}
        {teacher_topk_ids}
        tail: "bucket" adds (1-P) log (1-P)/(1-Q), "renormalize" divides by P and Q first, "truncate" does neither,
            "generalized" adds Q - P.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision inputs. All but "truncate": >= 0, +inf where the student
        excludes what the teacher does not. "truncate": at least P log P; negative where the student puts more than P on
        S in the teacher's proportions.

    Expected gradient, times 1 / temperature:
        "bucket": q - p on S, q - (1-P) q/(1-Q) outside. "renormalize": q/Q - p/P on S, 0 outside. "truncate": P q - p
        on S, P q outside: it pulls all mass out of the tail, towards q = p/P on S. "generalized": (1 + P - Q) q - p on
        S, (P - Q) q outside: 0 where q = p on S.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> logp, ids = torch.tensor([[0.5]]).log(), torch.tensor([[1]])  # the teacher's most probable token
        >>> kdloss.topk_forward_kl(logits, logp, ids, tail="bucket")
        tensor([0.0872])

    Source:
        The bucket is the forward KL's coarse-graining (log-sum inequality: Cover and Thomas, theorem 2.7.1). The
        generalized KL of masses: Lee and Seung (2001), eq. 3.
    """
    form = Form(FORWARD_KL)
    return _topk(form, logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, shard, impl)


@documented(TOPK_ARGS)
def topk_reverse_kl(
    logits: Tensor,  # (..., V)
    teacher_topk_logp: Tensor,  # (..., K)
    teacher_topk_ids: Tensor,  # (..., K) int
    *,
    tail: Tail,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Reverse KL to a teacher's K log-probs: sum_S q (log q - log p), and a tail.

    The mass that is compared is the student's, so the student's own top ids are the better support: pass them as
    `teacher_topk_ids`, with the teacher's log-probs of them.

    Args:
        {logits}
        {teacher_topk_logp}
        {teacher_topk_ids}
        tail: "bucket" adds (1-Q) log (1-Q)/(1-P), "renormalize" divides by P and Q first, "truncate" does neither,
            "generalized" adds P - Q.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision inputs. All but "truncate": >= 0, +inf where the student has
        mass on what the teacher excludes. "truncate": may be negative.

    Expected gradient, times 1 / temperature, with h = log q/p on S:
        "bucket": q (h - F) on S, q (log (1-Q)/(1-P) - F) outside, where F is the value. "renormalize": the same of q/Q
        and p/P, 0 outside. "truncate": q (h + 1 - C) on S, -q C outside, C = sum_S q (h + 1): where the student agrees
        with the teacher it still moves mass out of S. "generalized": q (h - C) on S, -q C outside, C = sum_S q h: 0
        where q = p on S.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> logp, ids = torch.tensor([[0.5]]).log(), torch.tensor([[1]])  # the teacher's most probable token
        >>> kdloss.topk_reverse_kl(logits, logp, ids, tail="bucket")
        tensor([0.0823])

    Source:
        The bucket is the reverse KL's coarse-graining (log-sum inequality: Cover and Thomas, theorem 2.7.1).
        "generalized": MOPD (arXiv 2606.30406), eq. 5.
    """
    form = Form(REVERSE_KL)
    return _topk(form, logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, shard, impl)


@documented(TOPK_ARGS)
def topk_generalized_jsd(
    logits: Tensor,  # (..., V)
    teacher_topk_logp: Tensor,  # (..., K)
    teacher_topk_ids: Tensor,  # (..., K) int
    *,
    tail: JSDTail,
    beta: float,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Generalised JSD from a teacher's K log-probs: sum_S β p log p/m + (1-β) q log q/m, and a tail; m = β p + (1-β) q.

    Args:
        {logits}
        {teacher_topk_logp}
        {teacher_topk_ids}
        tail: "bucket" adds the same two terms of the masses outside S, 1-P and 1-Q; "renormalize" divides by P and Q
            first; "truncate" does neither. "generalized" is refused: its masses cancel, so it would be "truncate".
        beta: β, 0 < β < 1. JSD / (β (1-β)) tends to the forward KL as β → 0 and to the reverse KL as β → 1.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision inputs, finite. "truncate": may be negative.

    Expected gradient, times 1 / temperature, with a = log q/m on S:
        "bucket": (1-β) q (a - C), with a of the bucket outside S, and C the mean of a under q. "renormalize": the same
        of q/Q and p/P, 0 outside. "truncate": (1-β) q (a - C) on S, -(1-β) q C outside, C = sum_S q a.

    Raises:
        {TypeError}
        ValueError: `beta` is 0 or 1 (use the KL that the error names), shapes or devices disagree, an option is out of
            range (`tail="generalized"` is for the two KLs), `impl` is "triton" where the kernels cannot run, or (on the
            CPU) an id is twice in a row or outside the vocabulary. Elsewhere, and under `torch.compile`, such a row is
            NaN.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> logp, ids = torch.tensor([[0.5]]).log(), torch.tensor([[1]])  # the teacher's most probable token
        >>> kdloss.topk_generalized_jsd(logits, logp, ids, tail="bucket", beta=0.5)
        tensor([0.0210])

    Source:
        GKD, arXiv 2306.13649, section 3, where p is the teacher; its coarse-graining (Cover and Thomas, theorem 2.7.1).
    """
    _checks.share("beta", beta, topk_forward_kl.__name__, topk_reverse_kl.__name__)
    return _topk(
        Form(GENERALIZED_JSD, beta),
        logits,
        teacher_topk_logp,
        teacher_topk_ids,
        tail,
        temperature,
        vocab_size,
        shard,
        impl,
    )


def _topk(
    form: Form,
    logits: Tensor,
    teacher_topk_logp: Tensor,
    teacher_topk_ids: Tensor,
    tail: Tail,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Tensor:  # (...,)
    """Any divergence with any tail; the public functions differ only in `form`."""
    check_tail(tail, form)
    logits, _, softmax = prepare_logits(logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl)
    rows = logits.shape[:-1]
    support = check_support("logits", logits, rows, teacher_topk_logp, teacher_topk_ids, softmax.vocab_size)
    _checks.row_temperatures(softmax.row_temperature, support.counted())

    def columns(ids: Tensor, *, with_rest: bool) -> tuple[Tensor, Tensor]:
        return kept_and_rest(logits, ids, softmax, with_rest=with_rest)

    dtype = _checks.promoted_dtype(logits, teacher_topk_logp)
    return divergence_of_support(form, tail, support, columns, softmax, dtype)


class Support(NamedTuple):
    """The ids of each row in ascending order, and the teacher's log-probs of them."""

    ids: Tensor  # (..., K) int64, -1 at padding
    logp: Tensor  # (..., K), undefined at padding
    vocab_size: int
    broken: Tensor | None  # (...,) bool, rows whose ids are twice or outside; None if those raise

    def valid(self) -> Tensor:
        """(..., K) bool, False at padding."""
        return (self.ids >= 0) & (self.ids < self.vocab_size)

    def counted(self) -> Tensor:
        """(...,) bool, the rows that have an id."""
        return self.valid().any(-1)

    def only(self, rows: Tensor) -> Support:
        """Padding alone in all rows but these (...,)."""
        broken = None if self.broken is None else self.broken & rows
        return Support(self.ids.masked_fill(~rows.unsqueeze(-1), PADDING), self.logp, self.vocab_size, broken)


def check_support(
    name: str, reference: Tensor, rows: torch.Size, logp: Tensor, ids: Tensor, vocab_size: int
) -> Support:
    """Checked ids, and the teacher's log-probs in their order. `reference` has the rows, and is `name` in errors."""
    _checks.tensors(teacher_topk_logp=logp)
    _checks.floating(teacher_topk_logp=logp)
    _checks.integral(teacher_topk_ids=ids)
    if logp.ndim != len(rows) + 1 or logp.shape[:-1] != rows or logp.shape[-1] < 1:
        raise ValueError(f"teacher_topk_logp must be {_checks.axes(*rows, 'K')} with K >= 1, got {tuple(logp.shape)}")
    _checks.same_shape("teacher_topk_logp", logp, teacher_topk_ids=ids)
    _checks.same_device(name, reference, teacher_topk_logp=logp)
    ordered, order = ids.long().sort(-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    outside = (ids < PADDING) | (ids >= vocab_size)
    broken = None
    if not _checks.value_checks_allowed(ids):
        broken = twice.any(-1) | outside.any(-1)
    elif outside.any():
        raise ValueError(
            f"teacher_topk_ids must be {PADDING} (padding) or in 0 .. {vocab_size - 1}, got {int(ids[outside][0])}"
        )
    elif twice.any():
        raise ValueError(f"teacher_topk_ids must be distinct in a row, got {int(ordered[..., 1:][twice][0])} twice")
    return Support(ordered, logp.detach().gather(-1, order), vocab_size, broken)


def divergence_of_support(
    form: Form,
    tail: Tail,
    support: Support,
    columns: Callable[..., tuple[Tensor, Tensor]],  # (ids, with_rest=) -> `kept_and_rest` of the student's logits
    softmax: Softmax,
    dtype: torch.dtype,
) -> Tensor:  # (...,)
    """The divergence of each row, 0 without gradient in a row of padding only."""
    valid = support.valid()
    empty = ~support.counted().unsqueeze(-1)
    log_p = torch.where(valid, support.logp.to(dtype), -math.inf)
    kept, rest = columns(support.ids, with_rest=tail != "renormalize")
    if tail == "renormalize":  # softmax over S is q/Q: nothing outside S is needed
        student = kept.to(dtype)
        teacher = log_p
    else:
        student = torch.cat([kept, rest.unsqueeze(-1)], -1).to(dtype)
        valid = torch.cat([valid, torch.ones_like(empty)], -1)
        teacher = torch.cat([log_p, _log_tail(log_p, support, form.kind).unsqueeze(-1)], -1)
    student = torch.where(empty, 0, torch.where(valid, student, -math.inf))
    teacher = torch.where(empty, 0, teacher)
    if tail in ("truncate", "generalized"):
        # a row with NaN, +inf or only -inf is not a distribution. It stays out of log_softmax, whose gradient would be
        # NaN even if the incoming gradient is 0
        nothing = ~student.detach().amax(-1, keepdim=True).isfinite()
        log_q = torch.where(nothing, 0, student).log_softmax(-1)[..., :-1]
        value = sum_over_support(form, tail, log_q, log_p).masked_fill(nothing.squeeze(-1), math.nan)
        value = torch.where(empty.squeeze(-1), 0, value)
    else:  # softmax(student) is the distribution over K + 1 outcomes, or over K
        kernels = softmax.kernels and dtype == torch.float32
        value = divergence(student, teacher, form, Softmax.of(student.shape[-1], kernels=kernels))
    return value if support.broken is None else value.masked_fill(support.broken, math.nan)


def check_tail(tail: Tail, form: Form) -> None:
    """Raise unless `tail` is one of the names, and one that the divergence has."""
    jsd = form.kind == GENERALIZED_JSD
    if jsd and tail == "generalized":
        raise ValueError(
            "tail must be one of 'bucket', 'renormalize', 'truncate' for a JSD, got 'generalized': the masses in its "
            "terms cancel, so it would be 'truncate'"
        )
    _checks.one_of("tail", tail, _JSD_TAILS if jsd else _TAILS)


def _log_tail(log_p: Tensor, support: Support, kind: str) -> Tensor:
    """`log(1 - P)`, with tails below 8 epsilons as above; -inf if S is the whole vocabulary."""
    tail = -torch.expm1(torch.logsumexp(log_p, -1))
    least = 8 * torch.finfo(log_p.dtype).eps
    log_tail = tail.clamp(min=least).log() if kind == REVERSE_KL else torch.where(tail < least, 0, tail).log()
    return torch.where(support.valid().sum(-1) == support.vocab_size, -math.inf, log_tail)


def sum_over_support(form: Form, tail: Tail, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Terms summed over S: the full form's, and for "generalized" also their masses.

    Every -inf is replaced before it can make the gradient NaN.
    """
    p, q, kind = log_p.exp(), log_q.exp(), form.kind
    if kind in (FORWARD_KL, REVERSE_KL):
        if kind == FORWARD_KL:
            terms = torch.where(p > 0, p * (log_p - log_q), 0)
        else:
            terms = q * (torch.where(q > 0, log_q, 0) - torch.where(q > 0, log_p, 0))
        if tail == "generalized":
            terms = terms + (q - p if kind == FORWARD_KL else p - q)
        return terms.sum(-1)
    both = (p > 0) & (q > 0)
    one_sided = _SATURATED * ((p > 0).to(q.dtype) - (q > 0).to(q.dtype))
    t = torch.where(both, torch.where(both, log_p, 0) - torch.where(both, log_q, 0), one_sided)
    shares, zero = form.shares(), torch.zeros_like(t)
    t = t + (shares.log_teacher - shares.log_student)
    a = -shares.log_student - torch.logaddexp(t, zero)
    b = -shares.log_teacher - torch.logaddexp(-t, zero)
    return (shares.teacher * p * b + shares.student * q * a).sum(-1)
