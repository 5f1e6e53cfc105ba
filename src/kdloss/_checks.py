"""Argument checks: every error names the argument, what was expected and what was passed.

Shapes, dtypes, devices and Python numbers are metadata, so checking them never waits for a device. Checks that read
*values* (`value_checks_allowed`) run on CPU tensors only, outside `torch.compile`. On other devices, the function that
uses a bad value returns NaN in its place.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_P = ParamSpec("_P")
_R = TypeVar("_R")

# No default: a weight that was tuned for another loss trains away from the teacher without an error.
CHOOSE_WEIGHT = "docs/weights.md says how to choose it; 0 leaves the teacher out"


def promoted_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if any input is float64, else float32 (half precision is widened)."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """The dtype for long sums: float64, except on devices that lack it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def tensors(**arguments: object) -> None:
    """Required tensors; None is an error."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            part, hint = name.removeprefix("teacher_"), ""
            if part == "weight" and (isinstance(x, torch.nn.Module) or hasattr(x, "logit_scale")):  # or an OutputHead
                hint = "; use weight, bias, softcap, logit_scale = kdloss.output_head(module)"
            elif isinstance(getattr(x, part, None), Tensor):  # a model's output, passed for its logits
                hint = f"; pass its .{part}"
            raise TypeError(f"{name} must be a tensor, got {'None' if x is None else type(x).__name__}{hint}")


def is_dtensor(x: object) -> bool:
    """Whether `x` is a DTensor."""
    # by the name of its class: importing DTensor takes a second, which most users do not need
    return type(x).__module__.startswith("torch.distributed.tensor") and type(x).__name__ == "DTensor"


def savable(x: Tensor) -> Tensor:
    """`x`, or a copy if it was made under `torch.inference_mode`: autograd saves no such tensor for the backward pass.

    Under `torch.compile` the two cannot be told apart, and `x` is returned.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def floating(**arguments: Tensor | None) -> None:
    """Floating-point tensors; None passes."""
    for name, x in arguments.items():
        if x is None:
            continue
        tensors(**{name: x})
        if not x.dtype.is_floating_point:
            hint = "; convert it with rewards.float()" if name == "rewards" else ""
            raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}{hint}")
        if x.dtype.itemsize < 2:
            raise TypeError(
                f"{name} must have a floating-point dtype of two bytes or more, got {x.dtype}, whose scale is missing; "
                f"pass {name}.bfloat16() * scale"
            )


def integral(**arguments: Tensor) -> None:
    """Tensors of int32 or int64."""
    for name, x in arguments.items():
        tensors(**{name: x})
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")


def boolean(**masks: Tensor | None) -> None:
    """Boolean tensors; None passes."""
    for name, mask in masks.items():
        if mask is None:
            continue
        tensors(**{name: mask})
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be torch.bool, got {mask.dtype}; convert it with {name}.bool()")


def same_shape(name: str, reference: Tensor, **others: Tensor | None) -> None:
    """`others` have the shape and the device of `reference`, which the error calls `name`; None passes."""
    for other, x in others.items():
        if x is None:
            continue
        same_kind(name, reference, **{other: x})
        if x.shape != reference.shape:
            hint = _spread(reference, x) if other == "advantages" else ""
            raise ValueError(f"{other} must match {name} {tuple(reference.shape)}, got {tuple(x.shape)}{hint}")
        same_device(name, reference, **{other: x})


def _spread(reference: Tensor, advantages: Tensor) -> str:
    """A hint on how to expand per-sequence advantages to the shape of `reference`."""
    if reference.ndim == 1:
        how = f"broadcast_to_tokens(advantages, cu_seqlens=..., total_tokens={len(reference)})"
    else:
        column = "advantages" if advantages.ndim == reference.ndim else "advantages[:, None]"
        how = f"{column}.expand_as(logp)"
    return f"; they are per token: expand one value per sequence with {how}"


def same_kind(name: str, reference: Tensor, **others: Tensor | None) -> None:
    """`others` are DTensors if and only if `reference` is, which the error calls `name`; None passes."""
    for other, x in others.items():
        if x is not None and is_dtensor(x) != is_dtensor(reference):
            odd, plain = (other, name) if is_dtensor(x) else (name, other)
            raise TypeError(
                f"{odd} must be a plain tensor beside a plain {plain}, got a DTensor; pass {odd}.full_tensor(), or "
                f"{odd}.to_local() where every rank passes its own part"
            )


def same_device(name: str, reference: Tensor, **others: Tensor | None) -> None:
    """`others` are on the device of `reference`, which the error calls `name`; None passes."""
    same_kind(name, reference, **others)
    for other, x in others.items():
        if x is not None and x.device != reference.device:
            raise ValueError(f"{other} must be on {name}'s device {reference.device}, got {x.device}")


