"""Holds `fused_linear_loss` by kernels: value and gradient of the two-step path by torch; and compaction.

Bounds: in float32 the two paths sum over the vocabulary and the tokens in different orders. In half precision the
gradient of a logit is rounded before it is multiplied by the head, and the result once more. For sums of a few terms of
similar size that is a hundredth of the largest. (The interpreter truncates bfloat16 where a GPU rounds it.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss import _checks
from kdloss._logprobs import fused
from kdloss._triton import _compaction
from triton_harness import DEVICE, normal, poisoned

T, D, V = 7, 4, 300
LABELS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(8)).index_fill(0, torch.tensor([3]), -100)
LABELS = LABELS.to(DEVICE)
MASK = (torch.arange(T, device=DEVICE) % 3 != 1) & (LABELS != -100)
INPUTS = (normal(T, seed=3) - 5, normal(T, seed=4) - 5, normal(T, seed=5), MASK)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def token_loss(logp, entropy, old_logp, teacher_logp, advantages, mask):
    """RL, distillation and an entropy bonus: both `logp` and `entropy` carry gradient."""
    kdrl = kdloss.kdrl_token_loss(logp, old_logp, teacher_logp, advantages, loss_mask=mask, distill_loss_weight=0.5)
    return kdrl - 0.1 * entropy


def leaves(dtype: torch.dtype, bias: bool) -> list[Tensor]:
    shapes = [(T, D), (V, D), *([(V,)] if bias else [])]
    found = [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    found[0][1] = torch.nan  # untrained
    return [x.requires_grad_() for x in found]


def outcome(inputs: list[Tensor], impl: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    bias = inputs[2] if len(inputs) == 3 else None
    out = kdloss.fused_linear_loss(
        *inputs[:2], LABELS, token_loss, *INPUTS, loss_mask=MASK, bias=bias, impl=impl, **options
    )
    wanted = [x for x in inputs if x.requires_grad]
    return [x.detach() for x in out], list(torch.autograd.grad(out.loss * 3, wanted))


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"temperature": 0.8, "softcap": 3.0, "logit_scale": 0.7, "normalizer": 3.5, "vocab_size": V - 3},
    "temperature per token": {"temperature": torch.linspace(0.5, 2, T, device=DEVICE)},
    "static bound": {"max_trained_tokens": 6},
}


def assert_like_float32(found, inputs: list[Tensor], **options: Any) -> None:
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    values, gradients = outcome(wide, "torch", **options)
    for x, y in zip(found[0], values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(found[1], gradients, strict=True):
        bound = BOUND[x.dtype]
        torch.testing.assert_close(x.float(), y, rtol=bound, atol=bound * float(y.abs().max()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_the_two_steps(options, dtype, monkeypatch):
    """In chunks of two rows."""
    monkeypatch.setattr(fused, "_CHUNK_BYTES", dict.fromkeys(fused._CHUNK_BYTES, 2 * V * 4))
    inputs = leaves(dtype, bias="softcap" in options)
    with poisoned():
        found = outcome(inputs, "triton", **options)
    assert_like_float32(found, inputs, **options)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
def test_float16_and_heads_of_another_dtype(dtypes):
    inputs = leaves(dtypes[0], bias=True)
    inputs[1] = inputs[1].detach().to(dtypes[1]).requires_grad_()
    with poisoned():
        found = outcome(inputs, "triton")
    assert_like_float32(found, inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = leaves(torch.bfloat16, bias=False)
    inputs[frozen].requires_grad_(False)
    with poisoned():
        found = outcome(inputs, "triton")
    assert_like_float32(found, inputs)


def test_float16_gradients_wait_for_the_incoming_scale():
    """A gradient of 1e-9 is 0 in float16; a loss scaler's 2^24 must reach it before it is rounded."""
    inputs = leaves(torch.float16, bias=False)

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        return -1e-9 * logp

    def gradients(inputs: list[Tensor], impl: str) -> list[Tensor]:
        out = kdloss.fused_linear_loss(*inputs, LABELS, loss, loss_mask=MASK, impl=impl).loss
        return [x.float() for x in torch.autograd.grad(out * 2.0**24, inputs)]

    wide = [x.detach().float().requires_grad_() for x in inputs]
    for x, y in zip(gradients(inputs, "triton"), gradients(wide, "torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3 * float(y.abs().max()))


def assert_kernels_agree(inputs: list[Tensor], mask: Tensor) -> None:
    """The kernels and torch give the same loss, log-probs, entropy and gradients."""
    with poisoned():
        found = [
            kdloss.fused_linear_loss(*inputs, LABELS, token_loss, *INPUTS[:3], mask, loss_mask=mask, impl=impl)
            for impl in ("triton", "torch")
        ]
        gradients = [torch.autograd.grad(out.loss, inputs) for out in found]
    for x, y in zip([*found[0], *gradients[0]], [*found[1], *gradients[1]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(T, dtype=torch.bool), torch.arange(T) == 2])
def test_none_and_one_trained_token(mask):
    inputs, mask = leaves(torch.float32, bias=False), mask.to(DEVICE)
    assert_kernels_agree(inputs, mask)


def test_a_trained_token_without_a_label_has_a_loss_where_values_are_not_read(monkeypatch):
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)  # as on a GPU
    inputs, mask = leaves(torch.float32, bias=False), torch.arange(T, device=DEVICE) % 3 != 1
    assert (mask & (LABELS == -100)).sum() == 1
    assert_kernels_agree(inputs, mask)


# Compaction


@pytest.mark.parametrize("tokens", [0, 1, 1024, 2500])  # a block, and three of them
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_trained_rows_come_first_in_order(tokens, share):
    trained = (torch.rand(tokens, generator=torch.Generator().manual_seed(tokens)) < share).to(DEVICE)
    expected = torch.argsort((~trained).to(torch.uint8), stable=True)
    for count in (0, 1, tokens // 2, tokens, tokens + 9):
        with poisoned():
            assert torch.equal(_compaction.order(trained, count), expected[:count])


@pytest.mark.parametrize("width", [1, 5, 2050])  # a block, and two of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_taken_and_put_back(width, dtype):
    hidden = normal(5, 2 * width, dtype=dtype)[:, ::2]  # strided both ways
    columns = torch.tensor([[1, -100], [-100, -100], [0, 0], [-100, 7], [2, 2]], device=DEVICE)
    hidden[1] = torch.nan
    rows = torch.tensor([4, 1, 3], device=DEVICE)
    with poisoned():
        taken = _compaction.take(hidden, rows, columns, dtype)
        back = _compaction.put_back(taken.float(), rows, 5, dtype, torch.tensor(2.0, device=DEVICE))
        every = _compaction.put_back(taken.float(), torch.tensor([2, 0, 1], device=DEVICE), 3, dtype, None)
    expected = hidden[rows].nan_to_num()
    assert torch.equal(taken, expected)
    assert torch.equal(back, torch.zeros_like(hidden).index_copy_(0, rows, 2 * expected))
    assert torch.equal(every, expected[[1, 2, 0]])


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_masks_and_tokens_of_any_strides_under_a_static_bound(layout):
    """A caller may pass a column of a matrix, or an expanded tensor; the kernels need contiguous ones."""

    def laid_out(x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(0), x.flip(0)], -1)[..., 0] if layout == "strided" else x[:1].expand(x.shape)

    mask, labels = laid_out(MASK), laid_out(LABELS)
    temperature = laid_out(torch.linspace(0.5, 2, T, device=DEVICE))
    assert not mask.is_contiguous()

    def found(impl: str, **options: Tensor) -> list[Tensor]:
        inputs = [x.detach().nan_to_num(0).requires_grad_() for x in leaves(torch.float32, bias=False)]
        given = {"loss_mask": mask, "labels": labels, "temperature": temperature} | options
        tokens, target = (given.pop(name) for name in ("loss_mask", "labels"))
        out = kdloss.fused_linear_loss(
            *inputs, target, lambda lp, h: h - lp, loss_mask=tokens, max_trained_tokens=T, impl=impl, **given
        )
        return [*(x.detach() for x in out), *torch.autograd.grad(out.loss, inputs)]

    with poisoned():
        strided = found("triton")
    for x, y in zip(strided, found("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_compaction.order(mask, T), _compaction.order(mask.contiguous(), T))
