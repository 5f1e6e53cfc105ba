"""Holds log-probs from hidden states by kernels: value and gradient against float64, with every option; registers.

Bounds, per element. In float32 both sides round a few dozen times per logit, so the bound is 64 roundings of the
largest logit, or of the sum of absolute terms of a product. In half precision the inputs are exact, and log-probs and
entropies are as accurate as in float32. The gradient of a logit is rounded once before it is multiplied by the head,
and the result once more. (The interpreter truncates bfloat16 where a GPU rounds it: twice the error.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import kdloss
from kdloss._logprobs import from_hidden, hidden_op
from kdloss._triton import _linear as kernels, _products
from kdloss._triton._row_math import LogitTransform, State
from kdloss.testing import reference
from triton_harness import DEVICE, far_apart, normal, poisoned

T, D = 6, 5
BUDGET = "KEPT_BYTES" if DEVICE == "cpu" else "DEVICE_KEPT_BYTES"
ROW_TEMPERATURE = torch.tensor([0.5, 1.0, float("nan"), 3.0, 0.2, 1.5])  # row 2 is ignored

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": -0.8},
    "everything": {"bias": True, "temperature": ROW_TEMPERATURE, "softcap": 1.5, "logit_scale": 1.2, "padding": 3},
}


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    monkeypatch.setattr(_products, "LEAST_WIDTH", 256)
    monkeypatch.setattr(_products, "SLICE_BYTES", 1)


class Operators(TorchDispatchMode):
    """The names of torch's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Problem(NamedTuple):
    """Leaves, labels and incoming gradients."""

    leaves: list[Tensor]  # hidden, weight, and bias if there is one
    labels: Tensor  # (T, K)
    logp: Tensor  # (T, K)
    entropy: Tensor | None
    options: dict[str, Any]


