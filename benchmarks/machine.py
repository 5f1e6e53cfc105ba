"""What the benchmark runs on: names and versions for the report, and the memory that is free now."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

PACKAGES = ("kdloss", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


def describe(device: str, threads: int) -> dict[str, str]:
    """Device, versions and date. Names of models only: no host name, no path."""
    facts = {"device": device_name(device), "cpu": _cpu_name(), "threads": str(threads)}
    if device == "cuda":
        facts["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
        facts["cuda"] = str(torch.version.cuda)
        facts["kernels"] = kernels()
    else:
        facts["memory"] = f"{_memory_line('MemTotal') / 2**30:.0f} GiB"
    facts["python"] = platform.python_version()
    facts.update({name: _version(name) for name in PACKAGES})
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return facts


def kernels() -> str:
    """Whether kdloss takes its kernels on this GPU, and why not: a figure without them is one of plain torch."""
    from kdloss._softmax.backend import takes_triton

    try:
        takes_triton("triton", logits=torch.empty(0, device="cuda", dtype=torch.bfloat16))
    except ValueError as reason:
        return f"none: {reason}"
    return "Triton"


def device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name(0))
    return f"{_cpu_name()} {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A folder's name: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def free_bytes(device: str) -> int:
    """Memory that a case may fill."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return min([_memory_line("MemAvailable"), *_cgroup_room()])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)| Processor$| CPU$", "", name)


def _memory_line(key: str) -> int:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_room() -> list[int]:
    """What a container's limit leaves, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        return [int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())]
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return []


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "kdloss":  # on the path only, not installed
        import kdloss

        return f"{kdloss.__version__} (from source)"
    return "absent"
