"""Whether plain torch or the Triton kernels compute: what `impl` stands for.

"torch"   never the kernels
"triton"  the kernels, or an error that says why not
"auto"    the kernels for CUDA tensors; where they cannot, plain torch, and a debug log that says why
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch
from torch import Tensor

from kdloss import _checks

CHOICES = ("auto", "torch", "triton")

_log = logging.getLogger("kdloss")
_installed = importlib.util.find_spec("triton") is not None
# Triton's own switch: kernels then run on CPU tensors, for tests. Read here, as Triton reads it when it is imported.
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def takes_triton(impl: str, **inputs: Tensor | None) -> bool:
    """Whether the kernels compute a function of `inputs`, named as the caller's arguments; None is no input.

    Ranks that share a vocabulary have to agree, as the kernels' maxima are in a unit of their own. They do where
    `impl`, dtypes, kinds of device and what is installed are the same on all of them.
    """
    _checks.one_of("impl", impl, CHOICES)
    given = {name: x for name, x in inputs.items() if x is not None}
    if impl == "torch" or (impl == "auto" and not any(x.device.type == "cuda" for x in given.values())):
        return False
    reason = _obstacle(given)
    if reason is None:
        return True
    if impl == "triton":
        raise ValueError(f'impl="triton" {reason}')
    if not torch.compiler.is_compiling():
        _log.debug("impl='auto' takes torch: the kernels' form %s", reason)
    return False


def _obstacle(inputs: dict[str, Tensor]) -> str | None:
    """What keeps the kernels from these inputs, as the rest of a sentence."""
    for name, x in inputs.items():
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, got {name} in {x.dtype}"
    for name, x in inputs.items():
        if x.device.type != "cuda" and not (_interpreted and x.device.type == "cpu"):
            return f"needs CUDA tensors, got {name} on {x.device}"
    if not _installed:
        return 'needs the package triton, but it is not installed: pip install "kdloss[triton]"'
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs, but this torch is a build for ROCm"
    if torch.cuda.is_available():
        for name, x in inputs.items():
            if x.device.type == "cuda" and (found := torch.cuda.get_device_capability(x.device)) < (8, 0):
                return f"needs compute capability 8.0, got {name} on a GPU of {found[0]}.{found[1]}"
    return None
