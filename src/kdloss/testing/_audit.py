"""The auditor: which known objectives does a loss descend, on the student's own samples and on another policy's?

The expected gradient of the loss is exact: every outcome, weighted by its probability. So are the gradients of the
known objectives: closed forms over the whole tree, differentiated. What remains is linear algebra: the sparsest
combination of known gradients that is the gradient of the loss. Nothing is sampled, so nothing is luck.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
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
_TIMES = "\N{MULTIPLICATION SIGN}"
_LARGEST_COMBINATION = 4  # terms; beyond it all known objectives are tried together


class Nearest(NamedTuple):
    """The one known objective that comes nearest, its coefficient, and what it leaves of the gradient."""

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
    """Norm of what the coefficients leave, relative to the gradient; where nothing fits, the least that any
    combination leaves, here and at other policies. 0 for a zero gradient."""
    nearest: Nearest | None
    """None for a zero gradient, and on a tree at which every known gradient is zero."""
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
            if self.nearest is None:
                return "none of the known objectives"
            name, coefficient, residual = self.nearest
            return (
                f"none of the known objectives; the nearest, {_number(coefficient)} {_TIMES} {name}, "
                f"leaves a residual of {_residual(residual)}, all together {_residual(self.residual)}"
            )
        text = ""
        for name, coefficient in self.coefficients.items():
            sign = "-" if coefficient < 0 else "+"
            text += (f" {sign} " if text else sign.strip("+")) + f"{_number(abs(coefficient))} {_TIMES} {name}"
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
        said = [f"your loss descends {on}" + (f"; residual {_residual(on.residual)}" if on.coefficients else "")]
        right = "this holds" if set(on.coefficients) <= set(_LENGTHS) else "right"  # nobody asks for a length
        if self.scope == "any behaviour policy":
            said.append(f"{right} for any behaviour policy" + (", token by token" if "token by" in str(off) else ""))
        elif self.scope == "on-policy only":
            # on a tree whose behaviour policy is the student, or near it, only the second policy tells
            same = "" if on.coefficients == off.coefficients else f"; from another policy's samples it descends {off}"
            said.append(f"{right} on-policy only{same}")
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
            rows.append(("", f"residual {_residual(fit.residual)}, variance {fit.variance:.3g}", ""))
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
    def moments(tree: SequenceTree, under: str) -> _Moments:
        return _moments(loss, tree, under, batch_size, normalizer)

    def fit(tree: SequenceTree, under: str) -> Fit:
        return _fit(moments(tree, under), tree, partial(moments, moved, under), moved, under, batch_size, rtol)

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
    elif _same(on, off, rtol) and _same(on, fit(far, "behaviour"), rtol):
        scope = "any behaviour policy"
    else:
        scope = "on-policy only"
    return Audit(on, off, scope, teacher_in_gradient, teacher_in_value)


class _Moments(NamedTuple):
    mean: Tensor  # (N, V) E[g], g the gradient that one batch gives
    variance: float  # trace of the covariance of g
    scale: float  # the root mean square of g, which says what a rounding error is
    values: Tensor  # (outcomes,) of the loss


def _moments(
    loss: Callable[..., Any], tree: SequenceTree, under: str, batch_size: int, normalizer: float | None
) -> _Moments:
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
        gradients.append(_gradient(scalar, tree))
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
    return _Moments(mean, variance, scale, value)


def _gradient(scalar: Tensor, tree: SequenceTree) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros_like(tree.student)
    (gradient,) = torch.autograd.grad(
        scalar, tree.student, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return gradient


def _fit(
    sample: _Moments,
    tree: SequenceTree,
    sample_moved: Callable[[], _Moments],
    moved: SequenceTree,
    under: str,
    batch_size: int,
    rtol: float,
) -> Fit:
    """The smallest combination of known gradients; one of several terms must hold at the moved policies, too."""
    here, there = (_known_gradients(t, under, batch_size) for t in (tree, moved))
    names = [name for name in here if name in there]
    columns, columns_moved = (np.array([known[name] for name in names]).T for known in (here, there))
    target = sample.mean.flatten().numpy()
    size = float(np.linalg.norm(target))
    drift = -float(target @ _gradient(_length(tree), tree).flatten().numpy())

    def result(
        coefficients: Mapping[str, float], residual: float, nearest: Nearest | None, *, is_zero: bool = False
    ) -> Fit:
        dependent = _dependent(names, np.concatenate([columns, columns_moved])) if coefficients else ()
        ambiguous = dependent if any(name in dependent for name in coefficients) else ()
        return Fit(coefficients, residual, nearest, is_zero, ambiguous, sample.variance, drift, sample.mean)

    if size <= rtol * sample.scale:
        return result({}, 0.0, None, is_zero=True)
    if not names:
        return result({}, 1.0, None)

    singles = [_least_squares(columns[:, [i]], target) for i in range(len(names))]
    best = min(range(len(names)), key=lambda i: singles[i][1])
    nearest = Nearest(names[best], float(singles[best][0][0]), singles[best][1])
    for name, (solution, residual) in zip(names, singles, strict=True):
        if residual <= rtol:
            return result({name: float(solution[0])}, residual, nearest)

    # a small tree has few free logits, and several terms may explain them by chance: not at two students at once,
    # as long as there are fewer terms than logits
    both = np.concatenate([columns, columns_moved])
    target_both = np.concatenate([target, sample_moved().mean.flatten().numpy()])
    triangle = np.linalg.qr(np.column_stack([both, target_both])).R  # the same norms in fewer rows
    logits = 2 * (tree.student.numel() - len(tree.student))
    sizes = [n for n in (*range(2, _LARGEST_COMBINATION + 1), len(names)) if n <= len(names) and n < logits]
    least = nearest.residual
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(names)), n) for n in sizes):
        solution, residual = _least_squares(triangle[:, chosen], triangle[:, -1])
        if residual <= rtol:
            weights = np.abs(solution) * np.linalg.norm(both[:, chosen], axis=0) / np.linalg.norm(target_both)
            found = {names[i]: float(c) for i, c, w in zip(chosen, solution, weights, strict=True) if w > rtol}
            left = float(np.linalg.norm(columns[:, chosen] @ solution - target)) / size
            return result(found, left, nearest)
        least = min(least, residual)
    return result({}, least, nearest)


def _known_gradients(tree: SequenceTree, under: str, batch_size: int) -> dict[str, npt.NDArray[np.float64]]:
    known = {name: _gradient(f, tree).flatten().numpy() for name, f in _known(tree, under, batch_size).items()}
    # what is infinite on this tree (a KL outside the support) or constant (a length without eos) cannot be told
    known = {name: g for name, g in known.items() if np.isfinite(g).all()}
    size = max((float(np.linalg.norm(g)) for g in known.values()), default=0.0)
    return {name: g for name, g in known.items() if np.linalg.norm(g) > 1e-12 * size}


def _least_squares(columns: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> tuple[Any, float]:
    """The coefficients, and what they leave relative to the target."""
    sizes = np.linalg.norm(columns, axis=0)
    solution = np.linalg.lstsq(columns / sizes, target, rcond=1e-10)[0] / sizes
    return solution, float(np.linalg.norm(columns @ solution - target) / np.linalg.norm(target))


def _dependent(names: list[str], columns: npt.NDArray[np.float64]) -> tuple[str, ...]:
    """The names that others can be written with: leaving one of them out does not lower the rank."""
    columns = columns / np.linalg.norm(columns, axis=0)
    rank = int(np.linalg.matrix_rank(columns, tol=1e-8))
    if rank == columns.shape[1]:
        return ()
    without = (np.linalg.matrix_rank(np.delete(columns, i, axis=1), tol=1e-8) for i in range(columns.shape[1]))
    return tuple(name for name, smaller in zip(names, without, strict=True) if smaller == rank)


def _known(tree: SequenceTree, under: str, batch_size: int) -> dict[str, Tensor]:
    """The closed forms, in the sign in which +1 of each is descended. In order: of equally small fits the first counts.

    q student, p teacher, mu the policy that samples; d_n is the probability of visiting prefix n under mu.
    """
    log_q, log_p = tree.student.log_softmax(-1), tree.teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    mu = tree.student if under == "student" else tree.behaviour
    visits = _visits(tree, mu).detach()
    reverse, entropy = (q * (log_q - log_p)).sum(-1), -(q * log_q).sum(-1)

    of_q, of_p, of_mu = (tree.probabilities(policy) for policy in (tree.student, tree.teacher, mu.detach()))
    log_of_q, log_of_p = tree.log_probabilities(tree.student), tree.log_probabilities(tree.teacher)
    length = _lengths(tree)

    known = {
        "reverse KL (token)": (visits * reverse).sum(),
        "reverse KL (sequence)": (of_q * (log_of_q - log_of_p)).sum(),
        "forward KL (token)": (visits[:, None] * p * (log_p - log_q)).sum(),
        "forward KL (sequence)": (of_p * (log_of_p - log_of_q)).sum(),
        "expected reward": -(of_q * tree.rewards).sum(),
        "expected reward / length": -(of_q * tree.rewards / length).sum(),
        "entropy (token)": -(visits * entropy).sum(),
        "entropy (sequence)": (of_q * log_of_q).sum(),
        "expected length": -(of_q * length).sum(),
        "expected 1/length": (of_q / length).sum(),
    }
    if batch_size > 1:
        tokens = _batch_tokens(tree, batch_size)
        inverse = 1 / torch.arange(tokens.shape[0], dtype=torch.float64)
        known["expected 1/tokens of the batch"] = (tokens[1:] * inverse[1:]).sum()
        # what each response adds to the batch's tokens moves with it, what the others add does not
        others = _batch_tokens(tree, batch_size - 1).detach()
        share = torch.stack([(others * inverse[n : n + others.shape[0]]).sum() for n in length.long().tolist()])
        known["expected reward / tokens of the batch"] = -batch_size * (of_q * tree.rewards * share).sum()
    if under == "behaviour":
        ratios = _summed_ratios(tree)  # differentiable in one token at a time
        known |= {
            "KL (behaviour || student)": -(of_mu * log_of_q).sum(),
            "reverse KL (token, student's prefixes)": (_visits(tree, tree.student).detach() * reverse).sum(),
            "expected reward (token by token)": -(of_mu * tree.rewards * ratios).sum(),
            "expected reward / length (token by token)": -(of_mu * tree.rewards / length * ratios).sum(),
        }
    return known


def _visits(tree: SequenceTree, policy: Tensor) -> Tensor:
    """(N,) the probability that a response passes through each prefix."""
    log_policy = policy.detach().log_softmax(-1)
    reached: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    row = {prefix: n for n, prefix in enumerate(tree.prefixes)}
    for prompt, tokens in tree.prefixes:  # parents come first
        parent = (prompt, tokens[:-1])
        reached[prompt, tokens] = (
            reached[parent] + log_policy[row[parent], tokens[-1]] if tokens else log_policy.new_zeros(())
        )
    return torch.stack(list(reached.values())).exp() / len(tree.prompt_lengths)


def _summed_ratios(tree: SequenceTree) -> Tensor:
    """(S,) the sum over a response's tokens of q(token | prefix) / mu(token | prefix)."""
    batch = tree.batch(range(len(tree.sequences)), under="behaviour")
    log_ratio = torch.where(batch.loss_mask, batch.logp - batch.old_logp, -math.inf)
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    return torch.stack([log_ratio[start:stop].exp().sum() for start, stop in bounds])


