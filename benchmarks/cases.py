"""The points that are measured, and the grids of them. Needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MIN_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One point: `path` says what is computed, the other fields how large it is."""

    path: str  # a key of `peers.PATHS`
    tokens: int  # T
    vocab: int  # V
    width: int = 0  # D of the student; 0 on paths from logits
    teacher_width: int = 0  # D of the teacher, for divergences from hidden states
    dtype: str = "bfloat16"
    entropy: bool = False  # log-probs and entropies, or log-probs alone
    trained: float = 1.0  # fraction of tokens that the mask trains
    kept: int = 0  # K log-probs per token that a top-k teacher gives

    @property
    def name(self) -> str:
        parts = [self.path + ("+entropy" if self.entropy else ""), f"T{self.tokens}", f"V{self.vocab}"]
        parts += [f"D{self.width}"] if self.width else []
        parts += [f"teacherD{self.teacher_width}"] if self.teacher_width else []
        parts += [f"K{self.kept}"] if self.kept else []
        parts += [f"trained{self.trained:.0%}"] if self.trained < 1 else []
        return "-".join([*parts, self.dtype])

    @property
    def logits_bytes(self) -> int:
        """T·V elements of the inputs' dtype: the unit of extra memory, also where no such tensor is made."""
        return self.tokens * self.vocab * ITEM_BYTES[self.dtype]

    def floor_seconds(self, ceilings: dict[str, float]) -> float:
        """A lower bound of the time on a machine with these ceilings; 0 where none is known.

        From logits: the forward reads them once, the backward reads and writes them once. From hidden states: three
        products of 2·T·V·D operations (logits, dH, dW) for the trained tokens, and one of the teacher's width.
        """
        if self.path == "tail":
            return 0.0
        if not self.width:
            return 3 * self.logits_bytes / ceilings["copy"]
        operations = 2 * self.trained * self.tokens * self.vocab * (3 * self.width + self.teacher_width)
        return operations / ceilings[f"matmul {self.dtype}"]


