"""Holds divergences from hidden states: equality with logits, chunks and slices, masks, frozen heads, dtypes.

Values and gradients against the oracles, error texts and compilation are tested in `every_function`. Chunks and slices
are small here: results must not depend on them, except for the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._divergences import hidden_passes
from kdloss._softmax import head, products

T, V, D, D_TEACHER = 40, 11, 4, 6
FORMS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
}
every_form = pytest.mark.parametrize("name", FORMS)
MASK = torch.arange(T) % 3 != 1
TAUS = torch.linspace(0.5, 2, T, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def linear(name: str) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, f"linear_{name}"), **FORMS[name])


def from_logits(name: str) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, name), **FORMS[name])


def student(dtype: torch.dtype = torch.float64, *, vocab: int = V) -> list[Tensor]:
    """Hidden states, weight and bias, as leaves."""
    return [x.to(dtype).requires_grad_() for x in (normal(T, D), normal(vocab, D, seed=1), normal(vocab, seed=2))]


def teacher(dtype: torch.dtype = torch.float64, *, vocab: int = V) -> list[Tensor]:
    return [normal(T, D_TEACHER, seed=3).to(dtype), normal(vocab, D_TEACHER, seed=4).to(dtype)]


@pytest.fixture
def small_chunks(monkeypatch):
    """The smallest sizes: 16 rows per chunk (two and a part for the trained tokens), 256 rows of the head per slice."""
    monkeypatch.setattr(hidden_passes, "_CHUNK_ENTRIES", {"cpu": 1, "gpu": 1})
    monkeypatch.setattr(head, "_SLICE_ENTRIES", 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "temperature per token": {"temperature": TAUS},
    "softcap": {"softcap": 1.5},
    "teacher_softcap": {"teacher_softcap": 1.5},
    "scales": {"logit_scale": -0.7, "teacher_logit_scale": 2.0},
    "all": {
        "teacher_bias": normal(V, seed=5),
        "softcap": 1.5,
        "teacher_softcap": 2.5,
        "logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "temperature": TAUS,
        "vocab_size": V - 2,
    },
}


def by_logits(name: str, leaves: list[Tensor], others: list[Tensor], **options: Any) -> Tensor:
    """The divergence from (T, V) logits of both sides."""

    def side(hidden: Tensor, weight: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        x = hidden @ weight.T + (0 if bias is None else bias)
        x = x * options.get(f"{prefix}logit_scale", 1.0)
        c = options.get(f"{prefix}softcap")
        return x if c is None else c * torch.tanh(x / c)

    logits = side(leaves[0], leaves[1], "", leaves[2])
    teacher_logits = side(others[0], others[1], "teacher_", options.get("teacher_bias"))
    kept = {key: options[key] for key in ("temperature", "vocab_size") if key in options}
    return torch.where(MASK, from_logits(name)(logits, teacher_logits, **kept), 0)


@every_form
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_the_form_from_logits(name, options, frozen, small_chunks):
    leaves, others, upstream = student(), teacher(), normal(T, seed=9)
    value = linear(name)(
        leaves[0],
        leaves[1].detach() if frozen else leaves[1],
        *others,
        loss_mask=MASK,
        bias=leaves[2].detach() if frozen else leaves[2],
        **options,
    )
    expected = by_logits(name, leaves, others, **options)
    wanted = leaves[:1] if frozen else leaves
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
    close(value, expected)
    found = torch.autograd.grad(value, wanted, upstream)
    for x, y in zip(found, torch.autograd.grad(expected, wanted, upstream), strict=True):
        close(x, y)


@every_form
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_gradients_of_any_part(name, trained):
    """Any of hidden states, weight and bias may be trained, as with LoRA, a frozen trunk or a frozen head."""
    leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(student())]
    leaves = [leaves[0][:5].detach().requires_grad_(0 in trained), *leaves[1:]]
    hidden, weight = teacher()

    def loss(*moving: Tensor) -> Tensor:
        given = dict(zip(trained, moving, strict=True))
        x, w, b = (given.get(i, leaf.detach()) for i, leaf in enumerate(leaves))
        return linear(name)(x, w, hidden[:5], weight, loss_mask=MASK[:5], bias=b, softcap=2.0, temperature=1.3)

    assert torch.autograd.gradcheck(loss, [leaves[i] for i in trained])


@every_form
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_untrained_tokens_leave_no_trace(name, frozen, garbage):
    def outcome(fill: float, where: Tensor) -> list[Tensor]:
        leaves, others = student(), teacher()
        hidden = leaves[0].detach().masked_fill(where[:, None], fill).requires_grad_()
        others[0] = others[0].masked_fill(where[:, None], fill)
        weight = leaves[1].detach() if frozen else leaves[1]
        value = linear(name)(hidden, weight, *others, loss_mask=MASK)
        # a token of the mask whose loss has weight 0 is like an untrained one, except for its value
        upstream = torch.where(torch.arange(T) % 7 == 0, 0.0, 1.0).double()
        return [value.detach(), *torch.autograd.grad(value, [hidden] if frozen else [hidden, weight], upstream)]

    clean = outcome(0.0, ~MASK)
    for x, y in zip(outcome(garbage, ~MASK), clean, strict=True):
        assert torch.equal(x, y)
    assert not clean[0][~MASK].any()
    assert not clean[1][~MASK].any()
    silent = outcome(garbage, ~MASK | (torch.arange(T) % 7 == 0))
    for x, y in zip(silent[1:], clean[1:], strict=True):
        assert torch.equal(x, y)


@every_form
def test_nothing_trained_is_an_attached_zero(name):
    leaves = student()
    value = linear(name)(leaves[0], leaves[1], *teacher(), loss_mask=torch.zeros_like(MASK), bias=leaves[2])
    assert value.shape == (T,)
    assert not value.any()
    assert not any(x.any() for x in torch.autograd.grad(value.sum(), leaves))
    empty = linear(name)(leaves[0][:0], leaves[1], teacher()[0][:0], teacher()[1], loss_mask=MASK[:0])
    assert empty.shape == (0,)
    assert not torch.autograd.grad(empty.sum(), leaves[1])[0].any()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32_and_rounded_once(name, dtype, small_chunks, monkeypatch):
    """A head of 600 rows makes three slices; three chunks of tokens. A bf16 sum would be off by several roundings.

    bfloat16 products of the gradient, where the processor has them, are tested in `_softmax/test_products.py`.
    """
    monkeypatch.setattr(products, "_BFLOAT16", False)
    leaves, others, upstream = student(dtype, vocab=600), teacher(dtype, vocab=600), normal(T, seed=9).float()
    truth_leaves, truth_others = [x.detach().double().requires_grad_() for x in leaves], [x.double() for x in others]
    value = linear(name)(leaves[0], leaves[1], *others, loss_mask=MASK, bias=leaves[2])
    truth = linear(name)(truth_leaves[0], truth_leaves[1], *truth_others, loss_mask=MASK, bias=truth_leaves[2])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), truth, rtol=4e-6, atol=4e-6)
    found = torch.autograd.grad(value, leaves, upstream)
    for x, y in zip(found, torch.autograd.grad(truth, truth_leaves, upstream.double()), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=0.501 * torch.finfo(dtype).eps, atol=4e-6)


@every_form
def test_a_teacher_of_another_dtype_and_width(name):
    leaves = student(torch.float32)
    others = teacher(torch.bfloat16)
    value = linear(name)(leaves[0], leaves[1], *others, loss_mask=MASK)
    expected = linear(name)(leaves[0], leaves[1], *(x.float() for x in others), loss_mask=MASK)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert linear(name)(leaves[0], leaves[1], others[0], others[1].double(), loss_mask=MASK).dtype == torch.float64


@every_form
def test_the_teacher_gets_no_gradient(name):
    leaves = student()
    others = [x.requires_grad_() for x in (*teacher(), normal(V, seed=5))]
    value = linear(name)(leaves[0], leaves[1], *others[:2], teacher_bias=others[2], loss_mask=MASK)
    assert torch.autograd.grad(value.sum(), others, allow_unused=True) == (None,) * 3
    detached = [x.detach() for x in leaves]
    assert not linear(name)(*detached[:2], *others[:2], loss_mask=MASK).requires_grad


@every_form
def test_any_leading_shape(name):
    leaves, others = [x.detach() for x in student()], teacher()
    flat = linear(name)(*leaves[:2], *others, loss_mask=MASK, temperature=TAUS)
    shaped = linear(name)(
        leaves[0].reshape(5, 8, D),
        leaves[1],
        others[0].reshape(5, 8, D_TEACHER),
        others[1],
        loss_mask=MASK.reshape(5, 8),
        temperature=TAUS.reshape(5, 8),
    )
    assert torch.equal(shaped.flatten(), flat)


@every_form
@pytest.mark.parametrize("frozen", [False, True])
def test_the_same_mask_gives_the_same_bits(name, frozen, small_chunks):
    def bits() -> list[bytes]:
        leaves = student(torch.float32)
        value = linear(name)(
            leaves[0], leaves[1].detach() if frozen else leaves[1], *teacher(torch.float32), loss_mask=MASK
        )
        found = torch.autograd.grad(value.sum(), leaves[: 1 if frozen else 2])
        return [x.detach().numpy().tobytes() for x in (value, *found)]

    assert bits() == bits()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_operator_is_well_formed(frozen):
    leaves, others = student(), teacher()
    arguments = (*others, None, MASK, TAUS, 1.5, None, 0.7, 1.0, "generalized_jsd", 0.3, 1.0, V - 1, False, frozen)
    weight, bias = (x.detach() if frozen else x for x in leaves[1:])
    torch.library.opcheck(torch.ops.kdloss.linear_divergence.default, (leaves[0], weight, bias, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_without_waiting_for_values(frozen):
    """The operator selects the trained rows itself, so the graph around it has static shapes."""
    torch.compiler.reset()
    leaves, others = student(), teacher()
    weight = leaves[1].detach() if frozen else leaves[1]
    wanted = leaves[:1] if frozen else leaves[:2]

    def loss(hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        value = kdloss.linear_reverse_kl(hidden, weight, *others, loss_mask=MASK)
        return kdloss.token_mean(value, loss_mask=MASK)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(leaves[0], weight, *others), wanted)
    for x, y in zip(torch.autograd.grad(compiled(leaves[0], weight, *others), wanted), expected, strict=True):
        torch.testing.assert_close(x, y)
