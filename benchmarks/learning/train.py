"""One run: a student learns by one method. All that is random comes from streams that are named after its seeds.

Methods share their seeds' initial student, prompts and random numbers, so they differ by their gradients alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss import schedules

from .methods import METHODS, Batch, Method
from .model import Transformer, sample
from .plan import Run, Task, Writer
from .task import Messages, labels_of, prompts, random_table, right_answers, stream, verify, writer, written

WARM_UP = 10


class Optimizer:
    """AdamW with a linear warm-up and a clip of the gradient's norm; `total` steps of cosine decay where given."""

    def __init__(self, model: Transformer, rate: float, total: int | None = None) -> None:
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

        def factor(step: int) -> float:
            decay = 1.0 if total is None else schedules.cosine(step, start=1.0, end=0.0, total_steps=total)
            return min(1.0, (step + 1) / WARM_UP) * decay

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, factor)

    def descend(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


class World:
    """A table of a task, with its teacher and its students, which are trained once and kept in a folder."""

    def __init__(self, task: Task, table: int, folder: Path, device: str) -> None:
        self.task, self.name, self.folder, self.device = task, f"{task.name}/{table}", folder, device
        self.table_seed = table
        self.messages = Messages(task.shortest, task.longest)
        self.prompt_width, self.answer_width = self.messages.prompt_width, self.messages.answer_width
        self.table = random_table(stream(device, "table", table))

    def teacher(self) -> Transformer:
        return self._pretrained("teacher", self.task.teacher).requires_grad_(False)

    def student(self, seed: int) -> Transformer:
        return self._pretrained(f"student-{seed}", self.task.student)

    def _pretrained(self, who: str, by: Writer) -> Transformer:
        model = Transformer(self.prompt_width + self.answer_width, stream("cpu", "init", self.name, who)).to(
            self.device
        )
        path = self.folder / f"{self.name.replace('/', '-')}-{who}.pt"
        if not path.exists():
            self._pretrain(model, who, by)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save(model.state_dict(), partial)
            partial.replace(path)  # at once, so that a killed process leaves a whole file or none
        model.load_state_dict(torch.load(path, map_location=self.device))
        return model

    def _pretrain(self, model: Transformer, who: str, by: Writer) -> None:
        """Cross-entropy on answers of a writer."""
        generator = stream(self.device, "pretraining", self.name, who)
        knowledge = {"slips": by.slips, "wrong": by.wrong, "trust": by.trust}
        digits = writer(self.table, **knowledge, generator=stream(self.device, "facts", self.name))  # type: ignore[arg-type]
        optimizer = Optimizer(model, by.rate, by.steps)
        for _ in range(by.steps):
            messages = self.messages.draw(by.batch, generator)
            answers = written(digits, messages, generator)
            logits = model.answer_logits(torch.cat([prompts(messages), answers], 1), self.prompt_width)
            labels = labels_of(answers).flatten()
            optimizer.descend(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels))


class Rollout(NamedTuple):
    """Answers, with what was known when they were sampled."""

    tokens: Tensor  # (B, P + A)
    labels: Tensor  # (T,)
    old_logp: Tensor | None  # (T,) where the student has moved since
    teacher_logits: Tensor  # (T, V)
    rewards: Tensor  # (B,)


class Sampler:
    """Prompts of one run, and answers to them."""

    def __init__(self, world: World, student: int) -> None:
        self.world, self.teacher = world, world.teacher()
        self.prompts = stream(world.device, "prompts", world.name, student)
        self.answers = stream(world.device, "answers", world.name, student)

    def __call__(self, writer: Transformer, *, count: int | None = None, stale: bool = False) -> Rollout:
        world, task = self.world, self.world.task
        messages = world.messages.draw(count or task.prompts, self.prompts).repeat_interleave(task.samples, 0)
        asked = prompts(messages)
        answers, logits = sample(writer, asked, world.answer_width, self.answers)
        labels = labels_of(answers).flatten()
        tokens = torch.cat([asked, answers], 1)
        with torch.no_grad():
            teacher_logits = self.teacher.answer_logits(tokens, world.prompt_width).flatten(0, 1)
        rewards = verify(answers, right_answers(world.table, messages))
        old_logp = kdloss.token_logprobs(logits.flatten(0, 1), labels) if stale else None
        return Rollout(tokens, labels, old_logp, teacher_logits, rewards)


