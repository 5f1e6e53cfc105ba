"""Holds `fused_linear_loss`: value and gradient of the two-step path, exact scaling, errors of coupled losses.

Tolerances: float64 sums over the vocabulary and the tokens in another order: a few roundings of terms of size 10.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss import _checks
from kdloss._logprobs import fused
from kdloss._softmax import head, products

T, D, V = 13, 4, 9
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(8)).index_fill(0, torch.tensor([3]), -100)
MASK = (torch.arange(T) % 3 != 1) & (LABELS != -100)
OLD, TEACHER, ADVANTAGES = normal(T, seed=3) - 2, normal(T, seed=4) - 2, normal(T, seed=5)
INPUTS = (OLD, TEACHER, ADVANTAGES, MASK)


def token_loss(logp, entropy, old_logp, teacher_logp, advantages, mask):
    """RL, distillation and an entropy bonus: both arguments carry gradient."""
    kdrl = kdloss.kdrl_token_loss(logp, old_logp, teacher_logp, advantages, loss_mask=mask, distill_loss_weight=0.5)
    return kdrl - 0.1 * entropy


def two_steps(hidden: Tensor, weight: Tensor, labels: Tensor, loss: Any, *inputs: Any, **options: Any) -> Any:
    normalizer = options.pop("normalizer", None)
    out = kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels, **options)
    total = kdloss.token_mean(
        loss(out.logp, out.entropy, *inputs), loss_mask=options["loss_mask"], normalizer=normalizer
    )
    return total, out


def leaves(with_bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(T, D), (V, D), *([(V,)] if with_bias else [])]
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"temperature": 0.8, "softcap": 3.0, "logit_scale": 0.7},
    "temperature per token": {"temperature": torch.linspace(0.5, 2, T, dtype=torch.float64)},
    "normalizer": {"normalizer": 3.5},
    "normalizer 0": {"normalizer": 0},
    "static bound": {"max_trained_tokens": 11},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 100])
def test_one_pass_is_the_two_steps(options, with_bias, rows_a_chunk, monkeypatch):
    monkeypatch.setitem(fused._CHUNK_BYTES, "cpu", rows_a_chunk * V * 8)
    inputs = leaves(with_bias)
    options = {"loss_mask": MASK, "bias": inputs[2] if with_bias else None, **options}
    found = kdloss.fused_linear_loss(*inputs[:2], LABELS, token_loss, *INPUTS, **options)
    expected, parts = two_steps(*inputs[:2], LABELS, token_loss, *INPUTS, **options)
    torch.testing.assert_close(found.loss, expected, **CLOSE)
    torch.testing.assert_close(found.logp, parts.logp.detach(), **CLOSE)
    torch.testing.assert_close(found.entropy, parts.entropy.detach(), **CLOSE)
    assert not found.logp.requires_grad
    assert not found.entropy.requires_grad
    for x, y in zip(
        torch.autograd.grad(found.loss * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True
    ):
        torch.testing.assert_close(x, y, **CLOSE)


def test_inference_tensors_are_taken_as_the_same_numbers():
    hidden, weight = leaves(with_bias=False)
    with torch.inference_mode():
        mask, labels, taus = MASK.clone(), LABELS.clone(), OPTIONS["temperature per token"]["temperature"].clone()
        inputs, frozen = [x.clone() for x in INPUTS], hidden.detach().clone()
    found = kdloss.fused_linear_loss(frozen, weight, labels, token_loss, *inputs, loss_mask=mask, temperature=taus)
    options = OPTIONS["temperature per token"]
    expected = kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=MASK, **options)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(*(torch.autograd.grad(x.loss, weight)[0] for x in (found, expected)))


def test_gradcheck_of_the_pass_itself():
    """The forward computes the inner gradients; finite differences find a wrong one."""
    inputs = leaves()

    def smooth(logp: Tensor, entropy: Tensor, a: Tensor, b: Tensor) -> Tensor:  # without a detached factor
        return a * logp.exp() + b * entropy.square()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kdloss.fused_linear_loss(
            hidden, weight, LABELS, smooth, OLD, TEACHER, loss_mask=MASK, bias=bias, softcap=2.0, temperature=0.7
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden, weight = leaves(with_bias=False)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=MASK).loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_half_precision_gradients_are_rounded_after_the_incoming_scale():
    """A gradient of 1e-9 is 0 in float16, so a loss scaler's factor must be applied before rounding."""
    hidden, weight = leaves(with_bias=False, dtype=torch.float16)
    tiny = 1e-9

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        return -tiny * logp

    out = kdloss.fused_linear_loss(hidden, weight, LABELS, loss, loss_mask=MASK).loss
    (found,) = torch.autograd.grad(out * 2.0**24, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact, _ = two_steps(*wide, LABELS, loss, loss_mask=MASK)
    (expected,) = torch.autograd.grad(exact * 2.0**24, wide[1])
    assert found.abs().max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-7)


