"""Tests scale-out: everything that is cut across ranks gives the values and gradients of one process."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch.distributed as dist

from kdloss._distributed import vocab_shard
from scale_out.ranks import INTERFACE, cases, run

MODULES = [
    "scale_out.cases_vocabulary",
    "scale_out.cases_divergences",
    "scale_out.cases_kernels",
    "scale_out.cases_context",
    "scale_out.cases_models",
    "scale_out.cases_heads",
    "scale_out.cases_trainers",
    "scale_out.cases_plan",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), MODULES)


@pytest.mark.parametrize("case", [name for module in MODULES for name, *_ in cases(importlib.import_module(module))])
def test_like_one_process(outcomes, case):
    assert outcomes[case] == "", outcomes[case]


def test_the_examples_of_vocab_shard_run(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", INTERFACE)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    examples = [x for x in doctest.DocTestFinder().find(vocab_shard) if x.examples]
    try:
        for example in examples:
            runner.run(example, out=report.append)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(examples) == 4  # the class, even, from_dtensor and validate
    assert not runner.failures, "".join(report)


def test_a_hang_ends_in_seconds_with_the_stack_of_the_rank(tmp_path, monkeypatch):
    """Gloo would wait for 15 minutes. A case that hangs, raises, crashes or loops forever fails alone; others go on."""
    monkeypatch.setenv("CRASHED", str(tmp_path / "crashed-once"))
    found = run(tmp_path, ["scale_out.cases_that_hang"], idle=2, case_processor_seconds=2)
    assert found["before-4"] == found["after-4"] == ""
    hang = found["one_rank_does_not_come-2"]
    assert hang.startswith("did not end on ranks [1]: all ranks slept for 2 s")
    assert "in wait_for_the_others" in hang.split("rank 1 said")[1]
    assert "in case_one_rank_does_not_come" in hang.split("rank 1 said")[1]
    assert "of rank 1 alone" in found["one_rank_raises-3"]
    loops = found["one_rank_loops_forever-4"]
    assert loops.startswith("did not end on ranks [2]: they left")
    assert "in case_one_rank_loops_forever" in loops.split("rank 2 said")[1]
    assert (tmp_path / "crashed-once").exists()
    assert found["one_rank_crashes_once-4"] == ""
    assert found["one_rank_crashes_always-2"].startswith("did not end on ranks [1]: they left")


def test_ranks_that_cannot_start_fail_every_case_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("scale_out.ranks.INTERFACE", "no-such-interface")
    found = run(tmp_path, ["scale_out.cases_that_hang"])
    assert all(text.startswith("the ranks did not start") for text in found.values())
