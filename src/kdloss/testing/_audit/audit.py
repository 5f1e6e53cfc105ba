"""The auditor: which known objectives does a loss descend, on the student's own samples and on another policy's?

The expected gradient of the loss is exact: the sum over every outcome, weighted by its probability. So are the
gradients of the known objectives, which are differentiated closed forms over the whole tree. The auditor finds the
smallest combination of known gradients that equals the gradient of the loss. Nothing is sampled, so no result is due to
chance.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kdloss.testing._sequence_tree import SequenceTree

from .fit import fit_known, same
from .moments import Moments, gradient_moments
from .report import Audit, Fit


def audit(
    loss: Callable[..., Any],
    tree: SequenceTree | None = None,
    *,
    batch_size: int = 1,
    normalizer: float | None = None,
    rtol: float = 1e-6,
) -> Audit:
    """Find the known objectives that the expected gradient of a loss consists of, on-policy and off-policy.

    `g = E[grad loss] = sum of c_i grad J_i`, with the fewest known objectives J_i. g is exact. The J_i are

    - the reverse KL, the forward KL and the entropy: per token at the visited prefixes, where the probability of
      visiting a prefix counts as a constant, and over whole sequences;
    - the expected reward, and the expected reward divided by each response's own length;
    - the expected length and 1/length; for batches of several sequences also the expected 1/tokens and reward / tokens;
    - off-policy also KL(mu || q), which pulls the student q towards the policy mu that sampled, and the expected reward
      when one token at a time comes from the student and the others as sampled: the objective of per-token ratios.

    A combination fits if it leaves less than `rtol` of g. A combination of several terms must also fit with the same
    coefficients at another student and another behaviour policy. Coefficients are per sequence: the token-level
    reverse KL is summed over the tokens of a response and averaged over responses.

    Args:
        loss: called with the fields of `TokenBatch` that its parameters name (`logp`, `old_logp`, `teacher_logp`,
            `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`, `lengths`). Returns a
            (T,) tensor, a 0-dim tensor, or a tuple with such a field `loss`. A per-token loss is summed over the
            trained tokens and divided by `normalizer`. The loss is also called with other policies, so it must use
            them through its arguments alone.
        tree: the language and its policies. None: three tokens, responses of one to three tokens, two prompts, random
            policies.
        batch_size: sequences per batch. A scalar loss is called several times for each of the S ** batch_size batches,
            S the number of sequences of the tree.
        normalizer: passed to a scalar loss that names it; the denominator of a per-token loss (default: `batch_size`).
        rtol: the part of g that may stay unexplained. Exact fits leave about 1e-15 in float64 and 1e-7 in float32.

    Returns:
        `Audit`: a verdict and a table when printed; its fields have the same facts for a test.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: the loss returns another shape, is NaN or has a gradient that is not finite; `batch_size` or `rtol`
            is out of range.

    Example:
        >>> import kdloss
        >>> from kdloss.testing import audit
        >>> report = audit(kdloss.kl_k2)
        >>> {name: round(x, 9) for name, x in report.on_policy.coefficients.items()}
        {'reverse KL (token)': 1.0}
        >>> report.scope
        'on-policy only'
    """
    if batch_size < 1 or not 0 < rtol < 1:
        raise ValueError(f"batch_size must be >= 1 and rtol in 0 .. 1, got {batch_size} and {rtol}")
    tree = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2)) if tree is None else tree

    @cache
    def moments(tree: SequenceTree, under: str) -> Moments:
        return gradient_moments(loss, tree, under, batch_size, normalizer)

    def fit(tree: SequenceTree, under: str) -> Fit:
        return fit_known(moments(tree, under), tree, partial(moments, moved, under), moved, under, batch_size, rtol)

    moved = _with(tree, student=_elsewhere(tree.student), behaviour=_elsewhere(tree.behaviour))
    on, off = fit(tree, "student"), fit(tree, "behaviour")

    teacher_in_gradient = teacher_in_value = False
    parameters = inspect.signature(loss).parameters.values()
    if any(p.name == "teacher_logp" or p.kind is p.VAR_KEYWORD for p in parameters):
        other_teacher = _with(tree, teacher=_elsewhere(tree.teacher))
        for under in ("student", "behaviour"):
            one, other = moments(tree, under), moments(other_teacher, under)
            teacher_in_gradient |= float((other.mean - one.mean).norm()) > rtol * one.scale
            teacher_in_value |= not torch.allclose(one.values, other.values, rtol=rtol, atol=0, equal_nan=True)

    # a clip may leave a behaviour policy near the student untouched, and still act on one that is farther away
    far = _with(tree, behaviour=moved.behaviour)
    if not on.coefficients:
        scope = "off-policy only" if off.coefficients else "none"
    elif same(on, off, rtol) and same(on, fit(far, "behaviour"), rtol):
        scope = "any behaviour policy"
    else:
        scope = "on-policy only"
    return Audit(on, off, scope, teacher_in_gradient, teacher_in_value)


def _with(tree: SequenceTree, **policies: Tensor) -> SequenceTree:
    """The same tree with some policies replaced."""
    other = copy.copy(tree)
    for name, policy in policies.items():
        setattr(other, name, policy.requires_grad_(name == "student"))
    return other


def _elsewhere(policy: Tensor) -> Tensor:
    """Another policy on the same support, far from `policy`."""
    generator = torch.Generator().manual_seed(2506)
    return policy.detach() + 1.5 * torch.randn(policy.shape, generator=generator, dtype=torch.float64)
