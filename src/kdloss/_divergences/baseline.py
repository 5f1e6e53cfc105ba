"""Baselines of the sampled reverse KL: a constant per row that is taken off the reward, from whole distributions.

    r_v = log p_v - log q_v,   s_v = onehot_v - q,   |s_v|² = 1 - 2 q_v + sum_u q_u²
    "value"    b = sum_v q_v r_v = -KL(q || p)
    "optimal"  b = sum_v w_v r_v / sum_v w_v,   w = q |s|² q/μ,   q/μ = 1 on-policy

The optimal baseline is a mean of r under the weights w. Ratios q/μ are divided by the largest of the row, so none
overflows. A mass of q or μ that is 0 in the dtype counts as 0, and so does a weight: in float32, a student within 1e-19
of certain may get the value baseline. The variance that there is to lower is of that order.

1 - 2 q + sum q² loses all its digits where q is nearly 1. So |s|² of the most probable token of a row is computed from
the masses of the others: (sum of the others)² + sum of their squares. For all other tokens q is at most 1/2.

Rows go through blocks of a fixed size, so memory does not grow with their number. If ranks hold slices of the
vocabulary, there are three all-gathers of three to six values per row, beside that of the reverse KL.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.operator import operator
from kdloss._softmax.rows import column, flat_rows
from kdloss._softmax.vocabulary import other_logits, prepare_logits, true_vocab_size

from .from_logits import DIVERGENCE_ARGS
from .logits_op import divergence
from .rows import REVERSE_KL, Form
from .sharded import log_softmax_of_slices, of_ranks

BaselineKind = Literal["value", "optimal"]
_KINDS = get_args(BaselineKind)

# entries of a block; about ten tensors of this size are alive at once
_CPU_ENTRIES, _DEVICE_ENTRIES = 2**18, 2**23

BASELINE_ARGS = DIVERGENCE_ARGS | {
    "logits": "(..., V) of the student, of any floating dtype and any strides. Detached.",
    "vocab_size": """the true V, where the last columns of a side are padding: they get no mass. Required where the
        sides differ in width.""",
    "shard": """the slice of the vocabulary that all these logits are, where each rank holds one (`VocabShard`). Logits
        that are DTensors placed `Shard(-1)` need no `shard`.""",
}


@documented(BASELINE_ARGS)
def reverse_kl_baseline(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    kind: BaselineKind,
    behaviour_logits: Tensor | None = None,  # (..., V)
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
) -> Tensor:  # (...,)
    """Baseline of the reward log p - log q of the sampled reverse KL: its value, or the constant of least variance.

        "value":    b = E_q[r] = -KL(q || p),   r = log p - log q
        "optimal":  b = E_q[rho |s|² r] / E_q[rho |s|²],   |s_v|² = 1 - 2 q_v + sum_u q_u²,   rho = q / mu

    s_v = onehot_v - q is the score of token v, the gradient of log q_v in the logits. "optimal" minimises
    E_mu|rho s (r - b)|², the second moment of the gradient of the surrogate in the logits of its own row.

    Args:
        {logits}
        {teacher_logits}
        kind: "value" or "optimal".
        behaviour_logits: (..., V) of the policy mu that samples the tokens, with the leading shape and the vocabulary
            of `logits`. Detached. None: on-policy, rho = 1. "value" does not depend on mu.
        {temperature}
            It is that of mu as well.
        {vocab_size}
        {shard}

    Returns:
        (...,) nats, detached, float32 for half-precision logits. 0 where the baseline would be -inf: the teacher
        excludes a token that counts. A logit of -inf is a mass of 0. A token that mu never samples is left out of
        "optimal". Where no token is left, as for a student that is certain, "optimal" is the value baseline.

    Expected gradient:
        None of its own. It depends on the prefix alone, so the surrogate with r - b in place of r has the same expected
        gradient, for any mu that is positive wherever q is. "optimal" then has the least variance of all constants.
        "value" may be louder than no baseline, above all where q is peaked.
        A bound on rho makes the expected gradient depend on b.

    Raises:
        {TypeError}
        ValueError: `kind` is neither of the two, shapes, devices or vocabularies disagree, or an option is out of
            range.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> teacher_logits = torch.tensor([0.2, 0.5, 0.3]).log()
        >>> [round(kdloss.reverse_kl_baseline(logits, teacher_logits, kind=x).item(), 4) for x in ("value", "optimal")]
        [-0.2238, 0.0402]

    Source:
        Greensmith, Bartlett and Baxter (2004), theorem 8, for the reward of KDRL (arXiv 2506.02208) at one token.
    """
    _checks.one_of("kind", kind, _KINDS)
    _checks.tensors(teacher_logits=teacher_logits)
    student, teacher, softmax = prepare_logits(
        logits, teacher_logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl="auto"
    )
    behaviour = None
    if behaviour_logits is not None:
        behaviour = other_logits("behaviour_logits", behaviour_logits, student, softmax.shard).detach()
        widths = [student.shape[-1], behaviour.shape[-1]]
        true_vocab_size(vocab_size, widths, softmax.shard, teacher_name="behaviour_logits")
    _checks.row_temperatures(softmax.row_temperature)
    assert teacher is not None
    student, teacher = student.detach(), teacher.detach()
    baseline = -divergence(student, teacher, Form(REVERSE_KL), softmax)
    if kind == "optimal":
        inputs = (student, teacher, behaviour, softmax.row_temperature, softmax.temperature, softmax.local_size)
        mean, weightless = _optimal(*inputs) if softmax.shard is None else _in_blocks(*inputs, softmax.shard)
        baseline = torch.where(weightless, baseline, mean)
    return baseline.masked_fill(baseline == -math.inf, 0)


@operator("optimal_baseline")
def _optimal(
    logits: Tensor,
    teacher_logits: Tensor,
    behaviour_logits: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """(the mean of r under the weights (...,), bool (...,): whether no token has a weight)."""
    return _in_blocks(logits, teacher_logits, behaviour_logits, row_temperature, temperature, vocab_size, None)


@_optimal.register_fake
def _(logits: Tensor, teacher_logits: Tensor, behaviour_logits: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = _checks.promoted_dtype(logits, teacher_logits, behaviour_logits)
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=torch.bool)


def _in_blocks(
    logits: Tensor,
    teacher_logits: Tensor,
    behaviour_logits: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    vocab_size: int,  # of this rank's slice
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    dtype = _checks.promoted_dtype(logits, teacher_logits, behaviour_logits)
    mean = torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device)
    weightless = torch.empty_like(mean, dtype=torch.bool)
    behaviour = logits if behaviour_logits is None else behaviour_logits  # a placeholder that nothing reads
    sides = tuple(x[..., :vocab_size] for x in (logits, teacher_logits, behaviour))
    entries = _CPU_ENTRIES if logits.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // (vocab_size if shard is None else shard.widest))  # the same on every rank
    results = (mean.unsqueeze(-1), weightless.unsqueeze(-1))
    for x, y, z, *found, tau in flat_rows(*sides, *results, column(row_temperature, mean)):
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            given = [side[rows].to(dtype) for side in ((x, y) if behaviour_logits is None else (x, y, z))]
            if row_temperature is not None or temperature != 1:
                divisor = temperature if row_temperature is None else tau[rows].to(dtype)
                given = [side / divisor for side in given]
            block = _of_rows(given, shard)
            for whole, part in zip(found, block, strict=True):
                whole[rows, 0] = part
    return mean, weightless


def _of_rows(logits: list[Tensor], shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """`_optimal` of logits / τ (R, n) of student, teacher and, off-policy, behaviour policy."""
    log_q, log_p, *log_mu = log_softmax_of_slices(logits, shard)
    q = log_q.exp()
    weight = q * _squared_score(q, shard)
    scale = q.new_zeros(q.shape[0], 1)  # the log of what the ratios are divided by
    if log_mu:
        log_ratio = torch.where((q == 0) | (log_mu[0].exp() == 0), -math.inf, log_q - log_mu[0])
        scale = log_ratio.amax(-1, keepdim=True)
        weight *= (log_ratio - torch.where(scale == -math.inf, 0, scale)).exp()
    terms = torch.where(weight == 0, 0, weight * (log_p - log_q))
    sums = torch.cat([scale, weight.sum(-1, keepdim=True), terms.sum(-1, keepdim=True)], -1)
    scales, totals, means = of_ranks(sums, shard).unbind(-1)
    factors = torch.where(scales == -math.inf, 0, (scales - scales.amax(0)).exp())
    total = (factors * totals).sum(0)
    return torch.where(factors == 0, 0, factors * means).sum(0) / total, total == 0


def _squared_score(q: Tensor, shard: VocabShard | None) -> Tensor:
    """|s_v|² (R, n) of this rank's columns."""
    peak, place = q.max(-1, keepdim=True)
    others = q.scatter(-1, place, 0)
    sums = torch.cat([peak, others.sum(-1, keepdim=True), others.square().sum(-1, keepdim=True)], -1)
    peaks, rests, squares = of_ranks(sums, shard).unbind(-1)  # (ranks, R)
    # one rank has the most probable token of a row; those of the other ranks belong to the rest
    owner = peaks.argmax(0)
    owns = torch.arange(peaks.shape[0], device=peaks.device).unsqueeze(-1) == owner
    rest = torch.where(owns, rests, rests + peaks).sum(0)
    square = torch.where(owns, squares, squares + peaks.square()).sum(0)
    found = 1 - 2 * q + (square + peaks.amax(0).square()).unsqueeze(-1)
    mine = owner == (0 if shard is None else shard.rank)
    of_peak = torch.where(mine, rest.square() + square, found.gather(-1, place).squeeze(-1))
    return found.scatter(-1, place, of_peak.unsqueeze(-1))
