"""The mean and the variance of the gradient of one batch, over every batch that a policy can sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.testing._calls import call_by_name, student_gradient
from kdloss.testing._sequence_tree import SequenceTree


class Moments(NamedTuple):
    """Of the gradient g of one batch."""

    mean: Tensor  # (N, V) E[g]
    variance: float  # trace of the covariance of g
    scale: float  # root mean square of g; rounding errors are judged relative to it
    values: Tensor  # (outcomes,) of the loss


def gradient_moments(
    loss: Callable[..., Any], tree: SequenceTree, under: str, batch_size: int, normalizer: float | None
) -> Moments:
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()
    whole = tree.batch(range(len(tree.sequences)), under=under)
    value = call_by_name(loss, whole, normalizer)
    scalars: Iterator[Tensor]
    if value.ndim == 1 and value.shape == whole.logp.shape:
        # linear in the sequences: single sequences suffice, and a batch is `copies` independent ones
        copies, factor = batch_size, 1 if normalizer is None else batch_size / normalizer
        weights = list(probability)
        bounds = itertools.pairwise(whole.cu_seqlens.tolist())
        # select trained tokens instead of multiplying by 0, which would keep NaN
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
            "the loss or its gradient is not finite. Either the loss reads untrained positions, which hold NaN: apply "
            "torch.where(loss_mask, x, 0) before anything else, or audit it on a tree with garbage=0.0. Or it is "
            "infinite at this tree's policies"
        )
    mean = torch.einsum("s,snv->nv", weight, gradient)
    variance = float((weight * (gradient - mean).square().sum((1, 2))).sum()) / copies
    scale = float((weight * gradient.square().sum((1, 2))).sum().sqrt())
    return Moments(mean, variance, scale, value)
