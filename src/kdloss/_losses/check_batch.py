"""Looks at a batch once, for a person: what is wrong with it, and what cannot be told."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks

from .advantages import group_relative_advantages
from .alignment import check_alignment
from .diagnostics import EXCLUDED
from .estimators import discounted_returns

Verdict = Literal["ok", "wrong", "cannot tell", "not given"]

# What counts as wrong. In nats where nothing else is said.
_ROUNDING = 1e-3  # above 0; a float32 log-softmax exceeds 0 by a few 1e-6 at most
_CERTAIN = 0.05  # share of the tokens below -0.5 for the student that the teacher finds certain; 0.03 at most was seen
_STALE = 0.5  # mean |log ratio|; sixteen updates of the example move it to 0.13
_MOVED = 0.05  # mean |log ratio| that is not rounding of two engines
_SAME = 0.02  # mean |log ratio| below which the tokens count as on-policy
_FAR = 5.0  # mean log q - log p; two models of one tokenizer are seldom 2 apart
_EMPTY = 12.0  # log q - log p of a response under a discount: docs/weights.md#a-discount has the measurements
_EVIDENCE = 5.0  # standard errors of a mean
_FEWEST = 40  # tokens; a few samples miss the rare tokens that make up for the others
_CLOSE = 0.1  # mean difference from logp, in mean deviations of logp, that needs no correlation to be aligned

_OWN_POSITIONS = (
    "is the mask at the tokens' own positions? Make it with kdloss.response_mask, or pass loss_mask & (labels != -100)"
)


class Finding(NamedTuple):
    """One line of a `BatchReport`.

    Attributes:
        check: what was looked at, such as "loss_mask" or "teacher alignment".
        verdict: "ok"; "wrong"; "cannot tell", where what was passed does not suffice; or "not given", where what the
            check needs was not passed, so it cannot be told either.
        text: what was found, and what to do about it.
    """

    check: str
    verdict: Verdict
    text: str


class BatchReport(NamedTuple):
    """The result of `check_batch`; `str(report)` is a table with one line per finding.

    Attributes:
        findings: one `Finding` per check, in the order of the table.

    Example:
        >>> import torch, kdloss
        >>> logp, mask = torch.full((8,), 0.5), torch.ones(8, dtype=torch.bool)  # a probability in place of a log-prob
        >>> report: kdloss.BatchReport = kdloss.check_batch(logp, loss_mask=mask)
        >>> report.ok, [finding.check for finding in report.wrong]
        (False, ['logp'])
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if everything that was passed could be judged, and nothing is wrong."""
        return all(finding.verdict in ("ok", "not given") for finding in self.findings)

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that are wrong. A batch of few tokens may have none and not be `ok`: not all could be told."""
        return tuple(finding for finding in self.findings if finding.verdict == "wrong")

    def __str__(self) -> str:
        """The table."""
        count = {
            v: sum(finding.verdict == v for finding in self.findings) for v in ("wrong", "cannot tell", "not given")
        }
        said = [f"{count['wrong']} wrong" if count["wrong"] else "nothing is wrong"]
        said += [f"{n} cannot tell" for n in [count["cannot tell"]] if n]
        said += [f"{n} not given" for n in [count["not given"]] if n]
        lines = [f"check_batch: {', '.join(said)}"]
        width = max(len(finding.check) for finding in self.findings)
        for check, verdict, text in self.findings:
            start = f"  {verdict.upper() if verdict == 'wrong' else verdict:11}  {check:{width}}  "
            lines.append(textwrap.fill(text, 120, initial_indent=start, subsequent_indent=" " * len(start)))
        return "\n".join(lines)


