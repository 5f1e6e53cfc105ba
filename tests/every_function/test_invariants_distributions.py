"""Holds the invariants of functions of whole distributions: rows are independent, masked rows leave no trace.

Divergences from logits, from a teacher's top K and from hidden states, and `fused_linear_loss`; value and gradient.
float64, so results differ only by the order of sums of at most 9 terms of size 10: a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss

GARBAGE = (math.nan, math.inf, -math.inf, 1e30)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
SHARE: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
}
TOPK = [(name, tail) for name in ("forward_kl", "reverse_kl", "generalized_jsd") for tail in ("bucket", "renormalize")]


class Rows(NamedTuple):
    """Rows of both models, from one seed. Rows are independent, so permuting them permutes the batch."""

    hidden: Tensor  # (T, 3)
    teacher_hidden: Tensor  # (T, 4)
    weight: Tensor  # (V, 3)
    teacher_weight: Tensor  # (V, 4)
    # computed once: a product of fewer rows rounds differently, and log(1 - P) amplifies that
    logits: Tensor  # (T, V)
    teacher_logits: Tensor  # (T, V)
    top_logp: Tensor  # (T, 2)
    top_ids: Tensor  # (T, 2)
    mask: Tensor  # (T,)
    labels: Tensor  # (T,), some -100

    def at(self, index: Tensor) -> Rows:
        return self._replace(
            hidden=self.hidden[index],
            teacher_hidden=self.teacher_hidden[index],
            logits=self.logits[index],
            teacher_logits=self.teacher_logits[index],
            top_logp=self.top_logp[index],
            top_ids=self.top_ids[index],
            mask=self.mask[index],
            labels=self.labels[index],
        )

    def filled(self, value: float) -> Rows:
        rows = ~self.mask[:, None]
        return self._replace(
            hidden=self.hidden.masked_fill(rows, value), teacher_hidden=self.teacher_hidden.masked_fill(rows, value)
        )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, Tensor]:
    """A batch of 0 to 6 rows over 3 to 9 entries, and an order of its rows."""
    count, vocab, scale = draw(st.integers(0, 6)), draw(st.integers(3, 9)), draw(st.sampled_from((0.1, 1.0, 5.0)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=random, dtype=torch.float64)

    labels = torch.randint(0, vocab, (count,), generator=random)
    labels = labels.masked_fill(torch.rand(count, generator=random) < 0.2, -100)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    mask &= labels != -100
    hidden, teacher_hidden, weight, teacher_weight = (
        normal(n, d) for n, d in ((count, 3), (count, 4), (vocab, 3), (vocab, 4))
    )
    logits, teacher_logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    top = teacher_logits.log_softmax(-1).topk(2)
    rows = Rows(
        hidden, teacher_hidden, weight, teacher_weight, logits, teacher_logits, top.values, top.indices, mask, labels
    )
    return rows, torch.tensor(draw(st.permutations(range(count))), dtype=torch.int64)


Outcome = tuple[Tensor, Tensor, Tensor]  # per row, its gradient, and the gradient of what rows share


def of_logits(name: str, tail: str | None = None) -> Callable[[Rows], Outcome]:
    def run(batch: Rows) -> Outcome:
        logits = batch.logits.clone().requires_grad_()
        if tail is None:
            values = getattr(kdloss, name)(logits, batch.teacher_logits, **SHARE[name])
        else:
            teacher_top = (batch.top_logp, batch.top_ids)
            values = getattr(kdloss, f"topk_{name}")(logits, *teacher_top, tail=tail, **SHARE[name])
        (gradient,) = torch.autograd.grad(values.sin().sum(), logits)
        return values.detach(), gradient, logits.new_zeros(0)

    return run


def of_hidden(name: str) -> Callable[[Rows], Outcome]:
    def run(batch: Rows) -> Outcome:
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        teacher = (batch.teacher_hidden, batch.teacher_weight)
        function = getattr(kdloss, f"linear_{name}")
        values = function(hidden, weight, *teacher, loss_mask=batch.mask, **SHARE[name])
        return values.detach(), *torch.autograd.grad(values.sin().sum(), (hidden, weight))

    return run


def fused(batch: Rows) -> Outcome:
    """With the normalizer of the whole batch, so the parts sum to the whole."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    target = batch.teacher_hidden.sum(-1)

    def loss(logp: Tensor, entropy: Tensor, target: Tensor) -> Tensor:
        return (logp - target).square() + entropy.sin()

    out = kdloss.fused_linear_loss(hidden, weight, batch.labels, loss, target, loss_mask=batch.mask, normalizer=7.0)
    per_row, shared = torch.autograd.grad(out.loss, (hidden, weight))
    return torch.stack([out.logp, out.entropy], -1), per_row, torch.cat([shared.flatten(), out.loss.detach()[None]])


def rows_are_independent(run: Callable[[Rows], Outcome], batch: Rows, order: Tensor) -> None:
    values, per_row, shared = run(batch)
    parts = [run(batch.at(torch.tensor([t]))) for t in range(batch.mask.shape[0])]
    torch.testing.assert_close(values, torch.cat([values[:0], *(p[0] for p in parts)]), **CLOSE)
    torch.testing.assert_close(per_row, torch.cat([per_row[:0], *(p[1] for p in parts)]), **CLOSE)
    torch.testing.assert_close(shared, sum((p[2] for p in parts), torch.zeros_like(shared)), rtol=1e-10, atol=1e-10)
    moved = run(batch.at(order))
    torch.testing.assert_close(moved[0], values[order], **CLOSE)
    torch.testing.assert_close(moved[1], per_row[order], **CLOSE)
    torch.testing.assert_close(moved[2], shared, rtol=1e-10, atol=1e-10)


def masked_rows_leave_no_trace(run: Callable[[Rows], Outcome], batch: Rows, garbage: float) -> None:
    clean, dirty = run(batch), run(batch.filled(garbage))
    assert all(torch.equal(x, y) for x, y in zip(dirty, clean, strict=True))
    assert not clean[0][~batch.mask].any()
    assert not clean[1][~batch.mask].any()


@pytest.mark.parametrize("name", SHARE)
@given(drawn=batches())
def test_rows_of_divergences_are_independent(name: str, drawn: tuple[Rows, Tensor]):
    rows_are_independent(of_logits(name), *drawn)


@pytest.mark.parametrize(("name", "tail"), TOPK)
@given(drawn=batches())
def test_rows_of_topk_divergences_are_independent(name: str, tail: str, drawn: tuple[Rows, Tensor]):
    rows_are_independent(of_logits(name, tail), *drawn)


@pytest.mark.parametrize("name", SHARE)
@given(drawn=batches(), garbage=st.sampled_from(GARBAGE))
def test_a_linear_divergence_is_the_sum_of_its_trained_rows(name: str, drawn: tuple[Rows, Tensor], garbage: float):
    rows_are_independent(of_hidden(name), *drawn)
    masked_rows_leave_no_trace(of_hidden(name), drawn[0], garbage)


@given(drawn=batches(), garbage=st.sampled_from(GARBAGE))
def test_a_fused_loss_is_the_sum_of_its_micro_batches(drawn: tuple[Rows, Tensor], garbage: float):
    rows_are_independent(fused, *drawn)
    masked_rows_leave_no_trace(fused, drawn[0], garbage)
