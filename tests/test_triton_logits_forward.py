"""Holds the kernel from logits to log-probs and entropies: against its torch form, blocks and splits, registers.

Tolerance: both sides compute in float32 and sum in different orders. A sum of V terms is off by a few roundings, as
each lane's share is short: 8 roundings of the largest value that takes part.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdloss._triton import _launch
from kdloss._triton import _logits_forward as kernel
from triton_aot import compiled
from triton_harness import DEVICE, far_apart, normal, poisoned

ROWS = 5
NAMES = ("logp", "entropy", "maximum", "peak", "mean")
# A vocabulary smaller than a block, odd ones of one and of several blocks, and one that fills its blocks.
VOCABULARIES = (1, 37, 2049, 4096)

OPTIONS = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "row temperature": {"row_temperature": torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])},
    "softcap": {"softcap": 1.5},
    "all": {"row_temperature": torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1]), "softcap": 1.5, "padding": 3},
}


def labels(vocab: int, count: int) -> Tensor:
    """(ROWS, count): both ends of the vocabulary, one ignored label, and a row that is ignored."""
    found = torch.randint(0, vocab, (ROWS, count), generator=torch.Generator().manual_seed(1))
    found[0, 0], found[1, 0] = 0, vocab - 1
    found[2], found[3, -1] = -100, -100
    return found.to(DEVICE)


def arguments(logits: Tensor, columns: Tensor, *, padding: int = 0, with_entropy: bool = True, **options):
    temperature = options.get("row_temperature")
    return (
        torch.nn.functional.pad(logits, (0, padding), value=50.0),
        columns,
        None if temperature is None else temperature.to(DEVICE),
        options.get("temperature", 1.0),
        options.get("softcap"),
        logits.shape[-1],
        with_entropy,
    )


def assert_same(found, expected, scale: float = 1.0):
    for name, x, y in zip(NAMES, found, expected, strict=True):
        bound = 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            x, y, rtol=bound, atol=bound * scale, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_kernel_is_its_torch_form(vocab, options, dtype):
    given = arguments(normal(ROWS, vocab, dtype=dtype, scale=3), labels(vocab, 1), **options)
    with poisoned():
        found = kernel.forward(*given)
    # entropies and log-probs of a vocabulary of 4096 and temperatures of 0.1 reach a hundred nats
    assert_same(found, kernel.forward_in_torch(*given), scale=64.0)


def test_rows_far_apart_are_found():
    """Row 1 begins past 2^31 elements, in memory that is mapped and never touched between them."""
    rows = normal(3, 33, dtype=torch.bfloat16)
    columns = labels(33, 1)[:3]
    spread = far_apart(rows, 2**31 + 16)
    with poisoned():
        found = kernel.forward(*arguments(spread, columns))
        expected = kernel.forward(*arguments(rows, columns))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def aot_calls() -> None:
    """Every code that the launch table leads to: few rows and many, with and without each part of the kernel."""
    vocab = 151936
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 256, 8192):
            for with_entropy in (False, True):
                for all_options in (False, True):
                    logits = torch.empty(rows, vocab, dtype=dtype, device="meta")
                    columns = torch.empty(rows, 1 + all_options, dtype=torch.int64, device="meta")
                    temperature = torch.empty(rows, device="meta") if all_options else None
                    softcap = 30.0 if all_options else None
                    kernel.forward(logits, columns, temperature, 1.0, softcap, vocab, with_entropy)


def test_nothing_spills_and_every_grid_is_legal():
    launches = compiled("test_triton_logits_forward:aot_calls")
    assert {launch.kernel for launch in launches} == {"forward_kernel", "merge_kernel"}
    for launch in launches:
        assert launch.spilled_bytes == 0, launch
        assert launch.registers <= 128, launch
        assert len(launch.grid) == 1, launch
        assert launch.grid[0] < 2**31, launch


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_fill_the_device(rows, dtype):
    """132 multiprocessors each have a program, without a split being left without columns."""
    launch = _launch.forward(rows, 151936, dtype)
    assert rows * launch.splits >= 132
    blocks = launch.blocks(151936)
    assert (launch.splits - 1) * blocks * launch.lanes * launch.width < 151936