def fitted(case: Case, free_bytes: int) -> Case:
    """The case with T halved until plain torch fits into the free memory."""

    def need(case: Case) -> int:
        heads = case.vocab * (case.width + case.teacher_width) * ITEM_BYTES[case.dtype]
        plain = 10 if case.dtype != "float32" else 5  # float32 copies, log-probs and their gradients
        return plain * case.logits_bytes + 4 * heads + 2**28

    while need(case) > 0.8 * free_bytes and case.tokens // 2 >= MIN_TOKENS:
        case = replace(case, tokens=case.tokens // 2)
    return case


def distinct(cases: list[Case]) -> list[Case]:
    """The first of each name."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.name, case)
    return list(found.values())


def matching(cases: list[Case], pattern: str | None) -> list[Case]:
    """Cases whose name matches the regular expression somewhere.

    Raises:
        ValueError: it is not a regular expression, or no case matches it.
    """
    if pattern is None:
        return cases
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--only {pattern!r} is not a regular expression: {error}") from None
    found = [case for case in cases if expression.search(case.name)]
    if not found:
        names = "\n  ".join(case.name for case in cases)
        raise ValueError(f"--only {pattern!r} matches none of these cases:\n  {names}")
    return found


QWEN, ODD, LLAMA, SMALL, HEAD = 151936, 151669, 128256, 32000, 16384
KINDS = ("forward-kl", "reverse-kl", "jsd")

# One tiny point per path: does everything run, and agree?
QUICK = [
    Case("logits", 128, SMALL),
    Case("logits", 128, SMALL, dtype="float32", entropy=True),
    Case("hidden", 128, 4096, 128),
    Case("hidden", 128, 4096, 128, trained=0.3),
    Case("ce", 128, 4096, 128),
    Case("kdrl", 128, 4096, 128),
    Case("grpo", 128, 4096, 128),
    Case("reverse-kl", 64, 4096),
    Case("linear-jsd", 64, 4096, 128, 128),
    Case("topk-forward-kl", 64, 4096, kept=16),
    Case("linear-topk-forward-kl", 64, 4096, 128, kept=16),
    Case("tail", 128, 4096),
]

# The regimes that matter, at sizes that one core computes in about a second.
CORE_CPU = [
    Case("logits", 2048, SMALL, dtype="float32"),
    Case("logits", 1024, QWEN),
    Case("logits", 1024, ODD),
    Case("logits", 512, QWEN, entropy=True),
    Case("hidden", 1024, HEAD, 1024, dtype="float32"),
    *(Case("hidden", 1024, HEAD, 1024, trained=share) for share in (1.0, 0.3, 0.1)),
    Case("ce", 1024, HEAD, 1024),
    Case("kdrl", 1024, HEAD, 1024, dtype="float32"),
    Case("kdrl", 1024, HEAD, 1024),
    Case("grpo", 1024, HEAD, 1024),
    *(Case(kind, 1024, SMALL) for kind in KINDS),
    Case("linear-reverse-kl", 512, HEAD, 1024, 1024, dtype="float32"),
    *(Case(f"linear-{kind}", 512, HEAD, 1024, 1024) for kind in KINDS),
    Case("topk-forward-kl", 1024, SMALL, kept=64),
    Case("linear-topk-forward-kl", 1024, HEAD, 1024, dtype="float32", kept=64),
    Case("linear-topk-forward-kl", 1024, HEAD, 1024, kept=64),
    Case("tail", 4096, SMALL, dtype="float32"),
]

# Every path at the shape where it is hardest to be fast, within ten minutes on a data-centre GPU.
CORE_GPU = [
    Case("logits", 8192, QWEN),
    Case("logits", 8192, ODD),
    Case("logits", 8192, QWEN, entropy=True),
    Case("logits", 8192, SMALL, dtype="float32"),
    Case("hidden", 8192, QWEN, 1024),
    Case("hidden", 8192, QWEN, 4096),
    Case("hidden", 8192, QWEN, 1024, trained=0.3),
    Case("ce", 8192, LLAMA, 4096),
    Case("kdrl", 8192, QWEN, 1024),
    Case("grpo", 8192, QWEN, 1024),
    Case("reverse-kl", 8192, QWEN),
    Case("jsd", 8192, QWEN),
    Case("linear-jsd", 8192, QWEN, 1024, 4096),
    Case("topk-forward-kl", 8192, QWEN, kept=64),
    Case("linear-topk-forward-kl", 8192, QWEN, 4096, kept=64),
    Case("tail", 32768, QWEN),
]

FULL_GPU = distinct(
    [
        *CORE_GPU,
        *(Case("logits", T, QWEN) for T in (256, 2048, 32768)),  # launches, then caches, stop mattering
        *(Case("hidden", T, QWEN, 1024) for T in (256, 2048, 32768)),
        *(Case("kdrl", 8192, QWEN, D) for D in (2048, 4096)),
        *(Case("hidden", 8192, QWEN, 1024, trained=share) for share in (0.5, 0.1)),
        *(Case(f"linear-{kind}", 8192, QWEN, 2048, 4096) for kind in KINDS),
        *(Case("topk-forward-kl", 8192, QWEN, kept=K) for K in (20, 256)),
        Case("forward-kl", 8192, QWEN),
        Case("hidden", 8192, QWEN, 2048, entropy=True),
        Case("logits", 2048, SMALL, dtype="float32", entropy=True),
    ]
)


@dataclass(frozen=True)
class Grid:
    """A list of cases and the time they may take."""

    cases: list[Case]
    seconds: float = math.inf  # no case is begun after this
    sample_seconds: float = 10  # of samples per case
    min_rounds: int = 5
    max_rounds: int = 25
    quick: bool = False  # one process for all cases, without the contenders whose first call compiles


GRIDS = {
    ("quick", "cpu"): Grid(QUICK, 52, sample_seconds=0.4, min_rounds=3, max_rounds=5, quick=True),
    ("quick", "cuda"): Grid(QUICK, 52, sample_seconds=0.4, min_rounds=3, max_rounds=5, quick=True),
    ("core", "cpu"): Grid(CORE_CPU),
    ("core", "cuda"): Grid(CORE_GPU, 570, sample_seconds=8),
    ("full", "cpu"): Grid(CORE_CPU, sample_seconds=60),
    ("full", "cuda"): Grid(FULL_GPU, sample_seconds=30),
}
