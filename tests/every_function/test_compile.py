"""Holds compilation: every function in one graph under aot_eager, three under Inductor, value and gradient; export.

Under aot_eager everything but code generation runs: a graph break, or an operation that functionalization does not
know, fails here. A host sync does not, so every function also runs on tensors without values. Inductor compiles C++,
which takes seconds per function, so it runs on three wide ones only.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import kdloss
from cases import CU, TABLE, T
from contract import assert_matches, call, cast, expected_warnings, fields, gradients, public_function, random_upstreams

COMPILED = [(name, variant) for name, entry in TABLE.items() for variant in entry.compiled]


def check_compiled(name, variant, *, backend, dtype, tolerance):
    torch.compiler.reset()
    entry, function = TABLE[name], public_function(name)
    eager_arguments = cast(entry.variants[variant], dtype, requires_grad=True)
    with expected_warnings(eager_arguments):
        eager = call(function, eager_arguments)
    arguments = cast(entry.variants[variant], dtype, requires_grad=True)
    with warnings.catch_warnings():  # not even the warning of direct_penalty, which would break the graph
        warnings.filterwarnings("error", module=r"kdloss(\.|$)|.*test_compile")
        result = call(torch.compile(function, fullgraph=True, backend=backend), arguments)

    assert type(result) is type(eager)
    assert list(fields(result)) == list(fields(eager))
    for part, x in fields(eager).items():
        actual = fields(result)[part]
        assert actual.dtype == x.dtype, part
        assert actual.requires_grad == x.requires_grad, part
        assert_matches(actual, x.detach().numpy(), tolerance, part)
    if entry.gradient != "attached" or not fields(eager)[entry.attached[0]].requires_grad:
        return
    upstreams = random_upstreams(entry, eager)
    wanted = gradients(entry, eager_arguments, eager, upstreams)
    for argument, gradient in gradients(entry, arguments, result, upstreams).items():
        if argument not in entry.differentiable:
            assert gradient is None or not gradient.any(), f"gradient flows to {argument}"
            continue
        assert_matches(gradient, wanted[argument].numpy(), tolerance, f"gradient of {argument}")


# The same operations in the same order, except for decompositions: a few roundings of float64.
@pytest.mark.parametrize(("name", "variant"), COMPILED)
def test_compiles_to_one_graph(name, variant):
    check_compiled(name, variant, backend="aot_eager", dtype=torch.float64, tolerance=(1e-12, 1e-14))


# Fused loops reorder sums and use a vectorized exp that is accurate to one float32 epsilon more.
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("kdrl_loss", "all at once"),
        ("distillation_loss", "kd_discount with a mask"),
        ("token_logprobs_and_entropy", "full"),
    ],
)
def test_inductor_agrees_with_eager(name, variant):
    check_compiled(name, variant, backend="inductor", dtype=torch.float32, tolerance=(4e-6, 4e-6))


# `fullgraph=True` captures `.item()` and a boolean index as they are. A fake tensor has no values, so reading one is an
# error. `linear_*` select the trained rows, which is one sync, unless `max_trained_tokens` bounds their number.
# `total_tokens=None` is read; `_packing/test_layout.py` holds that it must be given where that would be a sync.
VALUELESS = [
    (name, variant)
    for name, entry in TABLE.items()
    for variant, arguments in entry.variants.items()
    if entry.gradient != "number"
    and ("linear" not in name or "max_trained_tokens" in arguments)
    and arguments.get("total_tokens", 0) is not None
]


def without_values(function, arguments, entry=None):
    """Runs forward, and backward where the table says that there is a gradient."""
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        result = call(function, fake)
        if entry is not None and entry.gradient == "attached" and fields(result)[entry.attached[0]].requires_grad:
            gradients(entry, fake, result, random_upstreams(entry, result))


@pytest.mark.parametrize(("name", "variant"), VALUELESS)
def test_nothing_waits_for_the_device(name, variant):
    arguments = cast(TABLE[name].variants[variant], torch.float32, requires_grad=True)
    with expected_warnings(arguments):
        without_values(public_function(name), arguments, TABLE[name])


@pytest.mark.parametrize(
    "body",
    [
        lambda x, mask: x.sum() / max(mask.sum().item(), 1),
        lambda x, mask: x.sum() / mask.sum() if mask.any() else x.sum(),
        lambda x, mask: x[mask].mean(),
        lambda x, mask: x * float(mask.sum()),
    ],
    ids=["item", "branch on a value", "boolean index", "float"],
)
def test_what_waits_for_the_device_is_found(body):
    """The check above can fail."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        without_values(body, {"x": torch.ones(3), "mask": torch.tensor([True, False, True])})


