"""The linear algebra of the auditor: the smallest combination of known gradients that is the gradient of a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kdloss.testing._expected_gradient import student_gradient
from kdloss.testing._sequence_tree import SequenceTree

from .known import ON_POLICY_NAME, expected_length, known_gradients
from .moments import Moments
from .report import Fit, Nearest

_LARGEST_COMBINATION = 4  # terms; beyond it all known objectives are tried together


def fit_known(
    sample: Moments,
    tree: SequenceTree,
    sample_moved: Callable[[], Moments],
    moved: SequenceTree,
    under: str,
    batch_size: int,
    rtol: float,
) -> Fit:
    """The smallest combination of known gradients; one of several terms must hold at the moved policies, too."""
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


def same(on_policy: Fit, off_policy: Fit, rtol: float) -> bool:
    """Whether both fits name the same objectives, read on-policy, with the same coefficients."""
    off = {ON_POLICY_NAME.get(name, name): c for name, c in off_policy.coefficients.items()}
    return _close(on_policy.coefficients, off, rtol)


def _close(a: Mapping[str, float], b: Mapping[str, float], rtol: float) -> bool:
    # objectives that nearly coincide on a tree magnify what a fit leaves
    return a.keys() == b.keys() and all(math.isclose(a[name], b[name], rel_tol=1e3 * rtol) for name in a)
