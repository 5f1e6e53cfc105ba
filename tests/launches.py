"""Counts what a call would launch on a GPU: `with Launches() as launches: ...; launches.total`.

Counted are the calls of torch's operators that return no view, forward and backward, also those inside the library's
own operators. Each is about one kernel, and two where the operator copies its input before it writes into it. No check
of values runs on meta tensors, as none runs on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They wait for the device: they read a value, or give a shape that depends on one.
SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
INDEXING = {"index", "index_put", "index_put_"}  # so do these, by a boolean tensor
COPY_FIRST = {"masked_fill", "masked_scatter", "index_add", "index_copy", "index_fill", "index_put", "scatter_reduce"}
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Launches(TorchDispatchMode):
    """Counts operators by name, and those that wait for the device."""

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
            with self:  # the function that the operator was made from
                return func.redispatch(_ON_CPU, *args, **kwargs)
        name = func._opname
        aliases = [x.alias_info for x in func._schema.returns]
        if not any(x is not None and not x.is_write for x in aliases):
            self.counts[name] += 2 if name in COPY_FIRST else 1
        if name in SYNCS or (name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.syncs[name] += 1
        return func(*args, **kwargs)
