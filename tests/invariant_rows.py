"""Rows of two models, drawn by hypothesis, and the invariants of functions of whole distributions.

For `every_function/test_invariants_distributions.py` and `test_invariants_topk.py`. float64, so results differ only by
the order of sums of at most 9 terms of size 10: a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


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


def assert_near(actual: Tensor, expected: Tensor, *, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    """`assert_close` of tensors of one dtype, which would take longer than a small function."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.isclose(actual, expected, rtol=rtol, atol=atol).all(), f"{actual} is not {expected}"


def rows_are_independent(run: Callable[[Rows], Outcome], batch: Rows, order: Tensor) -> None:
    values, per_row, shared = run(batch)
    parts = [run(batch.at(torch.tensor([t]))) for t in range(batch.mask.shape[0])]
    assert_near(values, torch.cat([values[:0], *(p[0] for p in parts)]))
    assert_near(per_row, torch.cat([per_row[:0], *(p[1] for p in parts)]))
    assert_near(shared, sum((p[2] for p in parts), torch.zeros_like(shared)), rtol=1e-10, atol=1e-10)
    moved = run(batch.at(order))
    assert_near(moved[0], values[order])
    assert_near(moved[1], per_row[order])
    assert_near(moved[2], shared, rtol=1e-10, atol=1e-10)


def masked_rows_leave_no_trace(run: Callable[[Rows], Outcome], batch: Rows, garbage: float) -> None:
    clean, dirty = run(batch), run(batch.filled(garbage))
    assert all(torch.equal(x, y) for x, y in zip(dirty, clean, strict=True))
    assert not clean[0][~batch.mask].any()
    assert not clean[1][~batch.mask].any()
