"""Hypothesis strategies: the batches on which losses break, for the library's own tests and for yours.

    from kdloss.testing.strategies import packed_batches

    @given(packed_batches())
    def test_a_sequence_does_not_see_its_neighbours(batch):
        whole = my_loss(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
        parts = [my_loss(b.logp, b.teacher_logp, loss_mask=b.loss_mask) for b in map(batch.take, range(batch.size))]

`packed_batches` draws empty sequences, sequences of one token, sequences and batches without a trained token, NaN and
inf under the mask, ratios of exp(200) and exp(-200), teachers of -inf and +inf, in float64, float32, bf16 and fp16.
Hypothesis draws the lengths, the dtype, the flags and a seed, and a generator fills the tensors from the seed: an
example takes a fraction of a millisecond, and shrinks in what matters.

Log-probs lie on a grid of 1/64, so that their differences are exact in every dtype: `clipped` and its like do not
depend on rounding, whatever the order of the arithmetic.

This module needs hypothesis, and nothing else in the library imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_PER_TOKEN = ("logp", "old_logp", "prox_logp", "teacher_logp", "advantages", "weights", "entropy")
_GRID = 64
_HUGE_LOG_RATIO = 200.0
_SEEDS = st.integers(0, 2**32 - 1)
_GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -1e30)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences packed into one stream, at prediction positions. Field names are the library's argument names.

    Nothing requires grad: write `batch.logp.clone().requires_grad_()`.
    """

    logp: Tensor  # (T,)
    old_logp: Tensor  # (T,)
    prox_logp: Tensor  # (T,)
    teacher_logp: Tensor  # (T,) may be infinite at trained tokens
    advantages: Tensor  # (T,) some exactly 0
    weights: Tensor  # (T,) >= 0, some exactly 0
    entropy: Tensor  # (T,) > 0
    loss_mask: Tensor  # (T,) bool; every floating tensor above may hold NaN or inf where it is False
    kd_mask: Tensor  # (T,) bool
    cu_seqlens: Tensor  # (B + 1,) int32 or int64
    rewards: Tensor  # (B,)

    @property
    def size(self) -> int:
        """The number of sequences, B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence."""
        return self.cu_seqlens.diff().tolist()

    @property
    def trained(self) -> list[int]:
        """The trained tokens of each sequence."""
        bounds = self.cu_seqlens.tolist()
        return [int(self.loss_mask[a:b].sum()) for a, b in pairwise(bounds)]

    def take(self, sequences: int | Sequence[int]) -> PackedBatch:
        """The given sequences, packed in the given order: one of them, a micro-batch, or a permutation."""
        chosen = [sequences] if isinstance(sequences, int) else list(sequences)
        bounds = self.cu_seqlens.tolist()
        positions = [t for b in chosen for t in range(bounds[b], bounds[b + 1])]
        lengths = [bounds[b + 1] - bounds[b] for b in chosen]
        return self._at(positions, lengths, self.rewards[chosen])

    def stretch(self, lengths: Sequence[int], *, fill: float = math.nan) -> PackedBatch:
        """Every sequence padded on the right to the given lengths, with untrained tokens that hold `fill`.

        With B equal lengths L the stream is the flattened (B, L) form.
        """
        positions: list[int] = []
        for start, old, new in zip(self.cu_seqlens.tolist(), self.lengths, lengths, strict=False):
            positions += [start + o if o < old else -1 for o in range(new)]
        padding = torch.tensor(positions, dtype=torch.int64) < 0
        stretched = (
            self._at([max(p, 0) for p in positions], lengths, self.rewards)
            if self.logp.shape[0]
            else self._of(padding.shape[0], lengths)
        )
        return replace(stretched, loss_mask=stretched.loss_mask & ~padding)._filled(padding, fill)

    def with_garbage(self, value: float) -> PackedBatch:
        """The same batch with `value` under the mask, in every floating per-token tensor."""
        return self._filled(~self.loss_mask, value)

    def to(self, dtype: torch.dtype) -> PackedBatch:
        """The same batch in another floating dtype."""
        return replace(
            self, rewards=self.rewards.to(dtype), **{name: getattr(self, name).to(dtype) for name in _PER_TOKEN}
        )

    def _at(self, positions: list[int], lengths: Sequence[int], rewards: Tensor) -> PackedBatch:
        index = torch.tensor(positions, dtype=torch.int64)
        tensors = {name: getattr(self, name).index_select(0, index) for name in (*_PER_TOKEN, "loss_mask", "kd_mask")}
        return PackedBatch(**tensors, cu_seqlens=_cumulative(lengths, self.cu_seqlens.dtype), rewards=rewards)

    def _of(self, total: int, lengths: Sequence[int]) -> PackedBatch:
        tensors = {name: getattr(self, name).new_zeros(total) for name in (*_PER_TOKEN, "loss_mask", "kd_mask")}
        return PackedBatch(**tensors, cu_seqlens=_cumulative(lengths, self.cu_seqlens.dtype), rewards=self.rewards)

    def _filled(self, where: Tensor, value: float) -> PackedBatch:
        fill = torch.tensor(value, dtype=torch.float64).to(self.logp.dtype)  # 1e30 becomes inf in fp16
        return replace(self, **{name: getattr(self, name).masked_fill(where, fill) for name in _PER_TOKEN})


