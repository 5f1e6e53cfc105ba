"""The jobs of the plan, done one a process and one process a core; what is done is kept, a line per job.

A line that a killed process left unfinished is dropped, so its job is done again. A job depends on its seeds alone, so
neither the order of the jobs nor an interruption changes a result.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import exact, train
from .plan import CONFIRMING, EXACT, QUICK_TASKS, TASKS, Run, Seeds, Task


@dataclass(frozen=True)
class Job:
    """One process's work. `kind` is a teacher or student to pretrain, a run, or what `exact` measures."""

    kind: str
    run: Run  # its method and rate count for a run only
    checkpoint: int = 0
    quick: bool = False

    @property
    def name(self) -> str:
        if self.kind == "run":
            return self.run.name
        parts = [self.run.task, self.run.table, *([] if self.kind == "teacher" else [self.run.student])]
        return "/".join(map(str, [self.kind, *parts, *([self.checkpoint] if self.kind == "exact" else [])]))

    @property
    def task(self) -> Task:
        return (QUICK_TASKS if self.quick else TASKS)[self.run.task]

    @property
    def seconds(self) -> float:
        """An estimate of the processor's time."""
        task = self.task
        if self.kind == "run":
            return task.updates * task.update_seconds + 1
        if self.kind in ("teacher", "student"):
            return (task.teacher if self.kind == "teacher" else task.student).steps * task.update_seconds
        return 50.0 if self.kind == "exact" else 1.0


def work(job: Job, folder: Path, device: str) -> tuple[str, Any, float]:
    """(name, result, seconds of a processor)."""
    torch.set_num_threads(1)
    started = time.process_time()
    run, world = job.run, train.World(job.task, job.run.table, folder, device)
    result: Any
    if job.kind == "run":
        result = train.train(run, world)
    elif job.kind in ("teacher", "student"):
        model = world.teacher() if job.kind == "teacher" else world.student(run.student)
        result = train.Evaluation(world, run.student)(model)
    elif job.kind == "exact":
        result = exact.measure(world, run.student, job.checkpoint, EXACT)
    else:
        result = exact.effect_of_the_teacher(world, run.student)
    return job.name, result, time.process_time() - started


class Records:
    """Results by name, one line each in a file. A line that a killed process left unfinished is dropped."""

    def __init__(self, path: Path, pool: Executor, device: str) -> None:
        self.path, self.pool, self.device = path, pool, device
        self.found, self.seconds = dict[str, Any](), 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:
            path.write_text("".join(whole), encoding="utf-8")
        for line in whole:
            self._keep(json.loads(line))

    def _keep(self, record: dict[str, Any]) -> None:
        self.found[record["name"]] = record["result"]
        self.seconds += record["seconds"]

    def add(self, name: str, result: Any, seconds: float) -> None:
        record = {"name": name, "result": result, "seconds": round(seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._keep(record)

    def complete(self, stage: str, jobs: list[Job]) -> None:
        """Do the jobs that are not done yet, long ones first."""
        todo = sorted((job for job in jobs if job.name not in self.found), key=lambda job: -job.seconds)
        with _progress(stage, jobs, todo) as step:
            try:
                futures = [self.pool.submit(work, job, self.path.parent, self.device) for job in todo]
                for future in as_completed(futures):
                    name, result, seconds = future.result()
                    self.add(name, result, seconds)
                    step(name)
            except BaseException:  # the others would be done first
                self.pool.shutdown(wait=False, cancel_futures=True)
                raise


def pool_of(processes: int) -> ProcessPoolExecutor:
    """Processes that import this code once, so that it may change while they run."""
    # a thread a process; and memory that is freed is kept, as the system would fill it with zeros again
    os.environ.update(
        OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000"
    )
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def _progress(stage: str, jobs: list[Job], todo: list[Job]) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, of the estimated seconds of a processor."""
    weights = {job.name: round(10 * job.seconds) for job in jobs}
    left = sum(weights[job.name] for job in todo)
    with importlib.import_module("tqdm").tqdm(
        total=sum(weights.values()),
        initial=sum(weights.values()) - left,
        desc=stage,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # a log gets a line a minute
    ) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(weights[name])

        yield step


def preparations(task: Task, *seeds: Seeds, quick: bool = False) -> list[Job]:
    """Teachers and students, before the runs that start from them."""
    tables = [(table, each.students) for each in seeds for table in each.tables]
    jobs = [Job("teacher", Run(task.name, "", 0.0, table, students[0]), quick=quick) for table, students in tables]
    return jobs + [
        Job("student", Run(task.name, "", 0.0, table, student), quick=quick)
        for table, students in tables
        for student in students
    ]


def measurements(task: Task) -> list[Job]:
    """Gradients at fixed checkpoints, and whether the literal form reads the teacher."""
    student = CONFIRMING.students[0]
    starts = [Run(task.name, "", 0.0, table, student) for table in CONFIRMING.tables]
    if task.name == EXACT.task:
        return [Job("exact", start, checkpoint) for start in starts for checkpoint in EXACT.checkpoints]
    return [Job("effect", start) for start in starts] if task.name == "D" else []
