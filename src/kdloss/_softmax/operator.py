"""Operators of `torch.library` whose gradient is the one that was registered, or an error.

    @operator("name")                            the computation; the annotations give the schema
    @name.register_fake                          shapes and dtypes, for compilers and meta tensors
    name.register_autograd(backward, save)       without it, a gradient through the operator raises

`torch.library.custom_op` does the same and more. It costs an import of `torch._dynamo` at the first call, and it gives
a tangent of 0 in forward mode. Here everything that is not registered raises: forward mode, reverse mode of
`torch.func`, and a second derivative.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks

# An operator lives as long as its library. A module that is loaded again, as in a notebook, defines its operators anew.
_LIBRARIES: dict[str, torch.library.Library] = {}


# the gradients of the first inputs, from (ctx, *gradients of the outputs); inputs beyond them get none
Backward = Callable[..., tuple[Tensor | None, ...]]
Save = Callable[[Any, tuple[Any, ...], Any], None]  # (ctx, inputs, output)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as the operator `kdloss::name`."""
    return lambda function: Operator(name, function)


class Operator:
    """An operator that is called like the function that it was made from."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__doc__, self._name = function.__doc__, f"kdloss::{name}"
        self._defaults = [p.default for p in inspect.signature(function).parameters.values()]
        self._differentiable = _once(self._name, _undifferentiable(self._name), None)
        if name in _LIBRARIES:
            _LIBRARIES.pop(name)._destroy()
        self._library = _LIBRARIES[name] = torch.library.Library("kdloss", "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        self._library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, function, "CompositeExplicitAutograd")
        self._library.impl(name, self._autograd, "Autograd", with_keyset=True)
        self.overload: Any = getattr(torch.ops.kdloss, name).default

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.overload(*inputs, **options)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Register what gives the outputs' shapes and dtypes without reading values."""
        torch.library.register_fake(self._name, fake, lib=self._library)

    def register_autograd(self, backward: Backward, save: Save) -> None:
        """Register the gradient: `save` runs after the forward, `backward` in the backward."""
        self._differentiable = _once(self._name, backward, save)

    def _autograd(self, keyset: torch._C.DispatchKeySet, *given: Any) -> Any:
        # the dispatcher leaves out trailing arguments that equal their defaults
        inputs = (*given, *self._defaults[len(given) :])
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        _checks.refuse_transforms(self._name, *tensors)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self._below_autograd(keyset, *inputs)
        compute = partial(self._below_autograd, keyset)
        return self._differentiable.apply(*inputs, compute)

    def _below_autograd(self, keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _undifferentiable(name: str) -> Backward:
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_checks.no_second_derivative(name))

    return backward


def _once(name: str, backward: Backward, save: Save | None) -> type[torch.autograd.Function]:
    """The autograd function of an operator. It is differentiated once."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *inputs, compute = given
            output = compute(*inputs)
            if save is not None:
                save(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            found = backward(ctx, *upstream)
            if torch.is_grad_enabled():  # create_graph=True
                given = (*upstream, *ctx.saved_tensors)
                found = tuple(None if x is None else _checks.refuse_second_derivative(name, x, *given) for x in found)
            return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))

    Differentiable.__name__ = Differentiable.__qualname__ = name
    return Differentiable