def check_batch(
    logp: Tensor,  # (T,) or (B, L)
    old_logp: Tensor | None = None,  # as logp
    teacher_logp: Tensor | None = None,  # as logp
    *,
    loss_mask: Tensor,  # as logp, bool
    labels: Tensor | None = None,  # as logp, int64
    input_ids: Tensor | None = None,  # as logp, int64
    advantages: Tensor | None = None,  # as logp
    rewards: Tensor | None = None,  # (B,)
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    kd_discount: float = 0.0,
) -> BatchReport:
    """Check the first batch of a run for mistakes that raise no error: shifts, swaps, wrong scores, empty signals.

        report = kdloss.check_batch(logp, old_logp, teacher_logp, loss_mask=loss_mask, labels=labels)
        print(report)
        assert not report.wrong

    Only trained tokens are read. What counts as wrong:

    - `loss_mask`: no token is trained. A trained token has label -100. Without `labels`: all trained tokens that end a
      sequence have the value 0 or NaN in each stream.
    - `labels`, with `input_ids`: a trained token has another label than the token after it in its sequence.
    - log-probs: NaN; more than 1e-3 above 0 (probabilities, negated log-probs); -inf under the student.
    - `teacher_logp`: -inf or -9999. Exactly 0 at 5 % (and at least three) of the tokens that the student gives less
      than -0.5, or at all of ten or more trained tokens of a sequence.
    - alignment: `check_alignment` finds a constant, nothing in common, or a shift of the batch or of one sequence.
      Values that differ from `logp` by less than a tenth of its spread are aligned.
    - ratio: the mean of abs(logp - old_logp) is above 0.5. Or it is above 0.05 and 1.5 times that of `teacher_logp`,
      and the mean of (ratio - 1) / (ratio + 1) is above 0 by a standard error. It is below 0 for tokens from
      `old_logp`, so the two are swapped.
    - distance: the mean of logp - teacher_logp is above 5 nats; or, on-policy and with 40 tokens or more, below 0 by
      five standard errors.
    - `kd_discount`: the discounted sum of logp - teacher_logp over a response is above 12 nats on average. An empty
      answer cost 11 to 14 nats where this was measured, and students whose own answers cost more learned to end early.
    - `advantages`: one per sequence; NaN; with `rewards` and their groups also 0 at every trained token. Without them
      that cannot be told from a batch in which each group has equal rewards.
    - `rewards`: not finite; rewards that differ by no more than rounding in every group; groups of one; groups without
      a trained token.

    Not seen: prompts in the mask, a temperature that student and sampler share and the teacher does not, and mistakes
    in a minority of the sequences, such as scores that two sequences exchanged.

    Args:
        logp: (T,) or (B, L) log-probs under the student, nats: a packed stream with `cu_seqlens`, or padded rows
            without.
        old_logp: log-probs under the policy that sampled. None: not given, which the losses take for on-policy.
        teacher_logp: log-probs under the teacher. None: no teacher.
        loss_mask: bool, True where a token is trained on.
        labels: the token after each position, -100 where there is none. None: the mask cannot be compared with it.
        input_ids: the token at each position, to see whether `labels` are the tokens after them. None: not compared.
        advantages: per token. None: not given.
        rewards: (B,) one per sequence. None: not given.
        group_size: number of consecutive sequences of one prompt. None: not given.
        group_ids: (B,) integers, equal within a group. None: not given. Give at most one of the two.
        cu_seqlens: (B + 1,) cumulative lengths of a packed stream. None: each row is a sequence.
        kd_discount: that of the loss, 0 .. 1. Above 0 the report has a line on it.

    Returns:
        `BatchReport`, on the host: this waits for the device and is meant for a person, once a run. `ok` is True if
        everything that was passed could be judged, and nothing is wrong.

    Expected gradient:
        None: for logging; nothing here is part of a loss.

    Raises:
        TypeError: a tensor has another dtype than above.
        ValueError: shapes other than that of `advantages` differ, `cu_seqlens` does not fit, or `kd_discount` is
            outside 0 .. 1.

    Example:
        >>> import torch, kdloss
        >>> logp = -torch.rand(400, generator=torch.Generator().manual_seed(0))
        >>> mask = torch.ones(400, dtype=torch.bool)
        >>> report = kdloss.check_batch(logp, None, logp.roll(1) - 0.1, loss_mask=mask)
        >>> report.ok, [finding.check for finding in report.wrong]
        (False, ['teacher alignment'])
    """
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, teacher_logp=teacher_logp)
    _checks.floating(advantages=advantages, rewards=rewards)
    if labels is not None:
        _checks.integral(labels=labels)
        _checks.same_shape("logp", logp, labels=labels)
    if input_ids is not None:
        _checks.integral(input_ids=input_ids)
        _checks.same_shape("logp", logp, input_ids=input_ids)
    if group_ids is not None:
        _checks.integral(group_ids=group_ids)
    if group_size is not None and group_ids is not None:
        raise ValueError("group_size and group_ids exclude each other; pass one of them")
    if group_size is not None:
        _checks.integer(group_size=group_size)
        _checks.positive(group_size=group_size)
    _checks.unit_interval(kd_discount=kd_discount)
    if cu_seqlens is None:
        length = max(1, logp.shape[-1] if logp.ndim > 0 else 1)
        bounds = list(range(0, logp.numel() + 1, length))
    else:
        _checks.packed_stream("logp", logp, cu_seqlens)
        _checks.cumulative_lengths(cu_seqlens.cpu(), total_tokens=logp.shape[0])
        bounds = cu_seqlens.tolist()
    old, teacher = (None if x is None else x.detach().cpu().flatten() for x in (old_logp, teacher_logp))
    batch = _Batch(logp.detach().cpu().flatten(), old, teacher, loss_mask.cpu().flatten(), bounds)
    labels, input_ids = (None if x is None else x.cpu().flatten() for x in (labels, input_ids))
    groups_given = rewards is not None and (group_size is not None or group_ids is not None)
    return BatchReport(
        (
            _mask(batch, labels),
            *_labels(batch, labels, input_ids),
            _range("logp", batch.trained(batch.logp)),
            *_behaviour(batch),
            *_teacher(batch),
            *_discount(batch, kd_discount),
            _advantages(batch, advantages, logp.shape, groups_given),
            _rewards(batch, rewards, group_size, group_ids),
        )
    )


