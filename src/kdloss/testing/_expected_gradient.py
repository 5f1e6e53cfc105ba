"""The exact expected gradient of a loss: every outcome, weighted by its probability, is differentiated.

Nothing is sampled: the result is E[grad loss] up to rounding, for any loss. The parameters are the student's logits of
every prefix.
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
    """The exact expected gradient of a loss on a tree, with respect to the student's logits.

    `E over batches of d loss / d student logits`: a batch is `batch_size` sequences sampled from the policy `under`.

    The loss is called with the fields of `TokenBatch` that its parameters name (`logp`, `old_logp`, `teacher_logp`,
    `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`, `lengths`), and with
    `normalizer` if it is given and the loss names it. A loss with `**kwargs` gets every field. So the library's
    functions work directly or through `functools.partial`, and a loss of yours names what it needs.

    A per-token loss is summed over the trained tokens and divided by `normalizer` (default: `batch_size`). The
    expectation is then linear in the sequences, so one call with all of them suffices. A scalar loss may couple the
    sequences of a batch (a token count, a group's mean), so it is called for every batch: S ** batch_size calls, S the
    number of sequences of the tree.

    Args:
        loss: returns a (T,) tensor, a 0-dim tensor, or a tuple with such a field `loss`.
        tree: the language and its policies.
        under: "student" | "behaviour", the policy that samples the tokens and so the prefixes.
        batch_size: sequences per batch.
        normalizer: passed to a scalar loss that names it; the denominator of a per-token loss.

    Returns:
        (N, V) float64: row n is the gradient with respect to the logits of `tree.prefixes[n]`.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: `under` is neither policy, or the loss returns another shape.

    Example:
        The policy gradient `-q (r - E[r])` of three equally likely tokens, of which the first has reward 1:

        >>> import torch
        >>> from kdloss.testing import SequenceTree, expected_gradient
        >>> tree = SequenceTree(max_length=1, student=torch.zeros(1, 3), rewards=torch.tensor([1.0, 0.0, 0.0]))
        >>> gradient = expected_gradient(lambda logp, advantages: -advantages * logp, tree)
        >>> (9 * gradient).round().tolist()
        [[-2.0, 1.0, 1.0]]
    """
    if under not in ("student", "behaviour"):
        raise ValueError(f'under must be "student" or "behaviour", got {under!r}')
    # the probability of an outcome is not part of the loss, so it carries no gradient
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()

    whole = tree.batch(range(len(tree.sequences)), under=under)
    per_token = call_by_name(loss, whole, normalizer)
    if per_token.shape == whole.logp.shape and per_token.ndim == 1:
        of_token = torch.repeat_interleave(probability, whole.cu_seqlens.diff())
        # select trained tokens instead of multiplying by 0, which would keep NaN
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
    """Call a loss with the fields of a batch that it names; of a result with a field `loss`, return that."""
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
    # by name, except for positional-only parameters
    positional = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    result = loss(*positional, **arguments)
    value: Tensor = getattr(result, "loss", result)
    return value


def student_gradient(scalar: Tensor, tree: SequenceTree) -> Tensor:
    """(N, V) d scalar / d student logits. The graph is kept, because several scalars may share it."""
    if not scalar.requires_grad:  # a loss that does not depend on the student
        return torch.zeros_like(tree.student)
    (gradient,) = torch.autograd.grad(
        scalar, tree.student, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return gradient
