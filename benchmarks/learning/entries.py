"""`python -m benchmarks.learning.entries`: which entries of the table task B's students lose. Ten minutes of one core.

The teacher of B takes six entries for others, seven times in ten. A row per student and number of updates: the
accuracy, and the probability that the student gives the right digit of each of these entries. Runs are those of the
confirming seeds, three times as long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.report import table

from .model import Transformer
from .plan import CONFIRMING, TASKS, Run
from .report import LABELS
from .task import SYMBOLS, labels_of, prompts
from .train import Evaluation, World, students

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning" / "learning.json"
METHODS = ("kdrl-.3", "sampled", "forward-hopeless-and-grpo")
SHOWN, STUDENTS = (400, 1200), 2
TASK = replace(TASKS["B"], updates=SHOWN[-1])
DISPUTED = 0.6  # a teacher gives the right digit of a disputed entry about .3, of any other about .98


@torch.no_grad()
def probabilities(model: Transformer, world: World, evaluation: Evaluation) -> Tensor:
    """(36,) mean probability of the right digit, by entry: 6 * the digit before + the digit of the message."""
    right = evaluation.right
    tokens = torch.cat([prompts(evaluation.messages), right], 1)
    labels = labels_of(right)[:, : world.messages.longest]
    logits = model.answer_logits(tokens, world.prompt_width)[:, : world.messages.longest]
    before = torch.cat([torch.zeros_like(right[:, :1]), right], 1)[:, : world.messages.longest]
    is_digit = (labels >= 0) & (labels < SYMBOLS)
    found = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[is_digit]
    entries = one_hot((SYMBOLS * before + evaluation.messages)[is_digit], SYMBOLS**2).to(found.dtype)
    return found @ entries / entries.sum(0)


def rows(folder: Path) -> Iterator[list[str]]:
    rates = json.loads(RESULTS.read_text(encoding="utf-8"))["chosen"]["B"]
    for method in METHODS:
        for number in CONFIRMING.tables:
            world = World(TASK, number, folder, "cpu")
            for seed in CONFIRMING.students[:STUDENTS]:
                evaluation = Evaluation(world, seed)
                disputed = probabilities(world.teacher(), world, evaluation) < DISPUTED
                for updates, student in enumerate(students(Run("B", method, rates[method], number, seed), world)):
                    if updates in SHOWN:
                        q = probabilities(student, world, evaluation)[disputed]
                        accuracy = f"{evaluation(student)['accuracy']:.2f}"
                        shown = " ".join(f"{x:.2f}" for x in q.tolist())
                        yield [LABELS[method], f"{number}, {seed}", str(updates), accuracy, shown]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as made:
        head = ("method", "table, student", "updates", "accuracy", "probability of the right digit, six entries")
        print(table(head, list(rows(Path(made)))))