class _Batch(NamedTuple):
    logp: Tensor  # (T,)
    old_logp: Tensor | None
    teacher_logp: Tensor | None
    mask: Tensor
    bounds: list[int]  # of the sequences

    def trained(self, x: Tensor) -> Tensor:
        return x[self.mask].double()

    def trained_per_sequence(self) -> list[int]:
        return [int(self.mask[start:stop].sum()) for start, stop in pairwise(self.bounds)]

    def unscored_sequences(self, teacher_logp: Tensor) -> list[int]:
        """Sequences of ten or more trained tokens, to all of which the teacher gives exactly 0."""
        found = []
        for index, (start, stop) in enumerate(pairwise(self.bounds)):
            scores = teacher_logp[start:stop][self.mask[start:stop]]
            if len(scores) >= 10 and not scores.any():
                found.append(index)
        return found

    def alignment(self, name: str, x: Tensor) -> Finding:
        """Whether `x` is of the student's tokens: by its values if they are close to `logp`, else by correlation."""
        check = f"{name.removesuffix('_logp')} alignment"
        logp, other = self.trained(self.logp), self.trained(x)
        spread = (logp - logp.mean()).abs().mean()
        if (other - logp).abs().mean() < _CLOSE * spread and bool((other != other[0]).any()):
            return Finding(check, "ok", "aligned: the values are close to those of logp")
        found = check_alignment(self.logp, x, loss_mask=self.mask, cu_seqlens=torch.tensor(self.bounds))
        if found.aligned and (shifted := self._shifted_sequences(x)):
            index, shift = shifted[0]
            text = f"shifted sequences: {len(shifted)}, such as {index}, where {name}[t {shift:+d}] belongs to logp[t]"
            return Finding(check, "wrong", text)
        verdict: Verdict = "ok" if found.aligned else "wrong"
        if found.verdict in ("too few tokens", "several shifts"):
            verdict = "cannot tell"
        return Finding(check, verdict, str(found).removeprefix("cannot tell: ").replace("teacher_logp", name))

    def _shifted_sequences(self, x: Tensor) -> list[tuple[int, int]]:
        """(sequence, shift) of each sequence that is shifted by itself."""
        found = []
        for index, (start, stop) in enumerate(pairwise(self.bounds)):
            part = slice(start, stop)
            alone = check_alignment(self.logp[part], x[part], loss_mask=self.mask[part])
            if alone.shifted and alone.shift is not None:
                found.append((index, alone.shift))
        return found


