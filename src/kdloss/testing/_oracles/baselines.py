"""Oracle for baselines of the sampled reverse KL, row by row: score vectors are listed, and their squares summed."""

from __future__ import annotations

import math

import numpy as np

from .divergences import distribution, kl
from .types import ArrayLike, FloatArray, as_float


def _row(q: FloatArray, p: FloatArray, mu: FloatArray | None, kind: str) -> float:
    """The baseline of one row of masses (V,)."""
    weights = []  # (w_v, r_v)
    for v in np.flatnonzero(q > 0):
        score = np.eye(len(q))[v] - q
        rho = 1.0 if mu is None else math.inf if mu[v] == 0 else float(q[v] / mu[v])
        r = math.log(p[v] / q[v]) if p[v] > 0 else -math.inf
        weight = float(q[v]) * rho * float(score @ score)
        if 0 < weight < math.inf:  # a ratio of inf: mu never samples the token
            weights.append((weight, r))
    if kind == "value" or not weights:
        found = -kl(q, p)
    else:
        found = math.fsum(w * r for w, r in weights) / math.fsum(w for w, _ in weights)
    return 0.0 if found == -math.inf else found


def reverse_kl_baseline(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    kind: str,
    behaviour_logits: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`-KL(q || p)` ("value"), or `sum q ρ |s|² r / sum q ρ |s|²` ("optimal"), `r = log(p/q)`, `s_v = onehot_v - q`.

    logits, teacher_logits, behaviour_logits: (..., V). ρ = q/μ of the behaviour's masses μ, else 1; tokens of μ = 0 are
    left out. temperature: float or (...,). Returns (...,), nats; 0 in place of -inf.
    Source: Greensmith, Bartlett and Baxter (2004), theorem 8.
    """
    x, y = as_float("logits", logits), as_float("teacher_logits", teacher_logits)
    z = None if behaviour_logits is None else as_float("behaviour_logits", behaviour_logits)
    lead, size = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    tau = np.broadcast_to(as_float("temperature", temperature), lead)
    value = np.zeros(lead)
    for row in np.ndindex(lead):
        sides = [None if a is None else distribution(a[row][:size], float(tau[row])) for a in (x, y, z)]
        q, p, mu = sides
        assert q is not None
        assert p is not None
        value[row] = _row(q, p, mu, kind)
    return value
