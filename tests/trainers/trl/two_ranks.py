"""Runs KDRLTrainer on every rank of a process group and writes each rank's result. Started by test_ranks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3] / "docs" / "examples"))
import tiny
import torch
from opd import ranks
from trl import GRPOTrainer

from kdloss.integrations.trl import KDRLTrainer

# The weights of the RL term and of the distillation term.
WEIGHTS = {"trl": None, "rl": (1.0, 0.0), "kd": (0.0, 1.0), "joint": (1.0, 0.5)}


def run(folder: Path, loss_type: str, kind: str) -> None:
    weights = WEIGHTS[kind]
    cls, keywords = GRPOTrainer, {}
    if weights is not None:
        cls, keywords = KDRLTrainer, dict(zip(("rl_loss_weight", "distill_loss_weight"), weights, strict=True))
        keywords["teacher_model"] = tiny.alphabetical_teacher(steps=40)
    trainer = tiny.grpo(
        cls,
        tiny.model(seed=1),
        folder / kind,
        keywords=keywords,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        loss_type=loss_type,
        max_steps=2,
        ddp_backend="gloo",
        optim="sgd",
        max_grad_norm=0.0,
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    logs = [row for row in trainer.state.log_history if "reward" in row]
    result = {"parameters": parameters, "logs": logs}
    torch.save(result, folder / f"{loss_type}-{kind}-{trainer.accelerator.process_index}.pt")


def main(folder: str, *loss_types: str) -> None:
    torch.set_num_threads(1)
    for loss_type in loss_types:
        for kind in WEIGHTS:
            run(Path(folder), loss_type, kind)
    torch.distributed.barrier()


ranks.leave(lambda: main(*sys.argv[1:]))
