"""Holds compilation: every function in one graph under aot_eager, three under Inductor, value and gradient.

Under aot_eager everything but code generation runs: a graph break, a host sync or an operation that functionalization
does not know fails here. Inductor also compiles C++, seconds a function, so it has the widest only.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from cases import TABLE
from contract import assert_matches, call, cast, expected_warnings, fields, gradients, public_function, random_upstreams

COMPILED = [(name, variant) for name, entry in TABLE.items() for variant in entry.compiled]


def check_compiled(name, variant, *, backend, dtype, tolerance):
    torch.compiler.reset()
    entry, function = TABLE[name], public_function(name)
    eager_arguments = cast(entry.variants[variant], dtype, requires_grad=True)
    with expected_warnings(eager_arguments):
        eager = call(function, eager_arguments)
    arguments = cast(entry.variants[variant], dtype, requires_grad=True)
    with warnings.catch_warnings():  # also not that of direct_penalty: Python's warnings would break the graph
        warnings.filterwarnings("error", module=r"kdloss(\.|$)|.*test_contract")
        result = call(torch.compile(function, fullgraph=True, backend=backend), arguments)

    assert type(result) is type(eager)
    assert list(fields(result)) == list(fields(eager))
    for part, x in fields(eager).items():
        compiled = fields(result)[part]
        assert compiled.dtype == x.dtype, part
        assert compiled.requires_grad == x.requires_grad, part
        assert_matches(compiled, x.detach().numpy(), tolerance, part)
    if entry.gradient != "attached" or not fields(eager)[entry.attached[0]].requires_grad:
        return
    upstreams = random_upstreams(entry, eager)
    wanted = gradients(entry, eager_arguments, eager, upstreams)
    for argument, gradient in gradients(entry, arguments, result, upstreams).items():
        if argument not in entry.differentiable:
            assert gradient is None or not gradient.any(), f"gradient flows to {argument}"
            continue
        assert_matches(gradient, wanted[argument].numpy(), tolerance, f"gradient of {argument}")


# The same operations in the same order, but for decompositions: a few roundings of float64.
@pytest.mark.parametrize(("name", "variant"), COMPILED)
def test_compiles_to_one_graph(name, variant):
    check_compiled(name, variant, backend="aot_eager", dtype=torch.float64, tolerance=(1e-12, 1e-14))


# Fused loops reorder sums and use a vectorized exp that is good to one float32 epsilon more.
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
