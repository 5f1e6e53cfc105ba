"""Starts the fresh processes and reads what they say. Needs no torch: a small parent adds nothing to a child's peak."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# glibc keeps what it has been given: samples then hold arithmetic, not the zeroing of fresh pages
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class WorkerError(Exception):
    """A process that ended without a result."""

    def __init__(self, message: str, *, at: str | None = None, timed_out: bool = False):
        super().__init__(message)
        self.at = at  # who was running
        self.timed_out = timed_out


def run_job(
    job: dict[str, Any],
    *,
    timeout: float,
    keep_memory: bool = False,
    cold: bool = False,
    on_contender: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The result of a job in a new process, with `cold` one that finds nothing compiled by an earlier one.

    Raises:
        WorkerError: it died, or was stopped after `timeout` seconds.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, tempfile.TemporaryDirectory() as compiled:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=_environment(keep_memory=keep_memory, compiled=compiled if cold else None),
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(max(0.0, min(timeout, threading.TIMEOUT_MAX)), stop)
        timer.start()
        try:
            with process:
                result, at = _converse(process, json.dumps(job), on_contender)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        if result is not None:
            return result
        if timed_out.is_set():
            raise WorkerError(f"stopped after {timeout:.0f} s", at=at, timed_out=True)
        errors.seek(0)
        said = errors.read().strip().splitlines()
        raise WorkerError(without_paths(said[-1]) if said else f"ended with code {process.returncode}", at=at)


def without_paths(text: str) -> str:
    """Results are published: where files lie on the machine is nobody's business."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", text)


def _converse(
    process: subprocess.Popen[str], job: str, on_contender: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str | None]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:  # it died before it read; its own words say why
        return None, None
    result, at = None, None
    for line in process.stdout:
        message = json.loads(line)
        result = message.get("result", result)
        if "at" in message:
            at = message["at"]
            on_contender(at)
    return result, at


def _environment(*, keep_memory: bool, compiled: str | None) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in KEEP_MEMORY}
    paths = [str(ROOT), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # the process starts elsewhere: relative entries would be lost
    if compiled:
        environment["TORCHINDUCTOR_CACHE_DIR"] = compiled
    return {**environment, **(KEEP_MEMORY if keep_memory else {})}
