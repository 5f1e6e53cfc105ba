"""Holds the strategies of `kdloss.testing`: every kind of batch that they promise is drawn, and drawn often."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import Tensor

from kdloss.testing import strategies
from kdloss.testing.strategies import (
    DTYPES,
    GroupedRewards,
    HeadBatch,
    LogitsBatch,
    PackedBatch,
    grouped_rewards,
    head_batches,
    logits_batches,
    packed_batches,
)

# drawn per strategy; the same ones in every run
EXAMPLES = 300
FLOATS = ("logp", "old_logp", "prox_logp", "teacher_logp", "advantages", "weights", "entropy")


def drawn(strategy: st.SearchStrategy[Any]) -> list[Any]:
    examples: list[Any] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        examples.append(example)

    collect()
    assert len(examples) == EXAMPLES
    return examples


def masks(batch: PackedBatch) -> list[list[bool]]:
    """The loss mask of every sequence."""
    return [batch.loss_mask[a:b].tolist() for a, b in pairwise(batch.cu_seqlens.tolist())]


def has_hole(mask: list[bool]) -> bool:
    trained = [t for t, x in enumerate(mask) if x]
    return bool(trained) and not all(mask[trained[0] : trained[-1]])


def garbage(batch: PackedBatch, test: Callable[[Tensor], Tensor]) -> bool:
    return any(bool(test(getattr(batch, name)[~batch.loss_mask]).any()) for name in FLOATS)


def trained(batch: PackedBatch, name: str) -> Tensor:
    return getattr(batch, name)[batch.loss_mask].double()


def log_ratio(batch: PackedBatch) -> Tensor:
    return trained(batch, "logp") - trained(batch, "old_logp")


PACKED: dict[str, Callable[[PackedBatch], bool]] = {
    "no sequence": lambda b: b.size == 0,
    "no token in some sequences": lambda b: b.size > 0 and sum(b.lengths) == 0,
    "an empty sequence among others": lambda b: 0 in b.lengths and sum(b.lengths) > 0,
    "two empty sequences in a row": lambda b: (0, 0) in pairwise(b.lengths),
    "a sequence of one token": lambda b: 1 in b.lengths,
    "a single sequence": lambda b: b.size == 1 and b.lengths[0] > 1,
    "four sequences of which none is empty": lambda b: b.size == 4 and 0 not in b.lengths,
    "tokens, none trained": lambda b: sum(b.lengths) > 0 and not b.loss_mask.any(),
    "an untrained sequence among trained ones": lambda b: any(x and not any(x) for x in masks(b)) and b.loss_mask.any(),
    "an untrained token between two trained ones": lambda b: any(map(has_hole, masks(b))),
    "everything trained": lambda b: sum(b.lengths) > 0 and bool(b.loss_mask.all()),
    "NaN under the mask": lambda b: garbage(b, torch.isnan),
    "inf under the mask": lambda b: garbage(b, torch.isposinf),
    "-inf under the mask": lambda b: garbage(b, torch.isneginf),
    "1e30 under the mask": lambda b: garbage(b, lambda x: (x > 1e29) & x.isfinite()),
    "a ratio of exp(200)": lambda b: bool((log_ratio(b) > 190).any()),
    "a ratio of exp(-200)": lambda b: bool((log_ratio(b) < -190).any()),
    "both in one sequence": lambda b: any(
        (x > 190).any() and (x < -190).any()
        for x in torch.where(b.loss_mask, b.logp.double() - b.old_logp.double(), 0).split(b.lengths)
    ),
    "a teacher of -inf at a trained token": lambda b: bool((trained(b, "teacher_logp") == -math.inf).any()),
    "a teacher of +inf at a trained token": lambda b: bool((trained(b, "teacher_logp") == math.inf).any()),
    "an advantage of exactly 0": lambda b: bool((trained(b, "advantages") == 0).any()),
    "advantages of both signs": lambda b: bool(
        (trained(b, "advantages") > 0).any() & (trained(b, "advantages") < 0).any()
    ),
    "a weight of exactly 0": lambda b: bool((trained(b, "weights") == 0).any()),
    "a trained token without the distillation term": lambda b: bool((b.loss_mask & ~b.kd_mask).any()),
    "prox between two policies": lambda b: bool((trained(b, "prox_logp") != trained(b, "old_logp")).any()),
    "cu_seqlens in int32": lambda b: b.cu_seqlens.dtype == torch.int32,
    "cu_seqlens in int64": lambda b: b.cu_seqlens.dtype == torch.int64,
    **{str(dtype): lambda b, dtype=dtype: b.logp.dtype == dtype for dtype in DTYPES},
    "bf16 with a huge ratio and an infinite teacher": lambda b: bool(
        b.logp.dtype == torch.bfloat16 and (log_ratio(b).abs() > 190).any() and trained(b, "teacher_logp").isinf().any()
    ),
}

LOGITS: dict[str, Callable[[LogitsBatch], bool]] = {
    "no row": lambda b: b.logits.shape[0] == 0,
    "a vocabulary of one token": lambda b: b.logits.shape[1] == 1,
    "several labels a row": lambda b: b.labels.ndim == 2,
    "a row without a label": lambda b: bool(b.ignored.any()),
    "a row with some of its labels": lambda b: (
        b.labels.ndim == 2 and bool(((b.labels == -100).any(1) & ~b.ignored).any())
    ),
    "NaN in a row without a label": lambda b: bool(b.logits[b.ignored].isnan().any()),
    "a logit of -inf in a row with a label": lambda b: bool((b.logits[~b.ignored] == -math.inf).any()),
    "a label that is excluded": lambda b: (
        b.labels.ndim == 1
        and any(b.logits[t, b.labels[t]] == -math.inf for t in range(len(b.labels)) if not b.ignored[t])
    ),
    "logits of an offset of -1e4": lambda b: bool((b.logits[~b.ignored].double().nan_to_num() < -5e3).any()),
    "a scale of 1e3": lambda b: bool((b.logits[~b.ignored].double() > 500).any()),
    **{str(dtype): lambda b, dtype=dtype: b.logits.dtype == dtype for dtype in DTYPES},
}


def labelled(batch: HeadBatch) -> torch.Tensor:
    valid = batch.labels != -100
    return valid.any(-1) if valid.ndim > 1 else valid


HEADS: dict[str, Callable[[HeadBatch], bool]] = {
    "no row": lambda b: b.hidden.shape[0] == 0,
    "rows, none trained": lambda b: b.hidden.shape[0] > 0 and not b.loss_mask.any(),
    "everything trained": lambda b: b.hidden.shape[0] > 0 and bool(b.loss_mask.all()),
    "a row without a label": lambda b: not bool(labelled(b).all()),
    "an untrained row with a label": lambda b: bool((labelled(b) & ~b.loss_mask).any()),
    "NaN in a row that is not used": lambda b: bool(b.hidden[~b.used].isnan().any()),
    "inf in a row that is not used": lambda b: bool(b.hidden[~b.used].isinf().any()),
    "a width of one": lambda b: b.hidden.shape[1] == 1,
    "with bias": lambda b: b.bias is not None,
    "without bias": lambda b: b.bias is None,
    "several labels a row": lambda b: b.labels.ndim == 2,
    **{str(dtype): lambda b, dtype=dtype: b.hidden.dtype == dtype for dtype in DTYPES},
}


def group_sizes(batch: GroupedRewards) -> Counter[int]:
    return Counter(batch.group_ids.tolist())


GROUPS: dict[str, Callable[[GroupedRewards], bool]] = {
    "no response": lambda b: b.rewards.shape[0] == 0,
    "a group of one": lambda b: 1 in group_sizes(b).values(),
    "groups of several sizes": lambda b: len(set(group_sizes(b).values())) > 1,
    "a group in pieces": lambda b: (
        len(group_sizes(b)) < sum(x != y for x, y in pairwise([None, *b.group_ids.tolist()]))
    ),
    "several responses of one reward": lambda b: any(
        n > 1 and b.rewards[b.group_ids == g].unique().numel() == 1 for g, n in group_sizes(b).items()
    ),
    "a negative id": lambda b: bool((b.group_ids < 0).any()),
    "an id past 32 bits": lambda b: bool((b.group_ids.abs() > 2**32).any()),
    **{str(dtype): lambda b, dtype=dtype: b.rewards.dtype == dtype for dtype in DTYPES},
}

KINDS = {
    "packed_batches": (packed_batches, PACKED),
    "logits_batches": (logits_batches, LOGITS),
    "head_batches": (head_batches, HEADS),
    "grouped_rewards": (grouped_rewards, GROUPS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_drawn_and_drawn_often(name: str):
    strategy, kinds = KINDS[name]
    counts = dict.fromkeys(kinds, 0)
    for example in drawn(strategy()):
        for kind, is_one in kinds.items():
            counts[kind] += bool(is_one(example))
    # at least one of the hundred examples that the suite draws for each test
    assert [kind for kind, count in counts.items() if count < EXAMPLES / 100] == []
    # and no kind includes every example, so each predicate can fail
    assert [kind for kind, count in counts.items() if count == EXAMPLES] == []


def test_every_public_strategy_is_counted():
    public = {
        name
        for name, function in inspect.getmembers(strategies, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == strategies.__name__
    }
    assert public == set(KINDS)


def test_what_is_switched_off_is_not_drawn():
    plain = packed_batches(
        dtypes=(torch.float32,),
        min_sequences=1,
        max_sequences=2,
        max_length=3,
        huge_ratios=False,
        infinite_teacher=False,
        garbage=False,
    )
    for batch in drawn(plain):
        assert 1 <= batch.size <= 2
        assert max(batch.lengths) <= 3
        for name in FLOATS:
            x = getattr(batch, name)
            assert x.dtype == torch.float32
            assert x.isfinite().all()
            assert (x.abs() < 100).all()


def test_a_batch_is_taken_stretched_and_permuted_as_it_says():
    for batch in drawn(packed_batches(garbage=False)):
        parts = [batch.take(b) for b in range(batch.size)]
        assert [p.lengths for p in parts] == [[n] for n in batch.lengths]
        for name in (*FLOATS, "loss_mask", "kd_mask"):
            whole = getattr(batch, name)
            assert torch.equal(torch.cat([whole[:0], *(getattr(p, name) for p in parts)]), whole)
        again = batch.take(range(batch.size))
        assert again.cu_seqlens.tolist() == batch.cu_seqlens.tolist()
        assert torch.equal(again.rewards, batch.rewards)
        padded = batch.stretch([n + 1 for n in batch.lengths])
        assert padded.lengths == [n + 1 for n in batch.lengths]
        assert padded.trained == batch.trained
        for name in FLOATS:
            assert getattr(padded, name)[~padded.loss_mask].numel() >= batch.size


@pytest.mark.slow
def test_fuzzing_shares_the_examples_out_and_counts_them():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "tests/_packing/test_layout.py", "--fuzz", "31"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    # the file has four hypothesis tests, so eight examples each; its other tests do not run
    assert "fuzz: 32 examples in 4 tests" in result.stdout
    assert "4 passed" in result.stdout
