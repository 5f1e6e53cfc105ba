"""Divergences from the K log-probs a token that a scoring server gives, from the student's logits: one value a token.

S are the K ids, p the teacher, q the student, P and Q their masses on S. All else is one more outcome, the bucket:

    F = sum_S p log(p / q) + (1 - P) log((1 - P) / (1 - Q))
    dz = q - p on S,   q - (1 - P) q / (1 - Q) elsewhere

The ids of a row are spread evenly over the vocabulary from a random one on. A teacher's are mostly frequent tokens,
which lie close together: spread out, they meet the most cache lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ours, peers, problems, truth
from .cases import Case
from .contenders import Contender, Function, Problem, Variant
from .truth import Rows, Truth

NAMES = {"topk-forward-kl": "topk_forward_kl"}
MASS = 0.9  # P


def problem(case: Case, device: str, with_truth: bool) -> Problem:
    logits = problems.normal(
        case.tokens, case.vocab, scale=problems.LOGIT_SCALE, dtype=case.dtype, device=device, seed=0
    )
    logits.requires_grad_()
    first = torch.randint(case.vocab, (case.tokens, 1), generator=torch.Generator().manual_seed(6))
    ids = ((first + torch.arange(case.kept) * (case.vocab // case.kept)) % case.vocab).to(device)
    drawn = problems.normal(case.tokens, case.kept, scale=2.0, dtype="float32", device=device, seed=7)
    logp = torch.log_softmax(drawn, -1) + torch.tensor(MASS, device=device).log()
    g = problems.per_token(case.tokens, device, 4)
    held = _truth(logits.detach(), logp, ids, g) if with_truth else None
    return {"": Variant((logits, logp, ids), (logits,), (g,), held)}


def _truth(logits: Tensor, logp: Tensor, ids: Tensor, g: Tensor) -> Truth:
    dtype = torch.float64 if logits.numel() <= truth.SMALL else torch.float32
    step = max(1, truth.CHUNK_ELEMENTS // logits.shape[1])
    starts = range(0, logits.shape[0], step)
    parts = [_rows(logits[i : i + step], logp[i : i + step], ids[i : i + step], dtype)[0] for i in starts]
    rows = truth.sample(logits.shape[0], logits.device)
    dz = _rows(logits[rows], logp[rows], ids[rows], dtype)[1]
    return Truth((torch.cat(parts),), (Rows(rows, dz * g[rows, None].to(dtype)),))


def _rows(logits: Tensor, logp: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the divergence (n,), dz (n, V)) of some rows."""
    log_q = torch.log_softmax(logits.to(dtype), -1)
    log_p, kept = logp.to(dtype), log_q.gather(-1, ids)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)  # log(1 - Q), without a difference
    p = log_p.exp()
    tail = -torch.expm1(torch.logsumexp(log_p, -1, keepdim=True))  # 1 - P
    value = (p * (log_p - kept)).sum(-1) + (tail * (tail.log() - rest)).squeeze(-1)
    q = log_q.exp()
    return value, (q - tail * (log_q - rest).exp()).scatter(-1, ids, q.gather(-1, ids) - p)


def contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    found = peers.collect({"kdloss": lambda: _ours(case.path)}, absent, ours=True, units=1.2)
    found.append(Contender("naive", naive, units=8.0 if case.dtype != "float32" else 4.0))
    if case.compiled:
        found.append(Contender("naive compiled", naive, compiled=True))
    return found


def _ours(path: str) -> Function:
    topk = ours.public(NAMES[path])

    def kdloss_topk(logits: Tensor, teacher_topk_logp: Tensor, teacher_topk_ids: Tensor) -> tuple[Tensor, ...]:
        return (topk(logits, teacher_topk_logp, teacher_topk_ids, tail="bucket"),)

    return kdloss_topk


def naive(logits: Tensor, teacher_topk_logp: Tensor, teacher_topk_ids: Tensor) -> tuple[Tensor, ...]:
    """As trainers write it, 1 - Q as a difference: right while the student has mass outside of S."""
    log_q = torch.log_softmax(logits.float(), -1).gather(-1, teacher_topk_ids)
    p, q = teacher_topk_logp.exp(), log_q.exp()
    tail, rest = 1 - p.sum(-1), 1 - q.sum(-1)
    return ((p * (teacher_topk_logp - log_q)).sum(-1) + tail * (tail.log() - rest.log()),)
