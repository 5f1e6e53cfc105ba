"""The mean and the variance of the gradient of one batch, over every batch that a policy can sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.testing._calls import (
    call_by_name,
    checked_value,
    connected_gradient,
    loss_value,
    not_finite_text,
    whole_batch,
)
from kdloss.testing._sequence_tree import SequenceTree


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
        value = checked_value(loss, tree, under, batch_size, normalizer, rtol)
    batches: list[tuple[int, ...]]
    scalars: Iterable[Tensor]
    if value.ndim == 1:
        # linear in the sequences: single sequences suffice, and a batch is `copies` independent ones
        copies, factor = batch_size, 1 if normalizer is None else batch_size / normalizer
        batches = [(i,) for i in range(len(tree.sequences))]
        whole = whole_batch(tree, under)
        bounds = itertools.pairwise(whole.cu_seqlens.tolist())
        # select trained tokens instead of multiplying by 0, which would keep NaN
        scalars = (factor * value[start:stop][whole.loss_mask[start:stop]].sum() for start, stop in bounds)
    else:
        copies = 1
        batches = list(itertools.product(range(len(tree.sequences)), repeat=batch_size))
        scalars = (call_by_name(loss, tree.batch(batch, under=under), normalizer) for batch in batches)

    values, gradients, connected = [], [], False
    for batch, scalar in zip(batches, scalars, strict=True):
        gradient = connected_gradient(scalar, tree)
        connected |= gradient is not None
        gradient = torch.zeros_like(tree.student) if gradient is None else gradient
        if bool(scalar.isnan()) or not bool(gradient.isfinite().all()):
            raise ValueError(not_finite_text(loss, tree, under, batch, normalizer))
        values.append(scalar.detach())
        gradients.append(gradient)
    weight = torch.stack([probability[list(batch)].prod() for batch in batches])
    gradient, each = torch.stack(gradients), torch.stack(values)
    mean = torch.einsum("s,snv->nv", weight, gradient)
    variance = float((weight * (gradient - mean).square().sum((1, 2))).sum()) / copies
    scale = float((weight * gradient.square().sum((1, 2))).sum().sqrt())
    return Moments(mean, variance, scale, each, connected, torch.finfo(value.dtype).eps, value.ndim == 1)
