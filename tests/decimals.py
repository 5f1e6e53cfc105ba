"""Divergences to a mixture in decimals of 80 digits, which hold any share of either side, and the bounds of ours.

Used by the tests of torch's path and of the kernels.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import torch
from torch import Tensor

MIXTURES = ("generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl")
# Shares whose 1 - share is 1, has few digits of the share, is ordinary, and is small; 2^-53 is the smallest rest.
SHARES = (1e-30, 1e-17, 1e-9, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-9, 1 - 2**-53)


def assert_mixture(name: str, share: float, logits: Tensor, teacher_logits: Tensor, value: Tensor) -> None:
    """`value` (T,) and its gradient for `logits` (T, V) have a few roundings of what they are computed from.

    A skewed KL is a mean of log-ratios of at most -log α. A JSD is of the order of its smaller share,
    and so is every term.
    """
    expected, exact = in_decimals(name, share, logits, teacher_logits)
    (found,) = torch.autograd.grad(value, logits, torch.ones_like(value))
    eps = torch.finfo(value.dtype).eps
    scale = min(share, 1 - share) if name == "generalized_jsd" else 1 - math.log(share)
    bound = 64 * eps * scale if name == "generalized_jsd" else 4 * eps * scale
    assert (value.double() - expected.to(value.device)).abs().max() <= bound
    assert (found.double() - exact.to(found.device)).abs().max() <= bound


def in_decimals(name: str, share: float, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of each row from the definition of each mixture, in decimals of 80 digits."""
    with decimal.localcontext(decimal.Context(prec=80)):
        rows = [
            _row(name, Decimal(share), [list(map(Decimal, x)) for x in pair])
            for pair in zip(logits.tolist(), teacher_logits.tolist(), strict=True)
        ]
    values, gradients = zip(*rows, strict=True)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def _row(name: str, share: Decimal, pair: list[list[Decimal]]) -> tuple[float, list[float]]:
    def distribution(z: list[Decimal]) -> list[Decimal]:
        total = sum(x.exp() for x in z)
        return [x.exp() / total for x in z]

    def mean(weights: list[Decimal], x: list[Decimal]) -> Decimal:
        return sum(a * b for a, b in zip(weights, x, strict=True))

    q, p = map(distribution, pair)
    omega = 1 - share if name == "skewed_reverse_kl" else share
    m = [omega * b + (1 - omega) * a for a, b in zip(q, p, strict=True)]
    log_qm, log_pm = ([(x / y).ln() for x, y in zip(side, m, strict=True)] for side in (q, p))
    w = [(1 - omega) * x / y for x, y in zip(q, m, strict=True)]
    value, slope = {  # slope: dF/dq up to a constant, which the softmax removes
        "generalized_jsd": (omega * mean(p, log_pm) + (1 - omega) * mean(q, log_qm), [(1 - omega) * x for x in log_qm]),
        "skewed_forward_kl": (mean(p, log_pm), [-b * x / a for a, b, x in zip(q, p, w, strict=True)]),
        "skewed_reverse_kl": (mean(q, log_qm), [x - y for x, y in zip(log_qm, w, strict=True)]),
    }[name]
    center = mean(q, slope)
    return float(value), [float(a * (x - center)) for a, x in zip(q, slope, strict=True)]
