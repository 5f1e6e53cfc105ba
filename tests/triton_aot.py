"""Compiles every kernel that some calls launch, ahead of time for sm_90, and reports what ptxas says. Needs no GPU.

    python tests/triton_aot.py _triton.test_logits:aot_table

runs the named function, which calls launchers with tensors on the meta device, and prints a line of JSON for each
launch: the kernel, its grid, the constants it was compiled for, registers and spills. It ends with an error if a bound
is exceeded. Triton specializes the arguments as it would on the device, so this is the code that a GPU would run.
`compiled` does the same in a new process, since a process in which kernels are interpreted cannot compile them.

In a test module, `aot_calls` makes the launches that come nearest to the bounds, for every run of the tests.
`aot_table` makes all combinations of the options that decide a kernel's code, which takes minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Compiled(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: list[int]
    warps: int
    constants: dict[str, Any]  # parameters that are part of the code
    registers: int  # per thread
    spilled_bytes: int
    shared_bytes: int
    code: str  # a hash: launches with the same hash are compiled once


def assert_within_bounds(launches: Iterable[Compiled]) -> None:
    """No spills, at most 128 registers, and legal grids: all axes but the first end at 65535."""
    for launch in launches:
        assert launch.spilled_bytes == 0, launch
        assert launch.registers <= 128, launch
        assert launch.grid[0] < 2**31, launch
        assert all(n < 2**16 for n in launch.grid[1:]), launch


def compiled(calls: str) -> list[Compiled]:
    """The launches of `module:function` in this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, calls]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


class _Hopper:
    """The part of a driver that Triton needs before it launches anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(ptx: str) -> dict[str, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder) / "kernel.o")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills, said
    assert registers, said
    return {"registers": int(registers[1]), "spilled_bytes": int(spills[1]) + int(spills[2])}


def main(calls: str) -> None:
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Hopper())
    seen: dict[str, dict[str, int]] = {}
    launches: list[Compiled] = []

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **keywords: Any) -> None:
            found = kernel.warmup(*arguments, grid=grid, **keywords)
            constants = {kernel.arg_names[path[0]]: value for path, value in found.src.constants.items()}
            if found.hash not in seen:
                seen[found.hash] = _resources(found.asm["ptx"])
            out = Compiled(
                kernel.__name__,
                list(grid),
                found.metadata.num_warps,
                constants,
                shared_bytes=found.metadata.shared,
                code=found.hash,
                **seen[found.hash],
            )
            print(json.dumps(out._asdict()), flush=True)
            launches.append(out)

        return compile_only

    JITFunction.__getitem__ = launch
    module, function = calls.split(":")
    getattr(importlib.import_module(module), function)()
    if function == "aot_table":
        assert_within_bounds(launches)
        most = max(launches, key=lambda launch: launch.registers)
        print(f"{len(launches)} launches, {len(seen)} codes, {most.registers} registers at most", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