def _lengths(tree: SequenceTree) -> Tensor:
    return torch.tensor([len(tokens) for _, tokens in tree.sequences], dtype=torch.float64)


def _length(tree: SequenceTree) -> Tensor:
    return (tree.probabilities(tree.student) * _lengths(tree)).sum()


def _batch_tokens(tree: SequenceTree, batch_size: int) -> Tensor:
    """(n,) the distribution of the number of response tokens of a batch."""
    of_one = torch.zeros(tree.max_length + 1, dtype=torch.float64)
    of_one = of_one.index_add(0, _lengths(tree).long(), tree.probabilities(tree.student))
    of_batch = torch.ones(1, dtype=torch.float64)
    for _ in range(batch_size):
        parts = [torch.nn.functional.pad(of_batch * p, (n, tree.max_length - n)) for n, p in enumerate(of_one)]
        of_batch = torch.stack(parts).sum(0)
    return of_batch


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


def _same(on_policy: Fit, off_policy: Fit, rtol: float) -> bool:
    """Whether both fits name the same objectives, read on-policy, with the same coefficients."""
    off = {_ON_POLICY_NAME.get(name, name): c for name, c in off_policy.coefficients.items()}
    return _close(on_policy.coefficients, off, rtol)


def _close(a: Mapping[str, float], b: Mapping[str, float], rtol: float) -> bool:
    # objectives that nearly coincide on a tree magnify what a fit leaves
    return a.keys() == b.keys() and all(math.isclose(a[name], b[name], rel_tol=1e3 * rtol) for name in a)


def _residual(x: float) -> str:
    return f"{x:.2f}" if x >= 0.005 else f"{x:.0e}" if x > 0 else "0"


def _number(x: float) -> str:
    """Two decimals where they are exact, else four digits."""
    return f"{x:.2f}" if math.isclose(x, round(x, 2), rel_tol=1e-6) else f"{x:.4g}"
