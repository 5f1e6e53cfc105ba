"""`python -m benchmarks`: measures every case of a grid in a fresh process, and prints or saves the report.

Nothing is written unless `--save` or `--out` asks for it. This process imports no torch, so a machine without it can
list the cases and lay out stored results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import report
from .cases import GRIDS, Case, Grid, matching

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
OURS = ("kdloss", "gather")  # how the names of our contenders begin


class WorkerError(Exception):
    """A process that ended before its work was done."""

    def __init__(self, message: str, *, at: str | None = None, timed_out: bool = False):
        super().__init__(message)
        self.at, self.timed_out = at, timed_out  # who was running


def results_of(
    job: dict[str, Any], *, timeout: float, compiled: str, on_contender: Callable[[str], None] = lambda name: None
) -> Iterator[dict[str, Any]]:
    """The results of a job, as a new process reports them. `compiled` is the folder of what torch compiles.

    Raises:
        WorkerError: it died, or was stopped after `timeout` seconds.
    """
    paths = [str(ROOT), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": compiled}
        if job["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # autograd on a machine with GPUs starts threads, and cannot fork
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(max(0.0, min(timeout, 86400.0)), stop)
        timer.start()
        at = None
        with process:
            try:
                for message in _converse(process, json.dumps(job)):
                    if "result" in message:
                        yield message["result"]
                    else:
                        at = message["at"]
                        on_contender(at)
            except BaseException:  # also where nobody asks for the remaining results
                process.kill()
                raise
            finally:
                timer.cancel()
        if timed_out.is_set():
            raise WorkerError(f"stopped after {timeout:.0f} s", at=at, timed_out=True)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise WorkerError(
                report.without_paths(said[-1]) if said else f"ended with code {process.returncode}", at=at
            )


def _converse(process: subprocess.Popen[str], job: str) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:  # it died before it read; its own words say why
        return
    for line in process.stdout:
        yield json.loads(line)


@dataclass
class Suite:
    """One run of a grid on a device."""

    name: str
    grid: Grid
    cases: list[Case]
    device: str
    threads: int = 1
    on_entry: Callable[[dict[str, Any]], None] = lambda result: None  # after each case, with everything so far
    started: float = field(default_factory=time.monotonic)

    def __call__(self) -> dict[str, Any]:
        """The result. `failed` says that ours is wrong or died; no case ran after it.

        Raises:
            WorkerError: the machine could not be measured.
        """
        with tempfile.TemporaryDirectory() as compiled:  # of this run alone: a first call compiles
            return self._run(partial(results_of, compiled=compiled))

    def _run(self, results_of: Callable[..., Iterator[dict[str, Any]]]) -> dict[str, Any]:
        result: dict[str, Any] = {"grid": self.name, "kind": self.device, "cases": [], "not_run": {}, "failed": ""}
        (machine,) = results_of(self._job([]), timeout=600)
        result |= machine
        todo, died = list(self.cases), list[str]()
        with _progress(len(todo)) as (step, note):
            while todo and not result["failed"]:
                left = self.grid.seconds - (time.monotonic() - self.started)
                if left < 5:
                    result["not_run"] |= dict.fromkeys([x.name for x in todo], "the time of the grid was over")
                    break
                batch = todo if self.grid.quick else todo[:1]
                job = self._job(batch, ceilings=machine["ceilings"], exclude=died)
                try:
                    step(len(self.cases) - len(todo), todo[0].name)
                    for entry in results_of(job, timeout=left, on_contender=note):
                        result["cases"].append(entry)
                        todo = todo[1:]
                        died, result["failed"] = [], _failure(entry)
                        self.on_entry(result)
                        if not todo or result["failed"]:
                            break
                        step(len(self.cases) - len(todo), todo[0].name)
                except WorkerError as error:
                    case = todo[0]
                    if error.timed_out:
                        result["not_run"][case.name] = str(error)
                        todo = todo[1:]
                    elif error.at is None or error.at.startswith(OURS):
                        result["failed"] = f"{case.name}: {error.at or 'the process'} died: {error}"
                    else:
                        died = [*died, error.at]  # the case is tried again without the peer that killed the process
        result["seconds"] = round(time.monotonic() - self.started, 1)
        return result

    def _job(self, cases: list[Case], **more: Any) -> dict[str, Any]:
        limits = {key: getattr(self.grid, key) for key in ("sample_seconds", "min_rounds", "max_rounds", "quick")}
        job = {"device": self.device, "threads": self.threads, "cases": [vars(case) for case in cases]}
        return {**job, **limits, **more}


def _failure(entry: dict[str, Any]) -> str:
    wrong = [f"{name}: {row['error']}" for name, row in entry["rows"].items() if row["ours"] and row["error"]]
    return f"{entry['name']}: {wrong[0]}" if wrong else ""


@contextmanager
def _progress(steps: int) -> Iterator[tuple[Callable[[int, str], None], Callable[[str], None]]]:
    """(next case, next contender), on standard error: a bar, or a line per case without a terminal or tqdm."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield (lambda done, case: print(case, file=sys.stderr)), (lambda contender: None)
        return
    tqdm = importlib.import_module("tqdm").tqdm
    with tqdm(total=steps, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:

        def step(done: int, case: str) -> None:
            bar.set_description(case)
            bar.update(done - bar.n)

        yield step, bar.set_postfix_str


# --- the command line ----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m benchmarks", description="Measures kdloss beside its peers.")
    grid = out.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_const", const="quick", dest="grid", help="does it work? under a minute")
    grid.add_argument("--core", action="store_const", const="core", dest="grid", help="the default")
    grid.add_argument("--full", action="store_const", const="full", dest="grid", help="more shapes, more rounds")
    grid.add_argument(
        "--report",
        type=Path,
        metavar="JSON",
        help="measure nothing: print a stored result, or lay it out again with --save",
    )
    out.set_defaults(grid="core")
    out.add_argument("--only", metavar="PATTERN", help="cases whose name matches this regular expression")
    out.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    out.add_argument("--save", action="store_true", help="write to benchmarks/results/, and renew the page's summary")
    out.add_argument("--out", type=Path, metavar="DIR", help="write JSON, Markdown and a chart to this folder")
    out.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    out.add_argument("--threads", type=int, default=1, help="on a CPU; default: 1, see docs/benchmarks.md")
    return out


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _stored(options) if options.report else _measure(options)
    except (OSError, ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace) -> int:
    missing = [name for name in ("torch", "kdloss") if importlib.util.find_spec(name) is None]
    if missing and not options.list:
        raise ValueError(f"no {', '.join(missing)}: pip install -e . , or PYTHONPATH=src for kdloss")
    grid = GRIDS[options.grid, device := options.device or ("cpu" if missing else _device())]
    cases = matching(grid.cases, options.only)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    stem = options.grid if options.only is None else f"{options.grid}-only"
    folder = options.out or (RESULTS if options.save else None)

    def keep(so_far: dict[str, Any]) -> None:
        """An interrupted run keeps what it has."""
        if folder:
            report.write(so_far, folder / so_far["slug"], stem, pictures=False)

    result = Suite(options.grid, grid, cases, device, options.threads, keep)()
    written = report.write(result, folder / result["slug"], stem) if folder else []
    print(report.markdown(result))
    if written and not result["failed"]:
        _renew_pages(result, written[0])
    print("\n".join(_shown(path) for path in written))
    if result["failed"]:
        print(f"error: {result['failed']}", file=sys.stderr)
    return 1 if result["failed"] else 0


def _stored(options: argparse.Namespace) -> int:
    result = json.loads(options.report.read_text(encoding="utf-8"))
    print(report.markdown(result))
    if options.save:
        report.write(result, options.report.parent, options.report.stem)
        _renew_pages(result, options.report)
    return 0


def _renew_pages(result: dict[str, Any], data: Path) -> None:
    """The summaries of the pages that name this stored result."""
    if data.resolve().is_relative_to(ROOT):
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            renewed = report.documented(text, result, data.resolve().relative_to(ROOT).as_posix())
            if renewed != text:
                page.write_text(renewed, encoding="utf-8")


def _device() -> str:
    import torch  # only where no device is named

    return "cuda" if torch.cuda.is_available() else "cpu"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
