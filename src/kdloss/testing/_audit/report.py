"""The result of an audit: the fit for each sampling policy, and the text that a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .known import LENGTHS, ON_POLICY_NAME

# why a gradient is zero, as the rest of a sentence that begins with "your loss has"
NOT_CONNECTED = "no gradient: it is not connected to the student's logp, logits or entropy"
IN_EVERY_BATCH = "a gradient of zero in every batch, up to rounding"
IN_EXPECTATION = "an expected gradient of zero: it is noise alone"

_RAISED = ("expected reward", "entropy", "expected length")  # a coefficient of +1 raises these and lowers the others
_TIMES = "\N{MULTIPLICATION SIGN}"


class Nearest(NamedTuple):
    """The single known objective that fits best, its coefficient, and the relative norm of its residual."""

    objective: str
    coefficient: float
    residual: float


@dataclass(frozen=True)
class Fit:
    """The expected gradient of a loss under one sampling policy, and the known objectives that it consists of.

    Attributes:
        coefficients: known objective -> coefficient. +1 lowers divergences and 1/length, and raises rewards, entropies
            and lengths: a loss that ascends the reward has +1. Empty if nothing fits or the gradient is zero.
        residual: norm of the part of the gradient that the coefficients leave, relative to the gradient. If nothing
            fits, the least that any combination leaves, here and at policies nearby. 0 for a zero gradient.
        nearest: the single known objective that fits best, as (objective, coefficient, residual). A JSD, Hellinger
            distance, total variation or chi-square only where it leaves less than half of what the others leave. None
            for a zero gradient, and on a tree where every known gradient is zero.
        is_zero: whether the expected gradient is zero: at most `rtol` of the root mean square of the gradients of
            single batches, or rounding alone.
        ambiguous: objectives that are linearly dependent on this tree, if the fit has one of them; other combinations
            then fit as well. A tree with an `eos`, more lengths and more prompts tells them apart.
        variance: trace of the covariance of the gradient of one batch.
        length_drift: change of the expected length when the expected gradient is descended, tokens per unit of step
            size.
        gradient: (N, V) float64, the expected gradient with respect to the student's logits.
        why_zero: why the gradient is zero, in words: no gradient arrives at the student, it is zero in every batch, or
            it is zero in expectation only. Empty if it is not zero.
        changes_with: those of "teacher", "behaviour", "student" and "rewards" that change the result when they go far
            beyond the tree's: a bound (a clip, a mask) acts there, or a coefficient depends on them. Empty if nothing
            fits.

    Example:
        >>> import kdloss
        >>> from kdloss.testing import Fit, audit
        >>> fit: Fit = audit(kdloss.kl_k1).on_policy
        >>> fit.is_zero, fit.coefficients, fit.variance > 0
        (True, {}, True)
        >>> str(audit(kdloss.kl_k2).on_policy).replace(chr(215), "x")
        'lowers 1.00 x reverse KL (token)'
    """

    coefficients: Mapping[str, float]
    residual: float
    nearest: Nearest | None
    is_zero: bool
    ambiguous: tuple[str, ...]
    variance: float
    length_drift: float
    gradient: Tensor = field(repr=False, compare=False)
    why_zero: str = ""
    changes_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.is_zero:
            return f"has {self.why_zero}"
        if not self.coefficients:
            if self.nearest is None:
                return "follows none of the known objectives"
            name, coefficient, residual = self.nearest
            return (
                f"follows none of the known objectives; the nearest, {number_text(coefficient)} {_TIMES} {name}, "
                f"leaves a residual of {residual_text(residual)}, all together {residual_text(self.residual)}"
            )
        terms: dict[str, list[str]] = {"raises": [], "lowers": []}
        for name, coefficient in self.coefficients.items():
            terms[verb(name, coefficient)].append(f"{number_text(abs(coefficient))} {_TIMES} {name}")
        return ", ".join(f"{word} {' and '.join(named)}" for word, named in terms.items() if named)


@dataclass(frozen=True)
class Audit:
    """What descending a loss does: a verdict and a table when printed, the same facts as fields for a test.

    Attributes:
        on_policy: the fit for tokens and prefixes from the student.
        off_policy: the fit for tokens and prefixes from the tree's behaviour policy.
        scope: "any behaviour policy": the same known objectives with the same coefficients for every sampling policy.
            "on-policy only": known objectives from the student's own samples, others or none from another policy's.
            "this tree only": the same from the student's own samples, until a bound acts at a teacher, a student or
            rewards beyond the tree's. "off-policy only": known objectives from another policy's samples alone. "none":
            no known objective in either case. The behaviour policies tried are the tree's and one far from it, see
            `tried`.
        teacher_in_gradient: whether another teacher changes the expected gradient, on-policy or off-policy.
        teacher_in_value: whether another teacher changes the value of the loss.
        notes: the findings on bounds, on `batch_size` and on the denominator, as sentences; part of `verdicts`.
        tried: the ranges for which the result holds or `notes` say that it does not, as name -> (least, greatest):
            "log p - log q" (nats, teacher against student), "ratio" (student against behaviour policy), "reward".
            Those that the loss takes. A bound beyond them cannot be seen.

    Example:
        >>> import kdloss
        >>> from kdloss.testing import Audit, audit
        >>> report: Audit = audit(kdloss.kl_k1)
        >>> report.teacher_in_value, report.teacher_in_gradient
        (True, False)
        >>> "the teacher does not enter this gradient" in report.verdicts
        True
    """

    on_policy: Fit
    off_policy: Fit
    scope: str
    teacher_in_gradient: bool
    teacher_in_value: bool
    notes: tuple[str, ...] = ()
    tried: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The findings, as sentences."""
        on, off = self.on_policy, self.off_policy
        said = [f"your loss {on}" + (f"; residual {residual_text(on.residual)}" if on.coefficients else "")]
        elsewhere = f"from another policy's samples it {off}"
        right = "this holds" if set(on.coefficients) <= set(LENGTHS) else "right"  # nobody asks for a length
        if self.scope == "any behaviour policy":
            said.append(f"{right} for any behaviour policy" + (", token by token" if "token by" in str(off) else ""))
        elif on.coefficients:
            said.append(
                f"{right} {self.scope.replace('this', 'on this')}" + ("" if same(on, off) else f"; {elsewhere}")
            )
        elif off.coefficients or on.is_zero != off.is_zero:
            said.append(elsewhere)
        if not self.teacher_in_gradient and NOT_CONNECTED not in (on.why_zero, off.why_zero):
            said.append("the teacher does not enter this " + ("gradient" if self.teacher_in_value else "loss"))
        said += self.notes
        for fit, where in ((on, "on-policy"), (off, "off-policy")):
            if any(name in LENGTHS for name in fit.coefficients):
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
                rows.append((f"{number_text(coefficient):>11}", name, f"{verb(name, coefficient)} it"))
            rows = rows or [("", "zero gradient" if fit.is_zero else "none of the known", "")]
            rows.append(("", f"residual {residual_text(fit.residual)}, variance {fit.variance:.3g}", ""))
            table += [(source if row is rows[0] else "", *row) for row in rows]
        ranges = ", ".join(f"{name} {least:.3g} .. {greatest:.3g}" for name, (least, greatest) in self.tried.items())
        tried = [f"tried: {ranges}"] if ranges else []
        return "\n".join([*self.verdicts, "", *table_lines(table), *tried])


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, with a line below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]


