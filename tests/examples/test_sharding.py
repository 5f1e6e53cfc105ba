"""Holds FSDP2 on two processes with gloo: the update of one process, a whole run under torchrun, its resumption."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import on_policy_distillation
import pytest
import torch
from opd import models, ranks
from opd.loop import update
from opd.rollout import Batch, sample, score
from opd.task import WordProblems
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

import kdloss

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "examples" / "on_policy_distillation.py"
TINY = SCRIPT.parent / "tiny"
LOSS = kdloss.KDRLConfig(distill_loss_weight=0.5).as_kwargs()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(work: Callable[[], object]) -> None:
    """`work` in two forked processes, in the environment that torchrun sets: its launch alone costs seconds."""
    port = free_port()

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work()
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(rank,)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    assert [process.exitcode for process in children] == [0, 0]


def policy(name: str, *, trained: bool = True) -> models.Policy:
    return models.load_policy(str(TINY / name), vocab_size=46, temperature=1.0, dtype="float32", trained=trained)


def one_step(student: models.Policy, batch: Batch) -> tuple[dict, dict]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    metrics = update(student, optimizer, batch, loss_kwargs=LOSS, max_weight=2.0, micro_batches=2, max_grad_norm=0.5)
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: x.clone() for name, x in weights.items()}, metrics


def test_two_processes_update_like_one(tokenizer, tmp_path):
    whole, teacher = policy("student"), policy("teacher", trained=False)
    torch.manual_seed(0)
    problems = [WordProblems(seed=5, held_out=False)[i] for i in range(4)]
    batch = sample(whole, tokenizer, problems, n_samples=4, max_new_tokens=24, top_p=1.0, device=torch.device("cpu"))
    advantages = kdloss.group_relative_advantages(batch.rewards, group_size=4)
    batch = replace(batch, advantages=advantages, teacher_logp=score(teacher, batch))

    def sharded() -> None:
        ranks.start()
        student = policy("student")
        assert all(isinstance(p, DTensor) for p in student.parameters())
        result = one_step(student, batch.split(2)[ranks.rank()])
        torch.save(result, tmp_path / f"{ranks.rank()}.pt")
        ranks.stop()

    two_processes(sharded)
    expected, expected_metrics = one_step(whole, batch)
    for rank in (0, 1):
        weights, metrics = torch.load(tmp_path / f"{rank}.pt")
        assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-5)
        assert weights.keys() == expected.keys() or rank == 1  # rank 0 alone holds the gathered weights
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_a_run_under_torchrun_and_its_resumption(small, tmp_path):
    arguments = small("actor.gradient_checkpointing=true")
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "test" / "kdrl"
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert len(metrics.splitlines()) == 5
    (folder / "checkpoints" / "step-000004.pt").unlink()
    two_processes(lambda: on_policy_distillation.main(arguments))
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (folder / "student" / "model.safetensors").exists()


def test_loading_arguments_reach_transformers(load, monkeypatch, tokenizer):
    asked = {}

    def from_pretrained(path, **kwargs):
        asked.update(kwargs, path=path)
        return real

    real = load("student").lm
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    kwargs = {"vocab_size": 46, "temperature": 1.0, "dtype": "bfloat16", "device_map": "auto", "attn_impl": "sdpa"}
    policy = models.load_policy("some/teacher", trained=False, **kwargs)
    expected = {"path": "some/teacher", "dtype": torch.bfloat16, "device_map": "auto", "attn_implementation": "sdpa"}
    assert asked == expected
    assert not any(p.requires_grad for p in policy.parameters())
    models.load_policy("some/student", trained=True, gradient_checkpointing=True, **kwargs)
    assert asked["dtype"] == torch.float32, "weights that are trained stay float32"
    assert any(getattr(module, "gradient_checkpointing", False) for module in real.modules())