@st.composite
def packed_batches(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    min_sequences: int = 0,
    max_sequences: int = 4,
    max_length: int = 6,
    huge_ratios: bool = True,
    infinite_teacher: bool = True,
    garbage: bool = True,
) -> PackedBatch:
    """Packed batches of every awkward kind.

    Args:
        draw: given by hypothesis.
        dtypes: of the floating tensors; one of them a batch.
        min_sequences, max_sequences: bounds of B.
        max_length: bound of the length of a sequence; 0 and 1 are drawn often.
        huge_ratios: some batches have log-ratios of +200 and -200 nats.
        infinite_teacher: some batches have `teacher_logp` of -inf, some of +inf, at trained tokens.
        garbage: untrained positions hold NaN, inf, -inf and 1e30. Else what they would hold if trained.
    """
    lengths = draw(st.lists(st.integers(0, max_length), min_size=min_sequences, max_size=max_sequences))
    # one draw for all flags: a draw is what an example spends its time on
    dtype, keep, huge, teacher, drop_sequences, cu_dtype = draw(
        _combinations(
            tuple(dtypes),
            (0.6, 1.0, 0.0),  # of tokens are trained
            (False, True) if huge_ratios else (False,),
            (None, -math.inf, math.inf) if infinite_teacher else (None,),
            (False, True),
            (torch.int64, torch.int32),
        )
    )
    generator = torch.Generator().manual_seed(draw(_SEEDS))

    total, size = sum(lengths), len(lengths)
    normal = torch.randn(7, total, generator=generator, dtype=torch.float64)
    uniform = torch.rand(8, total, generator=generator, dtype=torch.float64)
    rewards = torch.randn(size, generator=generator, dtype=torch.float64)

    base = -(1.5 * normal[0]).abs()
    up = huge & (uniform[0] < 0.2)
    down = huge & (uniform[0] > 0.8)
    logp = base - _HUGE_LOG_RATIO * down
    old_logp = base + 0.3 * normal[1] - _HUGE_LOG_RATIO * up
    prox_logp = torch.where(uniform[1] < 0.5, old_logp, logp) + 0.3 * normal[2]
    teacher_logp = -(1.5 * normal[3]).abs()
    if teacher is not None:
        teacher_logp = teacher_logp.masked_fill(uniform[2] < 0.2, teacher)
    loss_mask = uniform[3] < keep
    if drop_sequences:
        dropped = torch.rand(size, generator=generator) < 0.5
        loss_mask = loss_mask & ~torch.repeat_interleave(dropped, torch.tensor(lengths, dtype=torch.int64))

    def on_grid(x: Tensor) -> Tensor:
        return (x * _GRID).round() / _GRID

    batch = PackedBatch(
        logp=on_grid(logp),
        old_logp=on_grid(old_logp),
        prox_logp=on_grid(prox_logp),
        teacher_logp=on_grid(teacher_logp),
        advantages=torch.where(uniform[4] < 0.2, 0, normal[4]),
        weights=torch.where(uniform[5] < 0.2, 0, normal[5].abs()),
        entropy=normal[6].abs() + 0.1,
        loss_mask=loss_mask,
        kd_mask=uniform[6] < 0.7,
        cu_seqlens=_cumulative(lengths, cu_dtype),
        rewards=rewards,
    ).to(dtype)
    if not garbage:
        return batch
    kinds = torch.tensor(_GARBAGE, dtype=torch.float64).to(dtype)
    values = kinds[(uniform[7] * len(_GARBAGE)).long()]
    # each tensor gets another sort of garbage at the same token
    filled = {
        name: torch.where(loss_mask, getattr(batch, name), values.roll(shift)) for shift, name in enumerate(_PER_TOKEN)
    }
    return replace(batch, **filled)


@dataclass(frozen=True)
class LogitsBatch:
    """Rows of logits and their labels. Field names are the library's argument names."""

    logits: Tensor  # (T, V)
    labels: Tensor  # (T,) or (T, K) int64, some -100; rows without a label may hold NaN or inf

    @property
    def ignored(self) -> Tensor:
        """(T,) bool: rows without a label."""
        return ~_labelled(self.labels)


