"""Holds the invariants of the losses of a top K, with or without samples: rows alone, masked ones leave no trace.

float64, so results differ only by the order of sums of at most 9 terms of size 10: a few roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from invariant_rows import GARBAGE, Outcome, Rows, batches, masked_rows_leave_no_trace, rows_are_independent


def sampled(batch: Rows, labels: Tensor) -> tuple[Tensor, ...]:
    """The arguments after the student's: the teacher's log-probs are NaN where the label is ignored."""
    ignored = labels == -100
    teacher_logp = batch.teacher_logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return labels, teacher_logp.masked_fill(ignored, torch.nan), batch.top_logp, batch.top_ids


def of_logits(batch: Rows) -> Outcome:
    logits = batch.logits.clone().requires_grad_()
    values = kdloss.topk_sampled_reverse_kl(logits, *sampled(batch, batch.labels), max_ratio=0.8)
    (gradient,) = torch.autograd.grad(values.sin().sum(), logits)
    return values.detach(), gradient, logits.new_zeros(0)


def of_hidden(batch: Rows) -> Outcome:
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    arguments = sampled(batch, batch.labels)
    values = kdloss.linear_topk_sampled_reverse_kl(hidden, weight, *arguments, loss_mask=batch.mask)
    return values.detach(), *torch.autograd.grad(values.sin().sum(), (hidden, weight))


DIVERGENCES = {
    "forward_kl": partial(kdloss.linear_topk_forward_kl, tail="generalized"),
    "reverse_kl": partial(kdloss.linear_topk_reverse_kl, tail="generalized"),
    "generalized_jsd": partial(kdloss.linear_topk_generalized_jsd, tail="bucket", beta=0.3),
}


def divergence(name: str, batch: Rows) -> Outcome:
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    ids = batch.top_ids.masked_fill(batch.labels[:, None] % 2 == 0, -1)  # rows of padding only
    values = DIVERGENCES[name](hidden, weight, batch.top_logp, ids, loss_mask=batch.mask)
    return values.detach(), *torch.autograd.grad(values.sin().sum(), (hidden, weight))


@pytest.mark.parametrize("name", DIVERGENCES)
@given(drawn=batches(), garbage=st.sampled_from(GARBAGE))
def test_rows_of_linear_topk_divergences_are_independent(name: str, drawn: tuple[Rows, Tensor], garbage: float):
    rows_are_independent(partial(divergence, name), *drawn)
    masked_rows_leave_no_trace(partial(divergence, name), drawn[0], garbage)


@pytest.mark.parametrize("run", [of_logits, of_hidden])
@given(drawn=batches())
def test_rows_of_sampled_topk_losses_are_independent(run: Callable[[Rows], Outcome], drawn: tuple[Rows, Tensor]):
    rows_are_independent(run, *drawn)


@given(drawn=batches(), garbage=st.sampled_from(GARBAGE))
def test_masked_rows_of_a_head_leave_no_trace(drawn: tuple[Rows, Tensor], garbage: float):
    masked_rows_leave_no_trace(of_hidden, drawn[0], garbage)


@given(drawn=batches())
def test_a_support_of_the_whole_vocabulary_is_the_reverse_kl(drawn: tuple[Rows, Tensor]):
    batch = drawn[0]
    log_p = batch.teacher_logits.log_softmax(-1)
    everything = torch.arange(log_p.shape[-1]).expand(log_p.shape)
    logits = batch.logits.clone().requires_grad_()
    labels, teacher_logp, *_ = sampled(batch, batch.labels)
    value = kdloss.topk_sampled_reverse_kl(logits, labels, teacher_logp, log_p, everything)
    exact = torch.where(labels != -100, kdloss.reverse_kl(logits, batch.teacher_logits), 0)
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)
    found, wanted = (torch.autograd.grad(x.sin().sum(), logits)[0] for x in (value, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@given(drawn=batches(), garbage=st.sampled_from(GARBAGE))
def test_topk_diagnostics_are_means_of_their_rows(drawn: tuple[Rows, Tensor], garbage: float):
    """In any order, whatever untrained rows hold; shares are in 0 .. 1."""
    batch, order = drawn

    def run(rows: Rows, logits: Tensor) -> dict[str, Tensor]:
        teacher = (rows.top_logp, rows.top_ids)
        return kdloss.topk_diagnostics(logits, rows.labels, *teacher, loss_mask=rows.mask)

    whole = run(batch, batch.logits)
    dirty = run(batch, batch.logits.masked_fill(~batch.mask[:, None], garbage))
    assert all(torch.equal(dirty[name], x) for name, x in whole.items())
    moved, parts = run(batch.at(order), batch.logits[order]), []
    for t in range(len(batch.mask)):
        one = batch.at(torch.tensor([t]))
        parts.append(run(one, one.logits))
    for name, x in whole.items():
        count = 1 if name in ("tokens", "scored") else whole["scored"]
        total = sum((part[name] for part in parts), torch.zeros_like(x))
        torch.testing.assert_close(total, count * x, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(moved[name], x, rtol=1e-11, atol=1e-12)
        assert name in ("tokens", "scored") or 0 <= x <= 1 + 1e-12
