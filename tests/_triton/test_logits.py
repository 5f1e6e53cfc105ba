"""Holds the kernels from logits, forward and backward: each agrees with its torch form, for any blocks and splits.

They run on a GPU if there is one, else in the interpreter. Memory that a kernel has to write holds NaN beforehand.

Tolerances: kernel and torch form compute in float32 and add in different orders. Each lane's part of a sum is short,
so a sum is off by a few roundings: 8 of the largest number that takes part. Gradients are then rounded to their dtype.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kdloss._triton import _launch, _logits_backward as backward_kernels, _logits_forward as forward_kernels
from kdloss._triton._row_math import State
from triton_harness import DEVICE, amid_nan, far_apart, normal, poisoned

ROWS = 6
EPS = torch.finfo(torch.float32).eps
NAMES = ("logp", "entropy", "maximum", "peak", "mean")
TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25, 1.5])

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "row temperature": {"row_temperature": TEMPERATURES},
    "softcap": {"softcap": 1.5},
    "all": {"row_temperature": TEMPERATURES, "softcap": 1.5, "padding": 3, "labels": 3},
}
# Odd vocabularies, smaller than a block and of several blocks and splits; one entry; one that fills its blocks.
CASES = [
    *itertools.product((37, 2049), OPTIONS, (torch.float32, torch.bfloat16)),
    (37, "all", torch.float16),
    (1, "defaults", torch.float32),
    (4096, "defaults", torch.bfloat16),
]
IDS = [f"{vocab}-{options}-{str(dtype).removeprefix('torch.')}" for vocab, options, dtype in CASES]


def label_rows(vocab: int, count: int) -> Tensor:
    """(ROWS, count): both ends of the vocabulary, an ignored row, an ignored label, a label that is given twice."""
    found = torch.randint(0, vocab, (ROWS, count), generator=torch.Generator().manual_seed(1))
    found[0, 0], found[1, 0] = 0, vocab - 1
    found[2], found[3, -1], found[4] = -100, -100, found[4, 0]
    return found.to(DEVICE)


def arguments(logits: Tensor, options: dict[str, Any], *, with_entropy: bool = True) -> tuple[Any, ...]:
    """Arguments of the forward."""
    temperature = options.get("row_temperature")
    return (
        torch.nn.functional.pad(logits, (0, options.get("padding", 0)), value=50.0),
        label_rows(logits.shape[-1], options.get("labels", 1)),
        None if temperature is None else temperature.to(DEVICE),
        options.get("temperature", 1.0),
        options.get("softcap"),
        logits.shape[-1],
        with_entropy,
    )


def backward_arguments(given: tuple[Any, ...], *, of: str = "both") -> tuple[Any, ...]:
    """Arguments of the backward of that forward; the last row has no incoming gradient."""
    logits, columns, row_temperature, temperature, *options, _ = given
    _, _, *known = forward_kernels.forward(*given)
    g, h = normal(*columns.shape, seed=2), normal(columns.shape[0], seed=3)
    g[-1], h[-1] = 0, 0
    return (
        None if of == "entropy" else g,
        None if of == "logp" else h,
        logits,
        State(columns, temperature, row_temperature, *known),
        *options,
    )


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, scale: float) -> None:
    for name, x, y in zip(NAMES, found, expected, strict=True):
        close = {"rtol": 8 * EPS, "atol": 8 * EPS * scale}
        torch.testing.assert_close(x, y, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("vocab", "options", "dtype"), CASES, ids=IDS)
def test_the_forward_is_its_torch_form(vocab, options, dtype):
    given = arguments(normal(ROWS, vocab, dtype=dtype, scale=3), OPTIONS[options])
    with poisoned():
        found = forward_kernels.forward(*given)
    # log-probs and entropies are differences of z - m and its mean, which reach 20 / 0.25
    assert_same(found, forward_kernels.forward_in_torch(*given), scale=80)


@pytest.mark.parametrize(("vocab", "options", "dtype"), CASES, ids=IDS)
@pytest.mark.parametrize("of", ["both", "logp", "entropy"])
def test_the_backward_is_its_torch_form(vocab, options, dtype, of):
    if of != "both" and (options, dtype) not in (("defaults", torch.float32), ("all", torch.bfloat16)):
        return  # one gradient alone needs these two cases only
    given = backward_arguments(arguments(normal(ROWS, vocab, dtype=dtype, scale=3), OPTIONS[options]), of=of)
    with poisoned():
        found = backward_kernels.backward(*given)
    expected = backward_kernels.backward_in_torch(*given)
    assert found.dtype == dtype
    # rate * (z - m - mean) is up to 4 * 80, times an incoming gradient of 3, before probabilities make it small
    close = {"rtol": torch.finfo(dtype).eps, "atol": 8 * EPS * 4}
    torch.testing.assert_close(found, expected, **close)


def test_without_an_entropy_none_is_written():
    given = arguments(normal(ROWS, 37), {}, with_entropy=False)
    with poisoned():
        logp, entropy, maximum, peak, mean = forward_kernels.forward(*given)
    both = forward_kernels.forward(*arguments(normal(ROWS, 37), {}))
    assert entropy.shape == mean.shape == (0,)
    assert torch.equal(logp, both[0])
    assert torch.equal(maximum, both[2])
    assert torch.equal(peak, both[3])


@pytest.mark.parametrize("programs", [1, 7, 30, 10**6])
def test_splits_only_move_roundings(programs, monkeypatch):
    """One, two, five and ten programs per row, which cut 10 blocks evenly or not."""
    given = arguments(normal(ROWS, 10 * 1024 - 5, dtype=torch.bfloat16), {"row_temperature": TEMPERATURES})
    whole = forward_kernels.forward(*given)
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    launch = _launch.forward(ROWS, 10 * 1024 - 5, torch.bfloat16)
    assert launch.splits == {1: 1, 7: 2, 30: 5, 10**6: 10}[programs]
    with poisoned():
        found = forward_kernels.forward(*given)
    assert_same(found, whole, scale=80)
    assert_same(found, forward_kernels.forward_in_torch(*given), scale=80)


@pytest.mark.parametrize("bad", [37, 40, -1, -99, 10**12, -(10**12)])
def test_a_label_outside_the_vocabulary_is_nan_and_reads_nothing(bad):
    """Far outside there is no memory at all; in the padding there is memory that has no effect."""
    given = arguments(normal(ROWS, 37), {"padding": 5, "labels": 2})
    clean = forward_kernels.forward(*given)
    columns = given[1].clone()
    columns[1, 1] = bad
    changed = (given[0], columns, *given[2:])
    with poisoned():
        found = forward_kernels.forward(*changed)
        gradient = backward_kernels.backward(*backward_arguments(changed))
    assert found[0][1, 1].isnan()
    found[0][1, 1] = clean[0][1, 1]
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))
    ignoring = given[1].clone()
    ignoring[1, 1] = -100
    expected = backward_kernels.backward(*backward_arguments((given[0], ignoring, *given[2:])))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_take_no_part_are_not_read(garbage):
    """Ignored rows in both directions, and rows without a gradient in the backward; nor are their temperatures."""
    options = {"row_temperature": TEMPERATURES}
    given = arguments(normal(ROWS, 37), options)
    clean = forward_kernels.forward(*given)
    clean_gradient = backward_kernels.backward(*backward_arguments(given))
    filled, temperatures = given[0].clone(), given[2].clone()
    filled[2], temperatures[2] = garbage, garbage
    found = forward_kernels.forward(filled, given[1], temperatures, *given[3:])
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))
    changed = list(backward_arguments(given))
    filled[-1], temperatures[-1] = garbage, garbage
    changed[2], changed[3] = filled, changed[3]._replace(row_temperature=temperatures)
    with poisoned():
        gradient = backward_kernels.backward(*changed)
    assert torch.equal(gradient, clean_gradient)
    assert not gradient[[2, -1]].any()


def test_an_incoming_nan_is_no_zero():
    given = list(backward_arguments(arguments(normal(ROWS, 37), {})))
    given[0][-1] = float("nan")
    gradient = backward_kernels.backward(*given)
    assert gradient[-1].isnan().all()
    assert not gradient[:-1].isnan().any()


# Addresses


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1, torch.bfloat16), (31, torch.float16), (31, torch.float32), (1050, torch.bfloat16)],
    ids=str,
)
def test_rows_may_begin_and_end_anywhere(vocab, dtype):
    """At each offset from a multiple of 16 bytes, with the end of the last row as the end of memory, amid NaN.

    A gradient at the same offsets is written in its own rows and nowhere else, and so is one at other offsets.
    """
    logits, columns, taus, *options = arguments(normal(ROWS, vocab, dtype=dtype), {"row_temperature": TEMPERATURES})
    given = (logits[:3], columns[:3], taus[:3], *options)
    expected = forward_kernels.forward_in_torch(*given)
    incoming = backward_arguments(given)
    gradient = backward_kernels.backward_in_torch(*incoming)
    for offset in range(0, 16 // dtype.itemsize, 1 if vocab == 31 else 3):
        logits = amid_nan(given[0], offset, gap=offset % 3)
        with poisoned():
            found = forward_kernels.forward(logits, *given[1:])
        assert_same(found, expected, scale=80)
        out = amid_nan(torch.full_like(given[0], torch.nan), offset + 3 * (offset % 2), gap=offset % 3)
        backward_kernels.backward(*incoming[:2], logits, *incoming[3:], out=out)
        torch.testing.assert_close(out, gradient, rtol=torch.finfo(dtype).eps, atol=8 * EPS * 4)
        out.fill_(torch.nan)
        assert torch.tensor([], dtype=dtype, device=DEVICE).set_(out.untyped_storage()).isnan().all()


def test_the_next_tokens_of_sequences_are_read_where_they_are():
    """Rows of a (B, L, V)[:, :-1] begin elsewhere than those of its gradient."""
    given = arguments(normal(ROWS, 1050, dtype=torch.bfloat16), {})
    sequences = torch.full((2, 4, 1050), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    sequences[:, :-1] = given[0].view(2, 3, 1050)
    there = (sequences[:, :-1], *given[1:])
    assert_same(forward_kernels.forward(*there), forward_kernels.forward(*given), scale=80)
    expected = backward_kernels.backward(*backward_arguments(given))
    found = backward_kernels.backward(*backward_arguments(there))
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=32 * EPS)


def test_rows_far_apart_are_read_and_written_where_they_are():
    """Row 2 begins past 2^31 elements, though the stride is smaller: forward, backward and in the gradient."""
    stride, labelled = 2**30 + 16, torch.tensor([0, 1, 4, 5], device=DEVICE)
    rows = _launch.room(4, 33, dtype=torch.bfloat16, device=torch.device(DEVICE))  # begin at multiples of 16 elements
    rows.copy_(normal(4, 33, dtype=torch.bfloat16))
    given = arguments(rows, {})
    near = (rows, given[1][labelled], *given[2:])
    spread = (far_apart(rows, stride), *near[1:])
    expected = forward_kernels.forward(*near)
    with poisoned():
        found = forward_kernels.forward(*spread)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    gradient = backward_kernels.backward(*backward_arguments(near))
    assert gradient[2].any()
    out = far_apart(torch.full_like(rows, torch.nan), stride)
    assert torch.equal(backward_kernels.backward(*backward_arguments(spread), out=out), gradient)


def test_columns_far_apart_are_read_where_they_are():
    """The last column of transposed logits lies past 2^31 elements."""
    rows = normal(ROWS, 3, dtype=torch.bfloat16)
    given = arguments(rows, {})
    spread = (far_apart(rows.T.contiguous(), 2**30 + 16).T, *given[1:])
    found, expected = forward_kernels.forward(*spread), forward_kernels.forward(*given)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    gradients = [backward_kernels.backward(*backward_arguments(x)) for x in (spread, given)]
    assert torch.equal(*gradients)


def test_rows_are_written_past_their_end_where_no_other_row_lies():
    room = _launch.room(3, 37, dtype=torch.bfloat16, device=torch.device(DEVICE))
    assert (room.shape, room.stride()) == ((3, 37), (48, 1))
    assert _launch.writable(room) == 48
    assert _launch.writable(torch.zeros(3, 37)) == 37
    assert (
        _launch.writable(torch.zeros(2 * 48 + 37).as_strided((3, 37), (48, 1))) == 37
    )  # memory ends with the last row


def test_which_rows_are_shifted():
    """Against rows of a gradient: in their first address, or by either stride; strides of single rows never count."""
    space = torch.zeros(3 * 5 * 37 + 1, dtype=torch.bfloat16, device=DEVICE)
    x, y = space[:-1].view(3, 5, 37), torch.empty(15, 37, dtype=torch.bfloat16, device=DEVICE)
    assert not _launch.shifted(x, y, 8)
    assert _launch.shifted(space[1:].view(3, 5, 37), y, 8)
    assert _launch.shifted(x[:, :-1], y[:12], 8)
    assert not _launch.shifted(x[:1, :-1], y[:4], 8)
    assert _launch.shifted(x[..., :-1], torch.empty(15, 36, device=DEVICE), 8)
    assert not _launch.shifted(x[:1, :1, :-1], torch.empty(1, 36, device=DEVICE), 8)


@pytest.mark.parametrize("rows", [1, 7, 64, 256, 2048, 65536, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grids_are_legal_and_fill_the_device(rows, dtype):
    """Each of 132 multiprocessors has a program, and every split and every chunk has columns."""
    vocab = 151936
    forward, backward = _launch.forward(rows, vocab, dtype), _launch.backward(rows, vocab, dtype)
    assert 132 <= rows * forward.splits < 2**31
    assert 132 <= rows * backward.chunks < 2**31
    assert (forward.splits - 1) * forward.blocks(vocab) * forward.lanes * forward.width < vocab
    block = backward.lanes * backward.width
    assert (backward.chunks - 1) * backward.blocks * block < vocab
    assert forward.splits * forward.blocks(vocab) * forward.lanes * forward.width >= vocab
    assert backward.chunks * backward.blocks * block >= vocab
