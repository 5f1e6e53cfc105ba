"""The code that an H200 would run, without one: the kernels that calls launch, and what a trip of their loops executes.

    with recording() as launches: ...      Triton's launches inside, one for each code; nothing is compiled or run
    codes(launches)                        compiled, and disassembled by one process: registers, spills, loops

Calls take tensors on the meta device. Triton specializes the arguments as it would on the device, so this is the code
that the GPU would run. TRITON_INTERPRET must not be set: interpreted kernels cannot be compiled.

A loop is counted along the shortest path of a trip that passes its loads and stores. Code that most trips jump over is
left out: the end of a row, a label in the block, the slow path of a division. So are loops inside it.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# A block of a loop is passed by every trip if it moves this share of what the largest one moves by its widest accesses.
MANDATORY = 0.25


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any  # triton.JITFunction
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    types: dict[str, str]  # of the arguments: "*bf16", "i32", "constexpr"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * int(self.options.get("num_warps", 4))

    def itemsize(self, argument: str) -> int:
        """Bytes of an element that an argument points to; 0 for None."""
        sizes = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*fp64": 8, "*i64": 8}
        return sizes[self.types[argument]] if self.arguments.get(argument) is not None else 0


class _Hopper:
    """The part of a driver that Triton needs before it launches anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorded(list[Launch]):
    """The launches, one for each code, and how many there were."""

    total = 0


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record launches in place of making them."""
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Hopper())
    found, seen = Recorded(), set()

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        binder = kernel.device_caches[0][-1]
        arguments, specialization, extra = binder(*given, **options)
        found.total += 1
        key = (kernel.cache_key, str(specialization), str(extra))
        if key not in seen:
            seen.add(key)
            types = {name: str(kind[0]) for name, kind in zip(arguments, specialization, strict=True)}
            places = grid(arguments) if callable(grid) else grid
            found.append(Launch(kernel, kernel.__name__, tuple(places), dict(arguments), types, dict(extra)))

    def run_first(tuner: Any, *given: Any, **options: Any) -> Any:
        """The first configuration of an autotuner: which is fastest only a GPU can tell."""
        return tuner.fn.run(*given, **options, **tuner.configs[0].all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", run_first):
        yield found


@dataclass(frozen=True)
class Loop:
    """What one thread executes in one trip, or in the whole kernel if there is no loop."""

    instructions: int
    special: int  # of these, exponentials, reciprocals, ...: a multiprocessor has an eighth as many units for them
    loads: Counter[int]  # bytes of an access to global memory: how many
    stores: Counter[int]
    steps: frozenset[int] = frozenset()  # constants that are added to integers

    @property
    def read(self) -> int:
        return sum(width * n for width, n in self.loads.items())

    @property
    def written(self) -> int:
        return sum(width * n for width, n in self.stores.items())

    def narrowest(self, read: float, written: float, stream: float) -> int:
        """Bytes of the narrowest access along the vocabulary, of which a trip reads and writes so many bytes.

        Accesses that move at most half of the smallest `stream` are a label's, or another value's of the row. So are
        all narrow ones if accesses of 16 bytes move everything.
        """
        found = set[int]()
        for accesses, expected in ((self.loads, read), (self.stores, written)):
            whole = 16 * accesses[16] >= expected
            found |= {n for n, times in accesses.items() if n == 16 or (not whole and 2 * n * times > stream)}
        return min(found, default=0)


@dataclass(frozen=True)
class Code:
    """A launch, compiled."""

    launch: Launch
    registers: int  # per thread
    spilled_bytes: int
    whole: Loop  # from the start to the end, without repetitions
    loops: list[Loop]  # in the order of the code

    def along(self, tile: int, lanes: int, read: float, written: float) -> list[Loop]:
        """The loops that handle a tile, or some: a thread reads and writes at least so many bytes in a trip.

        They step by elements, by bytes, or by the lanes of a tile. The kernel itself if there is none, because its loop
        is unrolled or each program has one tile.
        """
        steps = {n * times for n in (tile, 2 * tile, 4 * tile, lanes) for times in (1, 2, 3, 4, 8)}
        found = [loop for loop in self.loops if loop.steps & steps and loop.read >= read and loop.written >= written]
        return found or [self.whole]


def codes(launches: Sequence[Launch]) -> list[Code]:
    """Compile launches, and count their loops."""
    binaries = [_kernel(_compiled(launch)) for launch in launches]
    lines = _disassembled(b"".join(text for text, _ in binaries))
    out, start = [], 0
    for launch, (text, registers) in zip(launches, binaries, strict=True):
        mine = [line for line in lines if start <= line.address < start + len(text)]
        start += len(text)
        spilled = sum(_width(line.name) for line in mine if line.name.startswith(("STL", "LDL")))
        out.append(Code(launch, registers, spilled, *_loops(mine)))
    return out


def _compiled(launch: Launch) -> bytes:
    compiled = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    return compiled.asm["cubin"]  # type: ignore[no-any-return]


# --- the binary ----------------------------------------------------------------------------------------------------


def _kernel(cubin: bytes) -> tuple[bytes, int]:
    """(the instructions, registers per thread) of the kernel in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for section in sections:
        name = sections[names_at][4] + section[0]
        found[cubin[name : cubin.index(b"\0", name)].decode()] = cubin[section[4] : section[4] + section[5]]
    (text,) = (body for name, body in found.items() if name.startswith(".text."))
    # the entry EIATTR_REGCOUNT: format 4, attribute 0x2f, 8 bytes: a symbol, its registers
    at = found[".nv.info"].index(b"\x04\x2f\x08\x00")
    return text, struct.unpack_from("<II", found[".nv.info"], at + 4)[1]


