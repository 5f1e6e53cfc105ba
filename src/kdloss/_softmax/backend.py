"""What `impl` selects: plain torch or the Triton kernels.

"torch"   never the kernels
"triton"  the kernels, or an error with the reason why not
"auto"    the kernels for CUDA tensors; if they cannot run, plain torch and a debug log with the reason
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from kdloss import _checks

Impl = Literal["auto", "torch", "triton"]
TorchImpl = Literal["auto", "torch"]  # of a function that has no kernel
_IMPLS, _TORCH_IMPLS = get_args(Impl), get_args(TorchImpl)  # here, because torch 2.6 compiles no get_args

_log = logging.getLogger("kdloss")
_OLDEST = (3, 6)  # with triton 3.2, which torch 2.6 brings, tests of the kernels fail
_installed = importlib.util.find_spec("triton") is not None


def _version_of_triton() -> tuple[int, int]:
    """Major and minor version of the package, under each name that it comes by."""
    for package in ("triton", "triton-windows", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor, *_ = importlib.metadata.version(package).split(".")
            return int(major), int(minor)
    return _OLDEST  # a build without metadata


_version = _version_of_triton()
# Triton's switch for its interpreter, which runs kernels on CPU tensors, for tests. Read on import, as Triton does.
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def takes_triton(impl: Impl, **inputs: Tensor | None) -> bool:
    """Whether the Triton kernels compute a function of `inputs`, keyed by argument name; None is skipped.

    Ranks that share a vocabulary must agree, because the kernels keep row maxima in a unit of their own. They agree if
    `impl`, dtypes, device types and installed packages are the same on all of them.
    """
    _checks.one_of("impl", impl, _IMPLS)
    given = {name: x for name, x in inputs.items() if x is not None}
    if impl == "torch" or (impl == "auto" and not any(x.device.type == "cuda" for x in given.values())):
        return False
    reason = _obstacle(given)
    if reason is None:
        return True
    if impl == "triton":
        raise ValueError(f'impl="triton" {reason}')
    if not torch.compiler.is_compiling():
        _log.debug("impl='auto' runs torch: the Triton form %s", reason)
    return False


def torch_form(impl: TorchImpl) -> Impl:
    """The `impl` of a function that has no kernel: torch's operations everywhere."""
    _checks.one_of("impl", impl, _TORCH_IMPLS)
    return "torch"


def _obstacle(inputs: dict[str, Tensor]) -> str | None:
    """Why the kernels cannot take these inputs, as the rest of a sentence; None if they can."""
    for name, x in inputs.items():
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, got {name} in {x.dtype}"
    for name, x in inputs.items():
        if x.device.type != "cuda" and not (_interpreted and x.device.type == "cpu"):
            return f"needs CUDA tensors, got {name} on {x.device}"
    if not _installed:
        return 'needs the package triton, but it is not installed: pip install "triton>=3.6"'
    if _version < _OLDEST:
        oldest, came = (f"{major}.{minor}" for major, minor in (_OLDEST, _version))
        return f"needs triton {oldest}, but {came} is installed; torch 2.10 and newer bring it"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs, but this torch is a build for ROCm"
    if torch.cuda.is_available():
        for name, x in inputs.items():
            if x.device.type == "cuda" and (found := torch.cuda.get_device_capability(x.device)) < (8, 0):
                return f"needs compute capability 8.0, got {name} on a GPU of {found[0]}.{found[1]}"
    return None
