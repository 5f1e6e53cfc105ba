"""Holds the kernels under a `VocabShard`: value and gradient are those of the whole vocabulary in float64.

The ranks are simulated (`simulated_ranks.py`); `scale_out/cases_kernels.py` runs real ones.

Bounds: merging the slices adds a few roundings of log-probs and logits, here below 64, to those of one process. In half
precision the gradient of a logit is rounded once. If it is multiplied by a head, the result is rounded as well, and so
is each rank's part of dH. (The interpreter truncates bfloat16 where a GPU rounds it.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss import _checks, _divergences, _logprobs, _softmax
from kdloss._triton import _products
from kdloss.testing import reference
from simulated_ranks import Ranks
from triton_harness import DEVICE, normal, poisoned

# If a row or a slice of it has no mass, the interpreter's numpy warns about values that are not used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

T, D, V = 6, 5, 41
# Even slices, and slices of very different widths in another order than that of the ranks.
BOUNDS = {"even": [(0, 21), (21, 41)], "uneven": [(13, 41), (12, 13), (0, 12)]}
ROUNDING = 64 * torch.finfo(torch.float32).eps
HALF = {torch.float32: ROUNDING, torch.bfloat16: 2**-6, torch.float16: 2**-9}
TEMPERATURES = torch.tensor([0.5, 1.0, torch.nan, 3.0, 0.2, 1.5], device=DEVICE)  # row 2 is ignored


def label_rows(count: int | None, vocab: int = V) -> Tensor:
    """Both ends of the vocabulary, a label in every slice, an ignored row, an ignored label, a label given twice."""
    found = torch.randint(0, vocab, (T, count or 1), generator=torch.Generator().manual_seed(1))
    found[:, 0] = torch.tensor([0, vocab - 1, 0, 12, 11, 13])
    found[2] = -100
    if count is not None:
        found[3, -1], found[4, 1] = -100, found[4, 0]
    return (found if count is not None else found[:, 0]).to(DEVICE)


# Functions that every path by torch's operations calls.
TORCH_FORM = [
    (_softmax.rows.Sums, "read_"),
    (_divergences.rows, "_distribution"),
    *((module, "gradient_of") for module in (_logprobs.logits_op, _logprobs.hidden_op, _logprobs.fused_passes)),
]
Outcome = tuple[list[Tensor], list[Tensor]]


def outcome(call: Callable[..., Any], leaves: list[Tensor]) -> Outcome:
    """Results and gradients, for incoming gradients that are 0 in the last row but one."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = [x for x in call(*leaves) if x.numel()]
    incoming = [normal(*x.shape, seed=11 + number, dtype=x.dtype) for number, x in enumerate(found)]
    for x in incoming:
        if x.ndim > 0:
            x[4:5] = 0
    return [x.detach() for x in found], list(torch.autograd.grad(found, leaves, incoming))


def split(
    ranks: Ranks, call: Callable[..., Any], leaves: list[Tensor], axes: list[int | None], impl: str = "triton"
) -> Outcome:
    """Like `outcome`, from ranks that hold a slice of each leaf (all of it if its axis is None), put together again.

    All ranks must have the same bits of the results.
    """

    def one(shard):
        mine = [x if axis is None else shard.part(x, axis) for x, axis in zip(leaves, axes, strict=True)]
        return outcome(lambda *x: call(*x, shard=shard, impl=impl), mine)

    with poisoned(), contextlib.ExitStack() as forbidden:
        for where, name in TORCH_FORM if impl == "triton" else ():
            forbidden.enter_context(mock.patch.object(where, name, side_effect=AssertionError("not by kernels")))
        found = ranks.run(one)
    for values, _ in found[1:]:
        assert all(
            torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(values, found[0][0], strict=True)
        )
    order = sorted(range(len(found)), key=lambda rank: ranks.bounds[rank])
    gradients = []
    for number, axis in enumerate(axes):
        parts = [found[rank][1][number] for rank in order]
        gradients.append(
            torch.cat(parts, axis) if axis is not None else torch.stack(parts).double().sum(0).to(parts[0])
        )
    return found[0][0], gradients


