"""Detects a shift between two streams of log-probs: tokens that are hard for one model are hard for another."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._packing.layout import segment_ids

# In standard errors. Larger than in a textbook test, because neighbouring tokens of text are not independent.
_EVIDENCE = 5.0 * math.sqrt(2)
_FEWEST = 20  # pairs of tokens; fewer may agree by chance
_ENOUGH = 70  # tokens; a correlation of 0.7 is found from here on
_WEAK = 0.5  # two trained language models have a larger correlation; nothing in common is said of a smaller one only
# In nats. A log-prob below the floor means "practically impossible", whether it is -11, a server's -9999 or -inf. Rank
# correlation would need no floor, but it compares how certain two models are of tokens that both are certain of: noise,
# and most tokens of trained models are such tokens.
_FLOOR = -10.0

Verdict = Literal["aligned", "shifted", "constant", "NaN", "too few tokens", "several shifts", "nothing in common"]
_SHIFTED = {
    1: ", as of a server that reports at the token's own position: use to_prediction_positions",
    -1: ", as where a server drops a first token (such as BOS), or where to_prediction_positions was used twice",
}


class Alignment(NamedTuple):
    """The result of `check_alignment`.

    Attributes:
        shift: teacher_logp[t + shift] belongs to logp[t]; 0 is correct. None: no shift was found.
        correlations: correlation of the log-probs for each shift; NaN with fewer than 20 pairs or a constant side.
        tokens: number of trained tokens compared at shift 0.
        verdict: "aligned" or "shifted" where a shift was found; otherwise why none was: "constant" (one stream has the
            same value at every trained token, or is below -10 at all), "NaN" (a trained token has no score), "too few
            tokens" (fewer than 70, or than the relation needs), "several shifts" (they fit alike, or one is weak), or
            "nothing in common" (at any shift, in enough tokens).
        sentence: the verdict in words, and what may be the cause.

    Example:
        >>> import torch, kdloss
        >>> logp, mask = -torch.rand(400, generator=torch.Generator().manual_seed(0)), torch.ones(400, dtype=torch.bool)
        >>> found: kdloss.Alignment = kdloss.check_alignment(logp, logp.roll(1), loss_mask=mask)
        >>> found.aligned, found.shift, found.verdict
        (False, 1, 'shifted')
    """

    shift: int | None
    correlations: dict[int, float]
    tokens: int
    verdict: Verdict
    sentence: str

    @property
    def aligned(self) -> bool:
        """True only if the two streams are related, and without a shift."""
        return self.verdict == "aligned"

    @property
    def shifted(self) -> bool:
        """True if one stream is shifted against the other. False does not mean aligned."""
        return self.verdict == "shifted"

    def __str__(self) -> str:
        """One sentence with the correlations, for an assertion message or a log."""
        found = ", ".join(f"{shift:+d}: {r:.2f}" for shift, r in self.correlations.items())
        return f"{self.sentence} (correlation by shift over {self.tokens} tokens: {found})"


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

        alignment = kdloss.check_alignment(logp, teacher_logp, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
        assert alignment.aligned, alignment

    Args:
        logp: (T,) or (B, L) log-probs under the student, nats: a packed stream with `cu_seqlens`, or padded rows
            without. A flat stream without `cu_seqlens` is one sequence.
        teacher_logp: log-probs of the same tokens under the teacher, in the same layout.
        loss_mask: bool. Only pairs of trained tokens in the same sequence are compared.
        cu_seqlens: (B + 1,) cumulative lengths of a packed stream. None: each row is a sequence.
        max_shift: the largest shift to try, >= 1.

    Returns:
        `Alignment`, on the host: this waits for the device. A shift is found only if it fits better than every other
        one by five standard errors of the difference; a few hundred trained tokens are enough for models with anything
        in common. `aligned` is True only if shift 0 is found. Log-probs below -10 count as -10.

    Expected gradient:
        None: for logging; nothing here is part of a loss.

    Raises:
        TypeError: a per-token tensor is not floating-point, `loss_mask` is not bool, or `max_shift` is not an int.
        ValueError: shapes differ, `cu_seqlens` does not fit, or `max_shift` is not > 0.

    Example:
        >>> import torch, kdloss
        >>> logp = -torch.rand(400, generator=torch.Generator().manual_seed(0))
        >>> mask = torch.ones(400, dtype=torch.bool)
        >>> kdloss.check_alignment(logp, logp.roll(1), loss_mask=mask).shift
        1
        >>> kdloss.check_alignment(logp, logp.flip(0), loss_mask=mask).verdict
        'nothing in common'
    """
    _checks.tensors(teacher_logp=teacher_logp)
    _checks.per_token("logp", logp, loss_mask=loss_mask, teacher_logp=teacher_logp)
    _checks.integer(max_shift=max_shift)
    _checks.positive(max_shift=max_shift)
    if cu_seqlens is None:
        length = max(1, logp.shape[-1] if logp.ndim > 0 else 1)
        cu_seqlens = torch.arange(0, logp.numel() + 1, length, device=logp.device)
        logp, teacher_logp, loss_mask = logp.flatten(), teacher_logp.flatten(), loss_mask.flatten()
    _checks.packed_stream("logp", logp, cu_seqlens)
    sequence = segment_ids(cu_seqlens, total_tokens=logp.shape[0])
    logp, teacher_logp = logp.detach(), teacher_logp.detach()
    correlations, pairs = {}, {}
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), max(logp.shape[0] - max(0, shift), 0, -shift)
        student, teacher = slice(first, last), slice(first + shift, last + shift)
        both = loss_mask[student] & loss_mask[teacher] & (sequence[student] == sequence[teacher])
        pairs[shift] = int(both.sum())
        correlations[shift] = _correlation(logp[student][both], teacher_logp[teacher][both])
    unusable = _unusable(logp=logp[loss_mask], teacher_logp=teacher_logp[loss_mask])
    found, verdict, sentence = unusable or _judged(correlations, pairs)
    return Alignment(found, correlations, pairs[0], verdict, sentence)