def test_a_half_precision_head_is_widened_slice_by_slice(monkeypatch):
    """Three slices of 256 rows; products are in float32, so they differ from one whole product only by rounding.

    bfloat16 products of the gradient, where the processor has them, are tested in `_softmax/test_products.py`.
    """
    monkeypatch.setattr(head, "_SLICE_ENTRIES", 1)
    monkeypatch.setattr(products, "_BFLOAT16", False)
    weight = normal(600, D, seed=1, dtype=torch.bfloat16)
    hidden, labels = normal(T, D, dtype=torch.bfloat16), LABELS * 66 + (LABELS == -100) * 6500
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    wide = [x.float().requires_grad_() for x in (hidden, weight)]
    inputs = [x.float() for x in INPUTS[:3]]
    out = kdloss.fused_linear_loss(*found, labels, token_loss, *inputs, MASK, loss_mask=MASK)
    expected = kdloss.fused_linear_loss(*wide, labels, token_loss, *inputs, MASK, loss_mask=MASK)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
    gradients = zip(torch.autograd.grad(out.loss, found), torch.autograd.grad(expected.loss, wide), strict=True)
    for x, y in gradients:
        # rounded to bfloat16 once, at the end
        torch.testing.assert_close(x.float(), y, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_garbage_under_the_mask_leaves_no_trace():
    def outcome(value: float) -> list[Tensor]:
        hidden, weight = leaves(with_bias=False)
        hidden = torch.where(MASK[:, None], hidden.detach(), value).requires_grad_()
        inputs = [torch.where(MASK, x, value) for x in INPUTS[:3]]
        out = kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *inputs, MASK, loss_mask=MASK)
        return [*out, *torch.autograd.grad(out.loss, (hidden, weight))]

    clean = outcome(1.0)
    for value in (float("nan"), float("inf"), -float("inf")):
        assert all(torch.equal(x, y) for x, y in zip(outcome(value), clean, strict=True))