def _mask(batch: _Batch, labels: Tensor | None) -> Finding:
    tokens, per_sequence = int(batch.mask.sum()), batch.trained_per_sequence()
    sequences = f"{sum(map(bool, per_sequence))} of {len(per_sequence)} sequences"
    found = f"{tokens} of {len(batch.mask)} tokens are trained, in {sequences}"
    if tokens == 0:
        return Finding("loss_mask", "wrong", f"{found}: nothing is learned")
    if labels is None:
        ends = [stop - 1 for start, stop in pairwise(batch.bounds) if stop > start and batch.mask[stop - 1]]
        streams = [x[ends] for x in (batch.logp, batch.old_logp, batch.teacher_logp) if x is not None]
        if len(ends) > 1 and len(streams) > 1 and all(bool(((x == 0) | x.isnan()).all()) for x in streams):
            ended = f"{len(ends)} of them end a sequence, where nothing has a score, as at a label of -100"
            return Finding("loss_mask", "wrong", f"{found}; {ended}: {_OWN_POSITIONS}")
        return Finding("loss_mask", "not given", f"{found}; pass labels= to see whether their labels are -100")
    ignored = int((batch.mask & (labels == -100)).sum())
    if ignored:
        reason = f"{found}; {ignored} of them have label -100: {_OWN_POSITIONS}"
        return Finding("loss_mask", "wrong", reason)
    if tokens == len(batch.mask) - sum(stop > start for start, stop in pairwise(batch.bounds)):
        found += ": all but one of each sequence, so no prompt is left out"
    return Finding("loss_mask", "ok", found)


def _labels(batch: _Batch, labels: Tensor | None, input_ids: Tensor | None) -> Iterator[Finding]:
    """Whether the labels are the tokens after those of the input. The last of a sequence has none to compare with."""
    if input_ids is None:
        return
    if labels is None:
        yield Finding("labels", "not given", "input_ids have nothing to be compared with")
        return
    ends = torch.tensor([stop - 1 for start, stop in pairwise(batch.bounds) if stop > start], dtype=torch.int64)
    compared = batch.mask.index_fill(0, ends, False) & (labels != -100)
    if not compared.any():
        yield Finding("labels", "cannot tell", "no trained token with a label has another one after it")
        return
    other = int((labels != input_ids.roll(-1))[compared].sum())
    if not other:
        yield Finding("labels", "ok", "each is the token after its position")
        return
    found = f"{other} of {int(compared.sum())} are not the token after their position"
    if bool((labels == input_ids)[compared].all()):
        found = "each is the token of its own position"
    yield Finding("labels", "wrong", f"{found}: make them with kdloss.next_token_labels")


