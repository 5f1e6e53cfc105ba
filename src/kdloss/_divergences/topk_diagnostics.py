"""Detached statistics of a teacher's top K, to log beside a loss: how much it covers. Nothing here syncs.

The student's log-probs of the ids come from one pass over the logits. Whether an id is among the student's own top k is
read from the logits as they are, before the temperature: it is where its logit is at least the k-th largest, so ties
have the same answer on every device. If ranks hold slices of the vocabulary, each brings its own K largest logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._logprobs.from_logits import logprobs_from_logits
from kdloss._softmax.vocabulary import IGNORE_INDEX, Softmax, check_labels, prepare_logits

from .sharded import of_ranks
from .topk import TOPK_ARGS, check_support

DIAGNOSTICS_ARGS = TOPK_ARGS | {
    "logits": "(..., V) of the student, of any floating dtype and any strides. Detached.",
    "labels": "(...,) int64, the sampled token of each row, or (..., M) for M samples per row. -100 is ignored.",
    "loss_mask": "(...,) bool, True at trained tokens. Values of other rows, NaN included, reach no result.",
    "vocab_size": "the true V, where the last columns are padding: they get no mass.",
}


@documented(DIAGNOSTICS_ARGS)
def topk_diagnostics(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., M)
    teacher_topk_logp: Tensor,  # (..., K)
    teacher_topk_ids: Tensor,  # (..., K) int
    *,
    loss_mask: Tensor,  # (...,) bool
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
) -> dict[str, Tensor]:
    """Statistics of a teacher's top K over the trained tokens: how much of both models it covers.

    S is the set of the k <= K ids of a row that are no padding.

    | key | unit | meaning |
    |---|---|---|
    | `tokens` | tokens | trained tokens |
    | `scored` | tokens | trained tokens with at least one id; the means are over these |
    | `teacher_mass` | - | mean of sum_S p: 1 minus the mass of the tail that the student is told nothing of |
    | `student_mass` | - | mean of sum_S q: what a loss on S alone sees of the student |
    | `overlap` | - | mean share of S that is among the student's own k most probable tokens |
    | `sampled_inside` | - | mean share of the sampled tokens that are in S |

    Args:
        {logits}
        {labels}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {loss_mask}
        {temperature}
        {vocab_size}
        {shard}

    Returns:
        0-dim detached tensors on the device of `logits`; means are 0 where no token is scored. A token of the student
        that is as probable as its k-th counts as one of its k; one without mass does not. Rows of padding only are left
        out of the means.

    Expected gradient:
        None: for logging.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, or (on the CPU) a label is outside the
            vocabulary, an id is twice in a row or outside the vocabulary, or `loss_mask` is True where every label is
            -100. Elsewhere, and under `torch.compile`, a bad label or id at a trained token makes the means NaN.

    Example:
        >>> import torch, kdloss
        >>> logits, labels = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.tensor([3])
        >>> top_logp, top_ids = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0, 3]])
        >>> found = kdloss.topk_diagnostics(logits, labels, top_logp, top_ids, loss_mask=torch.tensor([True]))
        >>> {name: round(x.item(), 4) for name, x in found.items()}
        {'tokens': 1, 'scored': 1, 'teacher_mass': 0.75, 'student_mass': 0.625, 'overlap': 0.5, 'sampled_inside': 1.0}
    """
    logits, _, softmax = prepare_logits(
        logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl="auto"
    )
    logits, rows = logits.detach(), logits.shape[:-1]
    _checks.tensors(labels=labels, loss_mask=loss_mask)
    _checks.boolean(loss_mask=loss_mask)
    if loss_mask.shape != rows:
        raise ValueError(f"loss_mask must match the rows of logits {tuple(rows)}, got {tuple(loss_mask.shape)}")
    _checks.same_device("logits", logits, labels=labels, loss_mask=loss_mask)
    check_labels(labels, rows, softmax.vocab_size, loss_mask=loss_mask)
    support = check_support("logits", logits, rows, teacher_topk_logp, teacher_topk_ids, softmax.vocab_size)
    dtype = _checks.promoted_dtype(logits, teacher_topk_logp)
    size = support.valid().sum(-1)
    scored = loss_mask & (size > 0)
    read = support.valid() & scored.unsqueeze(-1)

    columns = torch.where(read, support.ids, IGNORE_INDEX)
    log_q, _ = logprobs_from_logits(logits, columns, None, softmax, with_entropy=False)
    among = read & _among_largest(logits, columns, size, softmax)
    labels = labels.unsqueeze(-1) if labels.shape == rows else labels
    sampled = labels != IGNORE_INDEX
    inside = (labels.unsqueeze(-1) == columns.unsqueeze(-2)).any(-1) & sampled
    per_row = torch.stack(
        [
            torch.where(read, support.logp.to(dtype), -math.inf).exp().sum(-1),
            torch.where(read, log_q.to(dtype), -math.inf).exp().sum(-1),
            among.sum(-1) / size.clamp(min=1).to(dtype),
            inside.sum(-1) / sampled.sum(-1).clamp(min=1).to(dtype),
        ]
    )
    if support.broken is not None:
        outside = sampled & ((labels < 0) | (labels >= softmax.vocab_size))
        per_row = per_row.masked_fill(support.broken | outside.any(-1), math.nan)
    count = scored.sum()
    means = torch.where(scored, per_row, 0).flatten(1).sum(1) / count.clamp(min=1)
    names = ("teacher_mass", "student_mass", "overlap", "sampled_inside")
    return {"tokens": loss_mask.sum(), "scored": count, **dict(zip(names, means.unbind(), strict=True))}


def _among_largest(logits: Tensor, columns: Tensor, size: Tensor, softmax: Softmax) -> Tensor:
    """(..., K) bool: whether a column of a row is among its `size` largest logits, and has mass."""
    k, start = columns.shape[-1], 0 if softmax.shard is None else softmax.shard.start
    logits, columns = logits[..., : softmax.local_size], columns - start
    here = (columns >= 0) & (columns < softmax.local_size)
    own = logits.gather(-1, columns.clamp(0, softmax.local_size - 1)).masked_fill(~here, -math.inf)
    largest = logits.topk(min(k, softmax.local_size)).values
    largest = torch.nn.functional.pad(largest, (0, k - largest.shape[-1]), value=-math.inf)
    own, largest = of_ranks(torch.cat([own, largest], -1), softmax.shard).split(k, -1)
    own, largest = own.amax(0), largest.movedim(0, -2).flatten(-2).topk(k).values
    least = largest.gather(-1, (size - 1).clamp(min=0).unsqueeze(-1))
    found: Tensor = (own >= least) & (own > -math.inf)
    return found
