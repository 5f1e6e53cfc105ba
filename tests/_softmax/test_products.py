"""Holds the products of the CPU path: every route agrees to rounding; bfloat16 errs no more than plain torch.

Each route is tested by taking the capability away, as on a build without oneDNN or a processor without bfloat16.
Tolerances: float32 sums of 37 or 300 terms in another order; errors in bfloat16 are compared with those of plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._logprobs import from_hidden, hidden_op
from kdloss._softmax import products

T, V, D = 70, 600, 37
BF16 = torch.bfloat16
LABELS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(5))
MASK = torch.arange(T) % 5 != 1

needs_bfloat16 = pytest.mark.skipif(not products._BFLOAT16, reason="the processor does not multiply bfloat16")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.fixture(params=["by oneDNN, if the build has it", "without oneDNN"])
def route(request, monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", request.param != "without oneDNN" and products._has_onednn())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "every second column": lambda x: torch.stack([x, x * math.nan], -1).flatten(-2)[:, ::2],
    "inside a wider matrix": lambda x: torch.cat([x * math.nan, x, x * math.nan], -1)[:, x.shape[1] : 2 * x.shape[1]],
    "an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 7, 9), (5, 1, 9), (5, 7, 1), (0, 7, 9), (5, 7, 0), (5, 0, 9)])
def test_a_product_of_any_shape_and_strides(shape, view, dtype, route, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_ENTRIES", 8)  # several blocks of a result
    monkeypatch.setattr(products, "_BLOCK_COLUMNS", 4)
    n, k, m = shape
    a, b = view(normal(n, k, dtype=dtype)), view(normal(k, m, seed=1, dtype=dtype))
    exact = (a.double() @ b.double()).to(dtype)
    close = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(products.product(a, b), exact, **close)
    wider = torch.full((n, m + 3), math.nan, dtype=dtype)
    products.product_(wider[:, 1 : m + 1], a, b)
    torch.testing.assert_close(wider[:, 1 : m + 1], exact, **close)
    products.add_product_(wider[:, 1 : m + 1], a, b)
    torch.testing.assert_close(wider[:, 1 : m + 1], 2 * exact, **close)
    assert wider[:, 0].isnan().all()
    assert wider[:, m + 1 :].isnan().all()


def test_infinities_and_nan_stay_in_their_row(route):
    a, b = normal(4, 7), normal(7, 9, seed=1)
    a[1, 3], a[2, 0] = math.nan, math.inf
    found = products.product(a, b)
    assert found.isfinite().all(-1).tolist() == [True, False, False, True]
    assert torch.equal(found.isnan(), (a @ b).isnan())


def test_the_same_operands_give_the_same_bits(route):
    a, b = normal(70, 300), normal(300, 90, seed=1)
    assert all(torch.equal(products.product(a, b), products.product(a.clone(), b.clone())) for _ in range(3))


def loss_of(name: str, leaves: list[Tensor], upstream: Tensor) -> Tensor:
    """A loss of hidden states, weight and bias by one path of the library."""
    hidden, weight, bias = leaves
    teacher = normal(T, D, seed=7).to(hidden.dtype), normal(V, D, seed=8).to(hidden.dtype)
    if name == "frozen head":  # its gradient of hidden states is computed in the forward
        weight, bias = weight.detach(), bias.detach()
    if name in ("linear_reverse_kl", "frozen head"):
        return (kdloss.linear_reverse_kl(hidden, weight, *teacher, bias=bias, loss_mask=MASK) * upstream).sum()
    if name == "fused_linear_loss":
        return kdloss.fused_linear_loss(
            hidden, weight, LABELS, lambda logp, _, u: logp * u, upstream, loss_mask=MASK, bias=bias, normalizer=1
        ).loss
    return (kdloss.linear_token_logprobs(hidden, weight, LABELS, bias=bias, loss_mask=MASK) * upstream).sum()


def by_hand(name: str, leaves: list[Tensor], upstream: Tensor) -> Tensor:
    """The same in plain torch: logits in the dtype of the inputs, then float32, as trainers write it."""
    hidden, weight, bias = leaves
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    log_q = (hidden @ weight.T + bias).to(wide).log_softmax(-1)
    if name in ("linear_reverse_kl", "frozen head"):
        teacher = normal(T, D, seed=7).to(BF16).to(hidden.dtype), normal(V, D, seed=8).to(BF16).to(hidden.dtype)
        log_p = (teacher[0] @ teacher[1].T).to(wide).log_softmax(-1)
        losses = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        losses = log_q.gather(-1, LABELS[:, None])[:, 0]
    return (losses * upstream.to(wide))[MASK].sum()


PATHS = ("kept", "recomputed", "fused_linear_loss", "linear_reverse_kl", "frozen head")


def gradients(name: str, leaves: list[Tensor], upstream: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(from_hidden, "KEPT_BYTES", 1 << 30 if name == "kept" else 0)
    return list(torch.autograd.grad(loss_of(name, leaves, upstream), leaves[: 1 if name == "frozen head" else 3]))


def half_leaves(scale: float) -> list[Tensor]:
    shapes, scales = ((T, D), (V, D), (V,)), (scale, 1.0, 0.1)
    return [
        normal(*shape, seed=seed, scale=size).to(BF16).requires_grad_()
        for seed, (shape, size) in enumerate(zip(shapes, scales, strict=True))
    ]


@needs_bfloat16
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("scale", [0.3, 1.0])  # logits of about 2 and 6
@pytest.mark.parametrize("tile", [None, 16])  # one tile, and sums over tiles and slices
def test_bfloat16_gradients_err_no_more_than_those_of_plain_torch(name, scale, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(hidden_op, "_CPU", hidden_op._Budget(tile, 256, 1 << 20))
    leaves, upstream = half_leaves(scale), normal(T, seed=9)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(by_hand(name, wide, upstream), wide)
    theirs = torch.autograd.grad(by_hand(name, leaves, upstream), leaves)
    for x, y, truth in zip(gradients(name, leaves, upstream, monkeypatch), theirs, exact, strict=False):
        assert x.dtype == BF16
        assert (x.double() - truth).norm() <= (y.double() - truth).norm()


@needs_bfloat16
def test_a_sum_of_rounded_products_errs_by_a_quarter_more_at_most(monkeypatch):
    """Logits of about 0.2: plain torch hardly rounds them, and its dw is one product. docs/log-probs.md says so."""
    monkeypatch.setattr(hidden_op, "_CPU", hidden_op._Budget(16, 256, 1 << 20))
    leaves, upstream = half_leaves(0.03), normal(T, seed=9)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(by_hand("kept", wide, upstream), wide)[1]
    theirs = torch.autograd.grad(by_hand("kept", leaves, upstream), leaves)[1]
    ours = gradients("recomputed", leaves, upstream, monkeypatch)[1]
    assert (ours.double() - exact).norm() <= 1.25 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("name", PATHS)
def test_without_bfloat16_a_gradient_is_rounded_once(name, route, monkeypatch):
    monkeypatch.setattr(products, "_BFLOAT16", False)
    leaves, upstream = half_leaves(1.0), normal(T, seed=9)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(by_hand(name, wide, upstream), wide)
    for x, truth in zip(gradients(name, leaves, upstream, monkeypatch), exact, strict=False):
        # half of an epsilon, and float32 sums of terms of size 1
        torch.testing.assert_close(x.double(), truth, rtol=0.501 * torch.finfo(BF16).eps, atol=1e-5)


@needs_bfloat16
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("power", [-60, 60])
def test_a_power_of_two_in_the_incoming_gradient_changes_no_digit(name, power, monkeypatch):
    leaves, upstream = half_leaves(1.0), normal(T, seed=9)
    plain = gradients(name, leaves, upstream, monkeypatch)
    for x, y in zip(gradients(name, leaves, upstream * 2.0**power, monkeypatch), plain, strict=True):
        assert torch.equal(x, y * 2.0**power)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_tiny_incoming_gradient_keeps_its_digits(name, dtype, monkeypatch):
    """1e-30 times the mass of a label far below the maximum is still normal; times e^-m as well it would not be."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in half_leaves(1.0)]
    upstream = normal(T, seed=9)
    plain = gradients(name, leaves, upstream, monkeypatch)
    for x, y in zip(gradients(name, leaves, upstream * 2.0**-100, monkeypatch), plain, strict=True):
        # the order of the multiplications differs; in bfloat16 by two roundings
        close = 1e-5 if dtype == torch.float32 else 2**-7
        assert (x.double() * 2.0**100 - y.double()).norm() <= close * y.double().norm()


@needs_bfloat16
@pytest.mark.parametrize("name", PATHS)
def test_untrained_rows_leave_no_trace_in_bfloat16(name, monkeypatch):
    def outcome(value: float) -> list[Tensor]:
        hidden, weight, bias = half_leaves(1.0)
        hidden = hidden.detach().masked_fill(~MASK[:, None], value).requires_grad_()
        return gradients(name, [hidden, weight, bias], normal(T, seed=9), monkeypatch)

    clean = outcome(1.0)
    assert not clean[0][~MASK].any()
    for value in (math.nan, math.inf, -math.inf):
        assert all(torch.equal(x, y) for x, y in zip(outcome(value), clean, strict=True))


def test_other_dtypes_are_never_rounded_to_bfloat16():
    half, wide = torch.zeros(2, 3, dtype=BF16), torch.zeros(2, 3)
    others = [(half, wide), (wide, half), (half.half(), half.half()), (wide, wide)]
    assert not any(products.rounds_gradient(x, w, torch.float32) for x, w in others)
    assert not products.rounds_gradient(half, half, torch.float64)  # a float64 bias
    assert not products.rounds_gradient(half.to("meta"), half.to("meta"), torch.float32)
