"""`python -m benchmarks.learning.discount`: where `kd_discount=1` teaches empty answers. Four minutes of one core.

A student learns by full reverse KL for some updates, then by the sampled form with discount 1. A row per start: what an
answer costs there, log q - log p summed over it, beside what the teacher charges for an empty one, -log p(end).
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.report import table

from . import methods
from .model import Transformer
from .plan import EXPLORING, TASKS, Run
from .task import END
from .train import Evaluation, Optimizer, Sampler, World, batch_of, students

RATE, UPDATES, BATCHES = 3e-3, 150, 8
STARTS = {"A": (0, 10, 20, 40, 60, 100), "C": (0, 10)}
HEAD = ("task, table", "updates before", "an answer costs", "an empty one", "accuracy", "length")


@torch.no_grad()
def costs(student: Transformer, sampler: Sampler) -> tuple[float, float]:
    """(of the student's answers, of an empty one) in nats, means over some batches."""
    answers, empty = [], []
    for _ in range(BATCHES):
        batch = batch_of(student, sampler(student), sampler.world)
        gap = torch.where(batch.loss_mask, batch.logp - batch.teacher_logp, 0)
        answers.append(gap.sum().item() / (len(batch.cu_seqlens) - 1))
        empty.append(-batch.teacher_logits.log_softmax(-1)[batch.cu_seqlens[:-1], END].mean().item())
    return statistics.fmean(answers), statistics.fmean(empty)


def learn_with_discount(student: Transformer, world: World, seed: int) -> None:
    sampler, optimizer = Sampler(world, seed), Optimizer(student, RATE)
    for step in range(UPDATES):
        optimizer.descend(methods.sampled(batch_of(student, sampler(student), world, step), discount=1.0))


def rows(name: str, folder: Path) -> list[list[str]]:
    found = []
    for number, seed in zip(EXPLORING.tables, EXPLORING.students, strict=True):
        world = World(TASKS[name], number, folder, "cpu")
        evaluation = Evaluation(world, seed)
        for updates, passing in enumerate(students(Run(name, "full-reverse", RATE, number, seed), world)):
            if updates in STARTS[name]:
                student = copy.deepcopy(passing)
                answer, empty = costs(student, Sampler(world, seed))
                before = evaluation.accuracy(student)
                learn_with_discount(student, world, seed)
                after = evaluation(student)
                accuracy = f"{before:.2f} -> {after['accuracy']:.2f}"
                cells = (f"{name}, {number}", str(updates), f"{answer:.1f}", f"{empty:.1f}", accuracy)
                found.append([*cells, f"{after['length']:.1f}"])
            if updates == max(STARTS[name]):
                break
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        print(table(HEAD, [row for name in STARTS for row in rows(name, Path(folder))]))
