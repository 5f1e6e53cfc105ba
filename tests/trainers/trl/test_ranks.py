"""Tests KDRLTrainer on two ranks: they stay equal, weight 0 is GRPOTrainer, and the joint run is the sum of terms."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

LOSS_TYPES = ("dapo", "grpo")
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [*RANKS, str(Path(__file__).parent / "two_ranks.py"), str(folder), *LOSS_TYPES]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_ranks(results, loss_type):
    first = {kind: results[f"{loss_type}-{kind}-0"] for kind in ("trl", "rl", "kd", "joint")}
    for kind, result in first.items():
        assert torch.equal(result["parameters"], results[f"{loss_type}-{kind}-1"]["parameters"])
    assert torch.equal(first["trl"]["parameters"], first["rl"]["parameters"])
    assert not torch.equal(first["trl"]["parameters"], first["joint"]["parameters"])
    step = {kind: result["logs"][0] for kind, result in first.items()}  # before the runs diverge
    assert step["joint"]["loss"] == pytest.approx(step["trl"]["loss"] + 0.5 * step["kd"]["loss"], rel=1e-3)
    values = {step[kind]["distill/reverse_kl"] for kind in ("rl", "kd", "joint")}
    assert len(values) == 1
    # its value is the reverse KL, except that the two weight micro-batches of different lengths differently
    assert step["kd"]["loss"] == pytest.approx(values.pop(), rel=0.1)
