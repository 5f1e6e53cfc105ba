"""The points that are measured: grids, and their fit to the device. Needs no torch.

A grid moves one axis at a time from a centre, V = 151936 (Qwen), because a full product would measure the same laws
over and over: time is linear in V and D, and in T once the device is full.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MIN_TOKENS = 64
FRACTIONS = (1.0, 0.5, 0.3, 0.1)  # of tokens trained
TAIL_TOKENS = 32768


@dataclass(frozen=True)
class Case:
    """One point. `path` says what is computed, the rest how large it is."""

    path: str  # "logits" | "hidden" | "fractions" | "fused" | "ce" | "tail", or a divergence
    tokens: int  # T; of the gather, for "tail"
    vocab: int  # V
    width: int = 0  # D, of the student; 0 on paths from logits
    teacher_width: int = 0  # D of the teacher, for divergences
    dtype: str = "bfloat16"
    entropy: bool = False  # log-probs and entropy, or log-probs
    compiled: bool = True  # also under torch.compile
    kept: int = 0  # K, of a teacher that gives so many log-probs a token

    @property
    def name(self) -> str:
        parts = [self.path + ("+entropy" if self.entropy else ""), f"T{self.tokens}", f"V{self.vocab}"]
        parts += [f"D{self.width}"] if self.width else []
        parts += [f"teacherD{self.teacher_width}"] if self.teacher_width else []
        parts += [f"K{self.kept}"] if self.kept else []
        return "-".join([*parts, self.dtype])

    @property
    def logits_bytes(self) -> int:
        """The unit of extra memory: T·V elements of the inputs' dtype, also where no such tensor is made."""
        return self.tokens * self.vocab * ITEM_BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        rows = self.tokens + self.vocab
        heads = rows * (self.width + self.teacher_width) * ITEM_BYTES[self.dtype]
        return heads if self.width else self.logits_bytes

    @property
    def least_bytes(self) -> int:
        """What the case needs at the very least: inputs, their gradients, and a float32 gradient of the head."""
        return 2 * self.input_bytes + 4 * self.vocab * self.width + 2**28

    def floor_seconds(self, ceilings: dict[str, float]) -> float:
        """No implementation can be faster on a machine with these ceilings.

        From logits: forward reads them once, backward reads and writes them once. From hidden states: three products
        of 2·T·V·D operations (logits, dH, dW); recomputing the logits in the backward makes it four, so that path ends
        at 75 %. The teacher of a divergence adds one of its own width.
        """
        if not self.width:
            return 3 * self.logits_bytes / ceilings["copy"]
        operations = 2 * self.tokens * self.vocab * (3 * self.width + self.teacher_width)
        return operations / ceilings[f"matmul {self.dtype}"]