@pytest.mark.parametrize("mask", [torch.zeros(T, dtype=torch.bool), torch.arange(T) == 2])
def test_none_and_one_trained_token(mask):
    hidden, weight = leaves(with_bias=False)
    out = kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS[:3], mask, loss_mask=mask)
    expected, _ = two_steps(hidden, weight, LABELS, token_loss, *INPUTS[:3], mask, loss_mask=mask)
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    for x, y in zip(
        torch.autograd.grad(out.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(x, y, **CLOSE)
    with torch.no_grad():
        silent = kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS[:3], mask, loss_mask=mask)
    torch.testing.assert_close(silent.loss, expected.detach(), **CLOSE)


@pytest.mark.slow
def test_without_a_gradient_and_under_compile_it_is_the_same_number():
    hidden, weight = leaves(with_bias=False)

    def call() -> Tensor:
        return kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=MASK).loss

    with torch.no_grad():
        silent = call()
    torch.testing.assert_close(silent, call(), **CLOSE)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, call(), **CLOSE)
    for x, y in zip(
        torch.autograd.grad(compiled, (hidden, weight)), torch.autograd.grad(call(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(x, y, **CLOSE)


def dropout(logp, entropy):
    return torch.nn.functional.dropout(logp, 0.5)


def rare_dropout(logp, entropy):
    return torch.nn.functional.dropout(logp, 1e-3)


def in_place(logp, entropy):
    return logp.mul_(2)


def in_place_input(logp, entropy, old_logp):
    return logp * old_logp.exp_()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda logp, entropy: logp * logp.mean(), ValueError, "must be elementwise.*linear_token_logprobs first"),
        (lambda logp, entropy: logp.cumsum(0), ValueError, "must be elementwise"),
        (lambda logp, entropy: logp.flip(0).cumsum(0).flip(0), ValueError, "must be elementwise"),
        (lambda logp, entropy: logp / len(logp), ValueError, "moved with the number or the gradient of others"),
        (lambda logp, entropy: logp + logp.mean() - logp.mean().detach(), ValueError, "must be elementwise"),
        (lambda logp, entropy: -logp * (logp == logp.max()), ValueError, "must be elementwise"),
        (lambda logp, entropy: -logp * (torch.arange(len(logp)) < 1), ValueError, "must be elementwise"),
        (lambda logp, entropy: logp.flip(0) - logp.flip(0).detach() - logp, ValueError, "must be elementwise"),
        (rare_dropout, ValueError, "must be deterministic"),
        (lambda logp, entropy: logp.sum(), ValueError, r"token_loss must return the loss of each.*got \(\)"),
        (lambda logp, entropy: 0.5, TypeError, "token_loss must return a tensor, got float"),
        (lambda logp, entropy: (logp > -1).long(), TypeError, "floating-point dtype, got torch.int64"),
        (dropout, ValueError, "must be deterministic.*pass them as a token input"),
        (in_place, ValueError, r"must not change its log-probs in place; return a new tensor, such as 2 \* logp"),
    ],
)
def test_a_loss_that_is_not_per_token_is_explained(loss, error, message, frozen):
    hidden, weight = leaves(with_bias=False)
    with pytest.raises(error, match=message):
        kdloss.fused_linear_loss(hidden, weight.detach() if frozen else weight, LABELS, loss, loss_mask=MASK)
    with torch.no_grad(), pytest.raises(error, match=message):
        kdloss.fused_linear_loss(hidden, weight, LABELS, loss, loss_mask=MASK)


def test_the_ways_out_of_these_errors():
    given = leaves(with_bias=False)
    for loss, inputs in (
        (lambda logp, entropy: 2 * logp, ()),
        (lambda logp, entropy, kept: logp * kept, ((torch.rand(T) > 0.5).double(),)),
        (lambda logp, entropy, old_logp: logp * old_logp.exp(), (OLD,)),
    ):
        expected, _ = two_steps(*given, LABELS, loss, *inputs, loss_mask=MASK)
        found = kdloss.fused_linear_loss(*given, LABELS, loss, *inputs, loss_mask=MASK).loss
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_token_input_that_is_changed_in_place_is_named():
    old = OLD.clone()
    with pytest.raises(ValueError, match=r"must not change token_inputs\[0\] in place"):
        kdloss.fused_linear_loss(*leaves(with_bias=False), LABELS, in_place_input, old, loss_mask=MASK)
    assert torch.equal(old, OLD)


@pytest.mark.parametrize("seed", range(40))
def test_a_loss_that_depends_on_a_quantile_of_the_batch_is_refused(seed):
    """Entropies that lie close together or far apart: the quantile moves whichever side a token is on."""
    hidden, weight = normal(T, D, seed=seed).requires_grad_(), normal(V, D, seed=seed + 1) * (1 + seed % 5)

    def on_forking_tokens(logp, entropy):
        return torch.where(entropy >= entropy.quantile(0.8), -logp, 0.0)

    with pytest.raises(ValueError, match="must be elementwise"):
        kdloss.fused_linear_loss(hidden, weight, LABELS, on_forking_tokens, loss_mask=MASK)