def _range(name: str, x: Tensor) -> Finding:
    """Whether values are log-probs of sampled tokens."""
    missing, above = int(x.isnan().sum()), int((x > _ROUNDING).sum())
    if missing:
        remedy = "leave them out of loss_mask, or score them"
        if name == "teacher_logp":
            remedy += "; if kd_mask leaves them out of the loss, pass loss_mask & kd_mask here"
        return Finding(name, "wrong", f"NaN at {missing} trained tokens: {remedy}")
    if above and bool((x >= 0).all()):
        what, remedy = ("probabilities", f"{name}.log()") if bool((x <= 1).all()) else ("negated log-probs", f"-{name}")
        return Finding(name, "wrong", f"no value is below 0: these are {what}; pass {remedy}")
    if above:
        return Finding(
            name, "wrong", f"{above} values are above 0, up to {float(x.max()):.3g}: these are not log-probs"
        )
    excluded = int((x == -math.inf).sum())
    if excluded and name != "teacher_logp":
        return Finding(
            name, "wrong", f"-inf at {excluded} trained tokens: a policy that excludes them never sampled them"
        )
    finite = x[x > EXCLUDED]
    return Finding(name, "ok", f"mean {float(finite.mean()):.3f} nats" if len(finite) else "no finite value")


def _behaviour(batch: _Batch) -> Iterator[Finding]:
    if batch.old_logp is None:
        text = (
            "cannot be told whether the tokens are on-policy: old_logp=None says that the student sampled them as it is"
        )
        yield Finding("old_logp", "not given", text)
        return
    old = batch.trained(batch.old_logp)
    yield (found := _range("old_logp", old))
    if found.verdict != "ok" or not _usable(batch):
        return
    aligned = batch.alignment("old_logp", batch.old_logp)
    yield aligned
    logp = batch.trained(batch.logp)
    moved = float((logp - old).abs().mean())
    text = f"mean |logp - old_logp| is {moved:.3f} nats"
    if aligned.verdict != "wrong" and (swapped := _swapped(batch, old, moved)) is not None:
        yield Finding("ratio", *swapped)
    elif moved > _STALE:
        reason = (
            f"{text}: the ratio of the first step is far from 1. Score logp and old_logp for the same tokens, at the "
            "sampling temperature, and with the same weights"
        )
        yield Finding("ratio", "wrong", reason)
    else:
        yield Finding("ratio", "ok", f"{text}; before the first update it is 0 but for rounding")


def _swapped(batch: _Batch, old: Tensor, moved: float) -> tuple[Verdict, str] | None:
    """Whether old_logp and teacher_logp are swapped; None if they are not."""
    if batch.teacher_logp is None:
        return None
    logp, teacher = batch.trained(batch.logp), batch.trained(batch.teacher_logp)
    nearest = float((logp - teacher).abs().mean())
    if not (moved > _MOVED and nearest < min(_STALE, moved / 1.5)):
        return None
    # E[tanh((log q - log mu) / 2)] is -D / 2 under mu and D / 2 under q, D = sum (q - mu)^2 / (q + mu): its sign tells
    # which of the two sampled the tokens. It is bounded, so a few tokens that the teacher excludes do not decide it.
    sign = torch.tanh((logp - old) / 2)
    mean, error = _mean_and_error(sign)
    if mean < -2 * error or bool((old - logp > -_ROUNDING).all()):  # the latter: top-p
        return None
    text = f"mean |logp - old_logp| is {moved:.3f} nats, and teacher_logp is closer to logp ({nearest:.3f})"
    if mean > error:
        return "wrong", f"{text}, and logp sampled the tokens rather than old_logp: are the two swapped?"
    return "cannot tell", f"{text}: the two are swapped, or the teacher is nearly the student; take more tokens"


def _mean_and_error(x: Tensor) -> tuple[float, float]:
    """The mean and its standard error, which is unknown from one value: inf."""
    return float(x.mean()), float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf


