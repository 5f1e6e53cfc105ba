"""Holds every public function to its oracle: value and gradient in four dtypes, and no trace of masked positions.

Runs over the table in `cases.py`. The oracles compute in float64 on inputs rounded to the dtype under test, so a
tolerance covers only what the function itself rounds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import TABLE, Arguments
from contract import (
    as_numpy,
    assert_matches,
    call,
    cast,
    expected_warnings,
    fields,
    gradients,
    has_gradient,
    oracle,
    oracle_gradients,
    public_function,
    random_upstreams,
)
from kdloss._softmax import products

# (relative, absolute). float64: the oracle and the function sum at most 17 terms of size 10 in different orders; the
# absolute part is for results that are differences of such terms. float32: the same, from an epsilon of 1.2e-7; a ratio
# exp(logp - old_logp) carries the rounding of a difference of terms of size 5. Half precision is widened to float32
# first, so it has float32's tolerance.
TOLERANCE = {
    torch.float64: (1e-12, 1e-14),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2e-6, 2e-6),
    torch.float16: (2e-6, 2e-6),
}
HALF = (torch.bfloat16, torch.float16)

CALLS = [(name, variant) for name, entry in TABLE.items() for variant in entry.variants]
ATTACHED = [(name, variant) for name, variant in CALLS if TABLE[name].gradient == "attached"]
# the two dtypes of computation, and the two that are widened (bf16 loses digits, fp16 loses range)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def untrained(arguments: Arguments, x: Tensor) -> Tensor | None:
    """Where the rows of `x` are not trained on; None if `x` is not per token."""
    masks = []
    if arguments.get("loss_mask") is not None:
        masks.append(~arguments["loss_mask"])
    if "labels" in arguments:
        tokens = arguments["logits" if "logits" in arguments else "hidden"].shape[:-1]
        masks.append((arguments["labels"] == -100).reshape(*tokens, -1).all(-1))
    if any(x.shape[: mask.ndim] != mask.shape for mask in masks):
        return None
    return torch.stack(masks).any(0) if masks else None


@DTYPES
@pytest.mark.parametrize(("name", "variant"), CALLS)
def test_value_is_the_oracles(name, variant, dtype):
    entry = TABLE[name]
    arguments = cast(entry.variants[variant], dtype)
    with expected_warnings(arguments):
        result = fields(call(public_function(name), arguments))
    expected = fields(call(oracle(name), as_numpy(arguments)))
    if entry.gradient == "number":
        assert isinstance(result[""], float)
        assert result[""] == pytest.approx(expected[""], rel=1e-15, abs=0)
        return
    assert set(result) == set(expected)
    for part, x in result.items():
        assert_matches(x, expected[part], TOLERANCE[dtype], part)
        if x.dtype.is_floating_point:
            assert x.dtype == (torch.float32 if dtype in HALF and not entry.copies else dtype), part
        mask = untrained(arguments, x)
        if mask is not None:
            # an untrained result is 0 or 1 to the bit, unless it is a bound or the weight of a whole sequence
            constant = torch.as_tensor(np.asarray(expected[part])).to(x.dtype)
            mask &= ((constant == 0) | (constant == 1)).reshape(*mask.shape, -1).all(-1)
            assert torch.equal(x[mask], constant[mask]), f"{part} holds a trace of untrained tokens"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "variant"), ATTACHED)
def test_gradient_is_the_oracles(name, variant, dtype):
    check_gradient(name, variant, dtype, TOLERANCE[dtype])


# A gradient is rounded once from float32 to the dtype of its input: by half an epsilon, or by half of fp16's smallest
# subnormal. Where two terms add up in `logp`, or up to 7 tokens in the entry of one sequence (`copies`), each term and
# their sum is rounded, and cancellation leaves an absolute error; the terms are smaller than 2.
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("name", "variant"), ATTACHED)
def test_gradient_has_the_dtype_of_its_input(name, variant, dtype, monkeypatch):
    epsilon = torch.finfo(dtype).eps
    if TABLE[name].copies:
        tolerance = (4 * epsilon, 4 * epsilon)
    elif name in ("kdrl_loss", "kdrl_token_loss"):
        tolerance = (epsilon, 2 * epsilon)
    else:
        tolerance = (0.501 * epsilon, 2e-6)
    if dtype == torch.bfloat16 and "weight" in TABLE[name].differentiable:
        # where the processor multiplies bfloat16, the gradient of the logits is rounded as well: half an epsilon of
        # each term of a sum, whose terms are below 2 together. `_softmax/test_products.py` compares with plain torch
        check_gradient(name, variant, dtype, (epsilon, epsilon))
        monkeypatch.setattr(products, "_BFLOAT16", False)
    check_gradient(name, variant, dtype, tolerance)


def check_gradient(name: str, variant: str, dtype: torch.dtype, tolerance: tuple[float, float]) -> None:
    entry = TABLE[name]
    arguments = cast(entry.variants[variant], dtype, requires_grad=True)
    with expected_warnings(arguments):
        result = call(public_function(name), arguments)
    if not has_gradient(entry, arguments):
        return
    upstreams = random_upstreams(entry, result)
    found = gradients(entry, arguments, result, upstreams)
    expected = oracle_gradients(name, arguments, upstreams)
    assert set(expected) == set(entry.differentiable) & set(found)
    for argument, gradient in found.items():
        if argument not in entry.differentiable:
            assert gradient is None, f"gradient flows to {argument}"
            continue
        assert gradient is not None, f"{argument} is cut off from the graph"
        assert gradient.dtype == dtype
        assert_matches(gradient, expected[argument], tolerance, f"gradient of {argument}")
        mask = untrained(arguments, gradient)
        if mask is not None:
            assert (gradient[mask] == 0).all(), f"the gradient of {argument} is not 0 at untrained positions"


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, v in CALLS if TABLE[n].gradient != "number"])
def test_only_what_is_stated_is_attached(name, variant):
    entry = TABLE[name]
    arguments = cast(entry.variants[variant], torch.float64, requires_grad=True)
    with expected_warnings(arguments):
        result = fields(call(public_function(name), arguments))
    for part, x in result.items():
        attached = entry.gradient == "attached" and part in entry.attached and has_gradient(entry, arguments)
        assert x.requires_grad == attached, part
        if entry.gradient == "integer":
            assert not x.dtype.is_floating_point


@pytest.mark.parametrize("name", [n for n in TABLE if n.endswith("_surrogate") or n in ("grpo_loss", "kdrl_loss")])
def test_the_table_reaches_every_clip(name):
    """Some trained token is clipped and some off-policy one is not; likewise for the dual clip."""
    results = [
        call(public_function(name), arguments)
        for arguments in TABLE[name].variants.values()
        if not arguments.get("direct_penalty")
    ]
    if name == "sapo_surrogate":  # its gate fades
        assert not any(r.clipped.any() for r in results)
        return
    assert any(r.clipped.any() for r in results)
    assert any((~r.clipped & (r.ratio != 1)).any() for r in results)
    if name in ("clipped_surrogate", "grpo_loss", "kdrl_loss"):
        assert any(r.dual_clipped.any() for r in results)


@pytest.mark.parametrize("variant", ["base", "full"])
def test_a_head_takes_any_leading_shape(variant):
    """`hidden` (4, 4, D) gives what (16, D) gives; the oracle knows the flat form alone."""
    name = "linear_token_logprobs_and_entropy"
    flat = {
        key: x[:16] if isinstance(x, Tensor) and x.shape[0] == 17 else x
        for key, x in TABLE[name].variants[variant].items()
    }
    shaped = {
        key: x.reshape(4, 4, *x.shape[1:]) if isinstance(x, Tensor) and x.shape[0] == 16 else x
        for key, x in flat.items()
    }
    for wanted, got in zip(call(public_function(name), flat), call(public_function(name), shaped), strict=True):
        assert torch.equal(got.flatten(0, 1), wanted)
