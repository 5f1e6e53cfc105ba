"""Divergences between whole next-token distributions, from both models' hidden states: mean over the trained tokens.

p is the teacher, q the student, m = b p + (1 - b) q. With a the derivative of the divergence in q, the logits' gradient
is dz = q (a - sum_v q a):

    JSD      b KL(p || m) + (1 - b) KL(q || m)     a = (1 - b) log(q / m)
    forward  KL(p || q)                            dz = q - p
    reverse  KL(q || p)                            a = log(q / p)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdloss

from . import ours, peers, problems, truth
from .cases import Case
from .contenders import Contender, Function, Problem, Variant
from .truth import Rows, Source, Truth

BETA = 0.5
NAMES = {"jsd": "linear_generalized_jsd", "forward-kl": "linear_forward_kl", "reverse-kl": "linear_reverse_kl"}
PEER_BETA = {"jsd": BETA, "forward-kl": 0.0, "reverse-kl": 1.0}  # TRL's and Liger's ends of one scale


def divergence(path: str, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and a: its derivative in q, up to a constant of the row."""
    q, p = log_q.exp(), log_p.exp()
    if path == "forward-kl":
        return (p * (log_p - log_q)).sum(-1), -p / q
    if path == "reverse-kl":
        return (q * (log_q - log_p)).sum(-1), log_q - log_p
    log_m = (BETA * p + (1 - BETA) * q).log()
    each = BETA * p * (log_p - log_m) + (1 - BETA) * q * (log_q - log_m)
    return each.sum(-1), (1 - BETA) * (log_q - log_m)


def problem(case: Case, device: str, with_truth: bool) -> Problem:
    hidden, weight = problems.head(case, device)
    scale = problems.LOGIT_SCALE / case.teacher_width**0.5
    rows, columns = (case.tokens, case.teacher_width), (case.vocab, case.teacher_width)
    teacher_hidden = problems.normal(*rows, scale=1.0, dtype=case.dtype, device=device, seed=10)
    teacher_weight = problems.normal(*columns, scale=scale, dtype=case.dtype, device=device, seed=11)
    mask = problems.random_mask(case.tokens, 1.0, device)
    arguments, leaves = (hidden, weight, teacher_hidden, teacher_weight, mask), (hidden, weight)
    held = None
    if with_truth:
        student = Source(hidden=hidden, weight=weight)
        teacher = Source(hidden=teacher_hidden, weight=teacher_weight)
        held = _truth(case.path, student, teacher, mask)
    return {"": Variant(arguments, leaves, (torch.ones((), device=device),), held)}


def _truth(path: str, student: Source, teacher: Source, mask: Tensor) -> Truth:
    known = [_row_sums(path, student, teacher, start) for start in _chunks(student)]
    values, mean_a, lse, teacher_lse = (torch.cat(part) for part in zip(*known, strict=True))
    g = mask.to(student.dtype) / mask.sum()

    rows = truth.sample(student.tokens, mask.device)
    log_q = student.rows(rows) - lse[rows, None]
    log_p = teacher.rows(rows) - teacher_lse[rows, None]
    dz = log_q.exp() * (divergence(path, log_q, log_p)[1] - mean_a[rows, None]) * g[rows, None]
    hidden_rows = Rows(rows, dz @ student.wide[1])  # type: ignore[index]

    columns = truth.sample(student.vocab, mask.device)
    log_q = student.columns(columns) - lse[:, None]
    log_p = teacher.columns(columns) - teacher_lse[:, None]
    dz = log_q.exp() * (divergence(path, log_q, log_p)[1] - mean_a[:, None]) * g[:, None]
    weight_rows = Rows(columns, dz.T @ student.wide[0])  # type: ignore[index]
    return Truth(((g * values).sum(),), (hidden_rows, weight_rows))


def _chunks(source: Source) -> list[slice]:
    step = max(1, truth.CHUNK_ELEMENTS // source.vocab)
    return [slice(start, start + step) for start in range(0, source.tokens, step)]


def _row_sums(path: str, student: Source, teacher: Source, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: the divergence, sum_v q a, and both log-sum-exps."""
    with torch.no_grad():
        z, teacher_z = student.rows(chunk), teacher.rows(chunk)
        lse, teacher_lse = torch.logsumexp(z, -1), torch.logsumexp(teacher_z, -1)
        log_q = z - lse[:, None]
        value, a = divergence(path, log_q, teacher_z - teacher_lse[:, None])
        return value, (log_q.exp() * a).sum(-1), lse, teacher_lse


def contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    path = case.path
    units = 16.0 if case.dtype != "float32" else 8.0
    found = peers.collect({"kdloss": lambda: _ours(path)}, absent, ours=True, units=1.2)
    found.append(Contender("naive", _naive(path), units=units))
    made = {"TRL": lambda: _trl(path), "Liger JSD": lambda: _liger(path, device)}
    return found + peers.collect(made, absent, units=1.0)


def _ours(path: str) -> Function:
    linear = ours.public(NAMES[path])
    options = {"beta": BETA} if path == "jsd" else {}

    def kdloss_divergence(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ...]:
        each = linear(hidden, weight, teacher_hidden, teacher_weight, loss_mask=loss_mask, **options)
        return (kdloss.token_mean(each, loss_mask=loss_mask),)

    return kdloss_divergence


def _naive(path: str) -> Function:
    def naive(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ...]:
        log_q = torch.log_softmax(F.linear(hidden, weight).float(), -1)
        with torch.no_grad():
            log_p = torch.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), -1)
        return (torch.where(loss_mask, _naive_divergence(path, log_q, log_p), 0).sum() / loss_mask.sum(),)

    return naive


def _naive_divergence(path: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    if path == "forward-kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if path == "reverse-kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(1 / BETA, device=log_q.device))
    teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    student = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return BETA * teacher + (1 - BETA) * student


def _trl(path: str) -> Function:
    loss = peers.load("trl.trainer.distillation_trainer", "_chunked_divergence_loss")

    def trl(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ...]:
        rows: Any = (hidden[None], teacher_hidden[None], weight, teacher_weight, loss_mask[None])
        return (loss(*rows, PEER_BETA[path])[0],)

    return trl


def _liger(path: str, device: str) -> Function:
    peers.need_gpu(device)
    fused = peers.load("liger_kernel.transformers.functional", "liger_fused_linear_jsd")

    def liger(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ...]:
        return (fused(hidden, weight, teacher_hidden, teacher_weight, jsd_beta=PEER_BETA[path]),)

    return liger
