"""Holds that kernels are compiled once for a model, not once for a shape: batches differ in tokens, labels and padding.

Triton compiles again if a number has another type (from 2^31 on), is divisible by 16 or not, or is 1. Few and many rows
have different launch parameters, labels are examined in blocks of powers of two, and the first and the last slice have
code of their own.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from _triton import test_divergences as divergences, test_linear as linear, test_logits as logits, test_topk as topk
from kdloss._triton import _compaction
from triton_aot import compiled

META = torch.device("meta")


def logits_calls() -> None:
    """Rows of an odd and of an even vocabulary, also past 2^31 elements; several labels; the sequences of a batch."""
    for rows in (3000, 4096, 20011):
        logits.step(
            torch.empty(rows, 151936, dtype=torch.bfloat16, device=META), 151936 - rows % 7, labels=9 + rows % 8
        )
    for rows in (3001, 4096, 20011):
        logits.step(torch.empty(rows, 128257, dtype=torch.bfloat16, device=META), 128257, labels=16)
    for rows in (2, 33, 50):
        logits.step(torch.empty(rows, 151936, dtype=torch.bfloat16, device=META), 151936, labels=9 + rows % 8)


def linear_calls() -> None:
    for tokens in (3000, 8192, 20011):
        linear.step(torch.bfloat16, 151669 + tokens % 3, tokens=tokens, rows=tokens - 7, labels=9 + tokens % 8)
        _compaction.order(torch.empty(tokens, dtype=torch.bool, device=META), tokens // 3)


def divergence_calls() -> None:
    for rows in (3000, 8191, 20011):
        x = torch.empty(rows, 151936, dtype=torch.bfloat16, device=META)
        divergences.step("generalized_jsd", x, x, 151936 - rows % 5)


def topk_calls() -> None:
    for rows, vocab in ((3000, 151936), (20011, 151936), (3001, 128257), (20011, 128257), (2, 151936), (33, 151936)):
        x = torch.empty(rows, vocab, dtype=torch.bfloat16, device=META)
        topk.step(x, vocab - 1 - rows % 5, 100 + rows % 29)


def calls() -> None:
    logits_calls()
    linear_calls()
    divergence_calls()
    topk_calls()


def test_shapes_share_their_code():
    codes = defaultdict(set)
    for launch in compiled("_triton.test_compilations:calls"):
        codes[launch.kernel].add(launch.code)
    assert {kernel: len(found) for kernel, found in codes.items()} == {
        "forward_kernel": 2,  # many rows, few rows; even vocabularies and odd ones share their code
        "merge_kernel": 1,
        "backward_kernel": 2,
        "order_kernel": 1,
        "take_kernel": 1,
        "fold_kernel": 3,  # the first slice, the last, and those in between
        "gradient_kernel": 1,
        "put_back_kernel": 1,
        "state_kernel": 1,
        "mixture_kernel": 1,
        "divergence_gradient_kernel": 1,
        "kept_and_rest_kernel": 2,
        "finish_kernel": 1,
        "kept_and_rest_backward_kernel": 2,
    }
