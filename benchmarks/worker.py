"""The fresh process: does one job that comes as JSON on standard input, and writes JSON lines on standard output.

Jobs: "machine" (facts and ceilings), "case" (parity, then time; on a GPU memory too), "memory" (one contender's, on a
CPU). A line {"at": name} says who is about to run, so that whoever started the process knows whom a crash belongs to;
the last line is {"result": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any, TextIO

import torch

from . import ceilings, machine, memory, parity, timing
from .cases import Case
from .contenders import Contender, Problem, Run
from .paths import PATHS
from .processes import without_paths


def run_machine(job: dict[str, Any]) -> dict[str, Any]:
    device = job["device"]
    facts = machine.describe(device, torch.get_num_threads())
    return {
        "facts": facts,
        "slug": machine.slug(facts["device"]),
        "free_bytes": machine.free_bytes(device),
        "ceilings": ceilings.measure(device, quick=job["quick"]),
    }


class CaseRun:
    """Parity, then interleaved samples, then (on a GPU) memory, of everyone who can take part in a case."""

    def __init__(self, job: dict[str, Any], out: TextIO):
        self.case = Case(**job["case"])
        self.device: str = job["device"]
        self.exclude: set[str] = set(job.get("exclude", ()))
        self.limits = {"seconds": job["sample_seconds"], "max_rounds": job["max_rounds"]}
        self.out = out
        self.absent: dict[str, str] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.plain: dict[str, parity.Parity] = {}  # of plain torch, by variant

    def run(self) -> dict[str, Any]:
        path = PATHS[self.case.path]
        entrants = [c for c in path.contenders(self.case, self.device, self.absent) if c.name not in self.exclude]
        self.absent.update(dict.fromkeys(self.exclude, "the process died while it ran"))
        if not any(c.ours for c in entrants):
            return {"absent": self.absent, "rows": {}, "reference": path.reference}
        free = machine.free_bytes(self.device) - self.case.input_bytes
        problem = path.problem(self.case, self.device, True)
        _settle(self.device)
        runs = {}
        # eager plain torch first: ours is held to its errors; then ours, which so finds nothing that a peer compiled
        for contender in sorted(entrants, key=lambda c: c.compiled or not c.name.startswith("naive")):
            need = contender.units * self.case.logits_bytes
            if need > 0.9 * free:
                self.absent[contender.name] = f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            elif run := self._admit(contender, problem):
                runs[contender.name] = run
        if any(row["ours"] and row["error"] for row in self.rows.values()):
            runs = {}  # ours is wrong: nothing is timed
        for name, samples in timing.interleave(runs, self.device, announce=self._announce, **self.limits).items():
            self.rows[name]["samples"] = samples
        if self.device == "cuda":
            for name, run in runs.items():
                self._announce(name)
                self.rows[name]["extra_bytes"] = memory.peak_extra_bytes(run, self.device)
        rows = {c.name: self.rows[c.name] for c in entrants if c.name in self.rows}
        return {"absent": self.absent, "rows": rows, "reference": path.reference}

    def _admit(self, contender: Contender, problem: Problem) -> Run | None:
        """First call (which compiles) and parity; None if it raised or is wrong."""
        self._announce(contender.name)
        run = Run(contender, contender.build(), problem[contender.variant])
        row = self.rows[contender.name] = {
            "ours": contender.ours,
            "compiled": contender.compiled,
            "scale": contender.scale,
            "work": contender.work,
            "error": "",
        }
        try:
            arguments, leaves = run.fresh_arguments()
            start = time.perf_counter()
            outputs = run.forward(arguments)
            gradients = run.backward(outputs, leaves)
            _settle(self.device)
            row["first_seconds"] = time.perf_counter() - start
            held = parity.check(run, outputs, gradients, plain=self.plain.get(contender.variant))
            if contender.name.startswith("naive") and not contender.compiled:
                self.plain.setdefault(contender.variant, held)
            row["parity"] = asdict(held)
            row["error"] = held.complaint
        except Exception as error:  # a peer may raise anything; it is reported, and the others go on
            row["error"] = without_paths(f"{type(error).__name__}: {error}".split("\n", 1)[0])[:300]
            self._die_if_broken()
        finally:
            arguments, leaves, outputs, gradients = (), (), (), ()
            gc.collect()
        return None if row["error"] else run

    def _die_if_broken(self) -> None:
        """An illegal access on a GPU breaks the process for everyone: better to end it, and be started without them."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(70)

    def _announce(self, name: str) -> None:
        say(self.out, {"at": name})


def run_memory(job: dict[str, Any]) -> dict[str, Any]:
    case, device = Case(**job["case"]), job["device"]
    path = PATHS[case.path]
    (contender,) = (c for c in path.contenders(case, device, {}) if c.name == job["contender"])
    problem = path.problem(case, device, False)
    run = Run(contender, contender.build(), problem[contender.variant])
    return {"extra_bytes": memory.peak_extra_bytes(run, device)}


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
        work = {
            "machine": lambda: run_machine(job),
            "case": lambda: CaseRun(job, out).run(),
            "memory": lambda: run_memory(job),
        }
        say(out, {"result": work[job["kind"]]()})


if __name__ == "__main__":
    main()
