"""Holds a contender's values and gradients against the truth, before it is timed.

Ours must be as exact as its dtype allows: no further from the truth than the plain torch formula in the same dtype, and
never further than the bounds below. A peer may round to its dtype (some compute log-probs in bf16); beyond that it is
not the same function, and its time means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contenders import Run, Variant
from .truth import Truth

# The reasons: float32 sums over V or T terms, with float32's 6e-8 a term; a bf16 gradient is rounded by 2⁻⁹ where it
# is stored and once more where dH and dW sum rounded dlogits. Peers: a bf16 log-prob near -16 is 2⁻⁵ from its
# neighbours, twice rounded; gradients from such log-probs are off by as much, relatively.
VALUE_BOUND = {"ours": {"half": 1e-3, "float32": 2e-4}, "peer": {"half": 0.15, "float32": 5e-3}}  # nats
GRADIENT_BOUND = {"ours": {"half": 1e-2, "float32": 2e-4}, "peer": {"half": 6e-2, "float32": 5e-3}}  # relative, norm

SLACK = 1.05  # "no further than plain torch" is not decided by which of two roundings was luckier


@dataclass(frozen=True)
class Parity:
    """Errors against the truth, their bounds, and what is wrong, if anything."""

    value_error: float  # largest, in nats (of a scalar: relative where it is above 1)
    gradient_error: float  # norm of the difference over norm of the truth, largest of the leaves
    value_bound: float
    gradient_bound: float
    torch_error: float  # value error of the plain torch formula in the same dtype

    @property
    def passed(self) -> bool:
        return self.value_error <= self.value_bound and self.gradient_error <= self.gradient_bound

    @property
    def complaint(self) -> str:
        if self.passed:
            return ""
        return (
            f"value error {self.value_error:.2e} (bound {self.value_bound:.2e}), "
            f"gradient error {self.gradient_error:.2e} (bound {self.gradient_bound:.2e})"
        )


def check(
    run: Run, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], *, plain: Parity | None = None
) -> Parity:
    """Compares one call's results with the variant's truth.

    `plain` is what plain torch got, where it ran: ours may err as much.

    Raises:
        ValueError: the number of outputs or a shape is wrong, or the variant has no truth.
    """
    truth = _truth(run.variant)
    if len(outputs) != len(truth.values):
        raise ValueError(f"{run.contender.name} gives {len(outputs)} outputs, expected {len(truth.values)}")
    half = "half" if run.variant.leaves[0].dtype in (torch.bfloat16, torch.float16) else "float32"
    who = "ours" if run.contender.ours else "peer"
    value_error = max(_value_error(out, want) for out, want in zip(outputs, truth.values, strict=True))
    gradient_error = max(
        _gradient_error(grad[want.rows], want.expected) for grad, want in zip(gradients, truth.gradients, strict=True)
    )
    value_bound = max(VALUE_BOUND[who][half], SLACK * truth.torch_error)
    gradient_bound = GRADIENT_BOUND[who][half]
    if plain is not None and plain.passed:
        value_bound = max(value_bound, SLACK * plain.value_error)
        gradient_bound = max(gradient_bound, SLACK * plain.gradient_error)
    return Parity(value_error, gradient_error, value_bound, gradient_bound, truth.torch_error)


def _truth(variant: Variant) -> Truth:
    if variant.truth is None:
        raise ValueError("parity needs a variant that was built with its truth")
    return variant.truth


def _value_error(out: Tensor, want: Tensor) -> float:
    if out.shape != want.shape:
        raise ValueError(f"output is {tuple(out.shape)}, expected {tuple(want.shape)}")
    if not out.numel():
        return 0.0
    difference = (out.detach().double() - want.double()).abs()
    if want.ndim == 0:
        difference = difference / want.double().abs().clamp(min=1)
    return _finite(float(difference.max()))


def _gradient_error(grad: Tensor, want: Tensor) -> float:
    if grad.shape != want.shape:
        raise ValueError(f"gradient is {tuple(grad.shape)}, expected {tuple(want.shape)}")
    norm = float(want.double().norm())
    return _finite(float((grad.double() - want.double()).norm()) / max(norm, 1e-30))


def _finite(x: float) -> float:
    return x if x == x else float("inf")
