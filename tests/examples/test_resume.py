"""Holds interruptions: a run that is killed at any moment and started again ends like one that was not, bit for bit.

The kills are real: a forked process sends itself SIGKILL at a chosen point.
"""

import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import on_policy_distillation
import pytest
import torch
from opd import checkpoint
from opd.checkpoint import Checkpoints, MetricsFile, read_records
from opd.loop import Run
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(arguments: list[str], arrange: Callable[[], None] = lambda: None) -> int:
    """The exit code of the command line in its own process, which calls `arrange` first."""

    def child() -> None:
        arrange()
        os._exit(on_policy_distillation.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_update(done: int) -> Callable[[], None]:
    """Dies after `done` updates."""

    def arrange() -> None:
        real = Run.one_update
        Run.one_update = lambda self, n: die() if n == done else real(self, n)

    return arrange


def while_saving(count: int) -> Callable[[], None]:
    """Dies with half of checkpoint number `count` on disk."""

    def arrange() -> None:
        real, seen = torch.save, []

        def save(state, file):
            seen.append(1)
            if len(seen) < count:
                return real(state, file)
            real(state, file)
            file.flush()
            os.truncate(file.name, os.path.getsize(file.name) // 2)
            return die()

        checkpoint.torch.save = save

    return arrange


def between_metrics_and_checkpoint() -> None:
    """Dies after a record is written and before its checkpoint, with half a line more in the file."""

    def half_a_line(self):
        self.file.write(b'{"step": 99, "rew')
        self.file.flush()
        die()

    MetricsFile.length = half_a_line


def results(folder: Path) -> tuple[bytes, dict]:
    return (folder / "metrics.jsonl").read_bytes(), load_file(folder / "student" / "model.safetensors")


@pytest.fixture(params=[("kdrl", 0), ("kdrl", 2), ("sft", 0)], ids=lambda p: f"{p[0]}-stale{p[1]}")
def arguments(request, small) -> Callable[[str], list[str]]:
    mode, staleness = request.param
    more = [f"mode={mode}", f"rollout.max_head_offpolicyness={staleness}", "total_train_steps=5"]
    return lambda trial: small(*more, f"trial_name={trial}")


def test_killed_anywhere_it_ends_the_same(arguments, tmp_path):
    assert run(arguments("whole")) == 0
    metrics, weights = results(tmp_path / "test" / "whole")
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [0, 1, 2, 3, 4, 5]
    early, late = [before_update(0), before_update(3), while_saving(1)], [while_saving(2), before_update(4)]
    for arrange in [*early, between_metrics_and_checkpoint, *late]:
        assert run(arguments("killed"), arrange) == -signal.SIGKILL
    assert run(arguments("killed")) == 0
    again, weights_again = results(tmp_path / "test" / "killed")
    assert again == metrics
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_finished_run_is_not_repeated(small, tmp_path):
    assert run(small()) == 0
    before = results(tmp_path / "test" / "kdrl")[0]
    assert run(small(), before_update(0)) == 0
    assert results(tmp_path / "test" / "kdrl")[0] == before


def test_another_configuration_is_refused(small, tmp_path, capfd):
    assert run(small("total_train_steps=1")) == 0
    assert run(small("total_train_steps=1", "gconfig.temperature=0.5")) == 2
    told = capfd.readouterr().err
    assert "another configuration" in told
    assert "+   temperature: 0.5" in told


def test_two_processes_do_not_share_a_run(small, tmp_path, capfd):
    folder = tmp_path / "test" / "kdrl"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(small()) == 2
        assert capfd.readouterr().err == f"error: another process is at work in {folder}\n"
        assert sorted(p.name for p in folder.iterdir()) == ["lock"]
    assert run(small("total_train_steps=1")) == 0


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert read_records(tmp_path / "none.jsonl") == []


def test_half_a_checkpoint_is_never_loaded_and_old_ones_go(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load(model=model, optimizer=optimizer) is None
    for step in (1, 2, 3):
        checkpoints.save(step, model=model, optimizer=optimizer, note="x")
    whole = (tmp_path / "step-000003.pt").read_bytes()
    (tmp_path / "step-000004.partial").write_bytes(whole[: len(whole) // 2])
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002.pt", "step-000003.pt"]
    state = checkpoints.load(model=model, optimizer=optimizer)
    assert (state["step"], state["note"]) == (3, "x")
