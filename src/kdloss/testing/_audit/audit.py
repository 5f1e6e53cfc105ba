"""The auditor: which known objectives does a loss descend, on the student's own samples and on another policy's?

The expected gradient of the loss is exact: every outcome, weighted by its probability. So are the gradients of the
known objectives: closed forms over the whole tree, differentiated. What remains is linear algebra: the sparsest
combination of known gradients that is the gradient of the loss. Nothing is sampled, so nothing is luck.
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
    """Which known objectives the expected gradient of a loss is made of, on-policy and off-policy.

    The expected gradient g is exact. It is fitted with the gradients of

    - the reverse KL, the forward KL and the entropy: token by token at the visited prefixes, where the probability of
      visiting one is a constant, and over whole sequences;
    - the expected reward, and the reward divided by each response's own length;
    - the expected length and 1/length, and for batches the expected 1/tokens and reward / tokens;
    - off-policy also KL(mu || q), which pulls the student to the policy mu that sampled, and the reward with one token
      at a time from the student and the rest as sampled, which is what a ratio per token gives.

    The smallest combination that leaves less than `rtol` of g is taken; one of several terms must have the same
    coefficients at another student and another behaviour policy. Coefficients are per sequence: the token-level
    reverse KL sums over the tokens of a response and averages over responses.

    Args:
        loss: as for `expected_gradient`: called with the fields of `TokenBatch` that it names (`logp`, `old_logp`,
            `teacher_logp`, `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`,
            `lengths`); returns a (T,) tensor, a 0-dim tensor, or a tuple with a field `loss` that is one. A loss per
            token is summed over the trained tokens and divided by `batch_size`. It is run with other policies, too, so
            what it uses of them must come through its arguments.
        tree: None: three tokens, responses of one to three tokens, two prompts, random policies.
        batch_size: sequences a batch. A scalar loss is called for each of the S ** batch_size batches, several times.
        normalizer: passed on to a scalar loss that names it; the denominator of a per-token one.
        rtol: what may be left unexplained, relative to g. Exact fits leave 1e-15 in float64 and 1e-7 in float32.

    Returns:
        `Audit`: `print` it.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: the loss returns another shape, is NaN or has a gradient that is not finite; `batch_size` or `rtol`
            is out of range.
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

    # a behaviour policy near the student would pass a clip that acts on others
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