def assert_like(found: Outcome, exact: Outcome) -> None:
    for x, y in zip(found[0], exact[0], strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    for x, y in zip(found[1], exact[1], strict=True):
        bound = HALF[x.dtype]
        largest = float(y.nan_to_num().abs().max())
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound * largest, equal_nan=True)


def wide(leaves: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in leaves]


# From logits

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "everything": {"temperature": TEMPERATURES, "softcap": 1.5, "vocab_size": V - 2},
}


@pytest.mark.parametrize(
    ("options", "count", "dtype", "bounds"),
    [
        ("defaults", None, torch.float32, "even"),
        ("temperature", 3, torch.float32, "uneven"),
        ("everything", 3, torch.float32, "uneven"),
        ("everything", None, torch.bfloat16, "even"),
    ],
)
def test_from_logits(options, count, dtype, bounds):
    given = OPTIONS[options]
    labels = label_rows(count, given.get("vocab_size", V))
    logits = normal(T, V, dtype=dtype, scale=3)
    logits[2] = torch.nan  # ignored

    def call(x, **more):
        return kdloss.token_logprobs_and_entropy(x, labels, **given, **more)

    ranks = Ranks(BOUNDS[bounds])
    found = split(ranks, call, [logits], [-1])
    assert ranks.collectives == 1
    assert_like(found, outcome(call, [logits.double()]))
    if options == "defaults":
        alone, _ = split(ranks, lambda x, **more: (kdloss.token_logprobs(x, labels, **given, **more),), [logits], [-1])
        assert torch.equal(alone[0], found[0][0])
    oracle = reference.token_logprobs_and_entropy(
        logits.double().cpu().nan_to_num().numpy(), labels.cpu().numpy(), **as_numpy(given)
    )
    for x, y in zip(found[0], oracle, strict=True):
        torch.testing.assert_close(x.double().cpu(), torch.from_numpy(y), rtol=ROUNDING, atol=ROUNDING)


def as_numpy(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu().nan_to_num(1).numpy() if isinstance(x, Tensor) else x for name, x in options.items()}


def test_an_offset_of_all_logits_changes_nothing():
    """Maxima are subtracted before they are multiplied by 1 / 0.7, which no float32 represents."""
    logits = (normal(T, V) * 1024).round() / 1024  # still exact in float32 after an offset of 1000

    def call(x, **more):
        return kdloss.token_logprobs_and_entropy(x, label_rows(3), temperature=0.7, **more)

    plain, moved = (split(Ranks(BOUNDS["uneven"]), call, [x], [-1]) for x in (logits, logits + 1000))
    for x, y in zip([*plain[0], *plain[1]], [*moved[0], *moved[1]], strict=True):
        assert torch.equal(x, y)


def test_hostile_logits():
    """Slices without mass, a label without mass, infinities, NaN, and a row without mass, as in one process."""
    logits = normal(8, V)
    logits[0] += 3e4
    logits[1, 12:] = -math.inf  # all mass is in one slice
    logits[2, :13] = -math.inf  # all mass is in one slice, and the label in another
    logits[3, 3] = math.inf
    logits[4] = -math.inf
    logits[5, 20] = -math.inf  # the label has no mass
    logits[6, 12] = math.nan  # the whole slice
    logits[7, ::2] = -math.inf
    labels = torch.tensor([20, 1, 5, 4, 2, 20, 3, 1], device=DEVICE)

    def call(x, **more):
        return kdloss.token_logprobs_and_entropy(x, labels, temperature=0.7, **more)

    found = split(Ranks(BOUNDS["uneven"]), call, [logits], [-1])
    exact = outcome(call, [logits.double()])
    finite = [0, 1, 2, 5, 7]
    assert all(x[[3, 4, 6]].isnan().all() for x in found[0])
    assert found[1][0][[3, 6]].isnan().any(-1).all()
    assert_like(
        *(([x[finite] for x in values], [x[finite] for x in gradients]) for values, gradients in (found, exact))
    )
    assert found[0][0][[2, 5]].tolist() == [-math.inf] * 2


