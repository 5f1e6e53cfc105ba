"""`python -m benchmarks.learning`: runs the plan, one run a process and one process a core, and reports.

What is done is kept, a line per job, in a folder that is named after the plan and the code. A study that was stopped
goes on there, and its results are those of a study that was not. Nothing else is written unless `--save` or `--out`
asks for it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kdloss

from . import exact, figures, plan, report, train
from .plan import CHOOSING, CONFIRMING, EXACT, QUICK, QUICK_TASKS, TASKS, Run, Task

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".learning"
RESULTS = ROOT / "benchmarks" / "results" / "learning"
PAGE = ROOT / "docs" / "learning.md"
CODE = ("plan", "task", "model", "methods", "train", "exact")


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
        return 40.0 if self.kind == "exact" else 1.0


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

    def __init__(self, path: Path) -> None:
        self.path, self.found, self.seconds = path, dict[str, Any](), 0.0
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

    def complete(self, jobs: Iterable[Job], processes: int, device: str, stage: str) -> None:
        """Do the jobs that are not done yet, long ones first."""
        jobs = list(jobs)
        todo = sorted((job for job in jobs if job.name not in self.found), key=lambda job: -job.seconds)
        with _progress(stage, jobs, todo) as step, _pool(processes) as pool:
            for future in as_completed([pool.submit(work, job, self.path.parent, device) for job in todo]):
                name, result, seconds = future.result()
                self.add(name, result, seconds)
                step(name)


def _pool(processes: int) -> ProcessPoolExecutor:
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


# --- the jobs of the plan --------------------------------------------------------------------------------------------


def preparations(task: Task, *seeds: plan.Seeds, quick: bool = False) -> list[Job]:
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


def chosen_rates(task: Task, found: dict[str, Any]) -> dict[str, float]:
    """The rate with the best mean accuracy on the choosing table; of equals, the lowest."""
    accuracy: dict[str, dict[float, list[float]]] = {}
    for run in plan.choosing_runs(task):
        accuracy.setdefault(run.method, {}).setdefault(run.rate, []).append(found[run.name]["accuracy"])
    return {method: min(rates, key=lambda rate: (-sum(rates[rate]), rate)) for method, rates in accuracy.items()}


def study(names: list[str], records: Records, processes: int, device: str) -> dict[str, Any]:
    """All of the plan for these tasks."""
    tasks = [TASKS[name] for name in names]

    def complete(stage: str, jobs: Iterable[Job]) -> None:
        records.complete(jobs, processes, device, stage)

    complete("pretraining", [job for task in tasks for job in preparations(task, CHOOSING, CONFIRMING)])
    complete("choosing rates", [Job("run", run) for task in tasks for run in plan.choosing_runs(task)])
    chosen = {task.name: chosen_rates(task, records.found) for task in tasks}
    runs = [run for task in tasks for run in plan.confirming_runs(task, chosen[task.name])]
    measured = [job for task in tasks for job in measurements(task)]
    complete("confirming", [*(Job("run", run) for run in runs), *measured])
    found = records.found
    return {
        "facts": facts(device, records.seconds),
        "explored": list(plan.EXPLORED),
        "start": {job.name: found[job.name] for task in tasks for job in preparations(task, CONFIRMING)},
        "choosing": [
            {**asdict(run), "accuracy": found[run.name]["accuracy"]}
            for task in tasks
            for run in plan.choosing_runs(task)
        ],
        "chosen": chosen,
        "runs": [{**asdict(run), **found[run.name]} for run in runs],
        "measured": {job.name: found[job.name] for job in measured},
    }


def quick_study(names: list[str], records: Records, processes: int, device: str) -> dict[str, Any]:
    """A look: few methods, one exploring seed and one rate. No evidence."""
    tasks = [QUICK_TASKS[name] for name in names]
    start = [job for task in tasks for job in preparations(task, QUICK, quick=True)]
    records.complete(start, processes, device, "pretraining")
    runs = [run for task in tasks for run in plan.quick_runs(task)]
    records.complete([Job("run", run, quick=True) for run in runs], processes, device, "runs")
    return {
        "facts": facts(device, records.seconds),
        "start": {job.name: records.found[job.name] for job in start},
        "chosen": {task.name: dict.fromkeys(task.methods, plan.QUICK_RATE) for task in tasks},
        "runs": [{**asdict(run), **records.found[run.name]} for run in runs],
    }


def facts(device: str, seconds: float) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "kdloss": kdloss.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),  # of a processor, in all
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fingerprint(device: str) -> str:
    """Of the plan and the code that a result depends on; comments do not count."""
    texts = [ast.dump(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) for name in CODE]
    return hashlib.sha256("".join([*texts, torch.__version__, kdloss.__version__, device]).encode()).hexdigest()[:12]


# --- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m benchmarks.learning", description="Which loss learns better, and when.")
    out.add_argument("--quick", action="store_true", help="a look at the same tasks in under 3 minutes; no evidence")
    out.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    out.add_argument(
        "--save", action="store_true", help="write to benchmarks/results/learning/ and renew the page's tables"
    )
    out.add_argument("--out", type=Path, metavar="DIR", help="write JSON, Markdown and figures to this folder")
    out.add_argument(
        "--report", type=Path, metavar="JSON", help="run nothing: report a stored result, or --save it again"
    )
    out.add_argument("--device", default="cpu", help="cpu, the default, or cuda")
    out.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core")
    return out


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.save and (options.quick or options.task != list(TASKS)):
        print("error: --save is for the whole study; use --out DIR", file=sys.stderr)
        return 2
    if options.report:
        result = json.loads(options.report.read_text(encoding="utf-8"))
    else:
        folder = WORK / fingerprint(options.device) / ("quick" if options.quick else "full")
        records = Records(folder / "records.jsonl")
        whole = quick_study if options.quick else study
        result = whole(options.task, records, options.processes, options.device)
    print(report.markdown(result))
    target = RESULTS if options.save else options.out
    if target is not None:
        print("\n".join(map(str, [*report.write(result, target), *figures.draw(result, target)])))
    if options.save and PAGE.exists():
        PAGE.write_text(report.documented(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