def per_token(name: str, reference: Tensor, *, loss_mask: Tensor, **others: Tensor | None) -> None:
    """Floating per-token tensors of one shape and device, and a boolean mask of that shape; None in `others` passes."""
    tensors(**{name: reference}, loss_mask=loss_mask)
    floating(**{name: reference}, **others)
    boolean(loss_mask=loss_mask)
    same_shape(name, reference, loss_mask=loss_mask, **others)


def packed_stream(name: str, x: Tensor, cu_seqlens: Tensor) -> None:
    """`x` is flat, and `cu_seqlens` is a tensor on its device."""
    tensors(**{name: x}, cu_seqlens=cu_seqlens)
    if x.ndim != 1:
        raise ValueError(
            f"{name} must be a flat (T,) stream beside cu_seqlens, got {tuple(x.shape)}; "
            "flatten a padded (B, L) tensor and pass cu_seqlens = arange(0, B*L + 1, L)"
        )
    same_device(name, x, cu_seqlens=cu_seqlens)


def cumulative_lengths(cu_seqlens: Tensor, *, total_tokens: int | None, name: str = "cu_seqlens") -> int:
    """`cu_seqlens` is (B + 1,), starts at 0, never decreases and ends at `total_tokens`, which is returned."""
    integral(**{name: cu_seqlens})
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must be (B + 1,) with B >= 0, got {tuple(cu_seqlens.shape)}")
    if total_tokens is None:
        total_tokens = token_count(cu_seqlens)
    if cu_seqlens.shape[0] == 1 and total_tokens > 0:
        raise ValueError(f"{name} has no sequence, but there are {total_tokens} tokens")
    if not value_checks_allowed(cu_seqlens):
        return total_tokens
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name} must start at 0, got {int(cu_seqlens[0])}")
    if cu_seqlens[-1] != total_tokens:
        raise ValueError(f"{name} must end at the number of tokens {total_tokens}, got {int(cu_seqlens[-1])}")
    if (cu_seqlens[1:] < cu_seqlens[:-1]).any():  # compared, because an int32 difference may wrap around
        raise ValueError(f"{name} must not decrease, got {cu_seqlens.tolist()}")
    return total_tokens


def token_count(cu_seqlens: Tensor) -> int:
    """T, read from the last entry of (B + 1,) `cu_seqlens`, where that causes no device sync and no graph break."""
    if not value_checks_allowed(cu_seqlens):
        where = f"for tensors on {cu_seqlens.device}"
        if torch.compiler.is_compiling() or inside_torch_func():
            where = "under torch.compile" if torch.compiler.is_compiling() else "inside torch.func"
        raise ValueError(
            f"total_tokens must be given {where}, got None; it is read on the CPU only, outside compilation and vmap: "
            "pass the number of tokens, such as input_ids.shape[0] of a packed stream"
        )
    return int(cu_seqlens[-1])


def exactly_one(**arguments: object) -> None:
    """One argument is given, the others are None."""
    given = [name for name, x in arguments.items() if x is not None]
    if len(given) != 1:
        *names, last = arguments
        raise ValueError(
            f"exactly one of {', '.join(names)} and {last} must be given, got {' and '.join(given) or 'none'}"
        )


def integer(**numbers: int) -> None:
    """Python integers, not bool."""
    for name, x in numbers.items():
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"{name} must be an int, got {type(x).__name__} {x!r}")


def positive(**numbers: float) -> None:
    """Python numbers > 0."""
    for name, x in numbers.items():
        _number(name, x)
        if not x > 0:
            raise ValueError(f"{name} must be > 0, got {x}")


def positive_or_none(**numbers: float | None) -> None:
    """Python numbers > 0; None passes."""
    positive(**{name: x for name, x in numbers.items() if x is not None})


def non_negative(**numbers: float) -> None:
    """Python numbers >= 0."""
    for name, x in numbers.items():
        _number(name, x)
        if not x >= 0:
            raise ValueError(f"{name} must be >= 0, got {x}")


def finite(**numbers: float) -> None:
    """Finite Python numbers."""
    for name, x in numbers.items():
        _number(name, x)
        if not -math.inf < x < math.inf:
            raise ValueError(f"{name} must be finite, got {x}")


def softcap(**caps: float | None) -> None:
    """Positive finite Python numbers; None passes."""
    positive_or_none(**caps)
    for name, x in caps.items():
        if x == math.inf:
            raise ValueError(f"{name} must be finite, got inf; pass None for no softcap")