def _teacher(batch: _Batch) -> Iterator[Finding]:
    if batch.teacher_logp is None:
        yield Finding("teacher_logp", "not given", "no teacher: nothing can be told of a distillation term")
        return
    teacher = batch.trained(batch.teacher_logp)
    found = _range("teacher_logp", teacher)
    if found.verdict != "ok" or not _usable(batch):
        yield found
        return
    logp = batch.trained(batch.logp)
    sentinels = int((teacher <= EXCLUDED).sum())
    unlikely = logp < -0.5
    certain = int((unlikely & (teacher == 0)).sum())
    unscored = batch.unscored_sequences(batch.teacher_logp)
    if sentinels == len(teacher):
        yield Finding("teacher_logp", "wrong", f"{float(teacher[0]):g} at every trained token: nothing was scored")
        return
    if sentinels:
        reason = (
            f"{sentinels} values are -inf or -9999, which servers write for a token that is excluded or not scored: "
            "leave these tokens out of loss_mask; if kd_reward_clip bounds them, pass teacher_logp.maximum(logp - clip)"
        )
        yield Finding("teacher_logp", "wrong", reason)
    elif unscored or (certain >= 3 and certain >= _CERTAIN * int(unlikely.sum())):
        where = f"{certain} of {int(unlikely.sum())} tokens that the student gives less than -0.5"
        if unscored:
            where = f"every trained token of {len(unscored)} sequences, such as sequence {unscored[0]}"
        reason = (
            f"exactly 0 at {where}: were missing scores filled with 0, a probability of 1? Fill them with NaN, and "
            "leave them out of loss_mask"
        )
        yield Finding("teacher_logp", "wrong", reason)
    else:
        yield found
    yield batch.alignment("teacher_logp", batch.teacher_logp)
    yield _distance(batch, logp, teacher)


def _distance(batch: _Batch, logp: Tensor, teacher: Tensor) -> Finding:
    scored = teacher > EXCLUDED
    gap = (logp - teacher)[scored]
    mean, error = _mean_and_error(gap)
    text = f"mean logp - teacher_logp is {mean:.3f} ± {error:.3f} nats"
    if mean > _FAR:
        reason = (
            f"{text}: the teacher finds the tokens impossible. Does it have another tokenizer, or did it score other "
            "tokens?"
        )
        return Finding("distance", "wrong", reason)
    on_policy = batch.old_logp is None or float((logp - batch.trained(batch.old_logp)).abs().mean()) < _SAME
    if on_policy and len(gap) >= _FEWEST and mean < -0.05 and mean < -_EVIDENCE * error:
        reason = (
            f"{text}: tokens that the student sampled cannot be likelier under the teacher on average. Were they "
            "sampled at another temperature, or with top-p (pass old_logp), or written by the teacher (use sft_loss)?"
        )
        return Finding("distance", "wrong", reason)
    return Finding("distance", "ok", text)


def _discount(batch: _Batch, discount: float) -> Iterator[Finding]:
    """Whether a response costs so much under the discount that an empty one may cost less."""
    if discount == 0:
        return
    if batch.teacher_logp is None:
        yield Finding("kd_discount", "not given", "no teacher: nothing can be told of a discount")
        return
    logp, teacher = batch.trained(batch.logp), batch.trained(batch.teacher_logp)
    if not len(logp) or not bool((logp.isfinite() & teacher.isfinite() & (teacher > EXCLUDED)).all()):
        yield Finding("kd_discount", "cannot tell", "no token is trained, or some of them have no score")
        return
    gap = batch.logp.double() - batch.teacher_logp.double()
    bounds = torch.tensor(batch.bounds)
    returns = discounted_returns(gap, loss_mask=batch.mask, cu_seqlens=bounds, discount=discount)
    parts = zip(returns.tensor_split(bounds[1:-1]), batch.mask.tensor_split(bounds[1:-1]), strict=True)
    costs = torch.cat([part[mask][:1] for part, mask in parts])
    mean, error = _mean_and_error(costs)
    text = f"log q - log p of a response is {mean:.1f} ± {error:.1f} nats under the discount of {discount:g}"
    if mean > _EMPTY:
        reason = (
            f"{text}: an empty answer may cost less, and then the student learns to end at once. "
            f"Take kd_discount=0 until the sum is well below {_EMPTY:g}"
        )
        yield Finding("kd_discount", "wrong", reason)
    else:
        yield Finding("kd_discount", "ok", text)


def _usable(batch: _Batch) -> bool:
    """Whether the student's log-probs can be compared with others."""
    return bool(batch.mask.any()) and _range("logp", batch.trained(batch.logp)).verdict == "ok"


