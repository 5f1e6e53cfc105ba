"""Peak extra memory of one forward and backward: everything beyond the inputs, the gradients included.

On a GPU the allocator counts it. On a CPU it is the growth of the process's peak resident memory (`ru_maxrss`), in a
process of its own, since a peak never comes down by itself; Linux can put it back after a warm-up, so that what a first
call loads and compiles is not counted. Elsewhere the warm-up is left out and those are counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

from .contenders import Run


def peak_extra_bytes(run: Run, device: str) -> int:
    """Bytes, 0 or more."""
    return _gpu_peak(run) if device == "cuda" else _cpu_peak(run)


def _gpu_peak(run: Run) -> int:
    arguments, leaves = run.fresh_arguments()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _call(run, arguments, leaves)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def _cpu_peak(run: Run) -> int:
    arguments, leaves = run.fresh_arguments()
    if _reset_peak():
        _call(run, arguments, leaves)
    gc.collect()
    _return_free_memory()
    _reset_peak()
    before = _status("VmRSS") or _peak()
    _call(run, arguments, leaves)
    return max(0, _peak() - before)


def _call(run: Run, arguments: tuple[object, ...], leaves: tuple[torch.Tensor, ...]) -> None:
    outputs = run.forward(arguments)
    gradients = run.backward(outputs, leaves)
    del outputs, gradients


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int:
    """The same count that `ru_maxrss` gives, without the parent's own peak, which a child inherits until it execs."""
    found = _status("VmHWM")
    if found:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _return_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