def verb(name: str, coefficient: float) -> str:
    """What descending a loss with this coefficient does to the objective."""
    return "raises" if name.startswith(_RAISED) == (coefficient > 0) else "lowers"


def same(on_policy: Fit, off_policy: Fit, tolerance: float = 1e-3) -> bool:
    """Whether both fits have the same coefficients for the same objectives, by their on-policy names."""
    # where objectives nearly coincide on a tree, the residual of a fit is magnified in the coefficients
    on = on_policy.coefficients
    off = {ON_POLICY_NAME.get(name, name): c for name, c in off_policy.coefficients.items()}
    return on.keys() == off.keys() and all(math.isclose(on[name], off[name], rel_tol=tolerance) for name in on)


def short_text(fit: Fit) -> str:
    """A fit in one line of a table; where it is not the whole truth, the line says so."""
    if fit.is_zero:
        said = "zero gradient" + (", noise alone" if fit.variance > 0 else "")
    elif fit.coefficients:
        said = str(fit)
    elif fit.nearest is None:
        said = "none of the known objectives"
    else:
        name, coefficient, residual = fit.nearest
        said = f"none known; nearest {number_text(coefficient)} {_TIMES} {name}, off by {residual_text(residual)}"
    said += ", one reading of several" if fit.ambiguous else ""
    return said + (", on this tree only" if fit.changes_with else "")


def residual_text(x: float) -> str:
    return f"{x:.2f}" if x >= 0.005 else f"{x:.0e}" if x > 0 else "0"


def number_text(x: float) -> str:
    """Two decimals if they are exact, else four digits."""
    return f"{x:.2f}" if math.isclose(x, round(x, 2), rel_tol=1e-6) else f"{x:.4g}"
