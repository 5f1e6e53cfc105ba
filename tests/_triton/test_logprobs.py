"""Holds log-probs and entropies from logits by kernels: oracles, float64, extremes, strides, torch's tools, and `impl`.

The kernels run on a GPU if there is one, else in the interpreter, which rounds float32 like a GPU and truncates
bfloat16.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdloss
from benchmarks.cases import Case
from benchmarks.formulas import ours_logits
from cases import TABLE
from contract import as_numpy, cast, fields, oracle
from kdloss import _checks
from kdloss._logprobs.logits_op import logprobs
from kdloss._softmax import backend
from triton_harness import DEVICE, normal, poisoned

ROWS, V = 4, 37
LABELS = torch.tensor([0, V - 1, -100, 3], device=DEVICE)
K_LABELS = torch.tensor([[0, 1, -100], [V - 1, V - 1, 0], [-100, -100, -100], [2, 5, 4]], device=DEVICE)
EPS = torch.finfo(torch.float32).eps


def outcome(logits: Tensor, labels: Tensor, impl: str = "triton", **options: Any) -> list[Tensor]:
    """(logp, entropy, gradient of a weighted sum of both)."""
    leaf = logits.detach().requires_grad_()
    logp, entropy = kdloss.token_logprobs_and_entropy(leaf, labels, impl=impl, **options)
    g, h = normal(*logp.shape, seed=11, dtype=logp.dtype), normal(*entropy.shape, seed=12, dtype=logp.dtype)
    (gradient,) = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), leaf)
    return [logp.detach(), entropy.detach(), gradient]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def row_by_row(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The outcome of each row alone, where it lies in memory."""
    g, h = normal(*labels.shape, seed=11), normal(*logits.shape[:-1], seed=12)
    found = []
    for row in itertools.product(*map(range, logits.shape[:-1])):
        leaf = logits[row].detach()[None].requires_grad_()
        logp, entropy = kdloss.token_logprobs_and_entropy(leaf, labels[row][None], impl="triton")
        (gradient,) = torch.autograd.grad((logp * g[row]).sum() + (entropy * h[row]).sum(), leaf)
        found.append((logp.detach()[0], entropy.detach()[0], gradient[0]))
    shapes = labels.shape, logits.shape[:-1], logits.shape
    return [torch.stack(x).view(shape) for x, shape in zip(zip(*found, strict=True), shapes, strict=True)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the order of sums, which follows from where rows begin between multiples of 16 bytes."""
    torch.testing.assert_close(found[:2], expected[:2], rtol=8 * EPS, atol=8 * EPS)
    torch.testing.assert_close(found[2], expected[2], rtol=torch.finfo(found[2].dtype).eps, atol=8 * EPS)


# Values and gradients

VARIANTS = [
    pytest.param(name, variant, id=f"{name}-{variant}")
    for name in ("token_logprobs", "token_logprobs_and_entropy")
    for variant in TABLE[name].variants
]


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_case_of_the_table(name, variant):
    """Values by the oracle, as `test_values.py` holds them in float32; gradients by torch's own in float64."""
    function, arguments = getattr(kdloss, name), TABLE[name].variants[variant] | {"impl": "triton"}
    expected = fields(oracle(name)(**as_numpy(cast(arguments, torch.float32))))
    narrow = on_device(cast(arguments, torch.float32))
    narrow["logits"].requires_grad_()
    with poisoned():
        found = fields(function(**narrow))
    wide = on_device(cast(arguments, torch.float64)) | {"impl": "torch"}
    wide["logits"].requires_grad_()
    exact = fields(function(**wide))
    for part, value in expected.items():
        truth = torch.from_numpy(value).to(DEVICE)
        torch.testing.assert_close(found[part].double(), truth, rtol=16 * EPS, atol=16 * EPS)
        with poisoned():
            (gradient,) = torch.autograd.grad(found[part].sum(), narrow["logits"], retain_graph=True)
        (truth,) = torch.autograd.grad(exact[part].sum(), wide["logits"], retain_graph=True)
        torch.testing.assert_close(gradient.double(), truth, rtol=16 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (10.0, 0.0), (3.0, 500.0)])