def unit_interval(**numbers: float) -> None:
    """Python numbers in 0 .. 1."""
    non_negative(**numbers)
    for name, x in numbers.items():
        if not x <= 1:
            raise ValueError(f"{name} must be in 0 .. 1, got {x}")


def share(name: str, share: float, at_0: str, at_1: str | None) -> None:
    """A share of a mixture is strictly between 0 and 1; at either end, the error says which function to use."""
    finite(**{name: share})
    if 0 < share < 1:
        return
    hint = ""
    if share == 0:
        hint = f"; use {at_0}"
    elif share == 1:
        hint = "; the divergence is 0 there for any student" if at_1 is None else f"; use {at_1}"
    raise ValueError(f"{name} must be in 0 < {name} < 1, got {share}{hint}")


def ppo_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """The bounds of PPO's clip: >= 0, and `dual_clip` > 1 or None."""
    non_negative(clip_low=clip_low, clip_high=clip_high)
    if dual_clip is None:
        return
    _number("dual_clip", dual_clip)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, got {dual_clip}")


def flag(**switches: object) -> None:
    """Switches are bool: the string "false" from a config would count as true."""
    for name, x in switches.items():
        if not isinstance(x, bool):
            raise TypeError(f"{name} must be true or false, got {x!r}")


def weight(reference_name: str, reference: Tensor, **weights: float | Tensor) -> None:
    """Loss weights: finite Python numbers, or floating tensors, 0-dim and finite or of the shape of `reference`."""
    for name, x in weights.items():
        if not isinstance(x, Tensor):
            finite(**{name: x})
            continue
        floating(**{name: x})
        if x.ndim > 0:
            same_shape(reference_name, reference, **{name: x})
        elif value_checks_allowed(x):
            finite(**{name: float(x.detach())})


