"""The linear algebra of the auditor: the smallest combination of known gradients that is the gradient of a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdloss.testing._calls import student_gradient
from kdloss.testing._sequence_tree import SequenceTree, replaced

from .known import DIVERGENCES, expected_length, known_gradients
from .moments import Moments
from .report import IN_EVERY_BATCH, IN_EXPECTATION, NOT_CONNECTED, Fit, Nearest

Indices = npt.NDArray[np.intp]

_LARGEST_COMBINATION = 4  # terms; above this only all known objectives together are tried


def fit_known(
    moments: Callable[[SequenceTree], Moments],
    tree: SequenceTree,
    near: SequenceTree,
    under: str,
    batch_size: int,
    rtol: float,
) -> Fit:
    """The smallest combination that fits; if it has several terms, it must also fit at policies nearby."""
    sample = moments(tree)
    here, there = (known_gradients(t, under, batch_size) for t in (tree, near))
    names = [name for name in here if name in there]
    columns, columns_near = (np.array([known[name] for name in names]).T for known in (here, there))
    target = sample.mean.flatten().numpy()
    size = float(np.linalg.norm(target))
    drift = -float(target @ student_gradient(expected_length(tree), tree).flatten().numpy())

    def result(
        coefficients: Mapping[str, float], residual: float, nearest: Nearest | None, *, why_zero: str = ""
    ) -> Fit:
        ambiguous: tuple[str, ...] = ()
        if coefficients:
            # the divergences of DIVERGENCES that are not part of the fit are no other reading: they count after the
            # others
            divergences = tuple({name.partition(" (")[0] for name in coefficients})
            read = [not name.startswith(DIVERGENCES) or name.startswith(divergences) for name in names]
            both = np.concatenate([columns, columns_near])[:, read]
            dependent = _dependent([*itertools.compress(names, read)], both)
            ambiguous = dependent if any(name in dependent for name in coefficients) else ()
        zero = bool(why_zero)
        return Fit(coefficients, residual, nearest, zero, ambiguous, sample.variance, drift, sample.mean, why_zero)

    def named(coefficients: Mapping[str, float], residual: float, nearest: Nearest) -> Fit:
        # where p - q is rounding alone, a total variation still has a gradient of order 1, and may fit the rounding
        if any(name.startswith(DIVERGENCES) for name in coefficients) and _is_rounding(moments, tree, sample):
            return result({}, 0.0, None, why_zero=IN_EVERY_BATCH)
        return result(coefficients, residual, nearest)

    if not sample.connected:
        return result({}, 0.0, None, why_zero=NOT_CONNECTED)
    if size <= rtol * sample.scale:
        return result({}, 0.0, None, why_zero=IN_EXPECTATION if sample.scale > 0 else IN_EVERY_BATCH)
    if not names:
        return result({}, 1.0, None)

    singles = [_least_squares(columns[:, [i]], target) for i in range(len(names))]
    # a divergence of DIVERGENCES is the nearest only where it is clearly so
    best = min(range(len(names)), key=lambda i: singles[i][1] * (2 if names[i].startswith(DIVERGENCES) else 1))
    nearest = Nearest(names[best], float(singles[best][0][0]), singles[best][1])
    for name, (solution, residual) in zip(names, singles, strict=True):
        if residual <= rtol:
            return named({name: float(solution[0])}, residual, nearest)

    # A small tree has few free logits, and several terms can fit them by chance. They can't at two students at once,
    # as long as there are fewer terms than logits.
    both = np.concatenate([columns, columns_near])
    target_both = np.concatenate([target, moments(near).mean.flatten().numpy()])
    triangle = np.linalg.qr(np.column_stack([both, target_both])).R  # same norms, fewer rows
    least = nearest.residual
    for combinations in _combinations(names, logits=2 * (tree.student.numel() - len(tree.student))):
        for chosen in _candidates(triangle, combinations, rtol):
            solution, residual = _least_squares(triangle[:, chosen], triangle[:, -1])
            least = min(least, residual)
            if residual > rtol:
                continue
            weights = np.abs(solution) * np.linalg.norm(both[:, chosen], axis=0) / np.linalg.norm(target_both)
            terms = [(names[i], float(c), float(w)) for i, c, w in zip(chosen, solution, weights, strict=True)]
            kept = [term for term in terms if term[2] > rtol]
            # A term of 1e-5 beside one of 1 fits whatever is left of the gradient to one part in ten: an objective
            # that is not known would get the name of one that is. So every term must account for its own part, not
            # for the sum's.
            if residual <= math.sqrt(rtol) * min(weight for *_, weight in kept):
                left = float(np.linalg.norm(columns[:, chosen] @ solution - target)) / size
                return named({name: coefficient for name, coefficient, _ in kept}, left, nearest)
    if _is_rounding(moments, tree, sample):
        return result({}, 0.0, None, why_zero=IN_EVERY_BATCH)
    return result({}, least, nearest)


def _combinations(names: list[str], logits: int) -> Iterator[Indices]:
    """The combinations that are tried, as (M, n) positions in `names`: M of n terms each.

    Those with a divergence of DIVERGENCES come last, at most two of these in each. Near p = q all divergences have
    nearly the same gradient, so on a small tree three of them fit a fourth one.
    """
    second = [i for i, name in enumerate(names) if name.startswith(DIVERGENCES)]
    first = [i for i in range(len(names)) if i not in second]
    for n in (*range(2, _LARGEST_COMBINATION + 1), len(first)):
        if n <= len(first) and n < logits:
            yield np.array([*itertools.combinations(first, n)])
    for n in range(2, _LARGEST_COMBINATION + 1):
        chosen = [
            (*some, *others)
            for k in (1, 2)
            for others in itertools.combinations(second, k)
            for some in itertools.combinations(first, n - k)
        ]
        if chosen and 2 * n <= logits:
            yield np.array(chosen)
    if second and 2 * len(names) <= logits:
        yield np.arange(len(names))[None]


def _candidates(triangle: npt.NDArray[np.float64], combinations: Indices, rtol: float) -> Indices:
    """The combinations that may fit, and the one that leaves least.

    |R[-1, -1]| of the QR factors of the terms and the target is the norm of the residual, unless the terms depend on
    each other.
    """
    columns = triangle / np.linalg.norm(triangle, axis=0)
    target = np.broadcast_to(columns[:, -1:, None], (len(columns), len(combinations), 1))
    stack = np.concatenate([columns[:, combinations], target], axis=2).swapaxes(0, 1)
    diagonals: npt.NDArray[np.float64] = np.abs(np.linalg.qr(stack).R.diagonal(axis1=1, axis2=2))
    residuals = diagonals[:, -1]
    possible = (residuals <= 10 * rtol) | (diagonals[:, :-1].min(axis=1) < 1e-8)
    possible[residuals.argmin()] = True
    candidates: Indices = combinations[possible]
    return candidates


def holds(
    fit: Fit, moments: Callable[[SequenceTree], Moments], tree: SequenceTree, under: str, batch_size: int, rtol: float
) -> bool:
    """Whether the coefficients of a fit give the gradient at other policies or rewards, too.

    Up to sqrt(rtol): the policies are far apart, and rounding grows with the ratios. A bound that acts changes more.
    """
    try:
        sample = moments(tree)
    except Exception:  # not finite there, or the loss checks its arguments: that is a bound, too
        return False
    known = known_gradients(tree, under, batch_size, fit.coefficients)
    expected = torch.zeros_like(sample.mean).flatten()
    for name, coefficient in fit.coefficients.items():
        if name in known:  # not known where its gradient is zero
            expected += coefficient * torch.from_numpy(known[name])
    size = float(expected.norm()) if fit.coefficients else sample.scale
    return float((sample.mean.flatten() - expected).norm()) <= math.sqrt(rtol) * size


def _is_rounding(moments: Callable[[SequenceTree], Moments], tree: SequenceTree, sample: Moments) -> bool:
    """Whether a gradient is rounding alone: changes of a few ulp in the policies and rewards make it another one."""
    generator = torch.Generator().manual_seed(0)

    def nudged(x: Tensor) -> Tensor:
        return x.detach() + 8 * sample.eps * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    names = ("student", "teacher", "behaviour", "rewards")
    for _ in range(4):  # one change alone leaves half of some roundings as they were
        other = moments(replaced(tree, **{name: nudged(getattr(tree, name)) for name in names}))
        change = float((other.mean - sample.mean).norm()) / float(sample.mean.norm())
        if change > 0.5 or change < 0.01:
            return change > 0.5
    return False


def _least_squares(columns: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> tuple[Any, float]:
    """The coefficients, and the norm of the residual relative to the target's."""
    sizes = np.linalg.norm(columns, axis=0)
    solution = np.linalg.lstsq(columns / sizes, target, rcond=1e-10)[0] / sizes
    return solution, float(np.linalg.norm(columns @ solution - target) / np.linalg.norm(target))


def _dependent(names: list[str], columns: npt.NDArray[np.float64]) -> tuple[str, ...]:
    """The names whose column depends linearly on the others: without one of them the rank is the same."""
    columns = columns / np.linalg.norm(columns, axis=0)
    rank = int(np.linalg.matrix_rank(columns, tol=1e-8))
    if rank == columns.shape[1]:
        return ()
    without = (np.linalg.matrix_rank(np.delete(columns, i, axis=1), tol=1e-8) for i in range(columns.shape[1]))
    return tuple(name for name, smaller in zip(names, without, strict=True) if smaller == rank)
