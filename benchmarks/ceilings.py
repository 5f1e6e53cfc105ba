"""The machine's own limits, measured in the same run: copy bandwidth and matmul rate.

Bandwidth is that of `y.copy_(x)` on buffers that no cache holds, counted as one read and one write. The matmul rate is
a large square product's, 2n³ operations. The best of several is taken: a ceiling is what the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from .timing import flush_l2

DTYPES = (torch.bfloat16, torch.float32)


def measure(device: str, *, quick: bool) -> dict[str, float]:
    """`copy` in bytes a second, `matmul bfloat16` and `matmul float32` in operations a second."""
    gpu = device == "cuda"
    size = 2**31 if gpu else 2**28
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    repeats = 3 if quick else 10
    ceilings = {"copy": 2 * size / _best(partial(target.copy_, source), gpu, repeats)}
    del source, target
    n = 8192 if gpu else (512 if quick else 1536)
    for dtype in DTYPES:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _best(partial(torch.mm, a, b), gpu, repeats)
        ceilings[f"matmul {str(dtype).removeprefix('torch.')}"] = 2 * n**3 / seconds
    return ceilings


def _best(call: Callable[[], object], gpu: bool, repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush_l2()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return float(min(seconds))
