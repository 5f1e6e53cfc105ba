"""Time and memory of one forward and backward.

Contenders take turns, so their samples pair up round by round. On a CPU a sample holds wall, user and system seconds.
User seconds are compared: on a shared machine wall time also holds other people's work and the zeroing of fresh pages
by the kernel (system seconds). On a GPU a sample is the time between CUDA events, with the L2 cache overwritten before
it.

Extra memory is everything beyond the inputs, gradients included. On a GPU the allocator counts it. On a CPU it is the
growth of the peak resident size, in a forked process per contender, because a peak never falls.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .peers import Contender
from .problems import Inputs

MIN_SAMPLE_SECONDS = 0.05  # user time is counted in scheduler ticks, so shorter calls are repeated within a sample
MAX_REPEATS = 64
Sample = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A contender with its inputs, ready to be called."""

    contender: Contender
    inputs: Inputs

    def fresh_arguments(self) -> tuple[Any, ...]:
        """Arguments of one call."""
        first, *others = self.inputs.arguments
        return (first.detach().clone().requires_grad_() if self.contender.overwrites else first, *others)

    def forward(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return self.contender.function(*arguments)

    def backward(self, outputs: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        upstream = [g.to(out.dtype) for g, out in zip(self.inputs.incoming(), outputs, strict=True)]
        return torch.autograd.grad(outputs, [arguments[i] for i in self.inputs.leaves], upstream)

    def __call__(self) -> None:
        arguments = self.fresh_arguments()
        self.backward(self.forward(arguments), arguments)


# --- time ----------------------------------------------------------------------------------------------------------


def interleave(
    runs: dict[str, Run],
    device: str,
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Sample]]:
    """The samples of each run, one per round. Every round starts with another run, so nobody always comes first."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        announce(name)
        warm = one_sample(run, device, 1)
        repeats[name] = min(MAX_REPEATS, max(1, math.ceil(MIN_SAMPLE_SECONDS / max(1e-6, warm["total"]))))
    names, start = list(runs), time.monotonic()
    gc.disable()
    try:
        for i in range(max_rounds if names else 0):
            if i >= min_rounds and time.monotonic() - start > seconds:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                announce(name)
                samples[name].append(one_sample(runs[name], device, repeats[name]))
            gc.collect()
    finally:
        gc.enable()
    return samples


def one_sample(run: Run, device: str, repeats: int) -> Sample:
    """Seconds per call: the forward alone, the total, and the CPU's user and system time."""
    return _gpu_sample(run) if device == "cuda" else _cpu_sample(run, repeats)


def _cpu_sample(run: Run, repeats: int) -> Sample:
    forward = total = user = system = 0.0
    for _ in range(repeats):
        arguments = run.fresh_arguments()
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        outputs = run.forward(arguments)
        middle = time.perf_counter()
        gradients = run.backward(outputs, arguments)
        end = time.perf_counter()
        after = resource.getrusage(resource.RUSAGE_SELF)
        del outputs, gradients, arguments
        forward += middle - start
        total += end - start
        user += after.ru_utime - before.ru_utime
        system += after.ru_stime - before.ru_stime
    seconds = {"forward": forward, "total": total, "user": user, "system": system}
    return {key: round(x / repeats, 9) for key, x in seconds.items()}


def _gpu_sample(run: Run) -> Sample:
    arguments = run.fresh_arguments()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    flush_l2()
    start.record()
    outputs = run.forward(arguments)
    middle.record()
    gradients = run.backward(outputs, arguments)
    end.record()
    torch.cuda.synchronize()
    del outputs, gradients
    return {"forward": start.elapsed_time(middle) / 1e3, "total": start.elapsed_time(end) / 1e3}


_flush_buffer: list[Tensor] = []


def flush_l2() -> None:
    """Overwrites twice the L2 cache. It also gives the host a head start, so launches are not timed as gaps."""
    if not _flush_buffer:
        size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
        _flush_buffer.append(torch.empty(max(2 * size, 2**28), dtype=torch.int8, device="cuda"))
    _flush_buffer[0].zero_()


def keep_memory() -> None:
    """From now on glibc keeps freed memory, so samples hold arithmetic and not the zeroing of fresh pages."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping per block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim


# --- memory --------------------------------------------------------------------------------------------------------


def peak_extra_bytes(run: Run, device: str) -> int | None:
    """The run has been called before. None where it cannot be measured."""
    return _gpu_peak(run) if device == "cuda" else _in_fork(partial(_cpu_peak, run))


def _gpu_peak(run: Run) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    arguments = run.fresh_arguments()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.backward(run.forward(arguments), arguments)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def _cpu_peak(run: Run) -> int:
    """A first call loads what the fork has not touched yet; then Linux resets the peak."""
    run()
    arguments = run.fresh_arguments()
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run.backward(run.forward(arguments), arguments)
    return max(0, _status("VmHWM") - before)


def _in_fork(measure: Callable[[], int]) -> int | None:
    """The result of a function in a forked process; None if it died or `/proc` lacks what it reads."""
    _trim()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            os.write(writer, str(measure()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return int(found) if found else None


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    (kilobytes,) = re.findall(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(kilobytes) * 1024


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


# --- the machine's own limits --------------------------------------------------------------------------------------


def ceilings(device: str, *, quick: bool) -> dict[str, float]:
    """`copy` in bytes per second, read and written; `matmul <dtype>` in operations per second. The best of several."""
    gpu = device == "cuda"
    size, n, repeats = (2**31, 8192, 10) if gpu else (2**28, 1536, 10)
    if quick:
        size, n, repeats = size // 8, n // 4, 3
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * size / min(_seconds(partial(target.copy_, source), gpu, repeats))}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"matmul {str(dtype).removeprefix('torch.')}"] = (
            2 * n**3 / min(_seconds(partial(torch.mm, a, b), gpu, repeats))
        )
    return found


def _seconds(call: Callable[[], object], gpu: bool, repeats: int) -> Iterator[float]:
    call()
    for _ in range(repeats):
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush_l2()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            yield start.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            call()
            yield time.perf_counter() - began
