"""Runs cases in four fresh processes joined by gloo, started once: `python ranks.py RANK FOLDER MODULE...`.

A case is a function `case_*(ranks)` of a module, with the numbers of ranks that it wants in `sizes`; it runs on each
of these as a group of the first ranks, and asserts by itself. One that raises, or that takes longer than its time, ends
the whole run, with the stack of every rank in what the test reports.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 4
TESTS = Path(__file__).parents[1]


@dataclass
class Ranks:
    """The group that a case runs on, seen from one of its ranks."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same on every rank."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def integers(self, high: int, *shape: int, seed: int = 0) -> Tensor:
        return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))

    def all(self, x: Any) -> list[Any]:
        """`x` of every rank."""
        found = [None] * self.size
        dist.all_gather_object(found, x, group=self.group)
        return found

    def same_bits(self, *tensors: Tensor) -> None:
        for x in tensors:
            mine = x.detach().flatten().view(torch.uint8)
            assert all(torch.equal(mine, other) for other in self.all(mine))


def on(*sizes: int) -> Callable[[Callable[[Ranks], None]], Callable[[Ranks], None]]:
    """Says on how many ranks a case runs."""

    def mark(case: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
        case.sizes = sizes
        return case

    return mark


def cases(module: ModuleType) -> Iterator[tuple[str, int, Callable[[Ranks], None]]]:
    for name, case in list(vars(module).items()):  # a compiled case adds names to its module
        if name.startswith("case_"):
            for size in case.sizes:
                yield f"{name.removeprefix('case_')}-{size}", size, case


def run(folder: Path, modules: list[str], *, seconds: float = 240, case_seconds: float = 40) -> dict[str, str]:
    """What became of every case: "" where all its ranks went through, else what happened."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CASE_SECONDS": str(case_seconds),
        "PYTHONPATH": os.pathsep.join(
            [*map(str, (TESTS, TESTS.parent, TESTS.parent / "src")), os.environ.get("PYTHONPATH", "")]
        ),
    }
    files = [(folder / f"{rank}.out").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(rank), str(folder), *modules],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        for rank, file in enumerate(files)
    ]
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    for file in files:
        file.close()
    return _outcomes(folder, modules)


def _outcomes(folder: Path, modules: list[str]) -> dict[str, str]:
    reports = [folder / f"{rank}.jsonl" for rank in range(WORLD)]
    ended = [dict(json.loads(line) for line in r.read_text().splitlines()) if r.exists() else {} for r in reports]
    outcome: dict[str, str] = {}
    for module in modules:
        for name, size, _ in cases(importlib.import_module(module)):
            found = [ended[rank].get(name) for rank in range(size)]
            outcome[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
            if not outcome[name] and None in found:
                last = [(folder / f"{rank}.out").read_text()[-6000:] for rank in range(WORLD)]
                said = "\n".join(f"rank {rank} said:\n{text}" for rank, text in enumerate(last) if text)
                outcome[name] = f"did not end on ranks {[r for r, x in enumerate(found) if x is None]}\n{said}"
    return outcome


def _main(rank: int, folder: Path, modules: list[str]) -> None:
    torch.set_num_threads(1)
    # memory that is not filled holds NaN: nothing may be read before it is written
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    seconds = float(os.environ["CASE_SECONDS"])
    faulthandler.dump_traceback_later(60 + seconds, exit=True)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=seconds + 5))
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)} | {WORLD: dist.group.WORLD}
    with (folder / f"{rank}.jsonl").open("w") as report:
        for module in modules:
            for name, size, case in cases(importlib.import_module(module)):
                if rank >= size:
                    continue
                faulthandler.dump_traceback_later(seconds, exit=True)
                torch.manual_seed(0)
                start = time.monotonic()
                try:
                    case(Ranks(rank, size, groups[size]))
                except Exception:
                    report.write(json.dumps([name, traceback.format_exc()]) + "\n")
                    report.flush()
                    os._exit(1)  # the others fail at their next collective, at once
                report.write(json.dumps([name, ""]) + "\n")
                print(f"{time.monotonic() - start:6.2f} s  {name}", flush=True)
        faulthandler.cancel_dump_traceback_later()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
