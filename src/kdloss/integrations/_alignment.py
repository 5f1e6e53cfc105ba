"""Detects a shift between two streams of log-probs: tokens that are hard for one model are hard for another."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss import _checks

# In standard errors. Larger than in a textbook test, because neighbouring tokens of text are not independent.
_EVIDENCE = 5.0
_FEWEST = 20  # pairs of tokens; fewer may agree by chance
# In nats. A log-prob below the floor means "practically impossible", whether it is -11, a server's -9999 or -inf. Rank
# correlation would need no floor, but it compares how certain two models are of tokens that both are certain of: noise,
# and most tokens of trained models are such tokens.
_FLOOR = -10.0


class Alignment(NamedTuple):
    """The result of `check_alignment`.

    Attributes:
        shift: teacher_logp[t + shift] belongs to logp[t]; 0 is correct. None: the tokens do not determine it.
        correlations: correlation of the log-probs for each shift; NaN with fewer than 20 pairs or a constant side.
        tokens: number of trained tokens compared at shift 0.
    """

    shift: int | None
    correlations: dict[int, float]
    tokens: int

    @property
    def shifted(self) -> bool:
        """True if one stream looks shifted against the other."""
        return self.shift not in (0, None)

    def __str__(self) -> str:
        """One sentence with the correlations, for an assertion message or a log."""
        found = ", ".join(f"{shift:+d}: {r:.2f}" for shift, r in self.correlations.items())
        if self.shift is None:
            verdict = "too little in common to tell"
        elif self.shift == 0:
            verdict = "aligned"
        else:
            verdict = f"teacher_logp[t {self.shift:+d}] belongs to logp[t]"
            if self.shift == 1:
                verdict += ", as of a server that reports at the token's own position: use to_prediction_positions"
        return f"{verdict} (correlation by shift over {self.tokens} tokens: {found})"


def check_alignment(
    logp: Tensor,  # (T,) or (B, L)
    teacher_logp: Tensor,  # as logp
    *,
    loss_mask: Tensor,  # as logp, bool
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    max_shift: int = 2,
) -> Alignment:
    """Check whether `teacher_logp` is shifted against `logp`, by their correlation at shifts -max_shift .. max_shift.

    Two language models find the same tokens hard. Their log-probs of the same tokens are therefore correlated, and
    those of neighbouring tokens much less. A teacher that is off by one position raises no error and teaches the wrong
    thing, so call this once, on the first batch.

        assert not (alignment := check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu)).shifted, alignment

    Args:
        logp, teacher_logp: log-probs of the same tokens, nats: a packed (T,) stream with `cu_seqlens`, or padded (B, L)
            rows without. A flat stream without `cu_seqlens` is one sequence.
        loss_mask: bool. Only pairs of trained tokens in the same sequence are compared.
        cu_seqlens: (B + 1,) cumulative lengths of a packed stream. None: each row is a sequence.
        max_shift: the largest shift to try, >= 1.

    Returns:
        `Alignment`, on the host: this waits for the device. Its `shift` is set only if one shift fits better than every
        other by five standard errors; a few hundred trained tokens are enough for models with anything in common.
        Log-probs below -10 count as -10.

    Raises:
        TypeError: a per-token tensor is not floating-point, `loss_mask` is not bool, or `max_shift` is not an int.
        ValueError: shapes differ, `cu_seqlens` does not fit, or `max_shift` is not > 0.

    Example:
        >>> import torch
        >>> from kdloss.integrations.servers import check_alignment
        >>> logp = -torch.rand(400, generator=torch.Generator().manual_seed(0))
        >>> check_alignment(logp, logp.roll(1), loss_mask=torch.ones(400, dtype=torch.bool)).shift
        1
    """
    _checks.tensors(teacher_logp=teacher_logp)
    _checks.per_token("logp", logp, loss_mask=loss_mask, teacher_logp=teacher_logp)
    _checks.positive(max_shift=operator.index(max_shift))
    if cu_seqlens is None:
        length = max(1, logp.shape[-1] if logp.ndim > 0 else 1)
        cu_seqlens = torch.arange(0, logp.numel() + 1, length, device=logp.device)
        logp, teacher_logp, loss_mask = logp.flatten(), teacher_logp.flatten(), loss_mask.flatten()
    _checks.packed_stream("logp", logp, cu_seqlens)
    sequence = kdloss.segment_ids(cu_seqlens, total_tokens=logp.shape[0])
    correlations, pairs = {}, {}
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), max(logp.shape[0] - max(0, shift), 0, -shift)
        student, teacher = slice(first, last), slice(first + shift, last + shift)
        both = loss_mask[student] & loss_mask[teacher] & (sequence[student] == sequence[teacher])
        pairs[shift] = int(both.sum())
        correlations[shift] = _correlation(logp.detach()[student][both], teacher_logp.detach()[teacher][both])
    return Alignment(_verdict(correlations, pairs), correlations, pairs[0])


def _verdict(correlations: dict[int, float], pairs: dict[int, int]) -> int | None:
    # Fisher's transform: the standard error of atanh(r) does not depend on r
    strength = {shift: math.atanh(max(-1 + 1e-9, min(r, 1 - 1e-9))) for shift, r in correlations.items() if r == r}
    if not strength:
        return None
    best = max(strength, key=lambda shift: strength[shift])
    next_best = max((x for shift, x in strength.items() if shift != best), default=0.0)
    error = 1 / math.sqrt(pairs[best] - 3)
    lead = strength[best] - max(next_best, 0.0)
    return best if lead > _EVIDENCE * math.sqrt(2) * error else None


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; NaN for fewer than `_FEWEST` pairs or where one side is constant."""
    if x.numel() < _FEWEST:
        return math.nan
    x, y = x.double().clamp(min=_FLOOR), y.double().clamp(min=_FLOOR)
    x, y = x - x.mean(), y - y.mean()
    if not x.any() or not y.any():
        return math.nan
    return float((x @ y) / (x.norm() * y.norm()))