def test_a_label_outside_the_vocabulary_is_nan_on_every_rank(monkeypatch):
    """If values are not checked, as on a GPU. V is in no shard, either. Other rows do not change."""
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    logits, weight = normal(T, V), normal(V, D, seed=1)
    labels, wrong = label_rows(3), label_rows(3)
    wrong[1, 2], wrong[3, 1], wrong[5, 0] = V, 10**12, -1
    ranks = Ranks(BOUNDS["even"])
    for call, leaves, axes in [
        (kdloss.token_logprobs_and_entropy, [logits], [-1]),
        (
            kdloss.linear_token_logprobs_and_entropy,
            [normal(T, D), weight],
            [None, 0],
        ),
    ]:
        clean, found = (
            split(ranks, lambda *x, call=call, y=y, **more: call(*x, y, **more), leaves, axes) for y in (labels, wrong)
        )
        assert found[0][0].isnan().nonzero().tolist() == [[1, 2], [3, 1], [5, 0]]
        others = [0, 2, 4]
        assert torch.equal(found[0][0][others], clean[0][0][others])
        assert torch.equal(found[1][0][others], clean[1][0][others])
        assert found[1][0].isfinite().all()


def test_a_label_of_another_shard_acts_through_the_normalisation():
    """In the operator itself. A label outside the vocabulary, and this one if rows are whole, has no effect."""
    logits, g = normal(1, 7).requires_grad_(), torch.tensor([[2.0]], device=DEVICE)
    for place, part, expected in [(7, True, -2 * logits.softmax(-1)), (7, False, 0 * logits), (8, True, 0 * logits)]:
        columns = torch.tensor([[place]], device=DEVICE)
        _, _, *state = _logprobs.logits_op.logprobs(logits, columns, None, 1.0, None, 7, False, True)
        given = (g, None, logits.detach(), columns, None, *state, 1.0, None, 7, True, part)
        with poisoned():
            found = _logprobs.logits_op.logprobs_backward(*given)
        torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)
    torch.library.opcheck(
        _logprobs.logits_op.logprobs_backward.overload, given, test_utils=("test_schema", "test_faketensor")
    )


# From hidden states

HEADS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"temperature": TEMPERATURES, "softcap": 1.5, "logit_scale": -1.2, "vocab_size": V - 2},
    "static bound": {"max_trained_tokens": T, "temperature": 0.7},
}


def head(dtype: torch.dtype, *, bias: bool) -> list[Tensor]:
    found = [normal(T, D, dtype=dtype), normal(V, D, seed=1, dtype=dtype)]
    found[0][2] = torch.nan  # untrained
    return [*found, normal(V, seed=2, dtype=dtype)] if bias else found


@pytest.mark.parametrize(
    ("options", "count", "dtype", "kept", "bounds"),
    [
        ("defaults", None, torch.float32, True, "uneven"),
        ("everything", 3, torch.float32, False, "uneven"),
        ("everything", None, torch.bfloat16, True, "even"),
        ("static bound", None, torch.float16, False, "even"),
    ],
)
def test_from_hidden_states(options, count, dtype, kept, bounds, monkeypatch):
    if not kept:
        monkeypatch.setattr(_logprobs.from_hidden, "KEPT_BYTES", 0)
        monkeypatch.setattr(_logprobs.from_hidden, "DEVICE_KEPT_BYTES", 0)
    given = HEADS[options]
    labels = label_rows(count, given.get("vocab_size", V))
    leaves = head(dtype, bias="softcap" in given)

    def call(h, w, b=None, **more):
        return kdloss.linear_token_logprobs_and_entropy(h, w, labels, bias=b, **given, **more)

    ranks = Ranks(BOUNDS[bounds])
    found = split(ranks, call, leaves, [None, 0, 0][: len(leaves)])
    assert ranks.collectives == 1
    assert_like(found, outcome(call, wide(leaves)))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_tokens_without_a_gradient_are_left_out_of_the_backward(impl):
    """As in one process: the hidden states of such a token are not read and may hold NaN."""
    leaves, clean = head(torch.float32, bias=False), head(torch.float32, bias=False)
    leaves[0][4] = torch.nan

    def call(h, w, **more):
        return kdloss.linear_token_logprobs_and_entropy(h, w, label_rows(None), **more)

    found, exact = (split(Ranks(BOUNDS["even"]), call, x, [None, 0], impl) for x in (leaves, clean))
    assert all(x[4].isnan() for x in found[0])
    assert all(torch.equal(x, y) for x, y in zip(found[1], exact[1], strict=True))


