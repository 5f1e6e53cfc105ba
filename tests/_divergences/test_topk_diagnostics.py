"""Holds the statistics of a teacher's top K: known rows, ties, what is NaN, and slices of the vocabulary.

Values against the oracle, error texts and compilation are tested in `every_function`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss import _checks
from simulated_ranks import Ranks

MEANS = ("teacher_mass", "student_mass", "overlap", "sampled_inside")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_known_rows() -> None:
    """Three trained rows of which one has no id, and an untrained one."""
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4, dtype=torch.float64)
    p = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    ids = torch.tensor([[1, 3], [0, -1], [-1, -1], [2, 3]])
    logp = torch.stack([p[0, [1, 3]], p[1, [0, 0]], p[0, [0, 0]], p[0, [2, 3]]]).log()
    labels, mask = torch.tensor([3, 1, 0, 2]), torch.tensor([True, True, True, False])
    found = kdloss.topk_diagnostics(q.log(), labels, logp, ids, loss_mask=mask)
    wanted = {
        "tokens": 3,
        "scored": 2,
        "teacher_mass": (0.8 + 0.7) / 2,
        "student_mass": (0.4 + 0.4) / 2,
        "overlap": (0.5 + 1) / 2,  # 1 is among the student's 0 and 1; 0 is its first
        "sampled_inside": 0.5,
    }
    assert {name: x.item() for name, x in found.items()} == pytest.approx(wanted)
    assert not any(x.requires_grad for x in found.values())


def test_the_students_own_top_k_overlaps_with_itself() -> None:
    """In every dtype, with ties at the k-th place, at any temperature; `inside` is the share of the samples in S."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = (2 * random(20, 40)).to(dtype)
        own = logits.topk(5)
        everything, mask = torch.arange(40).expand(20, 40), torch.ones(20, dtype=torch.bool)
        logp = logits.float().log_softmax(-1).gather(-1, own.indices)
        found = kdloss.topk_diagnostics(logits, everything, logp, own.indices, loss_mask=mask, temperature=0.3)
        assert found["overlap"] == 1
        assert found["sampled_inside"].item() == pytest.approx(5 / 40)
        torch.testing.assert_close(found["teacher_mass"], logp.exp().sum(-1).mean().to(found["teacher_mass"].dtype))


def test_a_token_as_probable_as_the_kth_counts_and_one_without_mass_does_not() -> None:
    logits = torch.tensor([[0.0, 0, 0, -1], [0, -math.inf, -math.inf, -math.inf]])
    logp, labels, mask = torch.full((2, 2), -1.0), torch.zeros(2, dtype=torch.int64), torch.tensor([True, True])
    found = kdloss.topk_diagnostics(logits, labels, logp, torch.tensor([[1, 2], [0, 1]]), loss_mask=mask)
    assert found["overlap"].item() == (1 + 0.5) / 2


def test_more_places_than_the_vocabulary_has() -> None:
    logits, ids = random(3, 4), torch.tensor([[0, 1, 2, 3, -1, -1]] * 3)
    logp = logits.log_softmax(-1).gather(-1, ids.clamp(min=0))
    found = kdloss.topk_diagnostics(
        logits, torch.tensor([0, 1, 3]), logp, ids, loss_mask=torch.ones(3, dtype=torch.bool)
    )
    assert [found[name].item() for name in MEANS] == pytest.approx([1, 1, 1, 1])


def test_a_bad_row_makes_the_means_nan_where_values_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id twice, an id or a label outside the vocabulary, a temperature of 0, NaN logits; not at untrained tokens."""
    logits, labels, ids = random(2, 5), torch.tensor([1, 2]), torch.tensor([[1, 2], [0, 3]])
    logp, mask = torch.full((2, 2), -1.0), torch.tensor([True, False])
    good = {"logits": logits, "labels": labels, "logp": logp, "ids": ids, "temperature": torch.ones(2)}
    bad = {
        "ids": [torch.tensor([[1, 1], [1, 1]]), torch.tensor([[5, 0], [5, 0]]), torch.tensor([[-2, 0], [-2, 0]])],
        "labels": [torch.tensor([5, 5]), torch.tensor([-1, -1])],
        "temperature": [torch.zeros(2)],
        "logits": [torch.full((2, 5), math.nan, dtype=torch.float64)],
    }

    def call(mask: Tensor, *, logits: Tensor, labels: Tensor, logp: Tensor, ids: Tensor, temperature: Tensor):
        return kdloss.topk_diagnostics(logits, labels, logp, ids, loss_mask=mask, temperature=temperature)

    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    clean = call(mask, **good)
    for name, values in bad.items():
        for x in values:
            both = good | {name: x}
            broken = call(mask, **both)
            assert broken["student_mass"].isnan()
            assert broken["overlap"].isnan() or name in ("temperature", "logits")
            beside = good | {name: torch.stack([good[name][0], x[1]])}
            for key, y in call(mask, **beside).items():
                torch.testing.assert_close(y, clean[key], rtol=1e-14, atol=0)


@pytest.mark.parametrize("bounds", [[(0, 4), (4, 9)], [(6, 9), (0, 2), (2, 6)], [(0, 8), (8, 9)]], ids=str)
def test_shards_give_the_statistics_of_whole_rows(bounds: list[tuple[int, int]]) -> None:
    """K is wider than some slices; ties across slices, and a slice without mass."""
    logits = random(6, 9)
    logits[1] = 0
    logits[2, bounds[0][0] : bounds[0][1]] = -math.inf
    teacher = random(6, 9, seed=1).log_softmax(-1)
    ids = teacher.topk(4).indices
    ids[3, 2:], ids[4] = -1, -1
    logp, mask = teacher.gather(-1, ids.clamp(min=0)), torch.arange(6) != 5
    labels = torch.arange(12).reshape(6, 2) % 9
    ranks = Ranks(bounds)
    for options in ({}, {"temperature": 0.7}, {"vocab_size": 9}):
        whole = kdloss.topk_diagnostics(logits, labels, logp, ids, loss_mask=mask, **options)

        def call(shard, options=options):
            mine = logits[:, shard.start : shard.stop]
            return kdloss.topk_diagnostics(mine, labels, logp, ids, loss_mask=mask, shard=shard, **options)

        found = ranks.run(call)
        assert ranks.collectives == 2
        for each in found:
            for name, x in whole.items():
                torch.testing.assert_close(each[name], x, rtol=1e-11, atol=1e-12)
                assert torch.equal(each[name], found[0][name])
