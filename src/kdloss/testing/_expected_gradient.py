"""The exact expected gradient of a loss: every outcome, weighted by its probability, is differentiated.

Nothing is sampled: the result is E[grad loss] up to rounding, for any loss. The parameters are the student's logits of
every prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._calls import call_by_name, checked_value, not_finite_text, student_gradient, whole_batch
from ._sequence_tree import SequenceTree

_MOST = 1_000_000  # batches; one core takes about 1,000 a second
_RTOL = 1e-6  # two calls of a loss, and a token alone and beside other sequences, may differ by this


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
    `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`, `lengths`, `teacher_logits`,
    `behaviour_logits`), and with `normalizer` if it is given and the loss names it. A loss with `**kwargs` gets every
    field. So the library's functions work directly or through `functools.partial`, and a loss of yours names what it
    needs.

    A per-token loss is summed over the trained tokens and divided by `normalizer` (default: `batch_size`). The
    expectation is then linear in the sequences, so one call with all of them suffices. A scalar loss may couple the
    sequences of a batch (a token count, a group's mean), so it is called for every batch: S ** batch_size calls, S the
    number of sequences of the tree. More than 1,000,000 are refused if `batch_size` is above 1.

    Refused, because the enumeration would not be right: a per-token loss that couples the sequences of a batch, which
    shows where its values or gradients on all sequences differ from those on single ones; a loss that is stochastic or
    keeps a state, which shows in a second call with the same batch; a loss that writes to its arguments. Values may
    differ by 1e-6 of the largest, gradients by 1e-6 of the norm.

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
        ValueError: `under` is neither policy; the loss is refused (see above), fails on a batch of `batch_size` but not
            on a larger one, returns another shape, is NaN or has a gradient that is not finite.

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

    value = checked_value(loss, tree, under, batch_size, normalizer, _RTOL, _MOST)
    if value.ndim == 1:
        whole = whole_batch(tree, under)
        of_token = torch.repeat_interleave(probability, whole.cu_seqlens.diff())
        # select trained tokens instead of multiplying by 0, which would keep NaN
        trained = whole.loss_mask
        total = (of_token[trained] * value[trained]).sum() * batch_size
        expected = student_gradient(total / (batch_size if normalizer is None else normalizer), tree)
        if bool(total.isnan()) or not bool(expected.isfinite().all()):
            raise ValueError(not_finite_text(loss, tree, under, (), normalizer))
        return expected

    expected = torch.zeros_like(tree.student)
    for indices in itertools.product(range(len(tree.sequences)), repeat=batch_size):
        scalar = call_by_name(loss, tree.batch(indices, under=under), normalizer)
        gradient = student_gradient(scalar, tree)
        if bool(scalar.isnan()) or not bool(gradient.isfinite().all()):
            raise ValueError(not_finite_text(loss, tree, under, indices, normalizer))
        expected += probability[list(indices)].prod() * gradient
    return expected