def test_a_head_of_several_slices_on_each_rank(monkeypatch):
    """The width of a slice, one past its last column, marks labels of other ranks. Only one row has a gradient."""
    monkeypatch.setattr(_products, "LEAST_WIDTH", 256)
    monkeypatch.setattr(_products, "SLICE_BYTES", 1)
    monkeypatch.setattr(_logprobs.from_hidden, "KEPT_BYTES", 0)
    monkeypatch.setattr(_logprobs.from_hidden, "DEVICE_KEPT_BYTES", 0)
    leaves, labels = [normal(3, D), normal(900, D, seed=1)], torch.tensor([511, 512, 899], device=DEVICE)

    def call(h, w, **more):
        logp, entropy = kdloss.linear_token_logprobs_and_entropy(h, w, labels, **more)
        return logp[1:2], entropy[1:2]

    found = split(Ranks([(0, 512), (512, 900)]), call, leaves, [None, 0])
    assert_like(found, outcome(call, wide(leaves)))


def token_loss(logp, entropy, old_logp, advantages):
    return -(logp - old_logp).exp() * advantages - 0.1 * entropy


@pytest.mark.parametrize(
    ("options", "dtype", "bounds"),
    [
        ("defaults", torch.float16, "even"),
        ("everything", torch.float32, "uneven"),
        ("static bound", torch.bfloat16, "uneven"),
    ],
)
def test_fused(options, dtype, bounds, monkeypatch):
    """In chunks of two rows, each with one all-gather; on a GPU a trained row without a label also has a loss."""
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    ranks = Ranks(BOUNDS[bounds])
    widest = max(stop - start for start, stop in ranks.bounds)
    monkeypatch.setattr(_logprobs.fused, "_CHUNK_BYTES", dict.fromkeys(_logprobs.fused._CHUNK_BYTES, 2 * 4 * widest))
    given = HEADS[options]
    labels, mask = label_rows(None, given.get("vocab_size", V)), torch.arange(T, device=DEVICE) != 2
    labels[3] = -100
    leaves = head(dtype, bias="softcap" in given)
    inputs = (normal(T, seed=4) - 4, normal(T, seed=5))

    def call(h, w, b=None, **more):
        out = kdloss.fused_linear_loss(h, w, labels, token_loss, *inputs, loss_mask=mask, bias=b, **given, **more)
        return (out.loss,)

    found = split(ranks, call, leaves, [None, 0, 0][: len(leaves)])
    assert ranks.collectives == 3
    assert_like(found, outcome(call, wide(leaves)))


# Divergences

FORMS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.1},
}
every_form = pytest.mark.parametrize("name", FORMS)


def collectives(name: str) -> int:
    return 1 if name.endswith("_kl") and "skewed" not in name else 2


FULL = [(name, "uneven") for name in FORMS]
HALVES = [(name, "even") for name in ("forward_kl", "generalized_jsd")]


