"""Holds the numerics of log-probs and entropies, from logits and from hidden states: gradients, extremes, error.

Values against the oracles, error texts and the independence of rows are tested in `every_function`.

Tolerances: gradcheck's own (central differences in float64); otherwise multiples of the dtype's rounding, stated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss

V, D = 7, 3
GARBAGE = (math.nan, math.inf, -math.inf)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def gradient(total: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, leaves)


LABELS = {
    "one": torch.tensor([0, V - 1, -100, 3]),  # both ends of the vocabulary, and one ignored
    "three": torch.tensor([[0, 1, -100], [V - 1, V - 1, 0], [-100, -100, -100], [2, 5, 4]]),
}

# Each option alone, and all together: they are applied in sequence, so the last case finds a wrong order.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "0-dim temperature": {"temperature": torch.tensor(1.7, dtype=torch.float64)},
    "temperature per row": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)},
    "softcap": {"softcap": 1.5},
    "vocab_size": {"vocab_size": V},
    "all": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64), "softcap": 1.5, "vocab_size": V},
}
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "logit_scale": {"logit_scale": 0.3},
    "loss_mask": {"loss_mask": torch.tensor([True, False, False, True])},
    "static bound": {"loss_mask": torch.tensor([True, False, False, True]), "max_trained_tokens": 3},
    "all": {
        **OPTIONS["all"],
        "logit_scale": 0.3,
        "loss_mask": torch.tensor([True, True, False, False]),
        "max_trained_tokens": 3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_gradients_of_logits(labels, options):
    logits = normal(4, V + 2 if "vocab_size" in options else V).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kdloss.token_logprobs(x, labels, **options), logits)
    assert torch.autograd.gradcheck(lambda x: tuple(kdloss.token_logprobs_and_entropy(x, labels, **options)), logits)


@pytest.mark.slow
@pytest.mark.parametrize("options", HEAD_OPTIONS.values(), ids=HEAD_OPTIONS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_a_linear_head(labels, options, with_bias):
    rows = V + 2 if "vocab_size" in options else V
    leaves = [normal(4, D), normal(rows, D, seed=1), *([normal(rows, seed=2)] if with_bias else [])]
    leaves = [x.requires_grad_() for x in leaves]

    def logp(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return kdloss.linear_token_logprobs(hidden, weight, labels, bias=bias, **options)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels, bias=bias, **options))

    assert torch.autograd.gradcheck(logp, leaves)
    assert torch.autograd.gradcheck(both, leaves)


def test_the_temperature_carries_no_gradient():
    temperature = torch.ones(4, requires_grad=True)
    logp = kdloss.token_logprobs(torch.zeros(4, V), LABELS["one"], temperature=temperature)
    assert not logp.requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_is_a_distribution(options):
    columns = V + 2 if "vocab_size" in options else V
    every_label = torch.arange(V).expand(4, V)
    logp, entropy = kdloss.token_logprobs_and_entropy(normal(4, columns), every_label, **options)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    assert torch.equal(kdloss.token_logprobs(normal(4, columns), every_label, **options), logp)


def test_bias_scale_softcap_and_temperature_act_in_this_order():
    hidden, weight, bias, labels = normal(4, D), normal(V, D, seed=1), normal(V, seed=2), LABELS["one"]
    z = 1.5 * torch.tanh(0.3 * (hidden @ weight.T + bias) / 1.5) / 0.7
    expected = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == -100, 0)
    logp = kdloss.linear_token_logprobs(
        hidden, weight, labels, bias=bias, logit_scale=0.3, softcap=1.5, temperature=0.7
    )
    torch.testing.assert_close(logp, expected)


# Extremes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_offset_of_all_logits_changes_nothing(dtype):
    # multiples of 2^-10, which an offset of 1000 leaves exact in float32
    logits = (normal(4, V) * 1024).round().div(1024).to(dtype).requires_grad_()
    labels = LABELS["one"]

    def outcome(offset: float) -> list[Tensor]:
        out = kdloss.token_logprobs_and_entropy(logits + offset, labels)
        return [*out, *gradient(out.logp.sum() + out.entropy.sum(), logits)]

    for moved, still in zip(outcome(1e3), outcome(0.0), strict=True):
        assert torch.equal(moved, still)


@pytest.mark.parametrize("value", [0.0, -1e4, 1e4, 60000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_are_uniform_at_any_size(value, dtype):
    logits = torch.full((4, V), value, dtype=dtype, requires_grad=True)
    logp, entropy = kdloss.token_logprobs_and_entropy(logits, LABELS["one"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.full((4,), -math.log(V), dtype=wide).masked_fill(LABELS["one"] == -100, 0)
    torch.testing.assert_close(logp, expected, rtol=4 * torch.finfo(wide).eps, atol=0)
    torch.testing.assert_close(entropy, -expected, rtol=4 * torch.finfo(wide).eps, atol=0)
    (found,) = gradient(logp.sum(), logits)
    onehot = torch.nn.functional.one_hot(LABELS["one"].clamp(min=0), V).double()
    exact = torch.where(LABELS["one"][:, None] == -100, 0, onehot - 1 / V)
    torch.testing.assert_close(found, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_certain_row_has_no_entropy_and_no_gradient_of_it(dtype):
    logits = torch.zeros(1, V, dtype=dtype)
    logits[0, 2] = 2000.0  # every other probability underflows to 0
    logits.requires_grad_()
    logp, entropy = kdloss.token_logprobs_and_entropy(logits, torch.tensor([[2, 0]]))
    assert logp.tolist() == [[0, -2000]]
    assert entropy == 0
    (found,) = gradient(entropy.sum(), logits)
    assert not found.any()
    (found,) = gradient(kdloss.token_logprobs(logits, torch.tensor([0])).sum(), logits)
    assert found.tolist() == [[1, 0, -1, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_minus_infinity_have_no_mass(dtype):
    logits, kept = normal(4, V, dtype=dtype), torch.tensor([0, 2, 3, 6])
    excluded = torch.ones(V, dtype=torch.bool).index_fill(0, kept, False)
    holed = logits.masked_fill(excluded, -math.inf).requires_grad_()
    small = logits[:, kept].clone().requires_grad_()
    labels = torch.tensor([0, 6, -100, 3])
    small_labels = torch.tensor([0, 3, -100, 2])
    out = kdloss.token_logprobs_and_entropy(holed, labels)
    expected = kdloss.token_logprobs_and_entropy(small, small_labels)
    # equal to a smaller vocabulary; the sums are in another order
    for x, y in zip(out, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=8 * torch.finfo(x.dtype).eps, atol=8 * torch.finfo(x.dtype).eps)
    eps = 8 * torch.finfo(dtype).eps
    for x, y in zip(out, expected, strict=True):
        (found,) = torch.autograd.grad(x.sum(), holed, retain_graph=True)
        (exact,) = torch.autograd.grad(y.sum(), small, retain_graph=True)
        assert not found[:, excluded].any()
        torch.testing.assert_close(found[:, kept], exact, rtol=eps, atol=eps)
    # a label without mass has a log-prob of -inf, in that row only
    impossible = kdloss.token_logprobs(holed, torch.tensor([0, 1, -100, 3]))
    assert impossible.isinf().tolist() == [False, True, False, False]
    assert impossible[1] == -math.inf


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_an_ignored_row_may_hold_anything(labels, options, garbage):
    columns = V + 2 if "vocab_size" in options else V
    options = dict(options)

    def outcome(value: float) -> list[Tensor]:
        logits = normal(4, columns).index_fill(0, torch.tensor([2]), value).requires_grad_()
        if isinstance(options.get("temperature"), Tensor) and options["temperature"].ndim:
            options["temperature"] = options["temperature"].index_fill(0, torch.tensor([2]), abs(value))
        out = kdloss.token_logprobs_and_entropy(logits, labels, **options)
        return [*out, *gradient(out.logp.sum() + out.entropy.sum(), logits)]

    clean = outcome(1.0)
    assert all(torch.equal(x, y) for x, y in zip(outcome(garbage), clean, strict=True))
    assert not any(x[2].any() for x in clean)


# Strides and shapes

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second column": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[:, ::2],
    "every second row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "rows inside a wider matrix": lambda x: torch.cat([x, x, x], -1)[:, x.shape[1] : 2 * x.shape[1]],
    "an odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides_do_not_matter(layout, dtype):
    logits, labels = normal(4, V, dtype=dtype), LABELS["one"]
    assert torch.equal(layout(logits), logits)

    def outcome(x: Tensor) -> list[Tensor]:
        leaf = x.requires_grad_()
        out = kdloss.token_logprobs_and_entropy(leaf, labels)
        return [*out, *gradient(out.logp.sum() + out.entropy.sum(), leaf)]

    eps = torch.finfo(dtype).eps
    for odd, plain in zip(outcome(layout(logits).detach()), outcome(logits.clone()), strict=True):
        torch.testing.assert_close(odd, plain, rtol=4 * eps, atol=4 * eps)

    hidden, weight = normal(4, D, dtype=dtype), normal(V, D, seed=1, dtype=dtype)
    odd = kdloss.linear_token_logprobs(layout(hidden), layout(weight), labels)
    plain = kdloss.linear_token_logprobs(hidden, weight, labels)
    torch.testing.assert_close(odd, plain, rtol=4 * eps, atol=4 * eps)


def test_strides_of_labels_masks_and_temperatures_do_not_matter():
    logits, hidden, weight = normal(4, V), normal(4, D), normal(V, D, seed=1)
    labels, mask = LABELS["three"], torch.tensor([True, False, False, True])
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    odd_temperature = torch.stack([temperature, temperature], -1)[:, 0]
    odd_labels, odd_mask = labels.T.contiguous().T, torch.stack([mask, ~mask], -1)[:, 0]
    assert not any(x.is_contiguous() for x in (odd_labels, odd_mask, odd_temperature))
    assert torch.equal(
        kdloss.token_logprobs(logits, odd_labels, temperature=odd_temperature),
        kdloss.token_logprobs(logits, labels, temperature=temperature),
    )
    for bound in (None, 4):
        assert torch.equal(
            kdloss.linear_token_logprobs(
                hidden, weight, odd_labels, loss_mask=odd_mask, temperature=odd_temperature, max_trained_tokens=bound
            ),
            kdloss.linear_token_logprobs(
                hidden, weight, labels, loss_mask=mask, temperature=temperature, max_trained_tokens=bound
            ),
        )


@pytest.mark.parametrize("lead", [(), (4,), (2, 2), (2, 1, 2)])
@pytest.mark.parametrize("labels_per_row", [None, 1, 3])
def test_any_leading_shape(lead, labels_per_row):
    rows = math.prod(lead)
    shape = lead if labels_per_row is None else (*lead, labels_per_row)
    labels = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))
    logits = normal(rows, V)
    flat = kdloss.token_logprobs_and_entropy(logits, labels.reshape(rows, *shape[len(lead) :]))
    out = kdloss.token_logprobs_and_entropy(logits.reshape(*lead, V), labels)
    assert (out.logp.shape, out.entropy.shape) == (labels.shape, lead)
    assert torch.equal(out.logp.flatten(), flat.logp.flatten())
    assert torch.equal(out.entropy.flatten(), flat.entropy)
    if lead:
        hidden, weight = normal(rows, D), normal(V, D, seed=1)
        flat = kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels.reshape(rows, *shape[len(lead) :]))
        out = kdloss.linear_token_logprobs_and_entropy(hidden.reshape(*lead, D), weight, labels)
        assert (out.logp.shape, out.entropy.shape) == (labels.shape, lead)
        assert torch.equal(out.logp.flatten(), flat.logp.flatten())
        assert torch.equal(out.entropy.flatten(), flat.entropy)


def test_several_labels_per_row_are_one_after_the_other():
    logits, labels = normal(4, V), LABELS["three"]
    together = kdloss.token_logprobs(logits, labels)
    assert torch.equal(together, torch.stack([kdloss.token_logprobs(logits, column) for column in labels.T], -1))
    # a row with any label has its entropy, one without has 0
    entropy = kdloss.token_logprobs_and_entropy(logits, labels).entropy
    assert (entropy == 0).tolist() == [False, False, True, False]


# Vocabulary padding


@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_padding_columns_get_no_mass_and_exactly_no_gradient(labels, padding):
    logits = normal(4, V)
    padded = torch.cat([logits, torch.full((4, 2), padding, dtype=torch.float64)], -1).requires_grad_()
    logits.requires_grad_()
    out = kdloss.token_logprobs_and_entropy(padded, labels, vocab_size=V)
    expected = kdloss.token_logprobs_and_entropy(logits, labels)
    assert torch.equal(out.logp, expected.logp)
    assert torch.equal(out.entropy, expected.entropy)
    (found,) = gradient(out.logp.sum() + out.entropy.sum(), padded)
    (exact,) = gradient(expected.logp.sum() + expected.entropy.sum(), logits)
    assert torch.equal(found[:, :V], exact)
    assert not found[:, V:].any()


@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan, math.inf])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_padding_rows_of_the_head_get_no_mass_and_exactly_no_gradient(labels, padding):
    hidden, weight, bias = normal(4, D), normal(V, D, seed=1), normal(V, seed=2)
    wide = torch.cat([weight, torch.full((2, D), padding, dtype=torch.float64)])
    wide_bias = torch.cat([bias, torch.full((2,), padding, dtype=torch.float64)])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    wide_leaves = [x.clone().requires_grad_() for x in (hidden, wide, wide_bias)]

    def outcome(leaves: list[Tensor], **options: Any) -> list[Tensor]:
        out = kdloss.linear_token_logprobs_and_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
        return [*out, *gradient(out.logp.sum() + out.entropy.sum(), *leaves)]

    *found, found_weight, found_bias = outcome(wide_leaves, vocab_size=V)
    *exact, exact_weight, exact_bias = outcome(leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))
    assert torch.equal(found_weight[:V], exact_weight)
    assert torch.equal(found_bias[:V], exact_bias)
    assert not found_weight[V:].any()
    assert not found_bias[V:].any()


# Trained tokens only


def dense(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, mask: Tensor) -> kdloss.LogprobsAndEntropy:
    """All rows; labels of -100 exclude the untrained ones."""
    rows = mask if labels.ndim == 1 else mask[:, None]
    return kdloss.token_logprobs_and_entropy(hidden @ weight.T + bias, torch.where(rows, labels, -100))


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("bound", [None, "tight", "loose"])
# the third row is without a label
@pytest.mark.parametrize(
    "mask", [[True, True, False, True], [False, True, False, True], [False, True, False, False], [False] * 4]
)
def test_compacted_rows_are_the_dense_ones(labels, bound, mask):
    loss_mask = torch.tensor(mask)
    used = loss_mask.sum().item()
    limit = {None: None, "tight": used, "loose": 4}[bound]
    leaves = [x.requires_grad_() for x in (normal(4, D), normal(V, D, seed=1), normal(V, seed=2))]
    out = kdloss.linear_token_logprobs_and_entropy(
        leaves[0], leaves[1], labels, bias=leaves[2], loss_mask=loss_mask, max_trained_tokens=limit
    )
    expected = dense(*leaves, labels, loss_mask)
    # a product of fewer rows may sum in another order
    close = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(out.logp, expected.logp, **close)
    torch.testing.assert_close(out.entropy, expected.entropy, **close)
    for pick in ("logp", "entropy"):
        found = torch.autograd.grad(getattr(out, pick).sum(), leaves, retain_graph=True)
        exact = torch.autograd.grad(getattr(expected, pick).sum(), leaves, retain_graph=True)
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x, y, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [None, 64])
def test_the_same_mask_gives_the_same_bits(dtype, bound):
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(96, generator=generator) < 0.5
    labels = torch.randint(0, 50, (96,), generator=generator)

    def bits(hidden: Tensor) -> list[bytes]:
        leaves = [hidden.requires_grad_(), normal(50, 16, seed=1, dtype=dtype).requires_grad_()]
        out = kdloss.linear_token_logprobs_and_entropy(*leaves, labels, loss_mask=mask, max_trained_tokens=bound)
        tensors = [*out, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), leaves)]
        return [x.detach().view(torch.uint8).numpy().tobytes() for x in tensors]

    first = bits(normal(96, 16, dtype=dtype))
    assert bits(normal(96, 16, dtype=dtype)) == first
    # the other rows do not matter
    assert bits(torch.where(mask[:, None], normal(96, 16, dtype=dtype), math.nan)) == first


def test_labels_of_untrained_rows_are_not_read():
    mask = torch.tensor([True, False, True, True])
    hidden, weight = normal(4, D), normal(V, D, seed=1)
    labels = torch.tensor([1, V + 5, 2, 3])
    expected = kdloss.linear_token_logprobs(hidden, weight, torch.tensor([1, 0, 2, 3]), loss_mask=mask)
    assert torch.equal(kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=mask), expected)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_trained_row_without_a_label_is_refused_with_the_count_and_ways_out(labels):
    """The most common fault is a mask at token positions: it is True at the last position, which predicts nothing."""
    hidden, weight = normal(4, D), normal(V, D, seed=1)
    kept = labels != -100 if labels.ndim == 1 else (labels != -100).any(-1)
    for function in (kdloss.linear_token_logprobs, kdloss.linear_token_logprobs_and_entropy):
        with pytest.raises(ValueError, match=r"got True at 1 of 4 trained tokens; pass loss_mask & \(labels != -100\)"):
            function(hidden, weight, labels, loss_mask=torch.ones(4, dtype=torch.bool))
    mask = torch.ones(4, dtype=torch.bool) & kept
    found = kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=mask)
    assert torch.equal(found, kdloss.linear_token_logprobs(hidden, weight, labels))

    cu_seqlens, ids = torch.tensor([0, 4]), torch.tensor([1, 5, 2, 3])
    labels = kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"or response_mask\(prompt_lengths, cu_seqlens=cu_seqlens\)"):
        kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=torch.arange(4) >= 2)
    mask = kdloss.response_mask(torch.tensor([2]), cu_seqlens=cu_seqlens)
    found = -kdloss.token_mean(kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=mask), loss_mask=mask)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy((hidden @ weight.T)[1:3], ids[2:]))


# Error, against float64

IMPLS = ("auto", "torch")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# logits of a fresh model, of a trained one, and far off centre; a small vocabulary, and one of several blocks
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (10.0, 0.0), (3.0, 500.0)])
@pytest.mark.parametrize("vocab", [101, 8003])
def test_no_more_error_than_torch_itself(dtype, scale, offset, vocab, impl):
    logits = (normal(32, vocab, scale=scale) + offset).to(dtype)
    labels = torch.randint(0, vocab, (32,), generator=torch.Generator().manual_seed(1))
    picked = labels[:, None]

    def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(x, -1)
        return logp.gather(-1, picked)[:, 0], -(logp.exp() * logp).sum(-1)

    truth_leaf = logits.double().requires_grad_()
    torch_leaf = logits.float().requires_grad_()
    leaf = logits.clone().requires_grad_()
    truth, by_torch = by_hand(truth_leaf), by_hand(torch_leaf)
    ours = kdloss.token_logprobs_and_entropy(leaf, labels, impl=impl)
    for x, y, exact in zip(ours, by_torch, truth, strict=True):
        assert x.dtype == torch.float32
        # torch's result may be exact by chance, so one rounding is always allowed
        allowed = (y.double() - exact).abs().max() + torch.finfo(torch.float32).eps / 2 * exact.abs().max()
        assert (x.double() - exact).abs().max() <= allowed
    for pick in range(2):
        (exact,) = torch.autograd.grad(truth[pick].sum(), truth_leaf, retain_graph=True)
        (theirs,) = torch.autograd.grad(by_torch[pick].sum(), torch_leaf, retain_graph=True)
        (found,) = torch.autograd.grad(ours[pick].sum(), leaf, retain_graph=True)
        # rounded to the dtype of the logits once, at the end
        allowed = (theirs.to(dtype).double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= allowed


def test_half_precision_logits_are_widened_before_the_subtraction():
    logits = normal(64, 1000, dtype=torch.bfloat16, scale=3.0)
    labels = torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(1))
    exact = kdloss.token_logprobs(logits.double(), labels)
    error = (kdloss.token_logprobs(logits, labels).double() - exact).abs().max()
    narrow = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
    assert error < 2e-6
    assert (narrow.double() - exact).abs().max() > 1e-2  # without widening


def test_a_tiny_incoming_gradient_keeps_its_digits():
    """Its product with the mass of a far label is normal, and would not be if it were multiplied by e^-m as well."""
    random = torch.Generator().manual_seed(0)
    logits = (12 * torch.randn(6, 500, generator=random)).requires_grad_()
    labels = torch.randint(0, 500, (6,), generator=random)
    logp = kdloss.token_logprobs(logits, labels)
    upstream = torch.randn(6, generator=random)
    (plain,) = torch.autograd.grad((logp * upstream).sum(), logits, retain_graph=True)
    (tiny,) = torch.autograd.grad((logp * upstream * 2.0**-100).sum(), logits)
    assert (tiny.double() * 2.0**100 - plain.double()).norm() <= 1e-5 * plain.double().norm()
