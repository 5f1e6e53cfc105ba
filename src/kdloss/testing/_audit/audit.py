"""The auditor: which known objectives does a loss descend, on the student's own samples and on another policy's?

The expected gradient of the loss is exact: the sum over every outcome, weighted by its probability. So are the
gradients of the known objectives, which are differentiated closed forms over the whole tree. The auditor finds the
smallest combination of known gradients that equals the gradient of the loss. Nothing is sampled, so no result is due to
chance.

A bound (a clip, a mask) that no token of the tree reaches cannot be seen there. So the result is tried again with a
teacher, a behaviour policy, a student and rewards far beyond the tree's, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kdloss.testing._calls import couples_pairs, takes
from kdloss.testing._sequence_tree import SequenceTree, replaced

from .fit import fit_known, holds
from .moments import MOST_BATCHES, Moments, gradient_moments
from .report import IN_EXPECTATION, Audit, Fit, same


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
    - in the same two forms the JSD at beta 0.5, of m = (p + q) / 2; the squared Hellinger distance, half the sum of
      (sqrt p - sqrt q)²; the total variation, half the sum of |p - q|; and the chi-square, the sum of (p - q)² / q. A
      combination has at most two of these;
    - the expected reward, and the expected reward divided by each response's own length;
    - the expected length and 1/length; for batches of several sequences also the expected 1/tokens and reward / tokens;
    - off-policy also KL(mu || q), which pulls the student q towards the policy mu that sampled, and the expected reward
      when one token at a time comes from the student and the others as sampled: the objective of per-token ratios.

    Thresholds:

    - The gradient is zero if its norm is at most `rtol` of the root mean square of the gradients of single batches, or
      if changes of a few ulp in the policies and rewards change it by more than half: it is rounding then.
    - A combination fits if it leaves less than `rtol` of g. A combination of several terms must also fit with the same
      coefficients at a student and a behaviour policy nearby, and leave less than sqrt(`rtol`) of its smallest term. So
      a term of 1e-5 is named only if it is exact, and something unknown of that size does not get a name.
    - A fit holds elsewhere if it leaves less than sqrt(`rtol`) of g with a teacher and a behaviour policy whose
      log-probs move by up to 16 nats, with a student whose log-probs move by up to 6, and with 100 times the rewards.
      Where it does not hold, a bound acts or a coefficient depends on the policies, and the report says so. A bound
      beyond that cannot be seen; the report has the ranges tried.

    Coefficients are per sequence: the token-level reverse KL is summed over the tokens of a response and averaged over
    responses.

    Refused, because the enumeration would not be right:

    - a per-token loss that couples the sequences of a batch (centred advantages, a division by `loss_mask.sum()`): its
      values or gradients on all sequences in one stream differ from those on single sequences. The scalar form, with
      `batch_size`, is enumerated batch by batch.
    - a loss that is stochastic or keeps a state: two calls with the same batch differ.
    - a loss that writes to its arguments in place.

    Values may differ by `rtol` of the largest, gradients by `rtol` of the norm.

    Args:
        loss: called with the fields of `TokenBatch` that its parameters name (`logp`, `old_logp`, `teacher_logp`,
            `advantages`, `rewards`, `loss_mask`, `cu_seqlens`, `labels`, `logits`, `entropy`, `lengths`,
            `teacher_logits`, `behaviour_logits`). Returns a (T,) tensor, a 0-dim tensor, or a tuple with such a field
            `loss`. A per-token loss is summed over the trained tokens and divided by `normalizer`. The loss is also
            called with other policies, so it must use them through its arguments alone. A module is called by the names
            of its `forward`.
        tree: the language and its policies. None: three tokens, responses of one to three tokens, two prompts, random
            policies. For a loss of the teacher's top K pass one with a vocabulary of at least K + 2: at K + 1 a tail of
            one token hides nothing.
        batch_size: sequences per batch. A scalar loss is called several times for each of the S ** batch_size batches,
            S the number of sequences of the tree (30 in the default tree). One core takes 100 to 200 batches a second.
            More than 30,000 are refused if `batch_size` is above 1.
        normalizer: passed to a scalar loss that names it; the denominator of a per-token loss (default: `batch_size`).
        rtol: the part of g that may stay unexplained. Exact fits leave about 1e-15 in float64 and 1e-7 in float32.

    Returns:
        `Audit`: a verdict and a table when printed; its fields have the same facts for a test.

    Raises:
        TypeError: the loss needs an argument that a batch does not have.
        ValueError: the loss is refused (see above), fails on a batch of `batch_size` but not on a larger one, returns
            another shape, is NaN or has a gradient that is not finite; `batch_size` or `rtol` is out of range; the
            tree has too many batches of `batch_size`.

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
    tree = default_tree() if tree is None else tree
    asked = tree

    @cache
    def moments(tree: SequenceTree, under: str) -> Moments:
        # one tree suffices to refuse a loss; both policies, because a coupling by ratios is 1 for the student's samples
        return gradient_moments(loss, tree, under, batch_size, normalizer, rtol if tree is asked else None)

    takes_teacher, takes_rewards = takes(loss, "teacher_logp", "teacher_logits"), takes(loss, "rewards", "advantages")
    # only what the loss takes; every loss takes the student, and its samples come from the behaviour policy
    far = {"student": replaced(tree, student=_spread(tree.student, 3))}
    if takes_teacher:
        far["teacher"] = replaced(tree, teacher=_spread(tree.teacher, 8))
    if takes_rewards:
        far["rewards"] = replaced(tree, rewards=100 * tree.rewards)
    far_behaviour = {"behaviour": replaced(tree, behaviour=_spread(tree.behaviour, 8))}
    near = replaced(tree, student=_nearby(tree.student), behaviour=_nearby(tree.behaviour))

    def fit(under: str) -> Fit:
        def sampled(tree: SequenceTree) -> Moments:
            return moments(tree, under)

        found = fit_known(sampled, tree, near, under, batch_size, rtol)
        if not _has_result(found):
            return found
        others = far | far_behaviour if under == "behaviour" else far
        changing = (n for n, t in others.items() if not holds(found, sampled, t, under, batch_size, rtol))
        return replace(found, changes_with=tuple(changing))

    on, off = fit("student"), fit("behaviour")

    teacher_in_gradient = teacher_in_value = False
    if takes_teacher:
        for under in ("student", "behaviour"):
            one = moments(tree, under)
            try:
                other = moments(far["teacher"], under)
            except Exception:  # not finite there, or the loss checks its arguments
                other = moments(replaced(tree, teacher=_nearby(tree.teacher)), under)
            teacher_in_gradient |= float((other.mean - one.mean).norm()) > rtol * one.scale
            teacher_in_value |= not torch.allclose(one.values, other.values, rtol=rtol, atol=0, equal_nan=True)

    if not on.coefficients:
        scope = "off-policy only" if off.coefficients else "none"
    elif on.changes_with:
        scope = "this tree only"
    elif same(on, off, rtol**0.5) and not off.changes_with:
        scope = "any behaviour policy"
    else:
        scope = "on-policy only"

    here, tried = _ranges([tree]), _ranges([tree, *far.values(), *far_behaviour.values()])
    notes = [*_bounds(on, off, here)]
    if not moments(tree, "student").per_token and couples_pairs(loss, tree, "behaviour", normalizer):
        if batch_size == 1:
            limit = math.isqrt(MOST_BATCHES)
            smaller = "" if len(tree.sequences) <= limit else f" and a tree of at most {limit} sequences"
            notes.append(
                "this is for batches of one sequence: the loss couples the sequences of a batch, so pass batch_size=2"
                + smaller
            )
        unknown = any(not fit.is_zero and not fit.coefficients for fit in (on, off))
        if unknown and not couples_pairs(loss, tree, "behaviour", normalizer, times_tokens=True):
            fixed = "a fixed one (normalizer=1)" if takes(loss, "normalizer") else "a fixed one"
            notes.append(
                f"its denominator is the token count of the batch, which couples the sequences; with {fixed} it may be "
                "an identity"
            )
    asks = {
        "log p - log q": takes_teacher and _has_result(on, off),
        "ratio": _has_result(off),
        "reward": takes_rewards and _has_result(on, off),
    }
    tried = {name: span for name, span in tried.items() if asks[name]}
    return Audit(on, off, scope, teacher_in_gradient, teacher_in_value, tuple(notes), tried)


def default_tree() -> SequenceTree:
    return SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2))


def _has_result(*fits: Fit) -> bool:
    """Whether there is a result that a bound could change elsewhere."""
    return any(fit.coefficients or fit.why_zero == IN_EXPECTATION for fit in fits)


def _bounds(on: Fit, off: Fit, here: dict[str, tuple[float, float]]) -> Iterator[str]:
    """Which results do not hold beyond the tree, as sentences."""

    def within(name: str) -> str:
        return f"({name} is {here[name][0]:.3g} .. {here[name][1]:.3g} on this tree)"

    beyond = {
        "teacher": f"a teacher farther from the student {within('log p - log q')}",
        "behaviour": f"a behaviour policy farther from the student {within('ratio')}",
        "student": "another student",
        "rewards": f"larger rewards {within('reward')}",
    }
    # a student far away is far from the teacher and from the behaviour policy, too: that is the same bound again
    one, other = ({*f.changes_with} - {"student"} or {*f.changes_with} for f in (on, off))
    changing = {
        "gradient": [name for name in beyond if name in one and name in other],
        "on-policy gradient": [name for name in beyond if name in one and name not in other],
        "off-policy gradient": [name for name in beyond if name in other and name not in one],
    }
    for which, names in changing.items():
        if names:
            what = " and with ".join(beyond[name] for name in names)
            yield f"no bound acted on this tree, but the {which} changes with {what}"


def _ranges(trees: list[SequenceTree]) -> dict[str, tuple[float, float]]:
    """What a bound could be on, and its least and greatest value on any of the trees."""

    def span(values: list[Tensor]) -> tuple[float, float]:
        finite = torch.cat([x.detach().flatten() for x in values])
        finite = finite[finite.isfinite()]
        return float(finite.min()), float(finite.max())

    log = [(t.student.log_softmax(-1), t.teacher.log_softmax(-1), t.behaviour.log_softmax(-1)) for t in trees]
    return {
        "log p - log q": span([p - q for q, p, _ in log]),
        "ratio": span([(q - mu).exp() for q, _, mu in log]),
        "reward": span([t.rewards for t in trees]),
    }


def _nearby(policy: Tensor) -> Tensor:
    """Another policy on the same support, not far from `policy`: bounds out of its reach should stay so."""
    generator = torch.Generator().manual_seed(2506)
    return policy.detach() + 0.5 * torch.randn(policy.shape, generator=generator, dtype=torch.float64)


def _spread(policy: Tensor, nats: float) -> Tensor:
    """Another policy on the same support: logits go up and down by `nats` in turn, so log-probs by up to twice that."""
    prefix, token = (torch.arange(n) for n in policy.shape)
    return policy.detach() + nats * (1.0 - 2.0 * ((prefix[:, None] + token) % 2))