@st.composite
def logits_batches(
    draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES, max_rows: int = 6, max_vocab: int = 9
) -> LogitsBatch:
    """Logits of scales 1 to 1e3, some rows with an offset of 1e4, some logits -inf; garbage in rows without a label.

    Args:
        draw: given by hypothesis.
        dtypes: of the logits.
        max_rows: bound of T, from 0.
        max_vocab: bound of V, from 1.
    """
    rows, vocab = draw(st.integers(0, max_rows)), draw(st.integers(1, max_vocab))
    (scale, offset), excluded, labels_per_row, dtype = draw(
        _combinations(((1.0, 0.0), (1.0, -1e4), (30.0, 0.0), (1e3, 1e3)), (False, True), (None, 1, 3), tuple(dtypes))
    )
    generator = torch.Generator().manual_seed(draw(_SEEDS))

    logits = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) + offset
    shape = (rows,) if labels_per_row is None else (rows, labels_per_row)
    labels = torch.randint(0, vocab, shape, generator=generator)
    if excluded:  # never all of a row: a distribution has to be left
        out = torch.rand(rows, vocab, generator=generator) < 0.3
        out[:, 0] = False
        logits = logits.masked_fill(out, -math.inf)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
    batch = LogitsBatch(logits.to(dtype), labels)
    garbage = torch.tensor(_GARBAGE)[torch.randint(0, len(_GARBAGE), (rows, 1), generator=generator)]
    return replace(batch, logits=torch.where(batch.ignored[:, None], garbage.to(dtype), batch.logits))


@dataclass(frozen=True)
class HeadBatch:
    """Hidden states, an output head, and labels. Field names are the library's argument names."""

    hidden: Tensor  # (T, D) may hold NaN or inf in rows that are untrained or have no label
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (T,) or (T, K) int64, some -100
    loss_mask: Tensor  # (T,) bool

    @property
    def used(self) -> Tensor:
        """(T,) bool: trained rows with a label."""
        return self.loss_mask & _labelled(self.labels)

    def named(self) -> dict[str, Any]:
        """The fields as keyword arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@st.composite
def head_batches(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    max_rows: int = 6,
    max_vocab: int = 9,
    max_width: int = 4,
) -> HeadBatch:
    """Hidden states with NaN and inf in unused rows; no, some or all rows trained; one or several labels a row.

    Args:
        draw: given by hypothesis.
        dtypes: of hidden states and head.
        max_rows: bound of T, from 0.
        max_vocab: bound of V, from 1.
        max_width: bound of D, from 1.
    """
    rows, vocab, width = (
        draw(st.integers(0, max_rows)),
        draw(st.integers(1, max_vocab)),
        draw(st.integers(1, max_width)),
    )
    keep, labels_per_row, with_bias, dtype = draw(
        _combinations((0.6, 1.0, 0.0), (None, 1, 3), (False, True), tuple(dtypes))
    )
    generator = torch.Generator().manual_seed(draw(_SEEDS))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (rows,) if labels_per_row is None else (rows, labels_per_row)
    labels = torch.randint(0, vocab, shape, generator=generator)
    batch = HeadBatch(
        hidden=normal(rows, width),
        weight=normal(vocab, width),
        bias=normal(vocab) if with_bias else None,
        labels=labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100),
        loss_mask=torch.rand(rows, generator=generator) < keep,
    )
    garbage = torch.tensor(_GARBAGE)[torch.randint(0, len(_GARBAGE), (rows, 1), generator=generator)]
    return replace(batch, hidden=torch.where(batch.used[:, None], batch.hidden, garbage.to(dtype)))


@dataclass(frozen=True)
class GroupedRewards:
    """One reward a response, and the group that it belongs to. Field names are the library's argument names."""

    rewards: Tensor  # (B,)
    group_ids: Tensor  # (B,) int64, in any order, negative ones too


@st.composite
def grouped_rewards(
    draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES, max_responses: int = 10
) -> GroupedRewards:
    """Groups of any sizes in any order, one-member groups and groups of equal rewards among them.

    Args:
        draw: given by hypothesis.
        dtypes: of the rewards.
        max_responses: bound of B, from 0.
    """
    size = draw(st.integers(0, max_responses))
    groups = draw(st.lists(st.sampled_from((-(2**62), -1, 0, 7, 2**62)), min_size=size, max_size=size))
    dtype = draw(st.sampled_from(dtypes))
    binary = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    rewards = torch.randn(size, generator=generator, dtype=torch.float64)
    if binary:
        rewards = (rewards > 0).to(torch.float64) * 0.1
    return GroupedRewards(rewards.to(dtype), torch.tensor(groups, dtype=torch.int64))


@cache
def _combinations(*choices: tuple[Any, ...]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.sampled_from([*product(*choices)])


def _labelled(labels: Tensor) -> Tensor:
    valid = labels != -100
    return valid.any(-1) if labels.ndim > 1 else valid


def _cumulative(lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    total, cumulative = 0, [0]
    for length in lengths:
        total += length
        cumulative.append(total)
    return torch.tensor(cumulative, dtype=dtype)