def test_a_tensor_of_all_tokens_is_a_token_input_and_not_captured():
    given = leaves(with_bias=False)
    with pytest.raises(ValueError, match=r"failed on 8 of 13: .*\(8\).*\(13\).*must be a token input"):
        kdloss.fused_linear_loss(*given, LABELS, lambda logp, entropy: logp * OLD, loss_mask=MASK)
    found = kdloss.fused_linear_loss(*given, LABELS, lambda logp, entropy, old: logp * old, OLD, loss_mask=MASK).loss
    expected, _ = two_steps(*given, LABELS, lambda logp, entropy, old: logp * old, OLD, loss_mask=MASK)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_label_outside_the_vocabulary_at_an_untrained_token_leaves_no_trace():
    given, garbage = leaves(with_bias=False), LABELS.masked_fill(~MASK, V + 5)
    out = kdloss.fused_linear_loss(*given, garbage, token_loss, *INPUTS, loss_mask=MASK, max_trained_tokens=T)
    expected = kdloss.fused_linear_loss(*given, LABELS, token_loss, *INPUTS, loss_mask=MASK)
    torch.testing.assert_close(tuple(out), tuple(expected), **CLOSE)
    assert not out.logp[~MASK].any()


def test_an_error_of_memory_is_not_taken_for_one_of_the_loss():
    def loss(logp, entropy):
        raise torch.OutOfMemoryError("of the device")

    with pytest.raises(torch.OutOfMemoryError, match=r"^of the device$"):
        kdloss.fused_linear_loss(*leaves(with_bias=False), LABELS, loss, loss_mask=MASK)


def test_a_loss_whose_every_log_prob_is_infinite_is_not_refused():
    """No log-prob is finite, so none tells how far to move the other tokens in the check of what is elementwise."""
    hidden, weight = leaves(with_bias=False)
    bias = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([3]), -torch.inf)
    labels = torch.full_like(LABELS, 3)
    out = kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, entropy: -logp, loss_mask=MASK, bias=bias)
    assert out.loss == torch.inf


