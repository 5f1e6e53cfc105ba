"""Parameters that FSDP2 shards, gathered outside their module's forward with the gradient of every rank.

FSDP2 reduces the gradients of parameters that it gathered itself, for the forward. A parameter that is gathered by
`DTensor.full_tensor()` bypasses that: without `grad_placements`, each shard keeps the gradient of its own rank's rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def gathered(x: Any, divisor: float | None = None) -> Tensor:
    """A DTensor as a plain tensor on every rank.

    Backward, the gradients of the ranks are summed, divided by `divisor` and scattered to the shards. None: the number
    of ranks, by which FSDP2 divides.
    """
    from torch.distributed.tensor import Partial  # importing it takes a second unless something else already has

    mesh = x.device_mesh
    whole: Tensor = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / (mesh.size() if divisor is None else divisor))
    return whole


def gradient_divisor(root: nn.Module, parameter: Tensor) -> float | None:
    """What FSDP2 divides the summed gradients of a sharded parameter by.

    None where no FSDP2 module in `root` holds this DTensor as its shard: it may be of tensor parallelism, of FSDP2 and
    tensor parallelism, or a parameter that FSDP2 has gathered in part.
    """
    for group in _parameter_groups(root):
        for held in group.fsdp_params:
            if held.sharded_param is parameter:
                mesh = parameter.device_mesh
                ranks = held.mesh_info.mesh.size()
                factor: float | None = group.gradient_divide_factor
                return None if mesh.size() != ranks else ranks if factor is None else factor
    return None


def _parameter_groups(root: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP2 gathers and reduces together."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: then nothing is sharded
    for module in root.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            state: Any = module._get_fsdp_state()
            if hasattr(state, "_fsdp_param_groups"):
                yield from state._fsdp_param_groups
            elif state._fsdp_param_group is not None:  # an older torch: one group, or none
                yield state._fsdp_param_group
