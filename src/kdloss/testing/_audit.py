"""The auditor: which known objectives does a loss descend, on the student's own samples and on another policy's?

The expected gradient of the loss is exact: every outcome, weighted by its probability. So are the gradients of the
known objectives: closed forms over the whole tree, differentiated. What remains is linear algebra: the sparsest
combination of known gradients that is the gradient of the loss. Nothing is sampled, so nothing is luck.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._expected_gradient import call_by_name
from ._sequence_tree import SequenceTree

# Off-policy an objective can have a second reading: one token at a time from the student, the rest as sampled; or the
# student's prefixes in place of those visited. On-policy the gradients are equal, and the two count as one.
_ON_POLICY_NAME = {
    "reverse KL (token, student's prefixes)": "reverse KL (token)",
    "expected reward (token by token)": "expected reward",
    "expected reward / length (token by token)": "expected reward / length",
}
_RAISED = ("expected reward", "entropy", "expected length")  # a coefficient of +1 raises these and lowers the others
_LENGTHS = ("expected length", "expected 1/length", "expected 1/tokens of the batch")
_LARGEST_COMBINATION = 4  # terms; beyond it all known objectives are tried together


class Nearest(NamedTuple):
    """The one known objective that comes nearest to a gradient, its coefficient, and the relative norm that it leaves."""

    objective: str
    coefficient: float
    residual: float


@dataclass(frozen=True)
class Fit:
    """The expected gradient of a loss under one sampling policy, and the known objectives that it is made of."""

    coefficients: Mapping[str, float]
    """Known objective -> coefficient. Divergences and 1/length count as lowered, rewards, entropies and lengths as
    raised, so a loss that ascends the reward has +1. Empty where nothing fits, or the gradient is zero."""
    residual: float
    """Norm of what the coefficients leave, relative to the gradient; where nothing fits, of what all known objectives
    together leave. 0 for a zero gradient."""
    nearest: Nearest | None
    """None for a zero gradient."""
    is_zero: bool
    """Whether the expected gradient is zero to rounding, compared with the gradient of single batches."""
    ambiguous: tuple[str, ...]
    """Objectives that are linearly dependent on this tree, where the fit has one of them: it is then one reading of
    several. A tree with an `eos`, more lengths and more prompts tells them apart."""
    variance: float
    """Trace of the covariance of the gradient that one batch gives."""
    length_drift: float
    """Tokens per unit of step size by which descending the expected gradient changes the expected length."""
    gradient: Tensor = field(repr=False, compare=False)
    """(N, V) float64, as `expected_gradient` gives it."""

    def __str__(self) -> str:
        if self.is_zero:
            return "nothing: its expected gradient is zero"
        if not self.coefficients:
            assert self.nearest is not None
            name, coefficient, residual = self.nearest
            return (
                f"none of the known objectives; residual {self.residual:.0e} "
                f"(nearest: {_number(coefficient)} × {name}, residual {residual:.2f})"
            )
        text = ""
        for name, coefficient in self.coefficients.items():
            sign = "-" if coefficient < 0 else "+"
            text += (f" {sign} " if text else sign.strip("+")) + f"{_number(abs(coefficient))} × {name}"
        return text


@dataclass(frozen=True)
class Audit:
    """What a loss descends. Its `str` is a verdict and a table; the fields are the same for a test."""

    on_policy: Fit
    off_policy: Fit
    """Tokens and prefixes from the tree's behaviour policy."""
    scope: str
    """ "any behaviour policy": the same known objectives with the same coefficients whoever samples. "on-policy only":
    known objectives from the student's own samples, others or none from other policies'. "off-policy only": the
    reverse. "none": nothing known either way. The behaviour policies tried are the tree's and one more, far from it."""
    teacher_in_gradient: bool
    """Whether another teacher changes the expected gradient, on-policy or off-policy."""
    teacher_in_value: bool
    """Whether another teacher changes the value of the loss."""

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What a person should know, in sentences."""
        on, off = self.on_policy, self.off_policy
        said = [f"your loss descends {on}" + (f"; residual {on.residual:.0e}" if on.coefficients else "")]
        if self.scope == "any behaviour policy":
            said.append("right for any behaviour policy" + (", token by token" if "token by token" in str(off) else ""))
        elif self.scope == "on-policy only":
            # on a tree whose behaviour policy is the student, or near it, only the second policy tells
            same = "" if on.coefficients == off.coefficients else f"; from another policy's samples it descends {off}"
            said.append(f"right on-policy only{same}")
        elif self.scope == "off-policy only":
            said.append(f"from another policy's samples it descends {off}")
        if not self.teacher_in_gradient:
            said.append("the teacher does not enter this " + ("gradient" if self.teacher_in_value else "loss"))
        for fit, where in ((on, "on-policy"), (off, "off-policy")):
            if any(name in _LENGTHS for name in fit.coefficients):
                said.append(f"{where} it pushes for {'longer' if fit.length_drift > 0 else 'shorter'} responses")
            if fit.ambiguous:
                said.append(
                    f"{where} this is one reading of several: on this tree {', '.join(fit.ambiguous)} are dependent"
                )
        return tuple(said)

    def __str__(self) -> str:
        table = [("tokens from", "coefficient", "known objective", "descending the loss")]
        for source, fit in (("the student", self.on_policy), ("another policy", self.off_policy)):
            rows = []
            for name, coefficient in fit.coefficients.items():
                raised = name.startswith(_RAISED) == (coefficient > 0)
                rows.append((f"{_number(coefficient):>11}", name, "raises it" if raised else "lowers it"))
            rows = rows or [("", "zero gradient" if fit.is_zero else "none of the known", "")]
            rows.append(("", f"residual {fit.residual:.0e}, variance {fit.variance:.3g}", ""))
            table += [(source if row is rows[0] else "", *row) for row in rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        table.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*self.verdicts, "", *(line.rstrip() for line in lines)])


def audit(
    loss: Callable[..., Any],
    tree: SequenceTree | None = None,
    *,
    batch_size: int = 1,
    normalizer: float | None = None,
    rtol: float = 1e-6,
) -> Audit:
    """Which known objectives the expected gradient of a loss is made of, on-policy and off-policy.

    The expected gradient g is exact. It is fitted with the gradients of: the reverse KL, the forward KL and the entropy,
    token by token at the visited prefixes (how often a prefix is visited is then a constant) and over whole sequences;
    the expected reward, also divided by each response's length; the expected length, 1/length and, for batches,
    1/tokens; off-policy also the imitation of the behaviour policy, E_mu[-log q], and the reward with one token at a
    time from the student, which is what a ratio per token gives. The smallest combination that leaves less than `rtol`
    of g is taken. A coefficient is per sequence: the token-level reverse KL sums over the tokens of a response, and
    averages over responses.

    Args:
        loss: as for `expected_gradient`: called with the fields of `TokenBatch` that it names (`logp`, `old_logp`,
            `teacher_logp`, `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`,
            `lengths`); returns a (T,) tensor, a 0-dim tensor, or a tuple with a field `loss` that is one. A loss per
            token is summed over the trained tokens and divided by `batch_size`.
        tree: None: three tokens, responses of one to three tokens, two prompts, random policies.
        batch_size: sequences a batch. A scalar loss is called for each of the S ** batch_size batches, several times.
        normalizer: passed on to a scalar loss that names it; the denominator of a per-token one.
        rtol: what may be left unexplained, relative to g. Exact fits leave 1e-15 in float64 and 1e-7 in float32.

    Returns:
        `Audit`: `print` it.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: the loss returns another shape, its gradient is not finite, or `batch_size` or `rtol` is not > 0.
    """
    if batch_size < 1 or not 0 < rtol < 1:
        raise ValueError(f"batch_size must be >= 1 and rtol in 0 .. 1, got {batch_size} and {rtol}")
    tree = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2)) if tree is None else tree

    def fit(tree: SequenceTree, under: str) -> Fit:
        return _fit(_moments(loss, tree, under, batch_size, normalizer), tree, under, batch_size, rtol)

    on, off = fit(tree, "student"), fit(tree, "behaviour")
    further = copy.copy(tree)
    further.behaviour = _elsewhere(tree.behaviour)

    other_teacher = copy.copy(tree)
    other_teacher.teacher = _elsewhere(tree.teacher)
    teacher_in_gradient = teacher_in_value = False
    for one, under in ((on, "student"), (off, "behaviour")):
        other = _moments(loss, other_teacher, under, batch_size, normalizer)
        change = float((other.mean - one.gradient).norm())
        teacher_in_gradient |= change > rtol * max(float(one.gradient.norm()), other.scale)
        value = _moments(loss, tree, under, batch_size, normalizer, gradients=False).values
        teacher_in_value |= not torch.allclose(value, other.values, rtol=rtol, atol=0, equal_nan=True)

    if on.coefficients:
        everywhere = all(_same(on, other, rtol) for other in (off, fit(further, "behaviour")))
        scope = "any behaviour policy" if everywhere else "on-policy only"
    else:
        scope = "off-policy only" if off.coefficients else "none"
    return Audit(on, off, scope, teacher_in_gradient, teacher_in_value)


class _Moments(NamedTuple):
    mean: Tensor  # (N, V) E[g]
    variance: float  # trace of the covariance of g
    scale: float  # sqrt(E[|g|^2]): what a rounding error is compared with
    values: Tensor  # the loss of every outcome


def _moments(
    loss: Callable[..., Any],
    tree: SequenceTree,
    under: str,
    batch_size: int,
    normalizer: float | None,
    *,
    gradients: bool = True,
) -> _Moments:
    """Mean and variance of the gradient that one batch gives, over every batch."""
    probability = tree.probabilities(tree.student if under == "student" else tree.behaviour).detach()

    def gradient(scalar: Tensor) -> Tensor:
        if not gradients or not scalar.requires_grad:
            return torch.zeros_like(tree.student)
        (g,) = torch.autograd.grad(scalar, tree.student, allow_unused=True, materialize_grads=True, retain_graph=True)
        return g

    whole = tree.batch(range(len(tree.sequences)), under=under)
    value = call_by_name(loss, whole, normalizer)
    if value.ndim == 1 and value.shape == whole.logp.shape:
        # linear in the sequences: one sequence tells all, and a batch has batch_size independent ones
        bounds = whole.cu_seqlens.tolist()
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        values = torch.stack([value[part][whole.loss_mask[part]].sum() for part in parts])
        outcomes = probability
        copies, denominator = batch_size, batch_size if normalizer is None else normalizer
    elif value.ndim == 0:
        batches = [list(b) for b in itertools.product(range(len(tree.sequences)), repeat=batch_size)]
        values = torch.stack([call_by_name(loss, tree.batch(b, under=under), normalizer) for b in batches])
        outcomes = torch.stack([probability[b].prod() for b in batches])
        copies, denominator = 1, 1
    else:
        raise ValueError(f"the loss must return (T,) = {tuple(whole.logp.shape)} or (), got {tuple(value.shape)}")

    each = torch.stack([gradient(v) for v in values.unbind()]).double() * copies / denominator
    if not bool(each.isfinite().all()):
        raise ValueError(
            "the gradient of the loss is not finite: it lets untrained positions through, which hold NaN "
            "(use torch.where(loss_mask, x, 0) before anything else, or a tree with garbage=0.0), "
            "or it is infinite on this tree's policies"
        )
    mean = torch.einsum("s,snv->nv", outcomes, each)
    deviation = (each - mean).square().sum((1, 2))
    power = each.square().sum((1, 2))
    variance = float((outcomes * deviation).sum()) / copies
    return _Moments(mean, variance, float((outcomes * power).sum().sqrt()), values.detach())
