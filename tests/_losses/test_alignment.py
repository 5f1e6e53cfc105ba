"""Tests check_alignment: every shift is found, and unrelated models raise no false alarm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import kdloss

V = 40


def scores(seed: int, length: int = 400, likeness: float = 1.0, sequences: int = 8):
    """Log-probs of a Markov chain's tokens under it and a similar one, at prediction positions; and the layout."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(V, V, generator=generator)
    noise = 2 * torch.randn(V, V, generator=generator)
    teacher = likeness * student + (1 - likeness**2) ** 0.5 * noise
    tokens = [torch.zeros(sequences, dtype=torch.int64)]
    for _ in range(length // sequences - 1):
        tokens.append(student[tokens[-1]].softmax(-1).multinomial(1, generator=generator)[:, 0])
    ids = torch.stack(tokens, 1).flatten()
    cu_seqlens = torch.arange(0, length + 1, length // sequences)
    labels = kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens)
    logp, teacher_logp = (kdloss.token_logprobs(table[ids], labels) for table in (student, teacher))
    return logp, teacher_logp, labels != -100, cu_seqlens


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("likeness", [0.95, 0.7])
def test_every_shift_is_found(shift, likeness):
    for seed in range(3):
        logp, teacher_logp, mask, cu_seqlens = scores(seed, likeness=likeness)
        found = kdloss.check_alignment(logp, teacher_logp.roll(shift), loss_mask=mask, cu_seqlens=cu_seqlens)
        assert (found.shift, found.shifted) == (shift, shift != 0), found
        assert found.tokens == mask.sum()
        assert found.correlations[shift] == max(found.correlations.values())


def test_a_server_that_was_not_shifted():
    logp, teacher_logp, mask, cu_seqlens = scores(0, likeness=0.8)
    own = kdloss.to_token_positions(teacher_logp, cu_seqlens=cu_seqlens, fill=0.0)
    found = kdloss.check_alignment(logp, own, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert found.shift == 1
    assert "use to_prediction_positions" in str(found)
    mended = kdloss.to_prediction_positions(own, cu_seqlens=cu_seqlens, fill=0.0)
    found = kdloss.check_alignment(logp, mended, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert found.aligned
    assert not found.shifted
    assert str(found).startswith("aligned")


def test_aligned_streams_are_never_accused():
    for seed in range(60):
        likeness = (0.0, 0.3, 0.6, 0.9)[seed % 4]
        logp, teacher_logp, mask, cu_seqlens = scores(seed, length=120, likeness=likeness)
        found = kdloss.check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu_seqlens)
        assert not found.shifted, found


def test_why_nothing_was_found_has_its_own_answer():
    logp, teacher_logp, mask, cu_seqlens = scores(0, likeness=0.9)
    unrelated = scores(0, likeness=0.0)[1]
    answers = {
        "nothing in common": (logp, unrelated, mask),
        "too few tokens": (logp, unrelated, mask & (torch.arange(400) < 60)),
        "constant": (logp, torch.zeros_like(logp), mask),
        "NaN": (logp, torch.where(torch.arange(400) == 7, torch.nan, teacher_logp), mask),
        "several shifts": (*2 * (torch.tensor([-0.1, -3.0]).repeat(200),), mask),
    }
    for verdict, (student, teacher, trained) in answers.items():
        found = kdloss.check_alignment(student, teacher, loss_mask=trained, cu_seqlens=cu_seqlens)
        assert (found.shift, found.aligned, found.shifted, found.verdict) == (None, False, False, verdict), found
    for trained in (mask & (torch.arange(400) < 19), torch.zeros_like(mask)):  # fewer than any correlation needs
        found = kdloss.check_alignment(logp, logp, loss_mask=trained, cu_seqlens=cu_seqlens)
        assert (found.shift, found.verdict) == (None, "too few tokens")
    assert "take 70 or more" in str(found)
    empty = torch.zeros(0)
    found = kdloss.check_alignment(empty, empty, loss_mask=empty.bool(), cu_seqlens=torch.tensor([0]))
    assert (found.shift, found.tokens, found.verdict) == (None, 0, "too few tokens")


def test_seventy_tokens_are_enough_for_a_correlation_of_seven_tenths():
    """The number after which "too few tokens" becomes "nothing in common", by the rule that finds a shift."""
    for tokens, verdict in ((69, "too few tokens"), (70, "nothing in common")):
        x = torch.randn(tokens, generator=torch.Generator().manual_seed(2))
        found = kdloss.check_alignment(x, x.flip(0), loss_mask=torch.ones(tokens).bool())
        assert found.verdict == verdict, found
    assert "a correlation of 0.70 would have been found" in str(found)


def test_how_many_tokens_tell():
    """docs/trainers.md: 150 tokens for models whose log-probs correlate by 0.7, and 300 for 0.6."""
    for likeness, length, tokens, correlation in ((0.8, 160, 152, 0.7), (0.7, 312, 304, 0.6)):
        found = []
        for seed in range(30):
            logp, teacher_logp, mask, cu_seqlens = scores(seed, length, likeness)
            assert mask.sum() == tokens
            found.append(kdloss.check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu_seqlens))
        assert all(x.aligned for x in found)
        assert np.mean([x.correlations[0] for x in found]) == pytest.approx(correlation, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    {
        "zeros": (torch.zeros_like, "constant"),
        "not scored": (lambda x: torch.full_like(x, -9999.0), "constant"),
        "excluded": (lambda x: torch.full_like(x, -torch.inf), "constant"),
        "late by three": (lambda x: x.roll(3), "nothing in common"),
        "swapped": (lambda x: torch.cat([x[1000:], x[:1000]]), "nothing in common"),
        "shuffled": (lambda x: x[torch.randperm(2000)], "nothing in common"),
        "reversed in sign": (torch.neg, "nothing in common"),
    }.values(),
)
def test_wrong_scores_are_never_aligned(wrong, verdict):
    torch.manual_seed(0)
    logp, teacher_logp, mask, cu_seqlens = scores(3, length=2000, likeness=0.9, sequences=2)
    found = kdloss.check_alignment(logp, wrong(teacher_logp), loss_mask=mask, cu_seqlens=cu_seqlens)
    assert (found.aligned, found.verdict) == (False, verdict), found
    assert kdloss.check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu_seqlens).aligned


