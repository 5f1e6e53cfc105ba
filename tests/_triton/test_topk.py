"""Holds the kernels of top-k divergences against their torch form, and the public functions against torch and oracles.

They run on a GPU if there is one, else in the interpreter. Memory that a kernel has to write holds NaN beforehand.

Tolerances: logits and rests are below 80 in size and rounded a few times each. A divergence is a mean of differences of
two of them, and gradients are rounded to their dtype once. (The interpreter truncates bfloat16 where a GPU rounds it.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._divergences import topk_op
from kdloss._logprobs import from_hidden
from kdloss._triton import _launch, _topk_backward as backward_kernels, _topk_forward as forward_kernels
from kdloss.testing import reference
from triton_harness import DEVICE, amid_nan, far_apart, normal, poisoned

# If a lane or a row has no mass, the interpreter's numpy warns about values that are not stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

EPS = torch.finfo(torch.float32).eps
ROUNDING = 64 * EPS
FORMS: dict[str, dict[str, float]] = {"forward_kl": {}, "reverse_kl": {}, "generalized_jsd": {"beta": 0.3}}
TAILS = ("bucket", "renormalize", "truncate")
every_form = pytest.mark.parametrize("name", FORMS)
every_tail = pytest.mark.parametrize("tail", TAILS)
TEMPERATURES = torch.tensor([0.5, 1.0, 0.25, 3.0])
ROWS = 4


def support(vocab: int, k: int) -> Tensor:
    """(ROWS, k) ascending: the first k; both ends and both sides of every block edge; all padding; half padding."""
    edges = [0, vocab - 1, *(x for edge in range(1024, vocab, 1024) for x in (edge - 1, edge, edge + 8))]
    order = torch.rand(2, vocab, generator=torch.Generator().manual_seed(vocab)).argsort(-1)
    apart = torch.tensor([*edges, *(x for x in order[0].tolist() if x not in edges)])
    found = torch.stack([torch.arange(k), apart[:k], torch.full((k,), -1), order[1, :k]])
    found[3, : k // 2] = -1
    return found.clamp(max=vocab - 1).sort(-1).values.to(DEVICE)


def arguments(vocab: int, k: int, dtype: torch.dtype, *, every_option: bool = False) -> tuple[Any, ...]:
    """Arguments of the forward; with every option there are columns of padding, and one temperature per row."""
    logits = torch.nn.functional.pad(normal(ROWS, vocab, dtype=dtype, scale=3), (0, 3 * every_option), value=50.0)
    taus = TEMPERATURES.to(DEVICE) if every_option else None
    return logits, support(vocab, k), taus, 0.7, vocab


def backward_arguments(given: tuple[Any, ...], rest: Tensor, *, with_rest: bool = True) -> tuple[Any, ...]:
    """Arguments of the backward; the rest of row 1 has no gradient, and row 3 has none at all."""
    g, h = normal(*given[1].shape, seed=2), normal(ROWS, seed=3)
    h[1], h[3], g[3] = 0, 0, 0
    h[2], g[2] = 0, 0  # row 2 has only padding
    return g, h, *given[:3], rest, *given[3:], with_rest


@pytest.mark.parametrize(
    ("vocab", "k", "dtype"), [(1, 1, torch.bfloat16), (37, 9, torch.bfloat16), (37, 9, torch.float32)]
)
def test_rows_may_begin_and_end_anywhere(vocab, k, dtype):
    """At each offset from a multiple of 16 bytes, amid NaN, with ids at the ends of rows and in their cells."""
    given = arguments(vocab, k, dtype)
    kept, rest = forward_kernels.forward_in_torch(*given, True)
    incoming = backward_arguments(given, rest)
    gradient = backward_kernels.backward_in_torch(*incoming)
    for offset in range(0, 16 // dtype.itemsize, 3 if vocab == 1 else 1):
        logits = amid_nan(given[0], offset, gap=offset % 3)
        with poisoned():
            found = forward_kernels.forward(logits, *given[1:], True)
        torch.testing.assert_close(found[0], kept, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(found[1], rest, rtol=ROUNDING, atol=ROUNDING)
        out = amid_nan(torch.full_like(given[0], torch.nan), offset + 3 * (offset % 2), gap=offset % 3)
        backward_kernels.backward(*incoming[:2], logits, *incoming[3:], out=out)
        torch.testing.assert_close(out, gradient, rtol=2 * torch.finfo(dtype).eps, atol=ROUNDING)
        out.fill_(torch.nan)
        assert torch.tensor([], dtype=dtype, device=DEVICE).set_(out.untyped_storage()).isnan().all()


@pytest.mark.parametrize(
    ("vocab", "k", "dtype", "every_option"),
    [
        # less than a block; several blocks, split between programs; all ids kept; a vocabulary of one; whole blocks;
        # a whole block of which the last three columns are padding
        (37, 5, torch.float32, False),
        (37, 5, torch.bfloat16, True),
        (2049, 16, torch.bfloat16, False),
        (2049, 16, torch.float32, True),
        (9, 9, torch.float16, True),
        (1, 1, torch.float32, False),
        (2048, 16, torch.bfloat16, False),
        (1021, 5, torch.float32, True),
    ],
)
def test_the_kernels_are_their_torch_form(vocab, k, dtype, every_option):
    given = arguments(vocab, k, dtype, every_option=every_option)
    for with_rest in (True, False):
        with poisoned():
            kept, rest = forward_kernels.forward(*given, with_rest)
        expected = forward_kernels.forward_in_torch(*given, with_rest)
        torch.testing.assert_close((kept, rest), expected, rtol=4 * EPS, atol=8 * EPS)
        exact = topk_op.kept_and_rest_of_rows(given[0].double(), *given[1:], with_rest)
        rows = [0, 1, 3]  # row 2 has only padding
        torch.testing.assert_close(
            (kept.double(), rest[rows].double()), (exact[0], exact[1][rows]), rtol=4 * EPS, atol=8 * EPS
        )
        behind = backward_arguments(given, rest, with_rest=with_rest)
        with poisoned():
            gradient = backward_kernels.backward(*behind)
        assert gradient.dtype == dtype
        expected = backward_kernels.backward_in_torch(*behind)
        # z - rest is up to 80 and is rounded before e^(z - rest)
        torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps + 160 * EPS, atol=8 * EPS)
        assert not gradient[2:].any()
        assert not gradient[:, vocab:].any()


def test_more_ids_than_are_looked_at_side_by_side():
    """300 of 301 ids, examined in three steps: one logit is left, between two that are kept."""
    logits = normal(1, 301, scale=3)
    ids = torch.cat([torch.arange(150), torch.arange(151, 301)])[None].to(DEVICE)
    with poisoned():
        kept, rest = forward_kernels.forward(logits, ids, None, 1.0, 301, True)
        gradient = backward_kernels.backward(kept, rest, logits, ids, None, rest, 1.0, 301, True)
    assert torch.equal(kept, logits.gather(-1, ids))
    torch.testing.assert_close(rest, logits[:, 150], rtol=2 * EPS, atol=0)
    torch.testing.assert_close(gradient, logits.index_copy(-1, torch.tensor([150], device=DEVICE), rest[:, None]))


@pytest.mark.parametrize("programs", [5, 10**6])
def test_splits_only_move_roundings(programs, monkeypatch):
    """One program per row, then three and five, which cut 5 blocks evenly or not; one program has no id."""
    vocab = 5 * 1024 - 5
    logits, ids, *options = arguments(vocab, 16, torch.bfloat16)
    ids = torch.where((ids > 1500) & (ids < 3500), -1, ids).sort(-1).values
    logits, ids = logits[:3], ids[:3]
    monkeypatch.setattr(_launch, "PROGRAMS", 1)
    kept, rest = forward_kernels.forward(logits, ids, *options, True)
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    assert _launch.forward(3, vocab, torch.bfloat16).splits == {5: 3, 10**6: 5}[programs]
    with poisoned():
        found = forward_kernels.forward(logits, ids, *options, True)
    assert torch.equal(found[0], kept)
    torch.testing.assert_close(found[1], rest, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("bad", [[37, 40], [-99, 10**12], [-(10**12), 3]])
def test_an_id_outside_the_vocabulary_is_nowhere_and_reads_nothing(bad):
    """Far outside there is no memory at all; in the padding there is memory that has no effect."""
    logits, ids, *options = arguments(37, 5, torch.float32, every_option=True)
    ids[1] = (
        torch.tensor([1, 2, 3, *bad], device=DEVICE).sort().values
        if bad[-1] > 3
        else torch.tensor([bad[0], 1, 2, 3, -1]).to(DEVICE)
    )
    clean = ids.clone()
    clean[1] = torch.tensor([-1, -1, 1, 2, 3], device=DEVICE)
    with poisoned():
        kept, rest = forward_kernels.forward(logits, ids, *options, True)
        gradient = backward_kernels.backward(*backward_arguments((logits, ids, *options), rest))
    expected = forward_kernels.forward(logits, clean, *options, True)
    assert torch.equal(rest, expected[1])
    assert torch.equal(kept[1].sort().values, expected[0][1].sort().values)
    assert gradient.isfinite().all()
    assert (
        not gradient[1]
        .masked_select(torch.ones(40, dtype=torch.bool, device=DEVICE).index_fill(0, clean[1, 2:], False))
        .any()
    )


def test_slices_of_a_vocabulary_are_read_alone_and_have_the_gradient_of_whole_rows():
    """Cut as ranks would cut, within a cell: kept ids of another slice match no column, and padding stays padding."""
    logits, ids, *_ = arguments(37, 5, torch.float32)
    whole = forward_kernels.forward(logits, ids, None, 1.0, 37, True)
    g, h = normal(ROWS, 5, seed=2), normal(ROWS, seed=3)
    gradient = backward_kernels.backward(g, h, logits, ids, None, whole[1], 1.0, 37, True)
    slices = [slice(*ends) for ends in ((0, 2), (2, 20), (20, 37))]
    parts, here = [], [topk_op.ids_of_slice(ids, part.start) for part in slices]
    for part, columns in zip(slices, here, strict=True):
        x = logits[:, part]
        with poisoned():
            parts.append(forward_kernels.forward(x, columns, None, 1.0, x.shape[-1], True))
    kept, rest = (torch.stack(x) for x in zip(*parts, strict=True))
    assert torch.equal(kept.amax(0), whole[0])
    torch.testing.assert_close(rest.logsumexp(0)[[0, 1, 3]], whole[1][[0, 1, 3]], rtol=4 * EPS, atol=0)
    for part, columns in zip(slices, here, strict=True):
        x = logits[:, part]
        with poisoned():
            mine = backward_kernels.backward(g, h, x, columns, None, whole[1], 1.0, x.shape[-1], True)
        assert torch.equal(mine[[0, 1, 3]], gradient[[0, 1, 3], part])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_takes_no_part_leaves_no_trace(garbage):
    """A row of padding and its temperature; kept logits, for the rest; rows without an incoming gradient."""
    logits, ids, taus, *options = arguments(37, 5, torch.float32, every_option=True)
    kept, rest = forward_kernels.forward(logits, ids, taus, *options, True)
    filled = logits.clone()
    filled[2], filled[0, 3] = garbage, garbage  # 3 is kept
    bad_taus = taus.clone()
    bad_taus[2] = garbage
    with poisoned():
        found = forward_kernels.forward(filled, ids, bad_taus, *options, True)
    assert torch.equal(found[1][:2], rest[:2])
    changed = kept.clone()
    changed[0, 3] = garbage
    assert torch.equal(found[0][:2].nan_to_num(), changed[:2].nan_to_num())
    filled[3], bad_taus[3] = garbage, garbage
    behind = backward_arguments((filled, ids, bad_taus, *options), rest)
    with poisoned():
        gradient = backward_kernels.backward(*behind)
    expected = backward_kernels.backward(*backward_arguments((logits, ids, taus, *options), rest))
    assert torch.equal(gradient, expected)
    assert not gradient[2:].any()


# Addresses


def test_rows_far_apart_are_read_and_written_where_they_are():
    """Row 2 begins past 2^31 elements, though the stride is smaller: forward, backward and in the gradient."""
    stride = 2**30 + 16
    given = arguments(33, 5, torch.bfloat16)
    near, ids, *options = (given[0], given[1].roll(1, 0), *given[2:])
    spread = far_apart(near, stride)
    expected = forward_kernels.forward(near, ids, *options, True)
    with poisoned():
        found = forward_kernels.forward(spread, ids, *options, True)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    g, h = normal(ROWS, 5, seed=2), normal(ROWS, seed=3)
    gradient = backward_kernels.backward(g, h, near, ids, None, expected[1], *options[1:], True)
    assert gradient[2].any()
    out = far_apart(torch.full_like(near, torch.nan), stride)
    again = backward_kernels.backward(g, h, spread, ids, None, expected[1], *options[1:], True, out=out)
    assert torch.equal(again, gradient)


def test_columns_far_apart_are_read_where_they_are():
    """The last column of transposed logits lies past 2^31 elements."""
    logits, ids, *options = arguments(3, 1, torch.bfloat16)
    ids[1] = 2
    spread = far_apart(logits.T.contiguous(), 2**30 + 16).T
    found, expected = (forward_kernels.forward(x, ids, *options, True) for x in (spread, logits))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    g, h = normal(ROWS, 1, seed=2), normal(ROWS, seed=3)
    gradients = [backward_kernels.backward(g, h, x, ids, None, found[1], *options[1:], True) for x in (spread, logits)]
    assert torch.equal(*gradients)


# The public functions


def topk(name: str, **options: Any) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, f"topk_{name}"), **FORMS[name], **options)


def outcome(function: Callable[..., Tensor], logits: Tensor, logp: Tensor, ids: Tensor, factor: Tensor, **options: Any):
    leaf = logits.detach().requires_grad_()
    value = function(leaf, logp, ids, **options)
    return value.detach(), *torch.autograd.grad(value, leaf, factor.to(value.dtype))


@every_form
@pytest.mark.parametrize(
    ("tail", "dtype"), [*((tail, torch.float32) for tail in TAILS), ("bucket", torch.bfloat16)], ids=str
)
def test_against_the_oracle(name, tail, dtype):
    """Ids in any order, one temperature per row, columns of padding, a row without an incoming gradient."""
    vocab = 37
    logits = normal(ROWS, vocab + 2, dtype=dtype, scale=3)
    logits[:, vocab:] = 50
    ids = support(vocab, 5).flip(-1)
    logp = (
        normal(ROWS, vocab, seed=1, scale=3)
        .log_softmax(-1)
        .gather(-1, ids.clamp(min=0))
        .masked_fill(ids < 0, torch.nan)
    )
    factor = normal(ROWS, seed=2)
    factor[3] = 0
    options = {"tail": tail, "temperature": TEMPERATURES.to(DEVICE), "vocab_size": vocab}
    with poisoned():
        value, gradient = outcome(topk(name), logits, logp, ids, factor, impl="triton", **options)
    arrays = [x.double().cpu().numpy() if x.is_floating_point() else x.cpu().numpy() for x in (logits, logp, ids)]
    options |= FORMS[name] | {"temperature": TEMPERATURES.double().numpy()}
    expected = getattr(reference, f"topk_{name}")(*arrays, **options)
    np.testing.assert_allclose(value.cpu().numpy(), expected, rtol=ROUNDING, atol=ROUNDING)
    upstream = factor.double().cpu().numpy()
    exact = getattr(reference, f"topk_{name}_grad")(*arrays, **options, upstream=upstream)
    unit = torch.finfo(dtype).eps
    np.testing.assert_allclose(gradient.double().cpu().numpy(), exact, rtol=unit + ROUNDING, atol=8 * ROUNDING)
    assert gradient.dtype == dtype
    assert value.dtype == torch.float32
    assert not gradient[2:].any()


@pytest.mark.parametrize(
    ("name", "tail"), [*((name, "bucket") for name in FORMS), ("reverse_kl", "renormalize"), ("forward_kl", "truncate")]
)
def test_masses_of_zero_and_rows_that_are_no_distributions(name, tail):
    """As by torch's path: masses of 0 at a kept id, at all others, in a cell, everywhere; NaN; +inf; the teacher's."""
    inf, vocab = torch.inf, 37
    logits, ids = normal(8, vocab), torch.tensor([1, 2, 9, 36], device=DEVICE).repeat(8, 1)
    logp = normal(8, vocab, seed=1).log_softmax(-1).gather(-1, ids)
    logits[0, 2] = -inf
    logits[1] = logits[1].index_fill(
        0, torch.tensor([x for x in range(vocab) if x not in (1, 2, 9, 36)]).to(DEVICE), -inf
    )
    logits[2, 8:16] = -inf
    logits[3], logits[4, 20], logits[5, 20], logits[6, 9] = -inf, torch.nan, inf, torch.nan
    logp[7, 1] = -inf
    factor = torch.ones(8, device=DEVICE)
    with poisoned():
        value, gradient = outcome(topk(name, tail=tail), logits, logp, ids, factor, impl="triton")
    expected, truth = outcome(topk(name, tail=tail), logits, logp, ids, factor, impl="torch")
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    for row in range(8):
        assert gradient[row].isfinite().all() == truth[row].isfinite().all(), row
        if truth[row].isfinite().all():
            torch.testing.assert_close(gradient[row], truth[row], rtol=ROUNDING, atol=ROUNDING)


@every_tail
@pytest.mark.parametrize("shift", [1e3, -1e4])
def test_logits_far_off_centre(tail, shift):
    """Kept logits stay exact, and the rest is rounded to the spacing of numbers of that size, as by torch."""
    logits = (normal(2, 300) * 8).round() / 8
    ids = torch.tensor([[1, 2, 299], [0, 128, 129]], device=DEVICE)
    logp, factor = normal(2, 300, seed=1).log_softmax(-1).gather(-1, ids), torch.ones(2, device=DEVICE)
    near = outcome(topk("forward_kl", tail=tail), logits, logp, ids, factor, impl="torch")
    with poisoned():
        far = outcome(topk("forward_kl", tail=tail), logits + shift, logp, ids, factor, impl="triton")
    bound = 2 * EPS if tail == "renormalize" else EPS * abs(shift)
    torch.testing.assert_close(far, near, rtol=bound, atol=bound)


def test_a_small_rest_keeps_its_digits():
    """A student that is sure of the kept ids: the remaining mass, 1e-12, lies partly in their cell."""
    logits = torch.tensor([[30.0, 29.0, 1.0, 0.5, 2.0]], device=DEVICE)
    logp, ids = torch.tensor([[0.5, 0.3]], device=DEVICE).log(), torch.tensor([[0, 1]], device=DEVICE)
    exact = kdloss.topk_forward_kl(logits.double(), logp.double(), ids, tail="bucket")
    value = kdloss.topk_forward_kl(logits, logp, ids, tail="bucket", impl="triton")
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "tail"), [("forward_kl", "bucket"), ("reverse_kl", "generalized")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20], ids=["computed again", "kept"])
def test_from_hidden_states(name, tail, dtype, kept_bytes, monkeypatch):
    """Products of half-precision operands are exact in float32; the gradient of the logits is rounded to the dtype."""
    monkeypatch.setattr(from_hidden, "KEPT_BYTES" if DEVICE == "cpu" else "DEVICE_KEPT_BYTES", kept_bytes)
    vocab, width, k = 300, 16, 4
    ids = support(vocab, k)
    logp = normal(ROWS, k, seed=4).log_softmax(-1) - 0.2
    mask = torch.tensor([True, True, True, False], device=DEVICE)
    leaves = [normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(ROWS, width), (vocab, width), (vocab,)])]
    leaves[0][3] = torch.nan

    def run(of: list[Tensor], impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        of = [x.detach().clone().requires_grad_() for x in of]
        function = getattr(kdloss, f"linear_topk_{name}")
        options = {"loss_mask": mask, "tail": tail, "bias": of[2], "softcap": 5.0, "temperature": 0.7, "impl": impl}
        value = function(*of[:2], logp.to(of[0].dtype) if impl == "torch" else logp, ids, **options)
        return value.detach(), torch.autograd.grad(value, of, torch.arange(1.0, ROWS + 1, device=DEVICE).to(value))

    with poisoned():
        value, gradients = run(leaves, "triton")
    expected, truth = run([x.double() for x in leaves], "torch")
    torch.testing.assert_close(value.double(), expected, rtol=ROUNDING, atol=ROUNDING)
    bound = 4 * ROUNDING if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for x, y in zip(gradients, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound * float(y.abs().max()))


def test_logits_of_any_strides_and_shapes():
    """`logits[:, :-1]` of (B, L, V), the same transposed, one row without leading axes, and no rows."""
    whole, ids = normal(2, 4, 70), torch.tensor([3, 4, 69], device=DEVICE).repeat(2, 3, 1)
    logp, factor = normal(2, 3, 70, seed=1).log_softmax(-1).gather(-1, ids), normal(2, 3, seed=2)
    of = topk("reverse_kl", tail="bucket")
    plain = outcome(of, whole[:, :-1].contiguous(), logp, ids, factor, impl="torch")
    for logits in (whole[:, :-1], whole[:, :-1].mT.contiguous().mT):
        with poisoned():
            found = outcome(of, logits, logp, ids, factor, impl="triton")
        torch.testing.assert_close(found, plain, rtol=ROUNDING, atol=ROUNDING)
    one = outcome(of, whole[0, 0], logp[0, 0], ids[0, 0], factor[0, 0], impl="triton")
    torch.testing.assert_close(one, (plain[0][0, 0], plain[1][0, 0]), rtol=ROUNDING, atol=ROUNDING)
    value, gradient = outcome(of, whole[:, :0], logp[:, :0], ids[:, :0], factor[:, :0], impl="triton")
    assert (value.shape, gradient.shape) == ((2, 0), (2, 0, 70))


def test_opcheck():
    logits, ids = normal(2, 5).requires_grad_(), torch.tensor([-1, 3], device=DEVICE).repeat(2, 1)
    torch.library.opcheck(topk_op.kept_and_rest_of_rows.overload, (logits, ids, normal(2).exp(), 1.0, 4, True, True))


@pytest.mark.gpu
@every_tail
def test_at_full_size_it_is_the_torch_path_and_the_same_bits_twice(tail):
    """The last of 16384 rows of 151936 begin past 2^31 entries."""
    logits = normal(64, 151936, dtype=torch.bfloat16, scale=3).repeat(256, 1)
    logp, ids = normal(64, 151936, seed=1, scale=3).log_softmax(-1).topk(64)
    logp, ids = logp.repeat(256, 1), ids.repeat(256, 1)
    factor = normal(logits.shape[0], seed=3)
    of = topk("generalized_jsd", tail=tail)
    found = outcome(of, logits, logp, ids, factor)
    again = outcome(of, logits, logp, ids, factor, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    rows = slice(-64, None)
    expected = outcome(of, logits[rows].clone(), logp[rows], ids[rows], factor[rows], impl="torch")
    torch.testing.assert_close(found[0][rows], expected[0], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(found[1][rows], expected[1], rtol=torch.finfo(torch.bfloat16).eps, atol=ROUNDING)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    logits, ids = normal(8, 5000), torch.arange(16, device=DEVICE).repeat(8, 1)
    logp, factor = normal(8, 5000, seed=1).log_softmax(-1).gather(-1, ids), normal(8, seed=2)
    of = topk("forward_kl", tail="bucket")
    outcome(of, logits, logp, ids, factor)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(of, logits, logp, ids, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