def _advantages(batch: _Batch, advantages: Tensor | None, shape: torch.Size, groups_given: bool) -> Finding:
    if advantages is None:
        return Finding("advantages", "not given", "nothing can be told of an RL term")
    if advantages.shape != shape:
        hint = ""
        if advantages.shape in ((len(batch.bounds) - 1,), (len(batch.bounds) - 1, 1)):
            spread = "advantages.reshape(-1, 1).expand_as(logp)"
            if len(shape) == 1:
                spread = "kdloss.broadcast_to_tokens(advantages.flatten(), cu_seqlens=..., total_tokens=...)"
            hint = f", one per sequence: pass {spread}"
        return Finding(
            "advantages", "wrong", f"shape {tuple(advantages.shape)} is not that of logp, {tuple(shape)}{hint}"
        )
    trained = batch.trained(advantages.detach().cpu().flatten())
    unusable = int((~trained.isfinite()).sum())
    if unusable:
        return Finding("advantages", "wrong", f"NaN or infinite at {unusable} trained tokens")
    zero = int((trained == 0).sum())
    if zero == len(trained):
        reason = "0 at every trained token: the RL term teaches nothing"
        if groups_given:
            return Finding("advantages", "wrong", reason)
        why = f"{reason}. Are the rewards of each group equal? Pass rewards= and group_size=, or a batch of more groups"
        return Finding("advantages", "cannot tell", why)
    return Finding(
        "advantages", "ok", f"root mean square {float(trained.square().mean().sqrt()):.3f}; 0 at {zero} tokens"
    )


def _rewards(batch: _Batch, rewards: Tensor | None, group_size: int | None, group_ids: Tensor | None) -> Finding:
    if rewards is None:
        return Finding("rewards", "not given", "nothing can be told of groups without a spread")
    counts = torch.tensor(batch.trained_per_sequence())
    values = rewards.detach().cpu()
    if values.shape != counts.shape:
        shape = tuple(values.shape)
        reason = f"shape {shape} is not one per sequence, ({len(counts)},); pass cu_seqlens for a packed stream"
        return Finding("rewards", "wrong", reason)
    if not bool(values.isfinite().all()):
        return Finding("rewards", "wrong", f"{int((~values.isfinite()).sum())} are NaN or infinite")
    text = f"mean {float(values.double().mean()):.3f}" if len(values) else "no sequence"
    if group_size is None and group_ids is None:
        return Finding(
            "rewards", "not given", f"{text}; pass group_size= or group_ids= to see whether they differ in groups"
        )
    if group_size is not None and len(values) % group_size:
        return Finding("rewards", "wrong", f"{len(values)} sequences are not a multiple of group_size {group_size}")
    if group_ids is not None and group_ids.shape != values.shape:
        shape = tuple(group_ids.shape)
        return Finding("rewards", "wrong", f"group_ids of shape {shape} are not one per sequence, ({len(values)},)")
    ids = torch.arange(len(values)) // (group_size or 1) if group_ids is None else group_ids.cpu()
    groups = [ids == i for i in ids.unique()]
    empty = sum(not counts[group].any() for group in groups)
    single = sum(int(group.sum()) == 1 for group in groups)
    advantages = group_relative_advantages(values, group_ids=ids)  # it decides which rewards differ by rounding alone
    spread = sum(bool(advantages[group].any()) for group in groups)
    text += f"; {spread} of {len(groups)} groups have different rewards"
    if empty:
        return Finding(
            "rewards", "wrong", f"{text}; groups without a trained token: {empty}. Are their responses empty?"
        )
    if single:
        reason = f"{text}; groups of one response, whose group-relative advantage is always 0: {single}"
        return Finding("rewards", "wrong", reason)
    if not spread:
        return Finding("rewards", "wrong", f"{text}: every group-relative advantage is 0")
    return Finding("rewards", "ok", text)