class _Line(NamedTuple):
    """An instruction."""

    address: int
    predicate: str  # "" if it always executes
    name: str  # "LDG.E.128"
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump leads to, or the constant of an addition."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.operands


def _disassembled(text: bytes) -> list[_Line]:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        command = [str(tool), "--binary", "SM90", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", said)
    return [_Line(int(address, 16), *rest) for address, *rest in found]


def _width(name: str) -> int:
    """Bytes of a load or store."""
    found = re.search(r"\.(128|64|[US]16|[US]8)\b", name)
    return {"128": 16, "64": 8, "16": 2, "8": 1}[found[1].lstrip("US")] if found else 4


# --- loops ---------------------------------------------------------------------------------------------------------


class _Block:
    """Instructions that are executed one after the other."""

    def __init__(self, lines: list[_Line]) -> None:
        names = Counter(line.name for line in lines)
        self.after: list[int] = []  # numbers of blocks
        self.instructions = sum(n for name, n in names.items() if name != "NOP")
        self.special = sum(n for name, n in names.items() if name.startswith("MUFU"))
        self.loads, self.stores = Counter[int](), Counter[int]()
        for name, n in names.items():
            if name.startswith(("LDG", "LD.")):
                self.loads[_width(name)] += n
            elif name.startswith(("STG", "ST.")):
                self.stores[_width(name)] += n
        steps = [line.target for line in lines if line.name.startswith(("VIADD", "IADD3", "UIADD3"))]
        self.steps = {step for step in steps if step is not None}
        self.bytes = sum(width * n for width, n in (*self.loads.items(), *self.stores.items()))


def _loops(lines: list[_Line]) -> tuple[Loop, list[Loop]]:
    """(the whole code, its loops), without the loops that contain another with most of their accesses."""
    blocks = _blocks(lines)
    dominators = _dominators(blocks)
    back = [(n, to) for n in dominators for to in blocks[n].after if to in dominators[n]]
    forward = {n: [to for to in blocks[n].after if (n, to) not in back] for n in dominators}
    ends = {head: {n for n, to in back if to == head} for _, head in back}
    bodies = {head: _body(blocks, head, ends[head]) for head in ends}
    last = {n for n in forward if not forward[n]}
    whole = _path(blocks, forward, 0, last, set(forward), set().union(*bodies.values()))
    loops = []
    for head, body in sorted(bodies.items()):
        inner = [other for other in bodies.values() if other < body]
        if not any(2 * _bytes(blocks, other) > _bytes(blocks, body) for other in inner):
            loops.append(_path(blocks, forward, head, ends[head], body, set().union(*inner)))
    return whole, loops


def _bytes(blocks: list[_Block], body: set[int]) -> int:
    return sum(blocks[n].bytes for n in body)


def _blocks(lines: list[_Line]) -> list[_Block]:
    jumps = ("BRA", "BSYNC", "EXIT", "RET")
    barriers: dict[str, int | None] = {}
    targets: dict[int, int | None] = {}  # address of a jump: where to
    for line in lines:
        if line.name.startswith("BSSY"):
            barriers[line.operands.split(",")[0].strip()] = line.target
        elif line.name.startswith("BSYNC"):
            targets[line.address] = barriers.get(line.operands.split(",")[-1].strip())
        elif line.name.startswith("BRA"):
            targets[line.address] = line.target
    wanted = {target for target in targets.values() if target is not None}
    starts = (line.address in wanted or last.name.startswith(jumps) for last, line in itertools.pairwise(lines))
    cut = [0, *(i for i, starts_here in enumerate(starts, 1) if starts_here)]
    pieces = [lines[i:j] for i, j in zip(cut, [*cut[1:], len(lines)], strict=True)]
    places = {piece[0].address: n for n, piece in enumerate(pieces)}
    blocks = [_Block(piece) for piece in pieces]
    for n, (piece, block) in enumerate(zip(pieces, blocks, strict=True)):
        last = piece[-1]
        target = targets.get(last.address)
        if target in places:
            block.after.append(places[target])
        leaves = last.name.startswith(jumps) and not last.conditional
        if n + 1 < len(blocks) and (not leaves or (last.name.startswith("BSYNC") and target is None)):
            block.after.append(n + 1)
    return blocks


def _dominators(blocks: list[_Block]) -> dict[int, set[int]]:
    """Blocks that every way from the start to a block passes, for each block that can be reached."""
    before: dict[int, list[int]] = {}
    reachable, waiting = {0}, [0]
    while waiting:
        n = waiting.pop()
        for to in blocks[n].after:
            before.setdefault(to, []).append(n)
            if to not in reachable:
                reachable.add(to)
                waiting.append(to)
    out = {n: set(reachable) for n in reachable}
    out[0] = {0}
    changed = True
    while changed:
        changed = False
        for n in sorted(reachable - {0}):
            now = {n} | set.intersection(*(out[m] for m in before[n]))
            changed, out[n] = changed or now != out[n], now
    return out


def _body(blocks: list[_Block], head: int, ends: set[int]) -> set[int]:
    """The blocks of the loops from `head` back to it."""
    before: dict[int, list[int]] = {}
    for n, block in enumerate(blocks):
        for to in block.after:
            before.setdefault(to, []).append(n)
    body, waiting = {head, *ends}, [n for n in ends if n != head]
    while waiting:
        for m in before.get(waiting.pop(), ()):
            if m not in body:
                body.add(m)
                waiting.append(m)
    return body


def _path(
    blocks: list[_Block], forward: dict[int, list[int]], head: int, ends: set[int], body: set[int], inner: set[int]
) -> Loop:
    """The shortest way from `head` to one of `ends` that passes the loads and stores outside of `inner` loops.

    Only the widest loads and stores count: in a kernel that moves 16 bytes at a time, narrower ones may be a label's.
    """
    moved = dict.fromkeys(body - inner, 0)
    for accesses in ({n: blocks[n].loads for n in moved}, {n: blocks[n].stores for n in moved}):
        widest = max(itertools.chain(*accesses.values()), default=0)
        moved = {n: moved[n] + widest * accesses[n][widest] for n in moved}
    least = max(1, MANDATORY * max(moved.values(), default=0))
    best: dict[int, tuple[int, int, list[int]]] = {}  # block: (bytes passed, minus the instructions, blocks)

    order: list[int] = []
    seen: set[int] = set()

    def visit(n: int) -> None:
        seen.add(n)
        for to in forward[n]:
            if to in body and to not in seen:
                visit(to)
        order.append(n)

    visit(head)
    best[head] = (0, 0, [])
    for n in reversed(order):
        block = blocks[n]
        passed, minus, way = best[n]
        passed += moved[n] if moved.get(n, 0) >= least else 0
        here = best[n] = (passed, minus - block.instructions, [*way, n])
        for to in forward[n]:
            if to in body and (to not in best or here[:2] > best[to][:2]):
                best[to] = here
    _, _, way = max((best[n] for n in ends if n in best), key=lambda found: found[:2])
    loads, stores = Counter[int](), Counter[int]()
    for n in way:
        loads.update(blocks[n].loads)
        stores.update(blocks[n].stores)
    instructions, special = (sum(getattr(blocks[n], name) for n in way) for name in ("instructions", "special"))
    return Loop(instructions, special, loads, stores, frozenset().union(*(blocks[n].steps for n in way)))


def functions_launched(modules: Iterable[Any]) -> set[str]:
    """Names of the kernels that modules define: the functions of `triton.jit` that no other of them calls."""
    from triton.runtime.jit import JITFunction

    found = {x.__name__: x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    called = {name for x in found.values() for name in re.findall(r"\b(\w+)\(", x.src) if name != x.__name__}
    return set(found) - called