@pytest.mark.parametrize(
    ("options", "dtype", "name", "bounds"),
    [
        *(("temperature", torch.float32, *case) for case in FULL),
        *(("everything", torch.bfloat16, *case) for case in HALVES),
    ],
)
def test_divergences_from_logits(name, options, dtype, bounds):
    given = {key: x for key, x in OPTIONS[options].items() if key != "softcap"}
    if isinstance(given.get("temperature"), Tensor):
        given["temperature"] = given["temperature"].nan_to_num(0.7)
    logits, teacher = normal(T, V, dtype=dtype, scale=2), normal(T, V, seed=1, dtype=dtype, scale=2)
    teacher[5] = logits[5]  # a divergence of 0
    logits[0] += 1e3 if dtype == torch.float32 else 0

    def call(x, y, shard=None, **more):
        y = y if shard is None else shard.part(y, -1)
        return (getattr(kdloss, name)(x, y, shard=shard, **FORMS[name], **given, **more),)

    ranks = Ranks(BOUNDS[bounds])
    found = split(ranks, lambda x, **more: call(x, teacher, **more), [logits], [-1])
    assert ranks.collectives == collectives(name)
    assert_like(found, outcome(lambda x: call(x, teacher.double()), [logits.double()]))


@every_form
def test_hostile_divergences(name):
    """Slices without mass on either side, rows without mass, NaN in a whole slice, rows with a large offset."""
    logits, teacher = normal(10, V), normal(10, V, seed=1)
    logits[0, 13:] = teacher[0, 13:] = -math.inf
    logits[1, 13:] = -math.inf
    teacher[2, :13] = -math.inf
    logits[3] = -math.inf
    teacher[4, 20] = math.inf
    logits[5, 12] = math.nan
    logits[6] += 3e4
    teacher[6] -= 3e4
    logits[7, 3] = -math.inf
    teacher[8] = -math.inf
    teacher[9, 12] = logits[9, 12] = -math.inf

    def call(x, y, shard=None, **more):
        y = y if shard is None else shard.part(y, -1)
        return (getattr(kdloss, name)(x, y, temperature=0.7, shard=shard, **FORMS[name], **more),)

    found = split(Ranks(BOUNDS["uneven"]), lambda x, **more: call(x, teacher, **more), [logits], [-1])
    exact = outcome(lambda x: call(x, teacher.double()), [logits.double()])
    torch.testing.assert_close(found[0][0].double(), exact[0][0], rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    finite = exact[0][0].isfinite()
    assert finite.sum() >= 4
    torch.testing.assert_close(found[1][0][finite].double(), exact[1][0][finite], rtol=ROUNDING, atol=ROUNDING)
    assert found[1][0][exact[0][0].isnan()].isnan().any(-1)[[0, 2, 3]].all()


@pytest.mark.parametrize(
    ("options", "dtype", "frozen", "name", "bounds"),
    [
        *(("everything", torch.float32, False, *case) for case in FULL),
        *(("temperature", torch.bfloat16, True, *case) for case in HALVES),
    ],
)
def test_divergences_from_hidden_states(name, options, dtype, bounds, frozen, monkeypatch):
    """In chunks of two rows; with a trained and with a frozen head."""
    monkeypatch.setattr(
        _divergences.hidden_passes, "_CHUNK_ENTRIES", dict.fromkeys(_divergences.hidden_passes._CHUNK_ENTRIES, 2 * V)
    )
    given = dict(HEADS[options], teacher_softcap=2.0) if options == "everything" else OPTIONS[options]
    hidden, weight, bias = head(dtype, bias=True)
    teacher = [normal(T, 4, seed=6, dtype=dtype), normal(V, 4, seed=7, dtype=dtype)]
    mask = torch.arange(T, device=DEVICE) != 2
    leaves = [hidden] if frozen else [hidden, weight, bias]

    def call(h, w=weight, b=bias, of=teacher, shard=None, **more):
        y = of[1] if shard is None else shard.part(of[1])
        if frozen and shard is not None:
            w, b = shard.part(w), shard.part(b)
        function = getattr(kdloss, f"linear_{name}")
        return (function(h, w, of[0], y, loss_mask=mask, bias=b, shard=shard, **FORMS[name], **given, **more),)

    ranks = Ranks(BOUNDS[bounds])
    found = split(ranks, call, leaves, [None, 0, 0][: len(leaves)])
    assert ranks.collectives == collectives(name)
    exact = {"of": wide(teacher), **({"w": weight.double(), "b": bias.double()} if frozen else {})}
    assert_like(found, outcome(partial(call, **exact), wide(leaves)))
