"""Holds the invariants of functions of whole distributions: rows are independent, masked rows leave no trace.

Divergences from logits, from a teacher's top K and from hidden states, and `fused_linear_loss`; value and gradient.
float64, so results differ only by the order of sums of at most 9 terms of size 10: a few roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from invariant_rows import GARBAGE, Outcome, Rows, batches, masked_rows_leave_no_trace, rows_are_independent

SHARE: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
}
TOPK = [(name, tail) for name in ("forward_kl", "reverse_kl", "generalized_jsd") for tail in ("bucket", "renormalize")]


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


@pytest.mark.parametrize("name", SHARE)
@given(drawn=batches())
def test_rows_of_divergences_are_independent(name: str, drawn: tuple[Rows, Tensor]):
    rows_are_independent(of_logits(name), *drawn)


@pytest.mark.parametrize("kind", ["value", "optimal"])
@given(drawn=batches())
def test_rows_of_baselines_are_independent(kind: str, drawn: tuple[Rows, Tensor]):
    def run(batch: Rows) -> Outcome:
        behaviour = batch.teacher_logits.flip(-1)
        found = kdloss.reverse_kl_baseline(batch.logits, batch.teacher_logits, kind=kind, behaviour_logits=behaviour)
        return found, torch.zeros_like(batch.logits), batch.logits.new_zeros(0)

    rows_are_independent(run, *drawn)


@given(drawn=batches(), shift=st.floats(-50, 50))
def test_a_baseline_lies_between_the_rewards_and_moves_with_them(drawn: tuple[Rows, Tensor], shift: float):
    """A mean of r: of the tokens of a row, and unchanged by a constant that is added to all logits of a row."""
    batch = drawn[0]
    reward = batch.teacher_logits.log_softmax(-1) - batch.logits.log_softmax(-1)
    for behaviour in (None, batch.teacher_logits.flip(-1)):
        options = {"kind": "optimal", "behaviour_logits": behaviour}
        found = kdloss.reverse_kl_baseline(batch.logits, batch.teacher_logits, **options)
        assert (found >= reward.amin(-1) - 1e-9).all()
        assert (found <= reward.amax(-1) + 1e-9).all()
        moved = kdloss.reverse_kl_baseline(batch.logits + shift, batch.teacher_logits - shift, **options)
        torch.testing.assert_close(moved, found, rtol=1e-9, atol=1e-9)


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