@pytest.mark.parametrize("vocab", [101, 5003])
def test_no_more_error_than_torch_itself(dtype, scale, offset, vocab):
    """Except for the last rounding of a result, and for p: its exponent, log2 e (z - m), is a product rounded twice.

    Each rounding is half an eps of the exponent, so p is off by eps p |log p|, which is eps / e at most.
    """
    logits = (normal(4, vocab, dtype=torch.float64, scale=scale) + offset).to(dtype)
    picked = torch.randint(0, vocab, (4, 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def by_hand(x: Tensor) -> list[Tensor]:
        leaf = x.requires_grad_()
        logp = torch.log_softmax(leaf, -1)
        parts = [logp.gather(-1, picked)[:, 0], -(logp.exp() * logp).sum(-1)]
        return [*parts, *(torch.autograd.grad(part.sum(), leaf, retain_graph=True)[0] for part in parts)]

    leaf = logits.clone().requires_grad_()
    ours = list(kdloss.token_logprobs_and_entropy(leaf, picked[:, 0], impl="triton"))
    ours += [torch.autograd.grad(part.sum(), leaf, retain_graph=True)[0] for part in list(ours)]
    truth, by_torch = by_hand(logits.double()), by_hand(logits.float())
    for number, (x, y, exact) in enumerate(zip(ours, by_torch, truth, strict=True)):
        wide = number < 2
        assert x.dtype == (torch.float32 if wide else dtype)
        rounding = EPS if wide or dtype == torch.float32 else torch.finfo(dtype).eps
        allowed = (y.to(x.dtype).double() - exact).abs().max() + rounding * exact.abs().max() + EPS / math.e
        assert (x.double() - exact).abs().max() <= allowed


# Extremes


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_an_offset_of_all_logits_changes_nothing(offset):
    # multiples of 2^-10 stay exact in float32 after an offset of 1000
    logits = (normal(ROWS, V) * 1024).round() / 1024
    assert same(outcome(logits + offset, LABELS), outcome(logits, LABELS))


@pytest.mark.parametrize("value", [-1e4, 60000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_are_uniform_wherever_they_lie(value, dtype):
    logits = torch.full((ROWS, V), value, dtype=dtype, device=DEVICE, requires_grad=True)
    logp, entropy = kdloss.token_logprobs_and_entropy(logits, LABELS, impl="triton")
    expected = torch.full((ROWS,), -math.log(V), device=DEVICE).masked_fill(LABELS == -100, 0)
    torch.testing.assert_close(logp, expected, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(entropy, -expected, rtol=4 * EPS, atol=0)
    (found,) = torch.autograd.grad(logp.sum(), logits)
    onehot = torch.nn.functional.one_hot(LABELS.clamp(min=0), V).float()
    exact = torch.where(LABELS[:, None] == -100, 0, onehot - 1 / V).to(dtype)
    torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_certain_row_has_no_entropy_and_no_gradient_of_it():
    logits = torch.zeros(1, V, device=DEVICE)
    logits[0, 2] = 2000.0  # every other probability underflows to 0
    logits.requires_grad_()
    logp, entropy = kdloss.token_logprobs_and_entropy(logits, LABELS.new_tensor([[2, 0]]), impl="triton")
    assert logp.tolist() == [[0, -2000]]
    assert entropy == 0
    (found,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
    assert not found.any()
    (found,) = torch.autograd.grad(logp[0, 1], logits)
    assert found.tolist() == [[1, 0, -1, *[0] * (V - 3)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [V, 4100])
def test_logits_of_minus_infinity_have_no_mass(dtype, vocab):
    """Between others, in whole blocks, and first in a lane: the result is that of a smaller vocabulary."""
    kept = torch.tensor([1, 2, 3, vocab - 1], device=DEVICE)
    logits = normal(ROWS, vocab, dtype=dtype)
    holed = torch.full_like(logits, -math.inf)
    holed[:, kept] = logits[:, kept]
    labels, small_labels = LABELS.new_tensor([1, vocab - 1, -100, 3]), LABELS.new_tensor([0, 3, -100, 2])
    found, expected = outcome(holed, labels), outcome(logits[:, kept], small_labels)
    assert torch.equal(found[2][:, kept].isnan(), torch.zeros_like(expected[2]).bool())
    torch.testing.assert_close(found[:2], expected[:2], rtol=8 * EPS, atol=8 * EPS)
    torch.testing.assert_close(found[2][:, kept], expected[2], rtol=torch.finfo(dtype).eps, atol=8 * EPS)
    excluded = torch.ones(vocab, dtype=torch.bool, device=DEVICE).index_fill(0, kept, False)
    assert not found[2][:, excluded].any()
    impossible = kdloss.token_logprobs(holed, LABELS.new_tensor([1, 0, -100, 3]), impl="triton")
    assert impossible.isinf().tolist() == [False, True, False, False]
    assert impossible[1] == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_of_a_trained_row_shows(bad):
    logits = normal(ROWS, V)
    logits[1, 5] = bad
    found, clean = outcome(logits, LABELS), outcome(normal(ROWS, V), LABELS)
    assert all(x[1].isnan().any() for x in found)
    others = [0, 2, 3]
    assert same([x[others] for x in found], [x[others] for x in clean])


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_gives_nan(temperature, monkeypatch):
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)  # as on a GPU
    temperatures = torch.tensor([1.0, temperature, 1.0, 1.0], device=DEVICE)
    logp = kdloss.token_logprobs(normal(ROWS, V), LABELS, temperature=temperatures, impl="triton")
    assert logp.isnan().tolist() == [False, True, False, False]


# Shapes and strides

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second column": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[:, ::2],
    "every second row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "rows inside a wider matrix": lambda x: torch.cat([x, x, x], -1)[:, x.shape[1] : 2 * x.shape[1]],
    "rows apart by 48, NaN between them": lambda x: F.pad(x, (0, 48 - x.shape[1]), value=math.nan)[:, : x.shape[1]],
    "an odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(layout, dtype):
    logits = layout(normal(ROWS, V, dtype=dtype))
    with poisoned():
        found = outcome(logits, K_LABELS)
    contiguous = outcome(logits.clone(memory_format=torch.contiguous_format), K_LABELS)
    assert same(found, contiguous if logits.stride(1) != 1 else row_by_row(logits, K_LABELS))
    assert_close(found, contiguous)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, :-1],  # as a trainer cuts (B, L, V)
        lambda x: x[:, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.view(2, 3, 2, 2, V)[:, :2, :, :1],  # needs more than two strides: no single launch can cover it
        lambda x: x[0, 0],
        lambda x: x[:0],
    ],
)
def test_leading_axes_are_walked_over_without_a_copy(cut):
    whole = normal(6, 4, V + 3)[..., :V]  # rows begin at multiples of 16 bytes, so that each has the same bits anywhere
    x = cut(whole)
    labels = torch.randint(0, V, x.shape[:-1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with poisoned():
        found = outcome(x, labels)
    flat = outcome(torch.nn.functional.pad(x.reshape(-1, V), (0, 3))[:, :V], labels.reshape(-1))
    assert found[2].shape == x.shape
    assert same([found[0].flatten(), found[1].flatten(), found[2].reshape(-1, V)], flat)


def test_strides_of_labels_temperatures_and_incoming_gradients_do_not_matter():
    logits, temperatures = normal(ROWS, V), torch.tensor([0.5, 1.0, 2.0, 3.0], device=DEVICE)
    odd_temperatures, odd_labels = torch.stack([temperatures] * 2, -1)[:, 0], K_LABELS.T.contiguous().T
    expected = outcome(logits, K_LABELS, temperature=temperatures)
    assert same(outcome(logits, odd_labels, temperature=odd_temperatures), expected)
    leaf = logits.clone().requires_grad_()
    logp, entropy = kdloss.token_logprobs_and_entropy(leaf, K_LABELS, impl="triton")
    g, h = normal(3, ROWS, seed=5).T, normal(ROWS, 2, seed=6)[:, 0]
    odd = torch.autograd.grad([logp, entropy], leaf, [g, h], retain_graph=True)
    plain = torch.autograd.grad([logp, entropy], leaf, [g.contiguous(), h.contiguous()], retain_graph=True)
    assert torch.equal(odd[0], plain[0])
    ones = torch.autograd.grad(logp, leaf, torch.ones_like(logp), retain_graph=True)
    assert torch.equal(torch.autograd.grad(logp.sum(), leaf)[0], ones[0])  # the gradient of a sum is an expanded scalar


@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan, math.inf])
def test_padding_columns_get_no_mass_and_exactly_no_gradient(padding):
    logits = normal(ROWS, V)
    padded = torch.nn.functional.pad(logits, (0, 3), value=padding)
    with poisoned():
        *found, gradient = outcome(padded, K_LABELS, vocab_size=V)
    *expected, exact = outcome(padded.nan_to_num()[:, :V], K_LABELS)
    assert same(found, expected)
    assert torch.equal(gradient[:, :V], exact)
    assert_close([*found, gradient[:, :V]], outcome(logits, K_LABELS))
    assert not gradient[:, V:].any()


@pytest.mark.parametrize("count", [130, V])
def test_many_labels_a_row(count):
    """More than are examined at once; each has the value that it has alone, and their gradients add up."""
    labels = torch.randint(0, V, (ROWS, count), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    found = outcome(normal(ROWS, V), labels)
    for k in (0, count // 2, count - 1):
        assert torch.equal(found[0][:, k], kdloss.token_logprobs(normal(ROWS, V), labels[:, k], impl="triton"))
    exact = outcome(normal(ROWS, V).double(), labels, impl="torch")[2]
    # up to 130 incoming gradients of size 1 are added up per row, a handful per label
    torch.testing.assert_close(found[2].double(), exact, rtol=0, atol=130 * EPS)


# torch's tools


@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy):
    logits = normal(ROWS, V).requires_grad_()
    temperatures = torch.tensor([0.5, 1.0, 2.0, 3.0], device=DEVICE)
    labels = K_LABELS.clamp(max=V - 2)
    torch.library.opcheck(logprobs.overload, (logits, labels, temperatures, 1.0, 3.0, V - 1, with_entropy, True))


def test_compiled_it_is_one_operation():
    """With no break in the graph, and the same bits."""

    def step(logits: Tensor) -> tuple[Tensor, ...]:
        out = kdloss.token_logprobs_and_entropy(logits, LABELS, softcap=2.0, impl="triton")
        return *out, (2 * out.logp + out.entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [normal(ROWS, V).requires_grad_() for _ in range(2)]
    results = [run(leaf) for run, leaf in zip((step, compiled), leaves, strict=True)]
    assert same(list(results[0]), list(results[1]))
    gradients = [torch.autograd.grad(out[-1], leaf)[0] for out, leaf in zip(results, leaves, strict=True)]
    assert torch.equal(*gradients)


def test_the_logits_and_a_few_numbers_a_row_are_kept():
    logits, kept = normal(64, 500, dtype=torch.bfloat16).requires_grad_(), []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = kdloss.token_logprobs_and_entropy(logits, torch.arange(64, device=DEVICE), impl="triton")
    others = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert len(others) < len(kept)
    # the labels, 8 bytes, and maximum, peak and mean, 4 each
    assert sum(x.numel() * x.element_size() for x in others) <= 64 * 20
    del out


def test_a_second_derivative_is_refused():
    logits = normal(ROWS, V).requires_grad_()
    logp = kdloss.token_logprobs(logits, LABELS, impl="triton")
    (first,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), logits)


# impl


def test_auto_takes_the_kernels_on_a_gpu_only():
    """With fake tensors, which have a device and no memory, so the question needs no GPU."""
    with FakeTensorMode():
        on_gpu = torch.empty(ROWS, V, device="cuda", dtype=torch.bfloat16)
        assert backend.takes_triton("auto", logits=on_gpu)
        assert backend.takes_triton("triton", logits=on_gpu)
        assert not backend.takes_triton("torch", logits=on_gpu)
    assert not backend.takes_triton("auto", logits=torch.zeros(ROWS, V))


class Operators(TorchDispatchMode):
    """Records which of our operators are called, and whether with kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdloss":
            named = dict(zip([x.name for x in func._schema.arguments], args, strict=False)) | (kwargs or {})
            self.called.append((func._opname, named.get("kernels", False)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entropy", [False, True])
def test_on_a_gpu_the_benchmarks_time_the_kernels(entropy):
    """The calls of `python -m benchmarks`, with fake tensors on a GPU; the backward follows the forward."""
    with FakeTensorMode(), Operators() as operators:
        logits = torch.empty(64, 151936, device="cuda", dtype=torch.bfloat16)
        function = ours_logits(Case("logits", 64, 151936, entropy=entropy))["kdloss"]
        function(logits, torch.empty(64, device="cuda", dtype=torch.int64))
    assert operators.called == [("logprobs", True)]


OBSTACLES = {
    "float64": ({}, torch.float64, "takes float32, bfloat16 and float16, got logits in torch.float64"),
    "no triton": ({"_installed": False}, torch.float32, "needs the package triton, but it is not installed"),
    "an old triton": ({"_version": (3, 2)}, torch.float32, "needs triton 3.6, but 3.2 is installed"),
}


@pytest.mark.parametrize(("changes", "dtype", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_the_kernels_cannot_is_said(changes, dtype, reason, monkeypatch, caplog):
    """As an error if they were asked for, else in a debug log."""
    for name, value in changes.items():
        monkeypatch.setattr(backend, name, value)
    with FakeTensorMode():
        on_gpu = torch.empty(ROWS, V, device="cuda", dtype=dtype)
        with pytest.raises(ValueError, match=reason):
            backend.takes_triton("triton", logits=on_gpu)
        assert caplog.records == []
        with caplog.at_level(logging.DEBUG, logger="kdloss"):
            assert not backend.takes_triton("auto", logits=on_gpu)
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_without_an_interpreter_a_cpu_has_no_kernels(monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got logits on cpu"):
        kdloss.token_logprobs(torch.zeros(ROWS, V), LABELS.cpu(), impl="triton")


def test_the_public_function_asks():
    """The result has the kernels' bits, which differ from those of the torch path in some row."""
    logits = normal(64, 500)
    labels = torch.arange(64, device=DEVICE)
    triton, plain = (kdloss.token_logprobs(logits, labels, impl=impl) for impl in ("triton", "torch"))
    assert not torch.equal(triton, plain)
    torch.testing.assert_close(triton, plain, rtol=16 * EPS, atol=16 * EPS)
