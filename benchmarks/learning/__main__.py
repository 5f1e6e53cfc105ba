"""`python -m benchmarks.learning`: runs the plan and reports.

What is done is kept, a line per job, in a folder that is named after the plan and the code. A study that was stopped
goes on there, and its results are those of a study that was not. Nothing else is written unless `--save` or `--out`
asks for it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kdloss

from . import figures, plan, report
from .jobs import Job, Records, measurements, pool_of, preparations
from .plan import CHOOSING, CONFIRMING, QUICK, QUICK_TASKS, TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".learning"
RESULTS = ROOT / "benchmarks" / "results" / "learning"
PAGE = ROOT / "docs" / "learning.md"
CODE = ("plan", "task", "model", "methods", "train", "exact")


def chosen_rates(task: Task, found: dict[str, Any]) -> dict[str, float]:
    """The rate with the best mean accuracy on the choosing table; of equals, the lowest."""
    accuracy: dict[str, dict[float, list[float]]] = {}
    for run in plan.choosing_runs(task):
        accuracy.setdefault(run.method, {}).setdefault(run.rate, []).append(found[run.name]["accuracy"])
    return {method: min(rates, key=lambda rate: (-sum(rates[rate]), rate)) for method, rates in accuracy.items()}


def study(names: list[str], records: Records) -> dict[str, Any]:
    """All of the plan for these tasks."""
    tasks = [TASKS[name] for name in names]
    records.complete("pretraining", [job for task in tasks for job in preparations(task, CHOOSING, CONFIRMING)])
    records.complete("choosing rates", [Job("run", run) for task in tasks for run in plan.choosing_runs(task)])
    chosen = {task.name: chosen_rates(task, records.found) for task in tasks}
    runs = [run for task in tasks for run in plan.confirming_runs(task, chosen[task.name])]
    measured = [job for task in tasks for job in measurements(task)]
    records.complete("confirming", [*(Job("run", run) for run in runs), *measured])
    found = records.found
    return {
        "facts": facts(records.device, records.seconds),
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


def quick_study(names: list[str], records: Records) -> dict[str, Any]:
    """A look: few methods, one exploring seed and one rate. No evidence."""
    tasks = [QUICK_TASKS[name] for name in names]
    start = [job for task in tasks for job in preparations(task, QUICK, quick=True)]
    records.complete("pretraining", start)
    runs = [run for task in tasks for run in plan.quick_runs(task)]
    records.complete("runs", [Job("run", run, quick=True) for run in runs])
    return {
        "facts": facts(records.device, records.seconds),
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
        with pool_of(options.processes) as pool:
            records = Records(folder / "records.jsonl", pool, options.device)
            result = (quick_study if options.quick else study)(options.task, records)
    print(report.markdown(result))
    target = RESULTS if options.save else options.out
    if target is not None:
        print("\n".join(map(str, [*report.write(result, target), *figures.draw(result, target)])))
    if options.save and PAGE.exists():
        PAGE.write_text(report.documented(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
