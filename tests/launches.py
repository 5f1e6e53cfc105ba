"""Counts what a call would launch on a GPU: `with Launches() as launches: ...; launches.total`.

Counted are the calls of torch's operators that return no view, forward and backward, also those inside the library's
own operators. Each launches about one kernel. On meta tensors no check of values runs, as on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# These wait for the device: they read a value, or give a shape that depends on one.
SYNCS = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
_EAGER = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Launches(TorchDispatchMode):
    """Counts operators by name, and the ones that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The number of launches."""
        return self.counts.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "kdloss":
            with self:  # the function that the operator was made from, which calls torch's operators
                return func.redispatch(_EAGER, *args, **kwargs)
        if func._opname in SYNCS:
            self.syncs[func._opname] += 1
        if not _is_view(func):
            self.counts[func._opname] += 1
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an input, and nothing is written."""
    aliases = [x.alias_info for x in func._schema.returns]
    return any(x is not None and not x.is_write for x in aliases)


def count(function: Callable[[], Tensor | None]) -> Launches:
    """What `function` and the backward of the scalar that it returns, if any, launch."""
    with Launches() as launches:
        loss = function()
        if loss is not None:
            loss.backward()
    return launches