def _unusable(**streams: Tensor) -> tuple[None, Verdict, str] | None:
    """Why trained tokens have no correlation, if they have none at any shift."""
    for name, x in streams.items():
        missing = int(x.isnan().sum())
        if missing:
            return None, "NaN", f"{name} is NaN at {missing} trained tokens: their scores are missing"
        if x.numel() < _FEWEST:
            continue
        if bool((x == x[0]).all()):  # values of other tokens would differ in real text
            return None, "constant", f"{name} is {x[0]:g} at every trained token: a model gives no such scores"
        if bool((x <= _FLOOR).all()):
            reason = f"{name} is {_FLOOR:g} or less at every trained token, as where the tokenizers differ"
            return None, "constant", reason
    return None


def _judged(correlations: dict[int, float], pairs: dict[int, int]) -> tuple[int | None, Verdict, str]:
    # Fisher's transform: the standard error of atanh(r) does not depend on r
    strength = {shift: math.atanh(max(-1 + 1e-9, min(r, 1 - 1e-9))) for shift, r in correlations.items() if r == r}
    best = max(strength, key=lambda shift: strength[shift], default=0)
    if strength:
        needed = _EVIDENCE / math.sqrt(pairs[best] - 3)
        next_best = max((x for shift, x in strength.items() if shift != best), default=0.0)
        if strength[best] - max(next_best, 0.0) > needed:
            if best == 0:
                return 0, "aligned", "aligned"
            return best, "shifted", f"teacher_logp[t {best:+d}] belongs to logp[t]{_SHIFTED.get(best, '')}"
        if strength[best] > needed:
            alike = [shift for shift, x in strength.items() if strength[best] - x <= needed and x > needed / 2]
            which = f"shifts {', '.join(f'{shift:+d}' for shift in alike)} fit alike"
            if len(alike) == 1:
                which = f"the relation at shift {best:+d} is weak"
            return None, "several shifts", f"cannot tell: {which}; take more tokens of varied text"
    if pairs[0] < _ENOUGH:
        return None, "too few tokens", f"cannot tell: {pairs[0]} trained tokens are too few; take {_ENOUGH} or more"
    error = 1 / math.sqrt(pairs[0] - 3)
    if strength.get(0, 0.0) + 2.5 * error > math.atanh(_WEAK):
        reason = (
            f"cannot tell: {pairs[0]} trained tokens are too few for a correlation of {correlations[0]:.2f}; take more"
        )
        return None, "too few tokens", reason
    tried, detectable = max(correlations), math.tanh(_EVIDENCE * error)
    return (
        None,
        "nothing in common",
        f"nothing in common at any shift from {-tried} to {tried}, where a correlation of {detectable:.2f} would have "
        "been found: the scores are of other tokens, of another tokenizer or sequence, further off (max_shift=), or of "
        "a model that is not trained",
    )


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; NaN for fewer than `_FEWEST` pairs or where one side is constant."""
    if x.numel() < _FEWEST:
        return math.nan
    x, y = x.double().clamp(min=_FLOOR), y.double().clamp(min=_FLOOR)
    x, y = x - x.mean(), y - y.mean()
    if not x.any() or not y.any():
        return math.nan
    return float((x @ y) / (x.norm() * y.norm()))