# whether each of hidden states and head is frozen
@pytest.mark.parametrize("frozen", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_captured_tensor_gets_no_gradient(frozen, compiled):
    hidden, weight = (x.requires_grad_(not stays) for x, stays in zip(leaves(with_bias=False), frozen, strict=True))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call() -> Tensor:
        loss = lambda logp, entropy: scale * logp + scale.square()  # noqa: E731
        return kdloss.fused_linear_loss(hidden, weight, LABELS, loss, loss_mask=MASK).loss

    loss = torch.compile(call, fullgraph=True, backend="aot_eager")() if compiled else call()
    assert loss.requires_grad == (frozen != (True, True))
    expected, _ = two_steps(hidden, weight, LABELS, lambda logp, entropy: 0.7 * logp + 0.49, loss_mask=MASK)
    torch.testing.assert_close(loss, expected, **CLOSE)
    if not loss.requires_grad:
        return
    loss.backward()
    assert scale.grad is None or scale.grad == 0
    expected_of = torch.autograd.grad(expected, [x for x in (hidden, weight) if x.requires_grad])
    for x, y in zip([x.grad for x in (hidden, weight) if x.requires_grad], expected_of, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_a_loss_without_gradient_has_a_gradient_of_zero():
    hidden, weight = leaves(with_bias=False)
    loss = kdloss.fused_linear_loss(hidden, weight, LABELS, lambda logp, _, old: old, OLD, loss_mask=MASK).loss
    torch.testing.assert_close(loss.detach(), OLD[MASK].mean(), **CLOSE)
    assert not any(x.any() for x in torch.autograd.grad(loss, (hidden, weight)))


def test_a_0_dim_token_input_and_none_are_passed_on():
    hidden, weight = leaves(with_bias=False)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(logp, entropy, factor, nothing):
        assert nothing is None
        assert factor.shape == ()
        return -factor * logp

    out = kdloss.fused_linear_loss(hidden, weight, LABELS, loss, scale, None, loss_mask=MASK)
    expected, _ = two_steps(hidden, weight, LABELS, lambda logp, entropy: -0.7 * logp, loss_mask=MASK)
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    out.loss.backward()
    assert scale.grad is None


def test_one_label_a_token():
    with pytest.raises(ValueError, match=r"^labels must match the rows of hidden \(13,\), got \(13, 1\)$"):
        kdloss.fused_linear_loss(*leaves(with_bias=False), LABELS[:, None], token_loss, *INPUTS, loss_mask=MASK)


def test_token_inputs_must_be_per_token():
    with pytest.raises(ValueError, match=r"token_inputs\[1\] must be \(13,\) or \(13, \.\.\.\), got \(12,\)"):
        kdloss.fused_linear_loss(*leaves(with_bias=False), LABELS, lambda *x: x[0], OLD, OLD[1:], loss_mask=MASK)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_bound_counts_the_tokens_of_the_mask(with_gradient):
    hidden, weight = leaves(with_bias=False)
    count = int(MASK.sum())
    with torch.set_grad_enabled(with_gradient):
        kdloss.fused_linear_loss(hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=MASK, max_trained_tokens=count)
        with pytest.raises(ValueError, match=f"max_trained_tokens must hold the {count} trained tokens"):
            kdloss.fused_linear_loss(
                hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=MASK, max_trained_tokens=count - 1
            )


UNLABELLED = LABELS.masked_fill(MASK & (torch.arange(T) > 6), -100)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_trained_token_without_a_label_is_refused(with_gradient):
    hidden, weight = leaves(with_bias=False)
    with torch.set_grad_enabled(with_gradient):
        with pytest.raises(ValueError, match=r"got True at 4 of 8 trained tokens; pass loss_mask & \(labels != -100\)"):
            kdloss.fused_linear_loss(hidden, weight, UNLABELLED, token_loss, *INPUTS, loss_mask=MASK)
        mask = MASK & (UNLABELLED != -100)
        found = kdloss.fused_linear_loss(hidden, weight, UNLABELLED, token_loss, *INPUTS, loss_mask=mask)
        expected, _ = two_steps(hidden, weight, LABELS, token_loss, *INPUTS, loss_mask=mask)
    torch.testing.assert_close(found.loss, expected, **CLOSE)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_where_values_are_not_read_a_trained_token_without_a_label_has_a_loss(with_gradient, compiled, monkeypatch):
    """Its log-prob and entropy are 0, and it counts in the denominator and in the bound: a GPU, or `torch.compile`."""
    if not compiled:
        monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    hidden, weight = leaves(with_bias=False)
    count = int(MASK.sum())

    def fused(bound: int | None) -> Tensor:
        return kdloss.fused_linear_loss(
            hidden, weight, UNLABELLED, token_loss, *INPUTS, loss_mask=MASK, max_trained_tokens=bound
        ).loss

    def apart() -> Tensor:
        return two_steps(hidden, weight, UNLABELLED, token_loss, *INPUTS, loss_mask=MASK)[0]

    if compiled:
        fused, apart = (torch.compile(x, fullgraph=True, backend="aot_eager") for x in (fused, apart))
    mask = MASK & (UNLABELLED != -100)
    labelled = kdloss.linear_token_logprobs_and_entropy(hidden, weight, UNLABELLED, loss_mask=mask)
    expected = kdloss.token_mean(token_loss(labelled.logp, labelled.entropy, *INPUTS), loss_mask=MASK)
    with torch.set_grad_enabled(with_gradient):
        results = [apart(), fused(None), fused(count)]
        assert fused(count - 1).isnan()
    for found in results:
        torch.testing.assert_close(found.detach(), expected.detach(), **CLOSE)
        if with_gradient:
            pairs = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (found, expected))
            for x, y in zip(*pairs, strict=True):
                torch.testing.assert_close(x, y, **CLOSE)