def distill_loss_weight_required(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, whose error for a missing keyword `distill_loss_weight` names the page on weights.

    For what trainers and configs call. Not for functions that `torch.compile` traces.
    """
    name = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "distill_loss_weight" not in kwargs:
            raise TypeError(f"distill_loss_weight of {name} must be given: {CHOOSE_WEIGHT}")
        return function(*args, **kwargs)

    return checked


def interval(minimum: tuple[str, float], maximum: tuple[str, float]) -> None:
    """Two non-negative bounds with minimum <= maximum, each given as (name, value)."""
    non_negative(**dict([minimum]))
    positive(**dict([maximum]))
    if minimum[1] > maximum[1]:
        raise ValueError(f"{minimum[0]} must not exceed {maximum[0]} = {maximum[1]}, got {minimum[1]}")


def axes(*sizes: int | str) -> str:
    """A shape as errors write it: (2, 6, K) for 2, 6 and "K"."""
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def normalizer(value: float | Tensor | None) -> None:
    """A denominator: None, or a finite number >= 0, which may be a tensor without dimensions.

    A tensor of NaN passes: counts are NaN where `cu_seqlens` does not fit, and the loss must show it.
    """
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        if not value_checks_allowed(value):
            return
        value = value.detach().item()
        if value != value:
            return
    finite(normalizer=value)
    non_negative(normalizer=value)


def no_reward_options(kd_discount: float, kd_reward_clip: float | None, kd_max_ratio: float | None) -> None:
    """`direct_penalty` has no reward, so options that shape the reward must be off."""
    for name, value, off in (
        ("kd_discount", kd_discount, 0),
        ("kd_reward_clip", kd_reward_clip, None),
        ("kd_max_ratio", kd_max_ratio, None),
    ):
        if value != off:
            raise ValueError(f"{name} must be {off} with direct_penalty=True, which has no reward, got {value}")


def no_baseline(kd_discount: float, direct_penalty: bool) -> None:
    """A baseline is of the reward of each token by itself."""
    if direct_penalty:
        raise ValueError("kd_baseline must be None with direct_penalty=True, which has no reward, got a tensor")
    if kd_discount != 0:
        raise ValueError(
            f"kd_baseline must be None where kd_discount is not 0 (it is {kd_discount}): a return holds the rewards of "
            "later tokens, and a baseline of one token's reward is not one of it"
        )


def row_temperature(name: str, reference: Tensor, temperature: float | Tensor) -> float | Tensor:
    """A number, or a tensor expanded to one value per row of `reference`, which the error calls `name`.

    `row_temperatures` checks the values, once it is known which rows count. Where it may not, bad ones become NaN.
    """
    if not isinstance(temperature, Tensor):
        positive(temperature=temperature)
        finite(temperature=temperature)
        return temperature
    rows = reference.shape[:-1]
    floating(temperature=temperature)
    if temperature.ndim > 0 and temperature.shape != rows:
        raise ValueError(f"temperature must be a number, 0-dim or {tuple(rows)}, got {tuple(temperature.shape)}")
    same_device(name, reference, temperature=temperature)
    if not value_checks_allowed(temperature):
        temperature = torch.where((temperature > 0) & (temperature < math.inf), temperature, math.nan)
    return savable(temperature).expand(rows)


def row_temperatures(temperature: Tensor | None, counts: Tensor | None = None) -> None:
    """The temperature of each row is > 0 and finite where `counts`, by default everywhere; None passes."""
    if temperature is None or not value_checks_allowed(temperature):
        return
    bad = ~((temperature > 0) & (temperature < math.inf))
    if counts is not None:
        bad &= counts
    if bad.any():
        raise ValueError(f"temperature must be > 0 and finite, got {temperature[bad][0].item()}")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, logit_scale: float, side: str = "") -> None:
    """Hidden states (T, D) and their head: weight (V, D), bias (V,). `side` is the prefix of the names in errors."""
    names = [f"{side}{name}" for name in ("hidden", "weight", "bias", "logit_scale")]
    tensors(**{names[0]: hidden, names[1]: weight})
    floating(**dict(zip(names[:3], (hidden, weight, bias), strict=True)))
    finite(**{names[3]: logit_scale})
    if hidden.ndim < 2:
        raise ValueError(f"{names[0]} must be (T, D), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"{names[1]} must be (V, D) with D = {hidden.shape[-1]} of {names[0]}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must match the rows of {names[1]} ({weight.shape[0]},), got {tuple(bias.shape)}")


def runs_eagerly(x: Tensor) -> bool:
    """Whether operations on `x` run at once: no compiler and no `torch.func` traces them, and `x` is no meta tensor."""
    return not (torch.compiler.is_compiling() or inside_torch_func() or x.is_meta)


def inside_torch_func() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) is running."""
    return peek_interpreter_stack() is not None


# Torch 2.6 cannot compile it. This is torch.compiler.assume_constant_result, which imports the compiler: 1 s more.
inside_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def value_checks_allowed(x: Tensor) -> bool:
    """Whether reading the values of `x` causes no device sync and no graph break."""
    return x.device.type == "cpu" and runs_eagerly(x) and not isinstance(x, FakeTensor)


def refuse_transforms(name: str, *tensors: object) -> None:
    """Raise if forward mode or `torch.func` differentiates one of the tensors: nothing would arrive."""
    top: Any = peek_interpreter_stack()
    transform, given = None if top is None else top.key(), [x for x in tensors if isinstance(x, Tensor)]
    if (forward_ad._current_level >= 0 or transform == TransformType.Jvp) and any(map(_has_tangent, given)):
        raise NotImplementedError(
            f"{name} has no tangent in forward mode (torch.func.jvp, jacfwd, dual numbers). {_REVERSE}, or {_BY_HAND}"
        )
    if transform == TransformType.Grad and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise NotImplementedError(
            f"{name} has no gradient inside torch.func (grad, vjp, jacrev, hessian). {_REVERSE}, or {_BY_HAND}"
        )


def _has_tangent(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # inside vmap torch cannot tell
        return True


_REVERSE = "Use reverse mode: loss.backward() or torch.autograd.grad"
_BY_HAND = "write this term with torch's operations, such as logits.log_softmax(-1).gather(-1, labels[..., None])"


def no_second_derivative(name: str) -> str:
    """Why a gradient of a gradient raises."""
    return (
        f"{name} has no second derivative: losses of kdloss are differentiated once, and a gradient of their gradient "
        f"(a gradient penalty, a Hessian) is not defined. For one, {_BY_HAND}"
    )


def refuse_second_derivative(name: str, gradient: Tensor, *given: Tensor | None) -> Tensor:
    """The gradient as it is. A gradient through it to one of the tensors that it was computed from raises.

    Without it, a gradient that was computed outside the graph would be a constant for `create_graph=True`.
    """
    return _RefusesGradient.apply(name, gradient, *given)  # type: ignore[no-any-return, no-untyped-call]


class _RefusesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *given: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(no_second_derivative(ctx.name))


def warn(message: str) -> None:
    """Warn at the line that called the public function, which must call this directly. No-op under `torch.compile`."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, UserWarning, stacklevel=3)


def _number(name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        hint = " (YAML reads 5e-3 as text: write 5.0e-3)" if isinstance(x, str) else ""
        raise TypeError(f"{name} must be a Python number, got {type(x).__name__} {x!r}{hint}")
