"""Hypothesis strategies: batches on which losses break, for the library's own tests and for yours.

    from kdloss.testing.strategies import packed_batches

    @given(packed_batches())
    def test_a_sequence_does_not_depend_on_its_neighbours(batch):
        whole = my_loss(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
        parts = [my_loss(b.logp, b.teacher_logp, loss_mask=b.loss_mask) for b in map(batch.take, range(batch.size))]

`packed_batches` draws empty sequences, sequences of one token, sequences and batches without a trained token, NaN and
inf under the mask, ratios of exp(200) and exp(-200), and teacher log-probs of -inf and +inf, in float64, float32, bf16
and fp16. Hypothesis draws the lengths, the dtype, the flags and a seed; a generator fills the tensors from the seed. So
an example takes a fraction of a millisecond, and failures shrink to few sequences, few tokens and few flags.

Log-probs are multiples of 1/64, so their differences are exact in every dtype. Flags such as `clipped` therefore depend
neither on rounding nor on the order of the arithmetic.

This module needs hypothesis. Nothing else in the library imports it.
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
    """Sequences packed into one stream, at prediction positions. Fields have the library's argument names.

    No tensor requires grad: write `batch.logp.clone().requires_grad_()`.

    Attributes:
        logp, old_logp, prox_logp: (T,) log-probs of the student, of the policy that sampled and of the proximal policy.
        teacher_logp: (T,) may be infinite at trained tokens.
        advantages: (T,) some exactly 0.
        weights: (T,) at least 0, some exactly 0.
        entropy: (T,) positive.
        loss_mask: (T,) bool. Where it is False, every floating tensor above may hold NaN or inf.
        kd_mask: (T,) bool.
        cu_seqlens: (B + 1,) int32 or int64.
        rewards: (B,) finite.

    Example:
        >>> import torch
        >>> from kdloss.testing.strategies import PackedBatch
        >>> x, mask = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([True, True, False])
        >>> batch = PackedBatch(x, x, x, x, x, -x, -x, mask, mask, torch.tensor([0, 1, 3]), torch.ones(2))
        >>> batch.size, batch.lengths, batch.trained
        (2, [1, 2], [1, 1])
        >>> batch.take([1, 0]).logp.tolist()
        [-2.0, -3.0, -1.0]
    """

    logp: Tensor
    old_logp: Tensor
    prox_logp: Tensor
    teacher_logp: Tensor
    advantages: Tensor
    weights: Tensor
    entropy: Tensor
    loss_mask: Tensor
    kd_mask: Tensor
    cu_seqlens: Tensor
    rewards: Tensor

    @property
    def size(self) -> int:
        """The number of sequences, B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return self.cu_seqlens.diff().tolist()

    @property
    def trained(self) -> list[int]:
        """The number of trained tokens of each sequence."""
        bounds = self.cu_seqlens.tolist()
        return [int(self.loss_mask[a:b].sum()) for a, b in pairwise(bounds)]

    def take(self, sequences: int | Sequence[int]) -> PackedBatch:
        """The given sequences, packed in the given order: a single one, a micro-batch, or a permutation."""
        chosen = [sequences] if isinstance(sequences, int) else list(sequences)
        bounds = self.cu_seqlens.tolist()
        positions = [t for b in chosen for t in range(bounds[b], bounds[b + 1])]
        lengths = [bounds[b + 1] - bounds[b] for b in chosen]
        return self._at(positions, lengths, self.rewards[chosen])

    def stretch(self, lengths: Sequence[int], *, fill: float = math.nan) -> PackedBatch:
        """Every sequence, padded on the right to the given length with untrained tokens that hold `fill`.

        With B equal lengths L the stream is the flattened (B, L) layout.
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
        """The same batch with `value` at untrained tokens in every floating per-token tensor."""
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
    """Packed batches with empty, short and untrained sequences, extreme values, and garbage under the mask.

    Args:
        draw: passed by hypothesis.
        dtypes: of the floating tensors; a batch has one of them.
        min_sequences, max_sequences: bounds of B.
        max_length: largest length of a sequence; 0 and 1 are drawn often.
        huge_ratios: some batches have log-ratios of +200 and -200 nats.
        infinite_teacher: in some batches `teacher_logp` is -inf, in others +inf, at some trained tokens.
        garbage: untrained positions hold NaN, inf, -inf and 1e30. If False, they hold ordinary values.

    Returns:
        A strategy for `PackedBatch`.

    Example:
        >>> import kdloss
        >>> from hypothesis import given
        >>> from kdloss.testing.strategies import packed_batches
        >>> @given(packed_batches(infinite_teacher=False))
        ... def test_untrained_tokens_are_zero(batch):
        ...     k1 = kdloss.kl_k1(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
        ...     assert not k1[~batch.loss_mask].any()
        >>> test_untrained_tokens_are_zero()
    """
    lengths = draw(st.lists(st.integers(0, max_length), min_size=min_sequences, max_size=max_sequences))
    # one draw for all flags, because draws take most of the time of an example
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
    # at one token, tensors next to each other hold different garbage
    filled = {
        name: torch.where(loss_mask, getattr(batch, name), values.roll(shift)) for shift, name in enumerate(_PER_TOKEN)
    }
    return replace(batch, **filled)


@dataclass(frozen=True)
class LogitsBatch:
    """Rows of logits and their labels. Fields have the library's argument names.

    Attributes:
        logits: (T, V), rows without a label may hold NaN or inf.
        labels: (T,) or (T, K) int64, some -100: no label.

    Example:
        >>> import torch
        >>> from kdloss.testing.strategies import LogitsBatch
        >>> LogitsBatch(torch.zeros(2, 3), torch.tensor([1, -100])).ignored.tolist()
        [False, True]
    """

    logits: Tensor
    labels: Tensor

    @property
    def ignored(self) -> Tensor:
        """(T,) bool: rows without a label."""
        return ~_labelled(self.labels)


@st.composite
def logits_batches(
    draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES, max_rows: int = 6, max_vocab: int = 9
) -> LogitsBatch:
    """Logits of scales from 1 to 1e3, with offsets of -1e4 and 1e3, and some of -inf; garbage in rows without a label.

    Args:
        draw: passed by hypothesis.
        dtypes: of the logits; a batch has one of them.
        max_rows: largest T; the smallest is 0.
        max_vocab: largest V; the smallest is 1.

    Returns:
        A strategy for `LogitsBatch`.

    Example:
        >>> from hypothesis import given
        >>> from kdloss.testing.strategies import logits_batches
        >>> @given(logits_batches())
        ... def test_only_rows_without_a_label_hold_garbage(batch):
        ...     assert not batch.logits[~batch.ignored].isnan().any()
        >>> test_only_rows_without_a_label_hold_garbage()
    """
    rows, vocab = draw(st.integers(0, max_rows)), draw(st.integers(1, max_vocab))
    (scale, offset), excluded, labels_per_row, dtype = draw(
        _combinations(((1.0, 0.0), (1.0, -1e4), (30.0, 0.0), (1e3, 1e3)), (False, True), (None, 1, 3), tuple(dtypes))
    )
    generator = torch.Generator().manual_seed(draw(_SEEDS))

    logits = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) + offset
    shape = (rows,) if labels_per_row is None else (rows, labels_per_row)
    labels = torch.randint(0, vocab, shape, generator=generator)
    if excluded:  # never a whole row, which would not be a distribution
        out = torch.rand(rows, vocab, generator=generator) < 0.3
        out[:, 0] = False
        logits = logits.masked_fill(out, -math.inf)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
    batch = LogitsBatch(logits.to(dtype), labels)
    garbage = torch.tensor(_GARBAGE)[torch.randint(0, len(_GARBAGE), (rows, 1), generator=generator)]
    return replace(batch, logits=torch.where(batch.ignored[:, None], garbage.to(dtype), batch.logits))


@dataclass(frozen=True)
class HeadBatch:
    """Hidden states, an output head, and labels. Fields have the library's argument names.

    Attributes:
        hidden: (T, D), rows that are untrained or have no label may hold NaN or inf.
        weight: (V, D).
        bias: (V,) or None.
        labels: (T,) or (T, K) int64, some -100: no label.
        loss_mask: (T,) bool.

    Example:
        >>> import torch
        >>> from kdloss.testing.strategies import HeadBatch
        >>> labels, mask = torch.tensor([1, -100, 0]), torch.tensor([True, True, False])
        >>> HeadBatch(torch.zeros(3, 2), torch.zeros(4, 2), None, labels, mask).used.tolist()
        [True, False, False]
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    loss_mask: Tensor

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
    """Hidden states with NaN and inf in unused rows; none, some or all rows that have a label are trained.

    Args:
        draw: passed by hypothesis.
        dtypes: of the hidden states and the head; a batch has one of them.
        max_rows: largest T; the smallest is 0.
        max_vocab: largest V; the smallest is 1.
        max_width: largest D; the smallest is 1.

    Returns:
        A strategy for `HeadBatch`.

    Example:
        >>> from hypothesis import given
        >>> from kdloss.testing.strategies import head_batches
        >>> @given(head_batches())
        ... def test_only_unused_rows_hold_garbage(batch):
        ...     assert batch.hidden[batch.used].isfinite().all()
        >>> test_only_unused_rows_hold_garbage()
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
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
    batch = HeadBatch(
        hidden=normal(rows, width),
        weight=normal(vocab, width),
        bias=normal(vocab) if with_bias else None,
        labels=labels,
        loss_mask=_labelled(labels) & (torch.rand(rows, generator=generator) < keep),
    )
    garbage = torch.tensor(_GARBAGE)[torch.randint(0, len(_GARBAGE), (rows, 1), generator=generator)]
    return replace(batch, hidden=torch.where(batch.used[:, None], batch.hidden, garbage.to(dtype)))


@dataclass(frozen=True)
class GroupedRewards:
    """One reward per response, and the group of the response. Fields have the library's argument names.

    Attributes:
        rewards: (B,) finite.
        group_ids: (B,) int64, in any order, some negative.

    Example:
        >>> import torch
        >>> from kdloss.testing.strategies import GroupedRewards
        >>> GroupedRewards(torch.tensor([1.0, 0.0]), torch.tensor([7, 7])).rewards.tolist()
        [1.0, 0.0]
    """

    rewards: Tensor
    group_ids: Tensor


@st.composite
def grouped_rewards(
    draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES, max_responses: int = 10
) -> GroupedRewards:
    """Groups of all sizes in any order, including groups of one response and groups of equal rewards.

    Args:
        draw: passed by hypothesis.
        dtypes: of the rewards; a batch has one of them.
        max_responses: largest B; the smallest is 0.

    Returns:
        A strategy for `GroupedRewards`.

    Example:
        >>> import kdloss
        >>> from hypothesis import given
        >>> from kdloss.testing.strategies import grouped_rewards
        >>> @given(grouped_rewards())
        ... def test_advantages_are_finite(batch):
        ...     assert kdloss.leave_one_out_advantages(batch.rewards, group_ids=batch.group_ids).isfinite().all()
        >>> test_advantages_are_finite()
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
