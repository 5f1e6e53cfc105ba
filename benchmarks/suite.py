"""Runs a grid: ceilings, then every case's parity and time, then memory; stops in time, and when ours is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import Case, Grid, distinct, fitted
from .processes import WorkerError, run_job
from .progress import Progress

STARTUP_SECONDS = 5  # a case is not begun with less than this left
Result = dict[str, Any]


OURS = ("kdloss", "kdrl_loss", "gather")  # how names of ours begin


class OursWrongError(Exception):
    """kdloss itself failed its parity check, or died."""


@dataclass
class Suite:
    """One run of a grid on a device."""

    grid_name: str
    grid: Grid
    cases: list[Case]
    device: str
    threads: int
    save: Callable[[Result], None]  # called after each step, so that an interrupted run keeps what it has
    progress: Progress
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.grid.seconds - (time.monotonic() - self.started)

    def __call__(self) -> Result:
        """The whole result.

        Raises:
            OursWrongError: after saving, naming the case and the errors.
            WorkerError: the machine could not be measured.
        """
        quick = self.grid_name == "quick"
        result: Result = {"format": 1, "grid": self.grid_name, "kind": self.device, "cases": []}
        with self.progress as progress:
            progress.begin(len(self.cases) + 1)
            progress.step("ceilings")
            result.update(run_job(self._job("machine", quick=quick), timeout=self._timeout()))
            for case in self._fit(result):
                progress.step(case.name)
                result["cases"].append(self._time(case, result["ceilings"]))
                self.save(result)
                _raise_if_ours_is_wrong(result["cases"][-1])
            if self.device == "cpu":
                self._memory(result)
        result["seconds"] = round(time.monotonic() - self.started, 1)
        self.save(result)
        return result

    def _fit(self, result: Result) -> list[Case]:
        limits = {"free_bytes": result["free_bytes"], "ceilings": result["ceilings"], "gpu": self.device == "cuda"}
        return distinct([fitted(case, call_seconds=self.grid.call_seconds, **limits) for case in self.cases])

    def _time(self, case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "case": asdict(case),
            "name": case.name,
            "logits_bytes": case.logits_bytes,
            "floor_seconds": case.floor_seconds(ceilings),
            "rows": {},
            "absent": {},
            "not_run": "",
        }
        died: list[str] = []
        while True:
            if self.seconds_left < STARTUP_SECONDS:
                entry["not_run"] = f"the {self.grid.seconds:.0f} s of the grid were over"
                return entry
            limits = {"sample_seconds": self.grid.sample_seconds, "max_rounds": self.grid.max_rounds}
            job = self._job("case", case=asdict(case), exclude=died, **limits)
            try:
                entry.update(
                    run_job(job, timeout=self._timeout(), keep_memory=True, cold=True, on_contender=self.progress.note)
                )
            except WorkerError as error:
                if error.timed_out:
                    entry["not_run"] = str(error)
                    return entry
                if error.at is None or error.at.startswith(OURS):
                    entry["not_run"] = f"{error.at or 'the process'} died: {error}"
                    entry["died"] = True
                    return entry
                died = [*died, error.at]  # a peer that kills the process is left out of another try
                continue
            if not entry["rows"]:
                entry["not_run"] = entry["absent"].get("kdloss", "no contender of ours")
            return entry

    def _memory(self, result: Result) -> None:
        """One process a contender; ours of every case first, then what bars compare it with, in case time runs out."""
        todo = [(entry, name) for entry in result["cases"] for name, row in entry["rows"].items() if "samples" in row]
        if not self.grid.peers_memory:
            todo = [(entry, name) for entry, name in todo if name in ("kdloss", "naive", "kdloss fused")]
        todo.sort(key=lambda pair: (not pair[0]["rows"][pair[1]]["ours"], pair[1] != "naive"))
        self.progress.extend(len(todo))
        for entry, name in todo:
            self.progress.step(f"memory of {name}, {entry['name']}")
            if self.seconds_left < STARTUP_SECONDS:
                continue
            job = self._job("memory", case=entry["case"], contender=name)
            try:
                entry["rows"][name].update(run_job(job, timeout=self._timeout()))
            except WorkerError as error:
                entry["rows"][name]["memory_error"] = str(error)
            self.save(result)

    def _job(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "device": self.device, "threads": self.threads, **more}

    def _timeout(self) -> float:
        return max(1.0, min(self.seconds_left, 3600.0))


def _raise_if_ours_is_wrong(entry: dict[str, Any]) -> None:
    for name, row in entry["rows"].items():
        if row["ours"] and row["error"]:
            raise OursWrongError(f"{entry['name']}: {name} fails parity: {row['error']}")
    if entry.get("died"):
        raise OursWrongError(f"{entry['name']}: {entry['not_run']}")
