"""Holds that every function takes tensors made under `torch.inference_mode`, which autograd itself cannot save.

A teacher is often run in that mode, and masks and lengths come from a generation loop in it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import TABLE
from contract import (
    call,
    cast,
    expected_warnings,
    fields,
    gradients,
    has_gradient,
    public_function,
    random_upstreams,
)

ARGUMENTS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, entry in TABLE.items()
    for argument in dict.fromkeys(
        key for arguments in entry.variants.values() for key, x in arguments.items() if isinstance(x, Tensor)
    )
]


def outcome(name: str, arguments: dict, leaves: list[str]) -> tuple[dict, dict]:
    """Results, and gradients of `leaves`."""
    entry = TABLE[name]
    arguments = {key: x.clone().requires_grad_() if key in leaves else x for key, x in arguments.items()}
    with expected_warnings(arguments):
        result = call(public_function(name), arguments)
    if not leaves or entry.gradient != "attached":
        return fields(result), {}
    return fields(result), gradients(entry, arguments, result, random_upstreams(entry, result))


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_inference_tensor_is_taken_as_the_same_numbers(name, argument):
    """Alone among ordinary tensors, which still get their gradients: a frozen side beside a trained one."""
    entry = TABLE[name]
    for variant in entry.variants.values():
        if not isinstance(variant.get(argument), Tensor):
            continue
        arguments = cast(variant, torch.float32)
        # the inference tensor is frozen, so it is no leaf
        candidates = entry.differentiable if has_gradient(entry, arguments) else ()
        leaves = [key for key in candidates if key != argument and isinstance(arguments.get(key), Tensor)]
        with torch.inference_mode():
            made = arguments[argument].clone()
        assert made.is_inference()
        expected, exact = outcome(name, arguments, leaves)
        found, gradient = outcome(name, arguments | {argument: made}, leaves)
        for part, x in expected.items():
            torch.testing.assert_close(found[part], x, rtol=0, atol=0, equal_nan=True)
        for leaf, x in exact.items():
            torch.testing.assert_close(gradient[leaf], x, rtol=0, atol=0, equal_nan=True)


def test_a_parameter_made_in_inference_mode_gets_its_gradient():
    """As a clone of it does in torch."""
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.eye(3))
    hidden, labels = torch.randn(2, 3), torch.tensor([0, 2])
    ordinary = torch.eye(3, requires_grad=True)
    for head in (weight, ordinary):
        call(
            public_function("linear_token_logprobs"), {"hidden": hidden, "weight": head, "labels": labels}
        ).sum().backward()
    assert torch.equal(weight.grad, ordinary.grad)
