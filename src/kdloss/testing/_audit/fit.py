"""The linear algebra of the auditor: the smallest combination of known gradients that is the gradient of a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kdloss.testing._calls import student_gradient
from kdloss.testing._sequence_tree import SequenceTree

from .known import ON_POLICY_NAME, expected_length, known_gradients
from .moments import Moments
from .report import Fit, Nearest

_LARGEST_COMBINATION = 4  # terms; above this only all known objectives together are tried


def fit_known(
    sample: Moments,
    tree: SequenceTree,
    sample_moved: Callable[[], Moments],
    moved: SequenceTree,
    under: str,
    batch_size: int,
    rtol: float,
) -> Fit:
    """The smallest combination that fits; if it has several terms, it must also fit at the moved policies."""
    here, there = (known_gradients(t, under, batch_size) for t in (tree, moved))
    names = [name for name in here if name in there]
    columns, columns_moved = (np.array([known[name] for name in names]).T for known in (here, there))
    target = sample.mean.flatten().numpy()
    size = float(np.linalg.norm(target))
    drift = -float(target @ student_gradient(expected_length(tree), tree).flatten().numpy())

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

    # A small tree has few free logits, and several terms can fit them by chance. They can't at two students at once,
    # as long as there are fewer terms than logits.
    both = np.concatenate([columns, columns_moved])
    target_both = np.concatenate([target, sample_moved().mean.flatten().numpy()])
    triangle = np.linalg.qr(np.column_stack([both, target_both])).R  # same norms, fewer rows
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


def same(on_policy: Fit, off_policy: Fit, rtol: float) -> bool:
    """Whether both fits have the same coefficients for the same objectives, by their on-policy names."""
    off = {ON_POLICY_NAME.get(name, name): c for name, c in off_policy.coefficients.items()}
    return _close(on_policy.coefficients, off, rtol)


def _close(a: Mapping[str, float], b: Mapping[str, float], rtol: float) -> bool:
    # where objectives nearly coincide on a tree, the residual of a fit is magnified in the coefficients
    return a.keys() == b.keys() and all(math.isclose(a[name], b[name], rel_tol=1e3 * rtol) for name in a)
