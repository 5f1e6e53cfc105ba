"""Times one forward and backward, and interleaves contenders so that their samples pair up.

On a CPU a sample holds wall, user and system seconds. User seconds are the ones to compare: on a shared machine wall
time also holds other people's work and the zeroing of fresh pages, which the kernel does (system seconds). On a GPU a
sample is what CUDA events saw, with the L2 cache overwritten before each, so that inputs come from memory.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .contenders import Run

MIN_SAMPLE_SECONDS = 0.05  # user time is counted in scheduler ticks: shorter calls are repeated within a sample
MAX_REPEATS = 64


@dataclass(frozen=True)
class Sample:
    """Seconds a call: the forward alone, forward and backward, and what of it the CPU spent where."""

    forward: float
    total: float
    user: float  # 0 on a GPU
    system: float


def one_sample(run: Run, device: str, repeats: int) -> Sample:
    """One sample of a contender: the mean over `repeats` calls on a CPU, one call on a GPU."""
    return _gpu_sample(run) if device == "cuda" else _cpu_sample(run, repeats)


def _cpu_sample(run: Run, repeats: int) -> Sample:
    forward = total = user = system = 0.0
    for _ in range(repeats):
        arguments, leaves = run.fresh_arguments()
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        outputs = run.forward(arguments)
        middle = time.perf_counter()
        gradients = run.backward(outputs, leaves)
        end = time.perf_counter()
        after = resource.getrusage(resource.RUSAGE_SELF)
        del outputs, gradients, arguments, leaves
        forward += middle - start
        total += end - start
        user += after.ru_utime - before.ru_utime
        system += after.ru_stime - before.ru_stime
    return Sample(forward / repeats, total / repeats, user / repeats, system / repeats)


def _gpu_sample(run: Run) -> Sample:
    arguments, leaves = run.fresh_arguments()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    flush_l2()
    start.record()
    outputs = run.forward(arguments)
    middle.record()
    gradients = run.backward(outputs, leaves)
    end.record()
    torch.cuda.synchronize()
    del outputs, gradients
    return Sample(start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3, 0.0, 0.0)


_flush_buffer: list[torch.Tensor] = []


def flush_l2() -> None:
    """Overwrites twice the L2 cache; also gives the host a head start, so that launches are not timed as gaps."""
    if not _flush_buffer:
        size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
        _flush_buffer.append(torch.empty(max(2 * size, 2**28), dtype=torch.int8, device="cuda"))
    _flush_buffer[0].zero_()


def interleave(
    runs: dict[str, Run],
    device: str,
    *,
    seconds: float,
    max_rounds: int,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, list[dict[str, float]]]:
    """Rounds in which every contender is sampled once, the first one rotating, until `seconds` are over.

    At least 3 rounds; each contender's sample number r is from round r.
    """
    order = list(runs)
    started = time.perf_counter()
    repeats, estimates = {}, {}
    for name in order:  # a warm-up, and how long one sample takes
        announce(name)
        estimate = one_sample(runs[name], device, 1).total
        repeats[name] = max(1, min(MAX_REPEATS, math.ceil(MIN_SAMPLE_SECONDS / max(estimate, 1e-6))))
        estimates[name] = estimate * (1 if device == "cuda" else repeats[name])
    left = seconds - (time.perf_counter() - started)
    rounds = max(3, min(max_rounds, int(left / max(sum(estimates.values()), 1e-9))))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            turn = index % len(order) if order else 0
            for name in order[turn:] + order[:turn]:
                announce(name)
                samples[name].append(asdict(one_sample(runs[name], device, repeats[name])))
    finally:
        gc.enable()
    return samples
