"""Runs cases in four processes joined by gloo: `python ranks.py MODULE...` imports the modules and forks four times.

A case is a function `case_*(ranks)` of a module, with the group sizes that it needs in `sizes`. It runs once per size,
in a group of the first ranks, and contains its own assertions. A case that raises or hangs ends the four processes, and
its test reports the stack of every rank; four new processes go on with the remaining cases.

Cases have no limit of wall-clock time, which says nothing on a loaded machine. A hang is recognized by every thread of
every rank sleeping for seconds; a thread that has work but no core is runnable, not asleep. Ranks that loop forever are
stopped by a limit of processor time per case.

A thread of gloo's own crashed once in about fifty runs: a general protection fault in libc, in `pt_gloo_runloop`.
Python code cannot cause that, so a case in which a rank crashes runs once more, in new processes. A second crash fails
it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 4
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
POLL, INTERFACE = 0.1, "lo"  # seconds; the loopback interface
PRELOADED = ("peft", "torch._inductor.compile_fx")
TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "docs" / "examples"


@dataclass
class Ranks:
    """The group that a case runs on, as seen from one of its ranks."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values, the same on every rank."""
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
    """Sets the group sizes that a case runs on."""

    def mark(case: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
        case.sizes = sizes
        return case

    return mark


def cases(module: ModuleType) -> Iterator[tuple[str, int, Callable[[Ranks], None]]]:
    for name, case in list(vars(module).items()):  # a compiled case adds names to its module
        if name.startswith("case_"):
            for size in case.sizes:
                yield f"{name.removeprefix('case_')}-{size}", size, case


@dataclass
class Round:
    """Four processes, until all cases are done or one process cannot go on."""

    folder: Path
    left: list[str]
    sizes: dict[str, int]
    stopped: str = ""  # why the processes had to be stopped
    texts: dict[str, dict[int, str]] = field(default_factory=dict)  # by case and rank
    first: str | None = None  # the case that raised first

    def watch(self, leader: subprocess.Popen[str], *, idle: float, until: float) -> None:
        self.folder.mkdir()
        (self.folder / "left").write_text("\n".join(self.left))
        assert leader.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the leader could not import the cases
            print(self.folder, file=leader.stdin, flush=True)
        activity, ended = Activity(), self.folder / "ended"
        while not ended.exists() and leader.poll() is None and not self.stopped:
            time.sleep(POLL)
            if self.joined() and activity.asleep(self.pids()) * POLL >= idle:
                self.stopped = f"all ranks slept for {idle:g} s"
            elif time.monotonic() > until:
                self.stopped = "the time for all cases was over"
        if self.stopped:
            self.signal(signal.SIGUSR1)
            end = time.monotonic() + 10
            while time.monotonic() < end and not all("most recent call first" in text for text in self.said()):
                time.sleep(POLL)
        self.read()  # before the ranks are killed: the last to die would notice the others' death and raise
        if self.stopped:
            self.signal(signal.SIGKILL)
            while not ended.exists() and leader.poll() is None and time.monotonic() < end + 10:
                time.sleep(POLL)

    def crashed(self) -> bool:
        return (self.folder / "crashed").exists()

    def joined(self) -> bool:
        return all((self.folder / f"{rank}.jsonl").exists() for rank in range(WORLD))

    def pids(self) -> list[int]:
        file = self.folder / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def signal(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def said(self) -> list[str]:
        files = [self.folder / f"{rank}.out" for rank in range(WORLD)]
        return [file.read_text(errors="replace")[-6000:] if file.exists() else "" for file in files]

    def read(self) -> None:
        reports = [self.folder / f"{rank}.jsonl" for rank in range(WORLD)]
        raised: list[tuple[float, str]] = []
        for rank, report in enumerate(reports):
            for line in report.read_text().splitlines() if report.exists() else []:
                name, text, when = json.loads(line)
                self.texts.setdefault(name, {})[rank] = text
                raised += [(when, name)] if text else []
        self.first = min(raised)[1] if raised else None

    def outcomes(self) -> dict[str, str]:
        """The outcomes of the cases that passed on all ranks, and of the case that stopped the round."""
        found = {n: "" for n in self.left if list(self.texts.get(n, {}).values()) == [""] * self.sizes[n]}
        rest = [name for name in self.left if name not in found]
        # Cases that raised later did so because a rank had left; they run again. A rank that crashed wrote nothing, and
        # another rank may have raised in a later case.
        first = None if self.crashed() else self.first
        for name in [first or rest[0]] if rest else []:
            texts = self.texts.get(name, {})
            missing = [rank for rank in range(self.sizes[name]) if rank not in texts]
            lines = [f"did not end on ranks {missing}: {self.stopped or 'they left'}"] if missing else []
            lines += [f"rank {rank}: {text}" for rank, text in sorted(texts.items()) if text]
            lines += [f"rank {rank} said:\n{text}" for rank, text in enumerate(self.said()) if text and missing]
            found[name] = "\n".join(lines)
        if rest and not self.joined():  # the next round would fail as well
            said = (self.folder.parent / "leader.out").read_text(errors="replace")[-6000:]
            found |= dict.fromkeys(rest, f"the ranks did not start\n{said}\n{found[rest[0]]}")
        return found


class Activity:
    """Tells whether processes are working, from the kernel's states of their threads."""

    def __init__(self) -> None:
        self.polls, self.seconds = 0, 0.0

    def asleep(self, pids: list[int]) -> int:
        """The number of polls during which no thread was running, runnable, stopped or waiting for a disk."""
        threads = [stat for pid in pids for stat in Path("/proc", str(pid), "task").glob("*/stat")]
        states, seconds = [], 0.0
        for stat in threads:
            with contextlib.suppress(OSError):  # a thread has just ended
                fields = stat.read_text().rpartition(")")[2].split()
                states.append(fields[0])
                seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if not states or seconds > self.seconds + 0.1:  # without /proc, only the time for all cases ends a hang
            self.polls, self.seconds = 0, seconds
        else:
            self.polls = self.polls + 1 if set(states) <= {"S", "Z", "X", "I"} else max(0, self.polls - 1)
        return self.polls


def run(
    folder: Path, modules: list[str], *, seconds: float = 900, idle: float = 5, case_processor_seconds: float = 150
) -> dict[str, str]:
    """The outcome of every case: "" if all its ranks passed, else what happened."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compiling processes, which would start before the ranks
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "CASE_PROCESSOR_SECONDS": str(case_processor_seconds),
        "PYTHONPATH": os.pathsep.join(
            [*map(str, (TESTS, TESTS.parent, TESTS.parent / "src", EXAMPLES)), os.environ.get("PYTHONPATH", "")]
        ),
    }
    sizes = {name: size for module in modules for name, size, _ in cases(importlib.import_module(module))}
    outcome: dict[str, str] = {}
    crashed: set[str] = set()
    until = time.monotonic() + seconds
    with (folder / "leader.out").open("w") as file:
        leader = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        for number in itertools.count():
            left = [name for name in sizes if name not in outcome]
            if not left or time.monotonic() >= until:
                break
            one = Round(folder / str(number), left, sizes)
            one.watch(leader, idle=idle, until=until)
            found = one.outcomes()
            if one.crashed():
                again = {name for name, text in found.items() if text} - crashed
                crashed |= again
                found = {name: text for name, text in found.items() if name not in again}
            outcome |= found
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.communicate()
    return {name: outcome.get(name, "not run: the time for all cases was over") for name in sizes}


def _main(modules: list[str]) -> None:
    found = [(name, size, case) for module in modules for name, size, case in cases(importlib.import_module(module))]
    torch.set_num_threads(1)
    # several cases import these on first use: imported here, they are shared by the ranks and by every round
    for name in PRELOADED if len(modules) > 1 else ():
        importlib.import_module(name)
    # uninitialized memory holds NaN: nothing may be read before it is written
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for line in sys.stdin:
        folder = Path(line.strip())
        left = (folder / "left").read_text().splitlines()
        children = [_forked(rank, folder, [case for case in found if case[0] in left]) for rank in range(WORLD)]
        (folder / "pids").write_text(" ".join(map(str, children)))
        for pid in children:
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES:
                (folder / "crashed").touch()
        (folder / "ended").touch()


def _forked(rank: int, folder: Path, found: list[tuple[str, int, Callable[[Ranks], None]]]) -> int:
    from opd.ranks import leave  # not at the top: pytest's process imports this file without docs/examples on its path

    pid = os.fork()
    if pid == 0:
        output = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        leave(lambda: _rank(rank, folder, found))
    return pid


def _rank(rank: int, folder: Path, found: list[tuple[str, int, Callable[[Ranks], None]]]) -> None:
    faulthandler.register(signal.SIGUSR1)
    faulthandler.register(signal.SIGPROF, chain=True)  # chained, so the signal still ends the process
    seconds = float(os.environ["CASE_PROCESSOR_SECONDS"])
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=15))
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)} | {WORLD: dist.group.WORLD}
    with (folder / f"{rank}.jsonl").open("w") as report:
        for name, size, case in found:
            if rank >= size:
                continue
            torch.manual_seed(0)
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                case(Ranks(rank, size, groups[size]))
            except Exception:
                report.write(json.dumps([name, traceback.format_exc(), time.monotonic()]) + "\n")
                report.flush()
                os._exit(1)  # the others fail at once, at their next collective
            report.write(json.dumps([name, "", time.monotonic()]) + "\n")
            report.flush()
            print(f"{time.process_time() - start:6.2f} s of its processor: {name}", flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
    dist.barrier()


if __name__ == "__main__":
    _main(sys.argv[1:])