def fitted(case: Case, *, free_bytes: int, ceilings: dict[str, float], gpu: bool, call_seconds: float) -> Case:
    """The case with T halved until it fits the free memory, and a naive call is expected to end in `call_seconds`."""
    while case.tokens // 2 >= MIN_TOKENS:
        seconds = 8 * case.floor_seconds(ceilings) if gpu or not case.width else 2 * case.floor_seconds(ceilings)
        if not gpu:
            seconds += 2e-9 * case.tokens * case.vocab  # two exponentials an element
        if case.least_bytes <= 0.8 * free_bytes and seconds <= call_seconds:
            break
        case = replace(case, tokens=case.tokens // 2)
    return case


def distinct(cases: list[Case]) -> list[Case]:
    """The first of each name."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.name, case)
    return list(found.values())


def matching(cases: list[Case], pattern: str | None) -> list[Case]:
    """Cases whose name holds the regular expression.

    Raises:
        ValueError: it is no regular expression, or no case has it.
    """
    if pattern is None:
        return cases
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--only {pattern!r} is no regular expression: {error}") from None
    found = [case for case in cases if expression.search(case.name)]
    if not found:
        names = "\n  ".join(case.name for case in cases)
        raise ValueError(f"--only {pattern!r} matches none of these cases:\n  {names}")
    return found


QWEN, LLAMA, SMALL = 151936, 128256, 32000

# A minute on two cores: one point a path, and no compilation, which alone can take half of it.
QUICK = [
    Case("logits", 256, QWEN, compiled=False),
    Case("logits", 512, SMALL, dtype="float32", compiled=False),
    Case("tail", 256, QWEN, compiled=False),
    Case("hidden", 256, SMALL, 256, compiled=False),
    Case("fractions", 256, SMALL, 256, compiled=False),
    Case("fused", 256, SMALL, 256, compiled=False),
]

# Ten minutes on a GPU: every bar once, each path at the shape where it is hardest to be good.
CORE = [
    Case("logits", 8192, QWEN),
    Case("logits", 8192, SMALL, dtype="float32"),
    Case("fractions", 8192, QWEN, 1024, compiled=False),
    Case("fused", 8192, QWEN, 1024),
    Case("tail", TAIL_TOKENS, QWEN),
    Case("hidden", 8192, QWEN, 4096),
    Case("hidden", 8192, QWEN, 1024),
    Case("logits", 8192, QWEN, entropy=True),
    Case("jsd", 8192, QWEN, 1024, 4096, compiled=False),
    Case("ce", 8192, LLAMA, 4096, compiled=False),
    Case("logits", 8192, LLAMA, compiled=False),
    Case("hidden", 8192, SMALL, 2048, compiled=False),
]

# Half an hour on two cores: the same bars at shapes that say something there. From hidden states a small vocabulary
# and many tokens; with few tokens the head alone is what is read and written, whatever is trained.
CORE_CPU = [
    Case("logits", 2048, QWEN),
    Case("logits", 4096, SMALL, dtype="float32"),
    Case("tail", TAIL_TOKENS, SMALL, dtype="float32"),
    Case("fractions", 4096, SMALL, 512, compiled=False),
    Case("fused", 4096, SMALL, 512, compiled=False),
    Case("hidden", 2048, SMALL, 1024, compiled=False),
    Case("hidden", 2048, SMALL, 1024, dtype="float32", compiled=False),
    Case("logits", 512, QWEN, entropy=True),
    Case("logits", 1024, SMALL, dtype="float32", entropy=True),
    Case("ce", 2048, SMALL, 512, compiled=False),
    Case("jsd", 1024, SMALL, 512, 1024, compiled=False),
    Case("forward-kl", 1024, SMALL, 512, 1024, compiled=False),
]

FULL = distinct(
    [
        *CORE,
        # T, at the largest and the smallest vocabulary: where launches, then caches, stop mattering
        *(Case("logits", T, QWEN) for T in (256, 2048, 32768)),
        *(Case("logits", T, SMALL, dtype="float32") for T in (256, 2048, 32768)),
        *(Case("hidden", T, QWEN, 1024) for T in (256, 2048, 32768)),
        # D
        Case("hidden", 8192, QWEN, 2048),
        Case("fused", 8192, QWEN, 2048),
        Case("fused", 8192, QWEN, 4096),
        Case("fractions", 8192, QWEN, 4096, compiled=False),
        Case("ce", 8192, QWEN, 1024, compiled=False),
        Case("jsd", 8192, QWEN, 2048, 4096, compiled=False),
        Case("forward-kl", 8192, QWEN, 1024, 4096, compiled=False),
        Case("reverse-kl", 8192, QWEN, 1024, 4096, compiled=False),
        # K: what a server gives, and where walking along the ids costs as much as the logits
        *(Case("topk-forward-kl", 8192, QWEN, kept=K, compiled=False) for K in (20, 64, 256)),
        # the other dtype, the entropy, the other vocabulary
        Case("hidden", 2048, SMALL, 1024, dtype="float32"),
        Case("hidden", 8192, QWEN, 2048, entropy=True, compiled=False),
        Case("logits", 2048, SMALL, dtype="float32", entropy=True),
        Case("hidden", 8192, LLAMA, 4096, compiled=False),
    ]
)


@dataclass(frozen=True)
class Grid:
    """A list of cases and the time they may take."""

    cases: list[Case]
    seconds: float  # the whole run ends before this
    sample_seconds: float  # of samples a case
    call_seconds: float  # of a naive call, see `fitted`; on a CPU
    max_rounds: int
    peers_memory: bool  # memory of every contender, or of ours and naive only


GRIDS = {
    "quick": Grid(QUICK, 52, 1.0, 0.4, 7, peers_memory=False),
    "core": Grid(CORE, 570, 8, 1.0, 25, peers_memory=True),
    "full": Grid(FULL, math.inf, 30, 4.0, 41, peers_memory=True),
}
# where a CPU measures something else
CPU_GRIDS = {
    "core": Grid(CORE_CPU, 1700, 8, 16, 25, peers_memory=True),
    "full": Grid(distinct([*CORE_CPU, *FULL]), math.inf, 30, 16, 41, peers_memory=True),
}


def grid_of(name: str, device: str) -> Grid:
    return CPU_GRIDS[name] if device == "cpu" and name in CPU_GRIDS else GRIDS[name]
