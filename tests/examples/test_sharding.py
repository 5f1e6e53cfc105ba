"""Holds FSDP2 on two gloo processes: the update of one process, a whole run under torchrun, its resumption, its end."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opd import models
from opd.loop import as_dict
from opd.rollout import sample, score
from opd.task import WordProblems

import kdloss

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SCRIPT = EXAMPLES / "on_policy_distillation.py"
SHARDED_UPDATE = Path(__file__).with_name("sharded_update.py")


# Every Python process imports this first. It records in $ENDS how a rank of torchrun ends; an exit handler runs as the
# first step of finalization.
SITE = """
import atexit, os, pathlib
if "RANK" in os.environ and "ENDS" in os.environ:
    record = pathlib.Path(os.environ["ENDS"], os.environ["RANK"])
    record.write_text("started")
    atexit.register(record.write_text, "finalized")
"""


def torchrun(script: Path, *arguments: str) -> None:
    """Runs `script` in two fresh processes, as a user starts them; neither of them may finalize its interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(SITE)
        _torchrun(script, *arguments, path=[folder], ENDS=folder)
        assert [Path(folder, rank).read_text() for rank in "01"] == ["started", "started"]


def _torchrun(script: Path, *arguments: str, path: list[str], **environment: str) -> None:
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    paths = os.pathsep.join([*path, str(ROOT / "src"), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def load_sharded_update():
    spec = importlib.util.spec_from_file_location("sharded_update", SHARDED_UPDATE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_update_like_one(tokenizer, tmp_path):
    sharded_update = load_sharded_update()
    whole, teacher = sharded_update.policy("student"), sharded_update.policy("teacher", trained=False)
    torch.manual_seed(0)
    problems = [WordProblems(seed=5, held_out=False)[i] for i in range(4)]
    batch = sample(whole, tokenizer, problems, n_samples=4, max_new_tokens=24, top_p=1.0, device=torch.device("cpu"))
    advantages = kdloss.group_relative_advantages(batch.rewards, group_size=4)
    batch = replace(batch, advantages=advantages, teacher_logp=score(teacher, batch))
    torch.save(as_dict(batch), tmp_path / "batch.pt")
    torchrun(SHARDED_UPDATE, str(tmp_path))
    expected, expected_metrics = sharded_update.one_step(whole, batch)
    for rank in (0, 1):
        weights, metrics = torch.load(tmp_path / f"{rank}.pt")
        assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-5)
        assert weights.keys() == expected.keys() or rank == 1  # only rank 0 has the gathered weights
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_a_run_under_torchrun_and_its_resumption(small, tmp_path):
    arguments = small("actor.gradient_checkpointing=true")
    torchrun(SCRIPT, *arguments)
    folder = tmp_path / "test" / "kdrl"
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert len(metrics.splitlines()) == 5
    (folder / "checkpoints" / "step-000004.pt").unlink()
    torchrun(SCRIPT, *arguments)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (folder / "student" / "model.safetensors").exists()


LEAVING = """
import atexit, torch.distributed as dist
from opd import ranks
def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("output", end="")  # in the buffer
    {end}
atexit.register(print, "finalized", flush=True)
ranks.leave(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("pass", 0, ""),
        ("return 3", 3, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise ValueError('of this rank')", 1, "ValueError: of this rank\n"),
    ],
)
def test_a_rank_ends_with_its_code_and_output_and_without_finalization(end, code, error):
    command = [sys.executable, "-c", LEAVING.replace("{end}", end)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "output")
    assert done.stderr.endswith(error)
    assert ("Traceback" in done.stderr) == bool(error)


def test_a_failing_rank_of_torchrun_fails_the_run_with_its_traceback(tmp_path):
    with pytest.raises(AssertionError, match=r"No such file or directory: .*batch\.pt"):
        torchrun(SHARDED_UPDATE, str(tmp_path))


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
