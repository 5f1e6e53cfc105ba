"""How much of one batch's gradient is signal: its cosine with the exact gradient, and its signal-to-noise ratio.

The student stands at fixed checkpoints: after so many updates of the full reverse KL, for every method alike. The exact
gradient is that of the divergence of whole distributions that a method descends, averaged over many thousand answers.

    cosine = mean over batches of cos(g, G),   signal to noise = |E g|^2 / E|g - E g|^2

A method is measured against its own objective's G. The reward and the literal penalty have none to a teacher, and are
measured against that of the reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import kdloss

from .methods import METHODS, full, grpo, kdrl
from .model import Transformer
from .plan import Exact, Run
from .task import stream
from .train import Sampler, World, batch_of, students

TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse KL": kdloss.reverse_kl,
    "forward KL": kdloss.forward_kl,
    "JSD": lambda logits, teacher_logits: kdloss.generalized_jsd(logits, teacher_logits, beta=0.5),
    "forward KL, teacher's text": kdloss.forward_kl,
}


def measure(world: World, student: int, checkpoint: int, plan: Exact) -> dict[str, Any]:
    """{method: its cosine and signal-to-noise ratio} for a student at a checkpoint."""
    run = Run(world.task.name, "full-reverse", plan.rate, world.table_seed, student)
    model = next(islice(students(run, world), checkpoint, None))
    sampler = Sampler(world, student)
    sampler.answers = stream(world.device, "exact", world.name, student, checkpoint)
    exact = _exact_gradients(model, sampler, plan)
    found = {method: _Noise() for method in plan.methods}
    for _ in range(plan.batches):
        rollouts = {False: sampler(model), True: sampler(sampler.teacher)}
        for method, noise in found.items():
            its = METHODS[method]
            batch = batch_of(model, rollouts[its.teacher_text > 0], world)
            noise.add(gradient(model, its.loss(batch)), exact[its.target])
    return {method: noise.summary() for method, noise in found.items()}


def _exact_gradients(model: Transformer, sampler: Sampler, plan: Exact) -> dict[str, Tensor]:
    """The gradient of each target, by the divergences of whole distributions over many answers."""
    task = sampler.world.task
    sums = dict.fromkeys(TARGETS, torch.zeros((), device=sampler.world.device))
    for _ in range(plan.chunks):
        own, teachers = (sampler(writer, count=plan.answers // task.samples) for writer in (model, sampler.teacher))
        for target, divergence in TARGETS.items():
            batch = batch_of(model, teachers if "teacher" in target else own, sampler.world)
            sums[target] = sums[target] + gradient(model, full(batch, divergence))
    return sums


def gradient(model: Transformer, loss: Tensor) -> Tensor:
    """All of it as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


class _Noise:
    """Running sums over batches."""

    def __init__(self) -> None:
        self.sum, self.square, self.cosines = torch.zeros(()), 0.0, list[float]()

    def add(self, g: Tensor, exact: Tensor) -> None:
        self.sum = self.sum.to(g.device) + g
        self.square += g.square().sum().item()
        self.cosines.append(torch.nn.functional.cosine_similarity(g, exact, dim=0).item())

    def summary(self) -> dict[str, float]:
        n = len(self.cosines)
        mean = self.sum / n
        noise = (self.square - n * mean.square().sum().item()) / (n - 1)  # E|g - E g|^2
        signal = mean.square().sum().item() - noise / n  # |E g|^2, without what is left of the noise
        cosines = torch.tensor(self.cosines)
        return {
            "cosine": round(cosines.mean().item(), 4),
            "spread": round(cosines.std().item(), 4),
            "signal_to_noise": round(max(signal, 0.0) / noise, 4) if noise > 0 else 0.0,
        }


def effect_of_the_teacher(world: World, student: int) -> dict[str, float]:
    """The change of the gradient on one batch where another teacher scores it, as a share of the gradient."""
    model, sampler = world.student(student), Sampler(world, student)
    rollout = sampler(model)
    other = rollout._replace(teacher_logits=rollout.teacher_logits.flip(-1))
    shares = {}
    for name, loss in (
        ("GRPO", grpo),
        ("KDRL 1", lambda b: kdrl(b, 1.0)),
        ("literal joint form 1", lambda b: kdrl(b, 1.0, direct_penalty=True)),
    ):
        first, second = (gradient(model, loss(batch_of(model, x, world))) for x in (rollout, other))
        shares[name] = ((first - second).norm() / first.norm()).item()
    return shares
