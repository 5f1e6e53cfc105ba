"""The mean and the variance of the gradient of one batch, over every batch that a policy can sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.testing._calls import (
    call_by_name,
    checked_value,
    connected_gradient,
    loss_value,
    not_finite_text,
)
from kdloss.testing._sequence_tree import SequenceTree, batch_and_rows

MOST_BATCHES = 30_000  # an audit enumerates them about 8 times, so one core takes 100 to 200 a second


class Moments(NamedTuple):
    """Of the gradient g of one batch."""

    mean: Tensor  # (N, V) E[g]
    variance: float  # trace of the covariance of g
    scale: float  # root mean square of g; rounding errors are judged relative to it
    values: Tensor  # (outcomes,) of the loss
    connected: bool  # whether autograd connects the loss to the student's logits
    eps: float  # of the loss's dtype
    per_token: bool


def gradient_moments(
    loss: Callable[..., Any],
    tree: SequenceTree,
    under: str,
    batch_size: int,
    normalizer: float | None,
    rtol: float | None = None,
) -> Moments:
    """Enumerate the batches; with `rtol`, refuse losses for which that is not right."""
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()
    if rtol is None:
        value = loss_value(loss, tree, under, batch_size, normalizer)
    else:
        value = checked_value(loss, tree, under, batch_size, normalizer, rtol, MOST_BATCHES)
    batches: list[tuple[int, ...]]
    if value.ndim == 1:
        # linear in the sequences: single sequences suffice, and a batch is `copies` independent ones
        copies, factor = batch_size, 1 if normalizer is None else batch_size / normalizer
        batches = [(i,) for i in range(len(tree.sequences))]
        each, gradient, connected = _of_sequences(loss, tree, under, normalizer)
        each, gradient = factor * each, factor * gradient
    else:
        copies, connected = 1, False
        batches = list(itertools.product(range(len(tree.sequences)), repeat=batch_size))
        values, gradients = [], []
        for batch in batches:
            scalar = call_by_name(loss, tree.batch(batch, under=under), normalizer)
            of_batch = connected_gradient(scalar, tree)
            connected |= of_batch is not None
            values.append(scalar.detach())
            gradients.append(torch.zeros_like(tree.student) if of_batch is None else of_batch)
        each, gradient = torch.stack(values), torch.stack(gradients)
    good = gradient.isfinite().all(-1).all(-1) & ~each.isnan()
    if not bool(good.all()):
        raise ValueError(not_finite_text(loss, tree, under, batches[int(good.int().argmin())], normalizer))
    weight = torch.stack([probability[list(batch)].prod() for batch in batches])
    mean = torch.einsum("s,snv->nv", weight, gradient)
    variance = float((weight * (gradient - mean).square().sum((1, 2))).sum()) / copies
    scale = float((weight * gradient.square().sum((1, 2))).sum().sqrt())
    return Moments(mean, variance, scale, each, connected, torch.finfo(value.dtype).eps, value.ndim == 1)


def _of_sequences(
    loss: Callable[..., Any], tree: SequenceTree, under: str, normalizer: float | None
) -> tuple[Tensor, Tensor, bool]:
    """Of a per-token loss: the value (S,) and the gradient (S, N, V) of each sequence, and `Moments.connected`."""
    batch, rows, prefix = batch_and_rows(tree, range(len(tree.sequences)), under)
    # select trained tokens instead of multiplying by 0, which would keep NaN
    value = call_by_name(loss, batch, normalizer)[batch.loss_mask]
    sequence = torch.repeat_interleave(batch.lengths)
    each = torch.zeros(len(tree.sequences), dtype=value.dtype).index_add(0, sequence, value.detach())
    gradient = torch.zeros(len(tree.sequences), *tree.student.shape, dtype=tree.student.dtype)
    of_rows: Tensor | None = None
    if value.requires_grad:
        (of_rows,) = torch.autograd.grad(value.sum(), rows, allow_unused=True, retain_graph=True)
    if of_rows is None:
        return each, gradient, False
    return each, gradient.index_put((sequence, prefix), of_rows), True
