"""One update of a sharded student, run under torchrun by `test_sharding.py`: folder -> folder/{rank}.pt.

It is a separate script because gloo has crashed in a process forked from a test worker.
"""

import sys
from pathlib import Path

import torch
from opd import models, ranks
from opd.loop import update
from opd.rollout import Batch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

import kdloss

TINY = Path(__file__).parents[2] / "docs" / "examples" / "tiny"
LOSS = kdloss.KDRLConfig(distill_loss_weight=0.5).as_kwargs()


def policy(name: str, *, trained: bool = True) -> models.Policy:
    return models.load_policy(str(TINY / name), vocab_size=46, temperature=1.0, dtype="float32", trained=trained)


def one_step(student: models.Policy, batch: Batch) -> tuple[dict, dict]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    metrics = update(student, optimizer, batch, loss_kwargs=LOSS, max_weight=2.0, micro_batches=2, max_grad_norm=0.5)
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: x.clone() for name, x in weights.items()}, metrics


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks.start()
    student = policy("student")
    assert all(isinstance(p, DTensor) for p in student.parameters())
    batch = Batch(**torch.load(folder / "batch.pt"))
    result = one_step(student, batch.split(ranks.world_size())[ranks.rank()])
    torch.save(result, folder / f"{ranks.rank()}.pt")


if __name__ == "__main__":
    ranks.leave(lambda: main(Path(sys.argv[1])))
