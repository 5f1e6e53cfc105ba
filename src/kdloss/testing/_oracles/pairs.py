"""One signature for an oracle and its gradient: both are made from one function that returns the two results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_Value = TypeVar("_Value")
_Grad = TypeVar("_Grad")


def pair(both: Callable[_P, tuple[_Value, _Grad]]) -> tuple[Callable[_P, _Value], Callable[_P, _Grad]]:
    """The oracles `f` and `f_grad`, from a function `f_and_grad` that returns the results of the two.

    The paragraphs of its docstring from "Gradient:" on become the docstring of `f_grad`, those before it that of `f`.
    Its parameters `upstream...` belong to `f_grad` alone, which requires them. Types cannot say that, so it is checked
    in each call.
    """
    name = both.__name__.removesuffix("_and_grad")
    doc, _, grad_doc = (inspect.getdoc(both) or "").partition("\n\nGradient: ")
    signature = inspect.signature(both)
    value_type, grad_type = signature.return_annotation.removeprefix("tuple[").removesuffix("]").split(", ")
    parameters = signature.parameters.values()
    upstream = [p for p in parameters if p.name.startswith("upstream")]
    takes = signature.replace(parameters=[p for p in parameters if p not in upstream], return_annotation=value_type)
    required = [p.replace(default=p.empty, annotation="ArrayLike") if p in upstream else p for p in parameters]
    grad_takes = signature.replace(parameters=required, return_annotation=grad_type)

    def value(*args: _P.args, **kwargs: _P.kwargs) -> _Value:
        takes.bind(*args, **kwargs)
        return both(*args, **kwargs)[0]

    def grad(*args: _P.args, **kwargs: _P.kwargs) -> _Grad:
        grad_takes.bind(*args, **kwargs)
        return both(*args, **kwargs)[1]

    _describe(value, both.__module__, name, doc, takes)
    _describe(grad, both.__module__, f"{name}_grad", grad_doc, grad_takes)
    return value, grad


def _describe(function: Callable[..., Any], module: str, name: str, doc: str, signature: inspect.Signature) -> None:
    function.__module__, function.__name__, function.__qualname__, function.__doc__ = module, name, name, doc
    function.__dict__["__signature__"] = signature
