"""Helpers of the tests in `every_function`: calls in any dtype, results as named parts, gradients by argument."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from cases import TABLE, Arguments, Entry
from kdloss.testing import reference


def public_function(name: str) -> Callable[..., Any]:
    return attrgetter(name)(kdloss)


def oracle(name: str) -> Callable[..., Any]:
    return getattr(reference, name.rpartition(".")[2])


def call(function: Callable[..., Any], arguments: Arguments) -> Any:
    """Calls as a user does: positionally where that is allowed, the rest by keyword."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in arguments]
    rest = {name: x for name, x in arguments.items() if name not in names}
    return function(*[arguments[name] for name in names], **rest)


def cast(arguments: Arguments, dtype: torch.dtype, *, requires_grad: bool = False) -> Arguments:
    """A copy with every float tensor in `dtype`."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            return x
        return x.to(dtype).clone().requires_grad_(requires_grad)

    return {name: one(x) for name, x in arguments.items()}


def as_numpy(arguments: Arguments) -> Arguments:
    """The arguments for an oracle, which takes no `impl`."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return x.double().numpy() if x.dtype.is_floating_point else x.numpy()

    return {name: one(x) for name, x in arguments.items() if name != "impl"}


def fields(result: Any) -> dict[str, Any]:
    """The parts of a NamedTuple or dict by name; anything else is one part named ""."""
    if isinstance(result, dict):
        return result
    # torch 2.6 compiles no `_asdict`
    return dict(zip(type(result)._fields, result, strict=True)) if hasattr(result, "_fields") else {"": result}


@contextlib.contextmanager
def expected_warnings(arguments: Arguments) -> Iterator[None]:
    """Expects the warning of `direct_penalty`, and no other."""
    if arguments.get("direct_penalty"):
        with pytest.warns(UserWarning, match=r"the teacher is not in its gradient.*leave it out to distill"):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield


def has_gradient(entry: Entry, arguments: Arguments) -> bool:
    """Whether this variant has a gradient: one that moves integers has none."""
    return any(
        isinstance(arguments.get(name), Tensor) and arguments[name].dtype.is_floating_point
        for name in entry.differentiable
    )


def random_upstreams(entry: Entry, result: Any) -> list[Tensor]:
    """A seeded upstream gradient, away from 0, for each part of the result that carries gradient."""
    random = torch.Generator().manual_seed(7)
    parts = fields(result)
    shapes = [parts[name] for name in entry.attached]
    return [(torch.rand(x.shape, generator=random, dtype=torch.float64) - 1.5).to(x.dtype) for x in shapes]


def gradients(entry: Entry, arguments: Arguments, result: Any, upstreams: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of every float tensor by argument; None where no gradient flows."""
    leaves = {key: x for key, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    parts = fields(result)
    attached = [parts[name] for name in entry.attached]
    found = torch.autograd.grad(attached, list(leaves.values()), upstreams, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def oracle_gradients(name: str, arguments: Arguments, upstreams: list[Tensor]) -> dict[str, Any]:
    """The oracle's gradients by argument. One without an upstream is elementwise or scalar and is multiplied by it."""
    gradient = getattr(reference, f"{name}_grad")
    wanted = [p for p in inspect.signature(gradient).parameters if p.startswith("upstream")]
    given = [u.double().numpy() for u in upstreams]
    arrays = as_numpy(arguments)
    if wanted:
        result = call(gradient, arrays | dict(zip(wanted, given, strict=True)))
    else:
        (upstream,) = given
        result = call(gradient, arrays) * upstream
    if hasattr(result, "_asdict"):
        return {key: x for key, x in result._asdict().items() if x is not None}
    return {TABLE[name].differentiable[0]: result}


def assert_matches(actual: Tensor, expected: Any, tolerance: tuple[float, float], what: str) -> None:
    """Equal to an oracle's array in shape, and in value within (relative, absolute); integers and bool exactly."""
    expected = np.asarray(expected)
    assert not np.isnan(expected).any(), f"{what}: the oracle gives NaN"
    assert tuple(actual.shape) == expected.shape, what
    actual = actual.detach()
    if not actual.dtype.is_floating_point:
        np.testing.assert_array_equal(actual.numpy(), expected, err_msg=what)
        return
    relative, absolute = tolerance
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=relative, atol=absolute, err_msg=what)
