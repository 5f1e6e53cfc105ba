"""Whether two streams of log-probs of the same tokens are aligned: what is hard for one model is hard for another."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss import _checks

# In standard errors. Neighbouring tokens of text are not independent, so it is more than a textbook test would ask.
_EVIDENCE = 5.0
_FEWEST = 20  # pairs: fewer may agree by chance
# In nats: below it a log-prob says "not at all", be it -11, a server's -9999 or -inf. Ranks in place of a floor would
# compare how certain two models are of what both are certain of, which is noise, and most tokens of trained models.
_FLOOR = -10.0


class Alignment(NamedTuple):
    """What `check_alignment` found."""

    shift: int | None  # teacher_logp[t + shift] goes with logp[t]: 0 is right; None: the tokens do not tell
    correlations: dict[int, float]  # of the log-probs, by shift
    tokens: int  # trained tokens that were compared at shift 0

    @property
    def shifted(self) -> bool:
        """Whether one stream looks shifted against the other."""
        return self.shift not in (0, None)

    def __str__(self) -> str:
        """A sentence with the correlations, for an assertion or a log."""
        found = ", ".join(f"{shift:+d}: {r:.2f}" for shift, r in self.correlations.items())
        if self.shift is None:
            verdict = "too little in common to tell"
        elif self.shift == 0:
            verdict = "aligned"
        else:
            verdict = f"teacher_logp[t {self.shift:+d}] goes with logp[t]"
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
    """Whether `teacher_logp` looks shifted against `logp`: their correlation at shifts -max_shift .. max_shift.

    Two language models find the same tokens hard, so their log-probs of the same tokens rise and fall together, and
    those of neighbouring tokens much less. A teacher that is off by one trains without an error and teaches the wrong
    thing: call this once, on the first batch.

        assert not (alignment := check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu)).shifted, alignment

    Args:
        logp, teacher_logp: per token, nats: a packed stream with `cu_seqlens`, or padded (B, L) rows without. A flat
            stream without `cu_seqlens` is one sequence.
        loss_mask: bool. Pairs of trained tokens of one sequence are compared.
        max_shift: >= 1.

    Returns:
        `Alignment`, on the host: this waits for the device. A shift is named where it fits better than every other, by
        five standard errors: a few hundred trained tokens are enough for models that are at all alike. Log-probs below
        -10 count as -10.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes differ, or `cu_seqlens` does not fit.
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
    # Fisher's transform: differences of atanh(r) have a standard error that does not depend on r
    strength = {shift: math.atanh(max(-1 + 1e-9, min(r, 1 - 1e-9))) for shift, r in correlations.items() if r == r}
    if not strength:
        return None
    best = max(strength, key=lambda shift: strength[shift])
    next_best = max((x for shift, x in strength.items() if shift != best), default=0.0)
    error = 1 / math.sqrt(pairs[best] - 3)
    lead = strength[best] - max(next_best, 0.0)
    return best if lead > _EVIDENCE * math.sqrt(2) * error else None


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; NaN for few pairs and where a side has a single value."""
    if x.numel() < _FEWEST:
        return math.nan
    x, y = x.double().clamp(min=_FLOOR), y.double().clamp(min=_FLOOR)
    x, y = x - x.mean(), y - y.mean()
    if not x.any() or not y.any():
        return math.nan
    return float((x @ y) / (x.norm() * y.norm()))