def batch_of(student: Transformer, rollout: Rollout, world: World, step: int = 0) -> Batch:
    task = world.task
    return Batch(
        logits=student.answer_logits(rollout.tokens, world.prompt_width).flatten(0, 1),
        labels=rollout.labels,
        old_logp=rollout.old_logp,
        teacher_logits=rollout.teacher_logits,
        rewards=rollout.rewards,
        cu_seqlens=torch.arange(0, rollout.labels.shape[0] + 1, world.answer_width, device=world.device),
        group_size=task.samples,
        step=step,
        updates=task.updates,
    )


def train(run: Run, world: World) -> dict[str, Any]:
    """The accuracy after 0, 1 x `every`, 2 x `every` ... updates of a run, and more at its end."""
    evaluation = Evaluation(world, run.student)
    curve = []
    for step, student in enumerate(students(run, world)):
        if step % world.task.every == 0:
            curve.append(evaluation.accuracy(student))
    return {"curve": curve, **evaluation(student)}


def students(run: Run, world: World) -> Iterator[Transformer]:
    """The student after 0, 1, ... all updates of a run: one model, which changes in place."""
    task, method = world.task, METHODS[run.method]
    student, sampler = world.student(run.student), Sampler(world, run.student)
    optimizer = Optimizer(student, run.rate)
    waiting: deque[Rollout] = deque()
    yield student
    for step in range(task.updates):
        rollout = _next_rollout(method, step, student, sampler, waiting)
        optimizer.descend(method.loss(batch_of(student, rollout, world, step)))
        yield student


def _next_rollout(
    method: Method, step: int, student: Transformer, sampler: Sampler, waiting: deque[Rollout]
) -> Rollout:
    """Answers of the student of `method.age` updates ago; of the first student while there is no older one.

    Every method trains on one rollout an update, and samples no other.
    """
    updates = sampler.world.task.updates
    if step < round(method.teacher_text * updates):
        return sampler(sampler.teacher)
    while len(waiting) <= method.age and step + len(waiting) < updates:
        waiting.append(sampler(student, stale=method.age > 0))
    return waiting.popleft()


class Evaluation:
    """One answer to each of the held-out questions: the same questions and random numbers each time."""

    def __init__(self, world: World, student: int) -> None:
        self.world, self.seed, self.teacher = world, student, world.teacher()
        generator = stream(world.device, "questions", world.name, student)
        self.messages = world.messages.draw(world.task.questions, generator, held_out=True)
        self.right = right_answers(world.table, self.messages)

    def accuracy(self, student: Transformer) -> float:
        """Of the first questions only, for a curve."""
        count = self.world.task.curve_questions
        generator = stream(self.world.device, "curve", self.world.name, self.seed)
        answers, _ = sample(student, prompts(self.messages[:count]), self.world.answer_width, generator)
        return int(verify(answers, self.right[:count]).sum()) / count

    @torch.no_grad()
    def __call__(self, student: Transformer) -> dict[str, float]:
        world, asked = self.world, prompts(self.messages)
        generator = stream(world.device, "evaluation", world.name, self.seed)
        answers, logits = sample(student, asked, world.answer_width, generator)
        labels = labels_of(answers)
        trained = labels.flatten() >= 0
        logits = logits.flatten(0, 1)[trained]
        teacher_logits = self.teacher.answer_logits(torch.cat([asked, answers], 1), world.prompt_width)
        logp = logits.log_softmax(-1)
        return {
            "accuracy": int(verify(answers, self.right).sum()) / world.task.questions,
            "reverse_kl": round(kdloss.reverse_kl(logits, teacher_logits.flatten(0, 1)[trained]).mean().item(), 5),
            "entropy": round(-(logp.exp() * logp).sum(-1).mean().item(), 5),
            "length": round((labels >= 0).sum(1).float().mean().item(), 3),
        }
