"""The exact expected gradient of a loss: every outcome, weighted by its probability, differentiated.

No sampling and no tolerance for luck: what comes out is E[grad loss] to rounding, for any loss, with the student's
logits of every prefix as the parameters.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._sequence_tree import SequenceTree, TokenBatch


def expected_gradient(
    loss: Callable[..., Any],
    tree: SequenceTree,
    *,
    under: str = "student",
    batch_size: int = 1,
    normalizer: float | None = None,
) -> Tensor:
    """E over batches of `batch_size` sequences sampled from a policy of d loss / d student logits, (N, V).

    The loss is called with the fields of `TokenBatch` that its parameters name (`logp`, `old_logp`, `teacher_logp`,
    `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`, `lengths`), and with
    `normalizer` where it is given and named; so the library's functions go in as they are, or through
    `functools.partial`, and a loss of yours names what it needs. One with `**kwargs` is passed every field.

    A loss that returns one value per token is summed over tokens, divided by `normalizer` (default: `batch_size`), and
    needs one stream: the expectation is linear. A scalar loss may couple the sequences of a batch (a token count, a
    group's mean), so every batch is enumerated: S ** batch_size calls.

    Args:
        loss: returns a (T,) tensor, a 0-dim tensor, or a tuple with a field `loss` that is one.
        tree: the language and its policies.
        under: "student" | "behaviour", the policy that samples. The prefixes follow it.
        batch_size: sequences a batch.
        normalizer: passed on to a scalar loss; the denominator of a per-token one.

    Returns:
        (N, V) float64: row n is the gradient with respect to the logits of `tree.prefixes[n]`.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: `under` is neither policy, or the loss returns another shape.
    """
    if under not in ("student", "behaviour"):
        raise ValueError(f'under must be "student" or "behaviour", got {under!r}')
    # the probability of an outcome is not part of the loss: no gradient flows through it
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()

    whole = tree.batch(range(len(tree.sequences)), under=under)
    per_token = call_by_name(loss, whole, normalizer)
    if per_token.shape == whole.logp.shape and per_token.ndim == 1:
        of_token = torch.repeat_interleave(probability, whole.cu_seqlens.diff())
        # summed over trained tokens by selection: a product with 0 would let NaN through
        trained = whole.loss_mask
        total = (of_token[trained] * per_token[trained]).sum() * batch_size
        return student_gradient(total / (batch_size if normalizer is None else normalizer), tree)
    if per_token.ndim != 0:
        raise ValueError(f"the loss must return (T,) = {tuple(whole.logp.shape)} or (), got {tuple(per_token.shape)}")

    expected = torch.zeros_like(tree.student)
    for indices in itertools.product(range(len(tree.sequences)), repeat=batch_size):
        scalar = call_by_name(loss, tree.batch(indices, under=under), normalizer)
        expected += probability[list(indices)].prod() * student_gradient(scalar, tree)
    return expected


def call_by_name(loss: Callable[..., Any], batch: TokenBatch, normalizer: float | None) -> Tensor:
    """Call a loss with the fields of a batch that it names; its `loss` where it returns a tuple with one."""
    offered = batch.named()
    if normalizer is not None:
        offered["normalizer"] = normalizer
    parameters = inspect.signature(loss).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = offered
    else:
        arguments = {p.name: offered[p.name] for p in parameters if p.name in offered}
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
        if missing:
            raise TypeError(f"the loss needs {', '.join(missing)}, which a batch does not have; it has {[*offered]}")
    # positionally where the loss insists on it, by name elsewhere
    positional = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    result = loss(*positional, **arguments)
    value: Tensor = getattr(result, "loss", result)
    return value


def student_gradient(scalar: Tensor, tree: SequenceTree) -> Tensor:
    """(N, V) d scalar / d student logits. The graph is kept: several scalars may share it."""
    if not scalar.requires_grad:  # a loss that holds nothing of the student has no gradient
        return torch.zeros_like(tree.student)
    (gradient,) = torch.autograd.grad(
        scalar, tree.student, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return gradient
