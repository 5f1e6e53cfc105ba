"""The first two moments of the gradient that one batch gives, over every batch that a policy can sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.testing._expected_gradient import call_by_name, student_gradient
from kdloss.testing._sequence_tree import SequenceTree


class Moments(NamedTuple):
    mean: Tensor  # (N, V) E[g], g the gradient that one batch gives
    variance: float  # trace of the covariance of g
    scale: float  # the root mean square of g, which says what a rounding error is
    values: Tensor  # (outcomes,) of the loss


def gradient_moments(
    loss: Callable[..., Any], tree: SequenceTree, under: str, batch_size: int, normalizer: float | None
) -> Moments:
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()
    whole = tree.batch(range(len(tree.sequences)), under=under)
    value = call_by_name(loss, whole, normalizer)
    scalars: Iterator[Tensor]
    if value.ndim == 1 and value.shape == whole.logp.shape:
        # linear in the sequences: one at a time tells all, and a batch is `copies` independent ones
        copies, factor = batch_size, 1 if normalizer is None else batch_size / normalizer
        weights = list(probability)
        bounds = itertools.pairwise(whole.cu_seqlens.tolist())
        # by selection: a product with 0 would let NaN through
        scalars = (factor * value[start:stop][whole.loss_mask[start:stop]].sum() for start, stop in bounds)
    elif value.ndim == 0:
        copies = 1
        batches = list(itertools.product(range(len(tree.sequences)), repeat=batch_size))
        weights = [probability[list(batch)].prod() for batch in batches]
        scalars = (call_by_name(loss, tree.batch(batch, under=under), normalizer) for batch in batches)
    else:
        raise ValueError(f"the loss must return (T,) = {tuple(whole.logp.shape)} or (), got {tuple(value.shape)}")

    values, gradients = [], []
    for scalar in scalars:
        values.append(scalar.detach())
        gradients.append(student_gradient(scalar, tree))
    weight, gradient, value = torch.stack(weights), torch.stack(gradients), torch.stack(values)
    if not bool(gradient.isfinite().all() & ~value.isnan().any()):
        raise ValueError(
            "the loss or its gradient is not finite. If the loss lets untrained positions through, which hold NaN: "
            "torch.where(loss_mask, x, 0) before anything else, or audit it on a tree with garbage=0.0. If not, it is "
            "infinite at this tree's policies"
        )
    mean = torch.einsum("s,snv->nv", weight, gradient)
    variance = float((weight * (gradient - mean).square().sum((1, 2))).sum()) / copies
    scale = float((weight * gradient.square().sum((1, 2))).sum().sqrt())
    return Moments(mean, variance, scale, value)