def test_a_head_without_a_bound_waits_once():
    """Documented: without `max_trained_tokens` the rows are selected by value."""
    arguments = TABLE["linear_token_logprobs"].variants["base"]
    with pytest.raises(DynamicOutputShapeException):
        without_values(public_function("linear_token_logprobs"), arguments)


# --- meta tensors and export ------------------------------------------------------------------------------------------


def fused(hidden, weight, labels, loss_mask):
    return kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, entropy: -logp * entropy, loss_mask=loss_mask)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.gradient != "number"])
def test_meta_tensors_give_shapes_and_dtypes(name):
    entry = TABLE[name]
    for arguments in entry.variants.values():
        given = cast(arguments, torch.float32, requires_grad=True)
        on_meta = {k: x.detach().to("meta") if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        meta = cast(on_meta, torch.float32, requires_grad=True)
        with expected_warnings(arguments):
            expected = fields(call(public_function(name), given))
            if "total_tokens" in inspect.signature(public_function(name)).parameters:  # must be given here
                meta["total_tokens"] = len(expected[""])
            found = fields(call(public_function(name), meta))
        for part, x in expected.items():
            assert (found[part].shape, found[part].dtype, found[part].is_meta) == (x.shape, x.dtype, True), part
        if entry.gradient == "attached" and expected[entry.attached[0]].requires_grad:
            sum(found[part].sum() for part in entry.attached).backward()


def test_meta_tensors_of_the_fused_loss():
    hidden, weight = torch.empty(5, 3, device="meta", requires_grad=True), torch.empty(7, 3, device="meta")
    labels, loss_mask = torch.empty(5, dtype=torch.long, device="meta"), torch.empty(5, dtype=torch.bool, device="meta")
    out = fused(hidden, weight, labels, loss_mask)
    assert [x.shape for x in out] == [(), (5,), (5,)]
    out.loss.backward()
    assert hidden.grad.shape == (5, 3)


class Module(torch.nn.Module):
    """One function with its options fixed."""

    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, tensors):
        return tuple(fields(self.function(**tensors, **self.options)).values())


# What takes `total_tokens` is told T as a number, `length` bounds it, and advantages are per response.
NOT_DYNAMIC = {"unpack", *(name for name, entry in TABLE.items() if "advantages" in name)}
EXPORTED = {
    name: (public_function(name), cast(entry.variants["base"], torch.float32))
    for name, entry in TABLE.items()
    if name not in NOT_DYNAMIC and {"cu_seqlens", "loss_mask", "labels", "logits"} & {*entry.variants["base"]}
}
EXPORTED = {name: case for name, case in EXPORTED.items() if "total_tokens" not in case[1]}
EXPORTED["fused_linear_loss"] = (fused, cast(TABLE["linear_token_logprobs"].variants["loss_mask"], torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_number_of_tokens(name, strict):
    function, arguments = EXPORTED[name]
    tensors = {k: x.contiguous() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    is_per_token = {k: x.ndim > 0 and x.shape[0] == T for k, x in tensors.items()}
    shapes = {k: {0: tokens} if dynamic else {} for k, dynamic in is_per_token.items()}
    module = Module(function, {k: x for k, x in arguments.items() if k not in tensors})
    exported = torch.export.export(module, (tensors,), dynamic_shapes=(shapes,), strict=strict).module()
    twice = {k: torch.cat([x, x]) if is_per_token[k] else x for k, x in tensors.items()}
    if "cu_seqlens" in twice:
        twice["cu_seqlens"] = torch.cat([CU[:-1], 2 * CU[-1:]])
    for given in (tensors, twice):
        for x, y in zip(exported(given), module(given), strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
