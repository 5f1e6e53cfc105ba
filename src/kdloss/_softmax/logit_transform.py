"""The scale and the softcap that a whole model applies to its head's logits, read off the model's own `forward`.

A configuration does not tell them: `logits_scaling` divides in Granite, multiplies in HyperCLOVA X and divides the
hidden states in MiniCPM3, and other models have other names. So the `forward` of the model's class runs once with two
stand-ins: a backbone that returns three rows of known hidden states, and a head that returns known logits. No layer
runs and no parameter is read. What comes out is `softcap(scale * logits)`, or the caller has to say what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The hidden states of the three rows. A power of two shows a factor exactly. A softcap changes the first row by less
# than float64 resolves, and leaves nothing of the last one but itself.
_ROWS = (2.0**-20, 1.0, 2.0**15)
# The logits of a row are its hidden state times these, over and over. 1/3 shows a rounding to half precision.
_COLUMNS = (1.0, -1.0, 0.5, 1 / 3)
# How far the logits may be from `softcap(scale * logits)`, relatively. A softcap in float32 is off by 2e-7.
_TOLERANCE = 2e-6


class LogitTransform(NamedTuple):
    """logits = softcap(scale * (hidden @ weight.T + bias)), for the last hidden states of the backbone."""

    softcap: float | None
    scale: float


def logit_transform(model: nn.Module, head: nn.Module, vocab_size: int) -> LogitTransform:
    """The transform of the logits in `model.forward`, for its module `head` of `vocab_size` rows.

    Raises:
        ValueError: the transform is another one, or cannot be found. The text says why, without naming the model.
    """
    rows = torch.tensor(_ROWS, dtype=torch.float64, device="cpu")[:, None]
    columns = torch.tensor(_COLUMNS, dtype=torch.float64, device="cpu").repeat(-(-vocab_size // 4))[:vocab_size]
    seen: list[torch.dtype] = []

    def give_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden.dtype)
        return hidden[..., :1].double() * columns

    def give_hidden(*_: Any, **__: Any) -> _Outputs:
        return _Outputs(rows[None].expand(1, len(_ROWS), 4))

    out = _forward(model, head, give_hidden, give_logits)
    if len(seen) != 1 or out.shape != (1, len(_ROWS), vocab_size):
        raise ValueError(f"its head ran {len(seen)} times, and its logits have the shape {tuple(out.shape)}")
    found, known = out[0].double(), rows * columns
    scale, largest = float(found[0, 0] / known[0, 0]), float(found[-1, 0])
    softcap = None if abs(largest - scale * _ROWS[-1]) <= _TOLERANCE * abs(largest) else abs(largest)
    expected = scale * known
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    half = torch.finfo(seen[0]).eps > _TOLERANCE
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=1e-12) or (half and scale != 1):
        raise ValueError("they are not softcap(scale * logits) for any scale and softcap")
    return LogitTransform(softcap, 1.0 if abs(scale - 1) <= _TOLERANCE else scale)


def _forward(
    model: nn.Module, head: nn.Module, give_hidden: Callable[..., Any], give_logits: Callable[..., Any]
) -> Tensor:
    """The logits of `model.forward` where its backbone is `give_hidden` and its head `give_logits`."""
    names = [name for name, module in model.named_children() if module is head]
    backbone = getattr(model, "base_model_prefix", None)
    if not names:
        where = [name.rpartition(".")[0] for name, module in model.named_modules() if module is head]
        raise ValueError(f"its head belongs to its module {where[0]}" if where else "its head is none of its modules")
    if not isinstance(backbone, str) or backbone not in model._modules:
        raise ValueError("it does not say which of its modules is the backbone")
    stand_ins = {
        names[0]: _StandIn(head, give_logits),
        backbone: _StandIn(model.get_submodule(backbone), give_hidden),
    }
    forward: Any = vars(model).get("_old_forward") or vars(model).get("forward") or type(model).forward
    if "forward" in vars(model) and not isinstance(forward, MethodType):  # `_old_forward`: accelerate's, of device_map
        raise ValueError("its forward was replaced")
    ids = torch.zeros(1, len(_ROWS), dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            outputs = getattr(forward, "__func__", forward)(_StandIn(model, None, stand_ins), input_ids=ids)
    except Exception as error:
        raise ValueError(f"its forward does not run on stand-ins: {type(error).__name__}: {error}") from error
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError("its forward returns no logits")
    return logits


class _StandIn:
    """Has the attributes of `real`, except for `replaced`, and calls `call`. Methods of `real` see the stand-in."""

    def __init__(self, real: Any, call: Callable[..., Any] | None, replaced: dict[str, Any] | None = None) -> None:
        vars(self).update(replaced or {})
        self._real, self._call = real, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            raise TypeError("the model called itself")
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        own = isinstance(found, MethodType) and found.__self__ is self._real
        return MethodType(found.__func__, self) if own else found


class _Outputs:
    """What a backbone returns: its last hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, at: Any) -> Any:
        return self.last_hidden_state if at == 0 else ()
