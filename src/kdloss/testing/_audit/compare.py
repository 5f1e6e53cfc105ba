"""Several losses side by side: what each descends, how noisy it is, and its cosine to the exact reverse KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdloss.testing._sequence_tree import SequenceTree

from .audit import audit, default_tree
from .known import known_gradients
from .report import Audit, Fit, short_text, table_lines

_EXACT = "reverse KL (token)"


@dataclass(frozen=True)
class Comparison:
    """What each of several losses descends and how noisy it is: one table when printed, the same facts as fields.

    Pairs are (tokens from the student, tokens from the tree's behaviour policy).

    Attributes:
        audits: name -> `Audit` of the loss.
        variances: name -> pair, the trace of the covariance of the gradient of one batch over the squared norm of its
            mean. inf where the mean is zero and single batches are not, NaN where all are zero.
        cosines: name -> pair, the cosine between the expected gradient and that of the exact reverse KL per token at
            the visited prefixes. NaN where either is zero or not finite.

    Example:
        >>> import kdloss
        >>> from kdloss.testing import Comparison, compare
        >>> report: Comparison = compare({"k1": kdloss.kl_k1, "k2": kdloss.kl_k2})
        >>> report.variances["k1"][0], report.audits["k1"].on_policy.is_zero
        (inf, True)
        >>> round(report.cosines["k2"][0], 6)
        1.0
    """

    audits: Mapping[str, Audit]
    variances: Mapping[str, tuple[float, float]]
    cosines: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        rows = [("loss", "tokens from", "descending it", "variance", "cosine")]
        for name, report in self.audits.items():
            fits = (("the student", report.on_policy), ("another policy", report.off_policy))
            for (source, fit), variance, cosine in zip(fits, self.variances[name], self.cosines[name], strict=True):
                first = name if source == "the student" else ""
                rows.append((first, source, short_text(fit), f"{_number(variance):>8}", f"{_number(cosine):>6}"))
        notes = (
            "variance: of the gradient of one batch, relative to the square of its mean",
            f"cosine: between the expected gradient and that of the exact {_EXACT}",
        )
        return "\n".join([*table_lines(rows), *notes])


def compare(
    losses: Mapping[str, Callable[..., Any]],
    tree: SequenceTree | None = None,
    *,
    batch_size: int = 1,
    normalizer: float | None = None,
    rtol: float = 1e-6,
) -> Comparison:
    """Compare losses on one tree: what each descends, the variance of its gradient, its cosine to the reverse KL's.

    variance = trace Cov[g] / |E[g]|², g the gradient of one batch; cosine = E[g] . e / (|E[g]| |e|), e the gradient of
    the exact reverse KL per token at the visited prefixes. Each loss is audited. Every outcome is enumerated, so the
    numbers are exact, and the same in every run.

    Args:
        losses: name -> loss. A loss is called with the fields of `TokenBatch` that its parameters name, and returns a
            (T,) tensor, a 0-dim tensor, or a tuple with such a field `loss`.
        tree: the language and its policies. None: three tokens, responses of one to three tokens, two prompts, random
            policies. For a loss of the teacher's top K pass one with a vocabulary of at least K + 2.
        batch_size: sequences per batch, for all losses.
        normalizer: passed to a scalar loss that names it; the denominator of a per-token loss (default: `batch_size`).
        rtol: the part of a gradient that may stay unexplained.

    Returns:
        `Comparison`: one table when printed; its fields have the same numbers for a test.

    Raises:
        TypeError: a loss needs an argument that a batch does not have; the text begins with its name.
        ValueError: there is no loss, `batch_size` or `rtol` is out of range, or a loss is refused because its expected
            gradient cannot be enumerated or is not finite; the text begins with its name.

    Example:
        One token, a uniform student q, h = log q/p: the sampled form has 2 sum h² / sum (h - mean h)² - 1, and the
        exact one samples no token.

        >>> import torch, kdloss
        >>> from kdloss.testing import SequenceTree, compare
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> tree = SequenceTree(max_length=1, student=student, teacher=teacher)
        >>> report = compare({"sampled": kdloss.kl_k2, "exact": kdloss.reverse_kl}, tree)
        >>> {name: round(variances[0], 4) for name, variances in report.variances.items()}
        {'sampled': 1.0601, 'exact': 0.0}
    """
    if not losses:
        raise ValueError("losses must have at least one entry, got none")
    tree = default_tree() if tree is None else tree
    exact = {}
    for under in ("student", "behaviour"):
        known = known_gradients(tree, under, batch_size, (_EXACT,))
        exact[under] = torch.from_numpy(known[_EXACT]) if _EXACT in known else torch.zeros(tree.student.numel())
    audits, variances, cosines = {}, {}, {}
    for name, loss in losses.items():
        try:
            report = audit(loss, tree, batch_size=batch_size, normalizer=normalizer, rtol=rtol)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        on, off = report.on_policy, report.off_policy
        audits[name] = report
        variances[name] = (_relative_variance(on), _relative_variance(off))
        cosines[name] = (_cosine(on, exact["student"]), _cosine(off, exact["behaviour"]))
    return Comparison(audits, variances, cosines)


def _relative_variance(fit: Fit) -> float:
    if fit.is_zero:
        return math.inf if fit.variance > 0 else math.nan
    return fit.variance / float(fit.gradient.square().sum())


def _cosine(fit: Fit, exact: torch.Tensor) -> float:
    size = float(fit.gradient.norm() * exact.norm())
    if fit.is_zero or size == 0:
        return math.nan
    return float(fit.gradient.flatten() @ exact) / size


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3g}" if x >= 100 else f"{x:.2f}"
