"""The fresh process: does one job that comes as JSON on standard input, and writes JSON lines to standard output.

A job has cases, each measured for parity, then memory, then time, or none: then names, versions and ceilings of the
machine are the result. A line {"at": name} says who runs next, so the process that started this one knows who crashed
it; a line {"result": ...} is the machine, or one case.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch

import kdloss

from . import timing
from .cases import Case, fitted
from .formulas import mean_of
from .peers import contenders
from .problems import Parity, Truth, build, check
from .report import without_paths
from .timing import Run

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


# --- the machine ---------------------------------------------------------------------------------------------------


def machine(job: dict[str, Any]) -> dict[str, Any]:
    device = job["device"]
    name = str(torch.cuda.get_device_name(0)) if device == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    facts = {"device": name}
    if device == "cuda":
        facts |= {"cpu": cpu_name(), "cuda": str(torch.version.cuda), "kernels": kernels()}
    else:
        facts |= {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}
    facts |= {"python": platform.python_version(), "kdloss": kdloss.__version__}
    facts |= {package: version(package) for package in PACKAGES}
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"facts": facts, "slug": slug(name), "ceilings": timing.ceilings(device, quick=job["quick"])}


def slug(name: str) -> str:
    """The name of a folder: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def kernels() -> str:
    """Whether kdloss uses its kernels on this GPU, and if not, why: without them its figures are plain torch's."""
    from kdloss._softmax.backend import takes_triton

    try:
        takes_triton("triton", logits=torch.empty(0, device="cuda", dtype=torch.bfloat16))
    except ValueError as reason:
        return f"none: {reason}"
    return "Triton"


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)| (\d+-Core )?Processor$| CPU$", "", name)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def free_bytes(device: str) -> int:
    """Memory that a case may fill; a container's limit counts too."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        (free,) = re.findall(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        room = int(free) * 1024
    except (OSError, ValueError):
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        return min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or no limit
        return room


# --- a case --------------------------------------------------------------------------------------------------------


class CaseRun:
    """Parity, memory and time of every contender that can take part in a case."""

    def __init__(self, case: Case, job: dict[str, Any], out: TextIO):
        self.job, self.out = job, out
        self.device: str = job["device"]
        self.case = fitted(case, free_bytes(self.device))
        self.rows: dict[str, dict[str, Any]] = {}
        self.plain: dict[str, Parity] = {}  # of eager plain torch, by name of inputs

    def run(self) -> dict[str, Any]:
        case, job = self.case, self.job
        absent = dict.fromkeys(job["exclude"], "the process died while it ran")
        inputs = build(case, self.device)
        formulas = {key: mean_of(x.formula) if x.scalar else x.formula for key, x in inputs.items()}
        entrants = contenders(case, self.device, formulas, absent, compiled=not job["quick"])
        gc.freeze()  # what was imported is never garbage; without it each collection takes a fifth of a second
        truths = {key: x.truth(case.vocab) for key, x in inputs.items()}
        runs = {}
        for contender in entrants:
            if contender.name not in job["exclude"]:
                run = Run(contender, inputs[contender.inputs])
                if self._admit(run, truths[contender.inputs]):
                    runs[contender.name] = run
        truths.clear()
        if not any(row["ours"] and row["error"] for row in self.rows.values()):
            self._measure(runs)
        return {
            "case": vars(case),
            "name": case.name,
            "logits_bytes": case.logits_bytes,
            "floor_seconds": case.floor_seconds(job["ceilings"]),
            "rows": self.rows,
            "absent": absent,
        }

    def _admit(self, run: Run, truth: Truth) -> bool:
        """The first call, which may compile, and its parity; False if it raised or is wrong."""
        contender = run.contender
        self._announce(contender.name)
        row = self.rows[contender.name] = {"ours": contender.ours, "compiles": contender.compiles, "error": ""}
        try:
            start = time.perf_counter()
            arguments = run.fresh_arguments()
            outputs = run.forward(arguments)
            gradients = run.backward(outputs, arguments)
            if self.device == "cuda":
                torch.cuda.synchronize()
            row["first_seconds"] = time.perf_counter() - start
            held = check(truth, outputs, gradients, ours=contender.ours, plain=self.plain.get(contender.inputs))
            if contender.name == "naive":
                self.plain[contender.inputs] = held
            row |= {"value_error": held.value_error, "gradient_error": held.gradient_error, "error": held.complaint}
        except Exception as error:  # a peer may raise anything; it is reported, and the others go on
            row["error"] = without_paths(f"{type(error).__name__}: {error}".split("\n", 1)[0])[:300]
            self._die_if_broken()
        finally:
            arguments, outputs, gradients = (), (), ()
            gc.collect()
        return not row["error"]

    def _measure(self, runs: dict[str, Run]) -> None:
        for name, run in runs.items():
            self._announce(name)
            self.rows[name]["extra_bytes"] = timing.peak_extra_bytes(run, self.device)
        if self.device == "cpu" and len(self.job["cases"]) == 1:  # it cannot be undone before another case
            timing.keep_memory()
        limits = {"seconds": self.job["sample_seconds"]} | {k: self.job[k] for k in ("min_rounds", "max_rounds")}
        for name, samples in timing.interleave(runs, self.device, announce=self._announce, **limits).items():
            self.rows[name]["samples"] = samples

    def _die_if_broken(self) -> None:
        """An illegal access on a GPU breaks the process for everyone, so it ends and is started without that peer."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(70)

    def _announce(self, name: str) -> None:
        say(self.out, {"at": name})


def say(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> None:
    job = json.load(sys.stdin)
    # peers print; what they print goes to standard error, and the messages keep standard output
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        warnings.simplefilter("ignore")
        if job["device"] == "cpu":
            torch.set_num_threads(job["threads"])
        if not job["cases"]:
            say(out, {"result": machine(job)})
        for case in job["cases"]:
            say(out, {"result": CaseRun(Case(**case), job, out).run()})


if __name__ == "__main__":
    main()