def test_a_stream_that_is_off_by_one_names_the_cause():
    logp, teacher_logp, mask, cu_seqlens = scores(4, likeness=0.9)
    own = kdloss.to_token_positions(teacher_logp, cu_seqlens=cu_seqlens, fill=0.0)
    late = kdloss.check_alignment(logp, own, loss_mask=mask, cu_seqlens=cu_seqlens)
    twice = kdloss.to_prediction_positions(teacher_logp, cu_seqlens=cu_seqlens, fill=0.0)
    early = kdloss.check_alignment(logp, twice, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert (late.shift, early.shift) == (1, -1)
    assert "reports at the token's own position" in str(late)
    assert "drops a first token" in str(early)
    assert "drops a first token" not in str(late)
    unnamed = kdloss.check_alignment(logp, teacher_logp.roll(2), loss_mask=mask, cu_seqlens=cu_seqlens)
    assert unnamed.sentence == "teacher_logp[t +2] belongs to logp[t]"
    found = kdloss.check_alignment(logp, teacher_logp.roll(3), loss_mask=mask, cu_seqlens=cu_seqlens, max_shift=3)
    assert found.shift == 3


def certain(seed: int, length: int = 400):
    """Two trained models: both are nearly certain of most tokens, and their remaining uncertainties are unrelated."""
    generator = torch.Generator().manual_seed(seed)
    surprise = torch.where(torch.rand(length, generator=generator) < 0.15, 3.0, 0.0) * torch.rand(length)
    noise = [torch.randn(length, generator=generator).sub(9).exp() for _ in range(2)]
    return -surprise - noise[0], -0.5 * surprise - noise[1], torch.ones(length).bool(), torch.tensor([0, length])


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_what_both_are_certain_of_does_not_drown_the_rest(shift):
    for seed in range(5):
        logp, teacher_logp, mask, cu_seqlens = certain(seed)
        found = kdloss.check_alignment(logp, teacher_logp.roll(shift), loss_mask=mask, cu_seqlens=cu_seqlens)
        assert found.shift == shift, found


def test_two_shifts_that_fit_alike_are_not_told_apart():
    logp = -torch.rand(200).repeat_interleave(2)  # every log-prob twice: a shift by one changes half of the pairs
    found = kdloss.check_alignment(logp, logp.roll(1), loss_mask=torch.ones(400).bool())
    assert found.shift == 1
    period_two = torch.tensor([-0.1, -3.0]).repeat(200)
    found = kdloss.check_alignment(period_two, period_two, loss_mask=torch.ones(400).bool())
    assert found.shift is None
    assert [found.correlations[shift] for shift in (0, 2)] == pytest.approx([1, 1])


def test_infinities_count_as_the_floor_and_the_mask_takes_nan():
    logp, teacher_logp, mask, cu_seqlens = scores(1, likeness=0.9)
    mask &= torch.arange(400) % 10 != 3
    logp = torch.where(mask, logp, torch.nan)
    teacher_logp = torch.where(mask, teacher_logp, torch.inf)
    excluded, written = (torch.where(teacher_logp < -6, x, teacher_logp) for x in (-torch.inf, -9999.0))
    assert excluded[mask].isinf().any()
    found = kdloss.check_alignment(logp.requires_grad_(), excluded, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert found.shift == 0
    assert kdloss.check_alignment(logp, written, loss_mask=mask, cu_seqlens=cu_seqlens) == found
    x, y = -torch.rand(50), -torch.rand(50)
    r = kdloss.check_alignment(x, y, loss_mask=torch.ones(50).bool()).correlations[1]
    assert r == pytest.approx(np.corrcoef(x[:-1], y[1:])[0, 1])


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_pairs_are_of_trained_tokens_of_one_sequence(lengths, seed):
    """The oracle collects the pairs one by one, and NumPy correlates them."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    logp, teacher_logp = -rng.exponential(2.0, (2, total))
    mask = rng.random(total) < 0.9
    ends = np.cumsum([0, *lengths])
    found = kdloss.check_alignment(
        torch.tensor(logp), torch.tensor(teacher_logp), loss_mask=torch.tensor(mask), cu_seqlens=torch.tensor(ends)
    )
    assert found.tokens == mask.sum()
    for shift in range(-2, 3):
        pairs = [
            (logp[t], teacher_logp[t + shift])
            for start, end in itertools.pairwise(ends)
            for t in range(start, end)
            if start <= t + shift < end and mask[t] and mask[t + shift]
        ]
        expected = np.corrcoef(np.maximum(np.array(pairs).T, -10))[0, 1] if len(pairs) >= 20 else np.nan
        assert found.correlations[shift] == pytest.approx(expected, nan_ok=True, rel=1e-9, abs=1e-12)


def test_rows_are_sequences():
    logp, teacher_logp, mask, cu_seqlens = scores(2, likeness=0.9)
    packed = kdloss.check_alignment(logp, teacher_logp, loss_mask=mask, cu_seqlens=cu_seqlens)
    rows = [x.reshape(8, 50) for x in (logp, teacher_logp, mask)]
    assert kdloss.check_alignment(*rows[:2], loss_mask=rows[2]) == packed


def test_arguments_are_checked():
    x, mask = torch.zeros(3), torch.ones(3).bool()
    with pytest.raises(ValueError, match=r"teacher_logp must match logp \(3,\), got \(2,\)"):
        kdloss.check_alignment(x, x[:2], loss_mask=mask)
    with pytest.raises(TypeError, match=r"loss_mask must be torch.bool"):
        kdloss.check_alignment(x, x, loss_mask=x)
    with pytest.raises(TypeError, match="teacher_logp must be a tensor, got None"):
        kdloss.check_alignment(x, None, loss_mask=mask)
    with pytest.raises(ValueError, match="max_shift must be > 0"):
        kdloss.check_alignment(x, x, loss_mask=mask, max_shift=0)
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        kdloss.check_alignment(x, x, loss_mask=mask, cu_seqlens=torch.tensor([0, 2]))


def test_scores_that_are_all_tiny_and_a_relation_that_is_weak_are_named_as_what_they_are():
    generator = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(400, generator=generator), torch.ones(400).bool()
    found = kdloss.check_alignment(logp, -11 - 19 * torch.rand(400, generator=generator), loss_mask=mask)
    assert found.verdict == "constant"
    assert "-10 or less at every trained token, as where the tokenizers differ" in str(found)
    logp = torch.randn(400, generator=generator)
    weak = 0.42 * logp + 0.19 * logp.roll(1) + 0.9 * torch.randn(400, generator=generator)
    found = kdloss.check_alignment(logp, weak, loss_mask=mask)
    assert (found.verdict, found.sentence[:48]) == (
        "several shifts",
        "cannot tell: the relation at shift +0 is weak; t",
    ), found


def test_a_moderate_relation_in_few_tokens_is_not_called_nothing():
    """A sound teacher that agrees by 0.6 is never accused; a few hundred tokens find it."""
    verdicts = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logp = torch.randn(500, generator=generator)
        teacher_logp = 0.6 * logp + 0.8 * torch.randn(500, generator=generator)
        for tokens in (70, 100):
            mask = torch.arange(500) < tokens
            found = kdloss.check_alignment(logp, teacher_logp, loss_mask=mask)
            verdicts.append(found.verdict)
            assert "take more" in str(found) or found.aligned
        assert kdloss.check_alignment(logp, teacher_logp, loss_mask=torch.ones(500).bool()).aligned
    assert "nothing in common" not in verdicts


def test_max_shift_is_an_int():
    x = torch.zeros(3)
    for wrong in (1.5, True, "2"):
        with pytest.raises(TypeError, match=f"max_shift must be an int, got {type(wrong).__name__}"):
            kdloss.check_alignment(x, x, loss_mask=x.bool(), max_shift=wrong)