def problem(
    vocab: int,
    dtype: torch.dtype,
    *,
    count: int = 1,
    with_entropy: bool = True,
    bias: bool = False,
    padding: int = 0,
    **options: Any,
) -> Problem:
    leaves = [normal(T, D, dtype=dtype), normal(vocab + padding, D, seed=1, dtype=dtype)]
    leaves += [normal(vocab + padding, seed=2, dtype=dtype)] if bias else []
    labels = torch.randint(0, vocab, (T, count), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    labels[0, 0], labels[1, 0], labels[2], labels[3, count // 2 :] = 0, vocab - 1, -100, -100
    labels[3, 0] = vocab // 2
    leaves[0][2] = torch.nan  # ignored
    logp, entropy = normal(T, count, seed=4), normal(T, seed=5)
    logp[2], logp[4], entropy[2], entropy[4] = torch.nan, 0, torch.nan, 0  # ignored, and without a gradient
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = options["temperature"].to(DEVICE)
    if padding:
        options["vocab_size"] = vocab
    return Problem([x.requires_grad_() for x in leaves], labels, logp, entropy if with_entropy else None, options)


def outcome(given: Problem, impl: str, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(log-probs and entropies, gradients of the leaves that need one)."""
    hidden, weight, *bias = given.leaves
    options = given.options | {"impl": impl, "bias": bias[0] if bias else None} | more
    if given.entropy is None:
        out = [kdloss.linear_token_logprobs(hidden, weight, given.labels, **options)]
    else:
        out = list(kdloss.linear_token_logprobs_and_entropy(hidden, weight, given.labels, **options))
    incoming = [given.logp, given.entropy][: len(out)]
    return [x.detach() for x in out], list(
        torch.autograd.grad(out, [x for x in given.leaves if x.requires_grad], incoming)
    )


class Exact(NamedTuple):
    """Results in float64, by torch's own operations on the whole matrix."""

    values: list[Tensor]
    gradients: list[Tensor]
    terms: list[Tensor]  # the sums of the absolute values of the terms that each gradient sums
    parts: list[Tensor]  # likewise, with the terms that the gradient of a logit itself sums
    largest: float  # of the logits, the terms of their products, and the logits divided by the temperature


def exact(given: Problem) -> Exact:
    used = (given.labels >= 0).any(-1)
    hidden, weight, *bias = (x.detach().double() for x in given.leaves)
    hidden = hidden.masked_fill(~used[:, None], 0)
    vocab = given.options.get("vocab_size", weight.shape[0])
    x = (hidden @ weight.T + (bias[0] if bias else 0)).requires_grad_()
    z = given.options.get("logit_scale", 1.0) * x[:, :vocab]
    softcap = given.options.get("softcap")
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    temperature = given.options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(used, temperature.double(), 1)[:, None]
    q = torch.log_softmax(z / temperature, -1)
    logp = q.gather(-1, given.labels.clamp(min=0)).masked_fill(given.labels < 0, 0)
    values = [logp, torch.where(used, torch.special.entr(q.exp()).sum(-1), 0)][: 1 if given.entropy is None else 2]
    incoming = [given.logp.masked_fill(given.labels < 0, 0)]
    incoming += [] if given.entropy is None else [given.entropy.masked_fill(~used, 0)]
    (dx,) = torch.autograd.grad(values, x, [g.double() for g in incoming])
    sums = [dx @ weight, dx.T @ hidden, dx.sum(0)]
    p, g = q.detach().exp(), incoming[0].abs()
    part = (p * g.sum(-1, keepdim=True)).scatter_add(-1, given.labels.clamp(min=0), g.double())
    if given.entropy is not None:
        part += p * (1 + q.detach().abs()) * values[1].detach()[:, None].add(1) * incoming[1].abs()[:, None]
    part *= abs(given.options.get("logit_scale", 1.0)) / temperature
    part = torch.nn.functional.pad(part, (0, x.shape[1] - vocab))
    terms, parts = ([y @ weight.abs(), y.T @ hidden.abs(), y.sum(0)][: len(given.leaves)] for y in (dx.abs(), part))
    reach = [(hidden.abs() @ weight.abs().T).max(), x.abs().max(), (z / temperature).abs().max()]
    largest = max(1.0, *(float(y.detach()) for y in reach))
    return Exact([x.detach() for x in values], sums[: len(given.leaves)], terms, parts, largest)


def assert_exact(found: tuple[list[Tensor], list[Tensor]], truth: Exact, dtype: torch.dtype) -> None:
    rounding = 64 * torch.finfo(torch.float32).eps * truth.largest
    for x, y in zip(found[0], truth.values, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=rounding)
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * (1 if cut else 0.5)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for x, y, terms, parts in zip(found[1], truth.gradients, truth.terms, truth.parts, strict=True):
        assert x.dtype == dtype
        bound = half * (terms + y.abs()) * (1 + half) + rounding * parts + smallest
        worst = ((x.double() - y).abs() / bound).max()
        assert worst <= 1, f"{float(worst):.3g} of the bound"


# Several slices with each option, in the two dtypes that people train in. All options at once and none: in the third
# dtype, and for a vocabulary smaller than a block or of one entry.
CASES = [(601, name, dtype) for name in OPTIONS for dtype in (torch.float32, torch.bfloat16)]
CASES += [(601, name, torch.float16) for name in ("defaults", "everything")]
CASES += [(vocab, name, torch.bfloat16) for vocab in (1, 37) for name in ("defaults", "everything")]


@pytest.mark.parametrize(("vocab", "options", "dtype"), CASES)
def test_values_and_gradients_are_exact(vocab, options, dtype):
    given = problem(vocab, dtype, **OPTIONS[options])
    with poisoned():
        found = outcome(given, "triton")
    assert_exact(found, exact(given), dtype)


@pytest.mark.parametrize(
    ("count", "with_entropy", "kept_bytes", "dtype"),
    [(1, False, 1 << 28, torch.float32), (3, True, 0, torch.float32), (40, True, 1 << 28, torch.bfloat16)],
)
def test_several_labels_and_kept_logits(count, with_entropy, kept_bytes, dtype, monkeypatch):
    monkeypatch.setattr(from_hidden, BUDGET, kept_bytes)
    given = problem(601, dtype, count=count, with_entropy=with_entropy, **OPTIONS["everything"])
    with poisoned():
        found = outcome(given, "triton")
    assert_exact(found, exact(given), dtype)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_costs_nothing_and_changes_nothing(frozen, dtype, monkeypatch):
    given = problem(300, dtype, bias=True)
    _, (dhidden, dweight, dbias) = outcome(given, "triton")
    products: list[tuple[int, ...]] = []
    for name in ("product_", "add_product_"):
        original = getattr(_products, name)

        def counting(out: Tensor, *operands: Tensor, original: Any = original) -> Tensor:
            products.append(tuple(out.shape))
            return original(out, *operands)

        monkeypatch.setattr(kernels, name, counting)
    given.leaves[0 if frozen == "hidden" else 1].requires_grad_(False)
    monkeypatch.setattr(from_hidden, BUDGET, 0)
    with poisoned():
        _, found = outcome(given, "triton")
    assert all(
        torch.equal(x, y) for x, y in zip(found, [dweight if frozen == "hidden" else dhidden, dbias], strict=True)
    )
    # for each of two slices: the logits forward and backward, and one gradient, as the other is frozen
    assert len(products) == 6


def test_inputs_may_have_any_strides():
    given = problem(300, torch.float32, count=2, bias=True, temperature=torch.tensor(0.7))
    expected = outcome(given, "triton")
    strided = [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in given.leaves]
    strided[1] = strided[1].detach().T.contiguous().T.requires_grad_()
    others = [x.T.contiguous().T for x in (given.labels, given.logp)]
    with poisoned():
        found = outcome(given._replace(leaves=strided, labels=others[0], logp=others[1]), "triton")
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_may_begin_anywhere(dtype):
    given = problem(601, dtype, bias=True, count=3)
    expected = outcome(given, "triton")
    bias = torch.nn.functional.pad(given.leaves[2].detach(), (3, 0), value=torch.nan)[3:].requires_grad_()
    with poisoned():
        found = outcome(given._replace(leaves=[*given.leaves[:2], bias]), "triton")
    assert bias.data_ptr() % 16 != 0
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one_token(rows):
    leaves = [normal(rows, D).requires_grad_(), normal(300, D, seed=1).requires_grad_()]
    labels = torch.full((rows,), 299, device=DEVICE)
    for mask in (None, torch.zeros(rows, dtype=torch.bool, device=DEVICE)):
        with poisoned():
            found = [
                kdloss.linear_token_logprobs_and_entropy(*leaves, labels, loss_mask=mask, impl=impl)
                for impl in ("triton", "torch")
            ]
            gradients = [torch.autograd.grad(out.logp.sum() + out.entropy.sum(), leaves) for out in found]
        for x, y in zip([*found[0], *gradients[0]], [*found[1], *gradients[1]], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shift", [1e3, -1e4])
def test_logits_far_off_centre_lose_no_more_than_their_own_rounding(shift):
    """Every logit is shifted by the same amount, a multiple of the last place of the numbers that it is added to."""
    given = problem(300, torch.float32, bias=True)
    bias = given.leaves[2]
    with torch.no_grad():
        for x in given.leaves[:2]:
            x.copy_((x * 8).round() / 8)  # products are multiples of 2^-6, even at 1e4
        bias.copy_((bias * 8).round() / 8)
    near = outcome(given, "triton")
    with torch.no_grad():
        bias += shift
    with poisoned():
        far = outcome(given, "triton")
    for x, y in zip([*near[0], *near[1]], [*far[0], *far[1]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_logits_of_minus_infinity_have_no_mass():
    """A slice without mass, and single entries without mass, one of which is a label."""
    given = problem(601, torch.float32, bias=True)
    with torch.no_grad():
        given.leaves[2][256:512] = -torch.inf
        given.leaves[2][[0, 599]] = -torch.inf
    found, expected = outcome(given, "triton"), outcome(given, "torch")
    assert found[0][0][0] == -torch.inf
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("impl", ["triton", "torch", "compiled"])
@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_a_row_that_is_no_distribution_is_nan_by_every_path(impl, bad):
    """From logits, from hidden states, and in one pass with the loss; the oracle and log-softmax agree."""
    logits = normal(2, 300)
    logits[0, slice(None) if bad == -torch.inf else 7] = bad
    bias, labels = logits[0].clone(), torch.tensor([5, 7], device=DEVICE)
    leaves = [torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in ((2, D), (300, D))]
    with np.errstate(invalid="ignore"):  # -inf - -inf
        oracle = reference.token_logprobs_and_entropy(logits.double().cpu().numpy(), labels.cpu().numpy())
    options = {"impl": "torch" if impl == "compiled" else impl}

    def run() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        found = [*kdloss.token_logprobs_and_entropy(leaf, labels, **options)]
        linear = [*kdloss.linear_token_logprobs_and_entropy(*leaves, labels, bias=bias, **options)]
        return [leaf, *found, *linear]

    leaf, *found = (torch.compile(run, backend="aot_eager") if impl == "compiled" else run)()
    for x, expected in zip(found, [*oracle, None, None], strict=True):
        assert x.isnan().tolist() == ([True, True] if expected is None else [True, False])
        assert expected is None or torch.isnan(torch.from_numpy(expected)).tolist() == [True, False]
    for x in found:
        wanted = [leaf] if x is found[0] or x is found[1] else leaves
        assert all(g[0].isnan().all() for g in torch.autograd.grad(x.sum(), wanted, retain_graph=True))
    if impl != "compiled":
        mask = torch.ones(2, dtype=torch.bool, device=DEVICE)
        fused = kdloss.fused_linear_loss(*leaves, labels, lambda a, b: b - a, bias=bias, loss_mask=mask, **options)
        assert all(x.isnan().all() for x in fused)


def test_rows_under_a_static_bound():
    """The same bits as without a bound, and zeros in the rows that only fill it up."""
    given = problem(300, torch.float32)
    plain = outcome(given, "triton")
    for bound in (5, T, 50):
        with poisoned():
            found = outcome(given, "triton", max_trained_tokens=bound)
        assert all(torch.equal(x, y) for x, y in zip(found[0], plain[0], strict=True))
        torch.testing.assert_close(found[1], plain[1], rtol=1e-6, atol=1e-6)


def test_bad_labels_are_refused_where_they_are_seen():
    given = problem(300, torch.float32)
    given.labels[0] = 300
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"labels must be -100 .* got 300"):
            outcome(given, "triton")
    else:
        (logp, entropy), gradients = outcome(given, "triton")
        assert logp[0].isnan()
        assert entropy.isfinite().all()
        assert all(x.shape == y.shape for x, y in zip(gradients, given.leaves, strict=True))


def test_rows_past_2_to_the_31_are_found():
    """Hidden states, logits and gradients whose rows lie that far apart."""
    hidden, weight = normal(3, D), normal(9, D, seed=1)
    labels = torch.tensor([[1], [-100], [8]], device=DEVICE)
    rows = torch.tensor([0, 2], device=DEVICE)
    given = (labels, rows, LogitTransform(), 1.0, None, torch.empty(0, 9, device=DEVICE), True)
    near = kernels.forward(hidden, weight, *given)
    far = kernels.forward(far_apart(hidden, 2**31 + 16), weight, *given)
    assert all(torch.equal(x, y) for x, y in zip(near, far, strict=True))
    state = State(labels, 1.0, None, *near[2:])
    incoming = normal(3, 1), normal(3)
    x = hidden[rows] @ weight.T
    out = [torch.empty_like(x), far_apart(x, 2**31 + 16)]
    kernels.gradient_(out[0], state, *incoming, x, None, rows, LogitTransform(), 0)
    kernels.gradient_(out[1], state, *incoming, out[1], None, rows, LogitTransform(), 0)  # also in place
    assert torch.equal(*out)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float16_gradients_do_not_depend_on_the_size_of_what_comes_in(scale):
    """Unscaled, logit gradients of 1e-12 would be 0 in float16, and those of 1e12 infinite."""
    given = problem(300, torch.float16, temperature=0.25, logit_scale=2.0)
    hidden, weight = given.leaves
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    transform, temperature = LogitTransform(logit_scale=2.0), (0.25, None)
    labels, kept = given.labels, torch.empty(0, 300, device=DEVICE)
    rows = (labels >= 0).any(-1).nonzero().squeeze(-1)

    def weight_gradient(hidden: Tensor, weight: Tensor, out: torch.dtype) -> Tensor:
        known = kernels.forward(hidden, weight, labels, rows, transform, *temperature, kept, True)[2:]
        state = State(labels, *temperature, *known)
        incoming = given.logp * scale, given.entropy * scale
        needs = (False, False, True)  # the bias, whose gradient is float32
        return kernels.backward(*incoming, state, hidden, weight, rows, None, transform, kept, needs)[2]

    found = weight_gradient(hidden.detach(), weight.detach(), torch.float32) / scale
    expected = weight_gradient(*[x.detach() for x in wide], torch.float32) / scale
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-4)


def test_slices_cover_the_vocabulary_evenly_and_fit_the_budget(monkeypatch):
    monkeypatch.undo()
    for tokens in (0, 1, 300, 8192, 32768, 1 << 20):
        for vocab in (1, 255, 1025, 32000, 128256, 151936):
            cuts = list(_products.slices(tokens, vocab))
            assert [part.start for part in cuts] == [0, *(part.stop for part in cuts[:-1])]
            assert cuts[-1].stop == vocab
            widths = [part.stop - part.start for part in cuts]
            assert max(widths) == _products.widest_slice(tokens, vocab)
            assert len(set(widths[:-1])) <= 1
            assert all(width % 256 == 0 for width in widths[:-1])
            assert max(widths) <= max(_products.LEAST_WIDTH, _products.SLICE_BYTES // 4 // max(1, tokens) + 255)
            assert len(cuts) == 1 or widths[-1] > widths[0] - 256 * len(cuts)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="this torch lacks what later ones have")
@pytest.mark.parametrize(
    ("version", "product", "sum_of_both"),
    [
        ("2.7.1", ["_to_copy", "_to_copy", "mm"], ["_to_copy", "_to_copy", "addmm"]),
        ("2.9.1", ["mm"], ["empty_like", "mm", "add_"]),
        ("2.10.0", ["mm"], ["addmm"]),
    ],
)
def test_half_precision_is_widened_only_where_torch_cannot_write_float32(version, product, sum_of_both, monkeypatch):
    """By the operators that are called; the meta device stands for CUDA."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4), (4, 5)))
    out = torch.empty(3, 5, device="meta")
    for function, expected in ((_products.product_, product), (_products.add_product_, sum_of_both)):
        with Operators() as called:
            function(out, a, b)
        assert called.names == expected


def test_opcheck():
    given = problem(37, torch.float32, bias=True)
    given.leaves[0].data[2] = 0  # opcheck compares results, and NaN is not equal to NaN
    options = (None, 0.7, 3.0, 1.2, 36, True, True, True, True)
    rows = (given.labels >= 0).any(-1).nonzero().squeeze(-1)
    torch.library.opcheck(
        hidden_op.linear_logprobs.overload, (*given.leaves, given.labels.clamp(max=35), rows, *options)
    )
