"""The plan: tasks, methods, learning rates, seeds and comparisons, fixed before the first confirming run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)  # the same grid for every method of every task


@dataclass(frozen=True)
class Writer:
    """Who writes the answers that a model is pretrained on: see `task.writer`."""

    slips: float
    wrong: int = 0
    trust: float = 0.0
    steps: int = 500
    rate: float = 1e-2
    batch: int = 128


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    teacher: Writer
    student: Writer
    updates: int
    methods: tuple[str, ...]
    shortest: int = 5
    longest: int = 7
    prompts: int = 16
    samples: int = 4  # answers to each prompt
    evaluations: int = 20
    curve_questions: int = 250
    questions: int = 1000  # at the end


@dataclass(frozen=True)
class Seeds:
    """Tables, each with a teacher of its own, and the students that learn each of them."""

    tables: tuple[int, ...]
    students: tuple[int, ...]


EXPLORING = Seeds((900, 901), (90, 91))
CHOOSING = Seeds((200,), (20, 21))
CONFIRMING = Seeds((301, 302, 303), (1, 2, 3, 4, 5))

KNOWS_NOTHING = Writer(slips=1.0, steps=100, rate=5e-3)  # but for the form of an answer

TASKS = {
    task.name: task
    for task in (
        Task("A", "Knowledge gap", Writer(slips=0.02), KNOWS_NOTHING, 200, ()),
        Task("B", "Imperfect teacher, rare reward", Writer(slips=0.02, wrong=6, trust=0.7), KNOWS_NOTHING, 500, ()),
        Task(
            "C",
            "Stale rollouts",
            Writer(slips=0.005),
            Writer(slips=0.15, steps=300),
            150,
            (),
            shortest=20,
            longest=24,
            prompts=4,
        ),
        Task("D", "Weights", Writer(slips=0.02), Writer(slips=0.35, steps=300), 150, ()),
    )
}


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    rate: float
    table: int
    student: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/{self.rate:g}/{self.table}/{self.student}"
