"""`python -m benchmarks`: measures, and writes JSON, Markdown and charts to benchmarks/results/<device>/."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import report
from .bars import bars
from .cases import grid_of, matching
from .processes import ROOT, WorkerError
from .progress import Progress
from .suite import OursWrongError, Suite

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m benchmarks", description="Measures kdloss beside its peers.")
    grid = out.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_const", const="quick", dest="grid", help="a minute on two cores")
    grid.add_argument("--core", action="store_const", const="core", dest="grid", help="12 points, 10 minutes on a GPU")
    grid.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: lay out a stored result again")
    out.set_defaults(grid="full")
    out.add_argument("--only", metavar="PATTERN", help="cases whose name holds this regular expression")
    out.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    out.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    out.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    out.add_argument("--threads", type=int, default=1, help="on a CPU; default: 1, see docs/benchmarks.md")
    out.add_argument("--seconds", type=float, help="end before this, instead of the grid's own limit")
    return out


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.report:
        return _report_again(options.report)
    missing = [name for name in ("torch", "kdloss") if importlib.util.find_spec(name) is None]
    if missing and not options.list:
        print(f"error: no {', '.join(missing)}: pip install -e . , or PYTHONPATH=src for kdloss", file=sys.stderr)
        return 2
    device = options.device or ("cpu" if missing else _device())
    grid = grid_of(options.grid, device)
    if options.seconds is not None:
        grid = replace(grid, seconds=options.seconds)
    try:
        cases = matching(grid.cases, options.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0

    stem = options.grid if options.only is None else f"{options.grid}-only"
    result: dict[str, Any] = {}

    def save(so_far: dict[str, Any]) -> None:
        result.update(so_far)
        report.write(so_far, options.out / so_far["slug"], stem, pictures=False)

    suite = Suite(options.grid, grid, cases, device, options.threads, save, Progress())
    failed = ""
    try:
        suite()
    except OursWrongError as error:
        failed = str(error)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    written = report.write(result, options.out / result["slug"], stem)
    for bar in bars(result):
        print(f"{bar.met:>12}  {bar.what}: {bar.measured or '-'} (bar {bar.bar})")
    print("\n".join(_shown(path) for path in written))
    if failed:
        print(f"error: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _device() -> str:
    import torch  # only where no device is named

    return "cuda" if torch.cuda.is_available() else "cpu"


def _report_again(stored: Path) -> int:
    try:
        result = json.loads(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: --report {stored}: {error}", file=sys.stderr)
        return 2
    for path in report.write(result, stored.parent, stored.stem):
        print(_shown(path))
    return 0


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
