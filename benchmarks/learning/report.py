"""Tables with intervals, and the page's blocks, from a result alone.

± is half of a 95 % t-interval. Of one table it is over the student seeds; of all tables it is over all runs.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import table

from .methods import METHODS
from .plan import BOUNDS, COMPARISONS, RATES, TASKS, Bound, Comparison

BLOCK = re.compile(r"(<!-- learning: (\S+) -->\n).*?(<!-- end of learning -->)", re.DOTALL)
# quantiles of Student's t at .975, by degrees of freedom; above, it is within 1 % of the formula below
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
LABELS = {name: method.label for name, method in METHODS.items()}
Result = dict[str, Any]


class Estimate(NamedTuple):
    mean: float
    half: float  # of the interval; 0 for one value

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{_number(self.mean)} ± {_number(self.half)}" if self.half else _number(self.mean)


def estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    if n == 1:
        return Estimate(values[0], 0.0)
    quantile = T[n - 2] if n - 1 <= len(T) else 1.96 + 2.5 / (n - 1)
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / n**0.5)


def updates_to_half(run: dict[str, Any]) -> float | None:
    """Updates until the curve first reaches half of its last level; None if that is not above its start."""
    curve, every = run["curve"], TASKS[run["task"]].every
    level = statistics.fmean(curve[-3:])  # of the last three points: one alone has a standard error of .03
    if level < curve[0] + 0.02:
        return None
    return next(i for i, accuracy in enumerate(curve) if accuracy >= level / 2) * every


class Runs:
    """The confirming runs of a task at the rate that was chosen for each method, or at its common rate."""

    def __init__(self, result: Result, task: str, *, common: bool = False) -> None:
        self.task, self.common = task, common
        methods = {run["method"]: TASKS[task].common_rate for run in result["runs"] if run["task"] == task}
        self.rates: dict[str, float | None] = methods if common else result["chosen"][task]
        self.by_method: dict[str, list[dict[str, Any]]] = {method: [] for method in self.rates}
        for run in result["runs"]:
            if run["task"] == task and run["rate"] == self.rates.get(run["method"]):
                self.by_method[run["method"]].append(run)

    def values(self, method: str, key: str | Callable[[dict[str, Any]], float | None] = "accuracy") -> list[float]:
        read = key if callable(key) else lambda run: run[key]
        return [x for run in self.by_method[method] if (x := read(run)) is not None]

    def tables(self, method: str) -> dict[int, Estimate]:
        """The accuracy on each table."""
        found: dict[int, list[float]] = {}
        for run in self.by_method[method]:
            found.setdefault(run["table"], []).append(run["accuracy"])
        return {table: estimate(values) for table, values in sorted(found.items())}

    def curve(self, method: str) -> list[Estimate]:
        return [estimate(point) for point in zip(*(run["curve"] for run in self.by_method[method]), strict=True)]


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """The whole report."""
    found = blocks(result)
    titles = {task: f"{task}. {TASKS[task].title}" for task in result["chosen"]} | {
        "comparisons": "Comparisons that the plan fixed",
        "paired": "The same comparisons, each student against itself: not in the plan",
        "rates": "Learning rates, chosen on a separate table",
        "explored": "Explored beforehand: no evidence",
    }
    for name in titles:
        if noise := found.get(f"{name}-gradients"):
            found[name] += f"\n\n{noise}"
    parts = [f"## {title}\n\n{found[name]}" for name, title in titles.items() if name in found]
    return "\n\n".join([found["facts"], *parts])


def blocks(result: Result) -> dict[str, str]:
    """The tables by name, as the page shows them."""
    found = {"facts": facts(result)}
    for task in result["chosen"]:
        runs = Runs(result, task)
        found[task] = f"{starts(result, task)}\n\n{methods_table(runs)}"
        if TASKS[task].common_rate and "choosing" in result:
            rate = f"All methods at the learning rate {TASKS[task].common_rate:g}:"
            found[task] += f"\n\n{rate}\n\n{methods_table(Runs(result, task, common=True))}"
        if noise := noise_table(result, task):
            found[f"{task}-gradients"] = noise
    if "choosing" in result:
        found["comparisons"], found["paired"] = comparisons(result), paired(result)
        found["rates"] = rates_table(result)
        found["explored"] = "\n".join(f"- {text}" for text in result["explored"])
    return found


def documented(page: str, result: Result) -> str:
    """The page with each of its blocks renewed."""
    found = blocks(result)
    return BLOCK.sub(lambda m: f"{m[1]}\n{found[m[2]]}\n\n{m[3]}" if m[2] in found else m[0], page)


def facts(result: Result) -> str:
    known = result["facts"]
    device = "" if known["device"] == "cpu" else f", {known['device']}"
    return (
        f"{known['processor']}{device}, one thread a run; torch {known['torch']}, kdloss {known['kdloss']}; "
        f"{known['date']}; {known['seconds']} seconds of a processor."
    )


def starts(result: Result, task: str) -> str:
    """How good teachers and students are before the first update."""
    kinds: dict[str, list[float]] = {}
    for name, found in result["start"].items():
        kind, of, *_ = name.split("/")
        if of == task:
            kinds.setdefault(kind, []).append(found["accuracy"])
    teachers = ", ".join(_number(x) for x in kinds["teacher"])
    return f"Teachers: {teachers}. Students before training: {estimate(kinds['student'])}."


def methods_table(runs: Runs) -> str:
    """A row per method, the best first."""
    tables = sorted({run["table"] for its in runs.by_method.values() for run in its})
    head = ["method", "rate", "runs", "accuracy", *(f"table {x}" for x in tables)]
    head += ["updates to half", "reverse KL", "entropy", "length"]
    rows = []
    for method in sorted(runs.by_method, key=lambda m: -statistics.fmean(runs.values(m))):
        half = runs.values(method, updates_to_half)
        row = [
            LABELS[method],
            f"{runs.rates[method]:g}",
            str(len(runs.by_method[method])),
            str(estimate(runs.values(method))),
        ]
        row += [str(x) for x in runs.tables(method).values()]
        row += [f"{statistics.median(half):.0f}" if half else "never"]
        row += [
            f"{statistics.fmean(runs.values(method, key)):.{n}f}"
            for key, n in (("reverse_kl", 3), ("entropy", 3), ("length", 2))
        ]
        rows.append(row)
    return table(head, rows)


def noise_table(result: Result, task: str) -> str:
    """Cosine and signal-to-noise ratio of each method, a pair of columns per checkpoint."""
    found: dict[int, list[dict[str, Any]]] = {}
    for name, measured in result.get("measured", {}).items():
        kind, of, *rest = name.split("/")
        if of == task and kind == "exact":
            found.setdefault(int(rest[-1]), []).append(measured)
    effects = [x for name, x in result.get("measured", {}).items() if name.startswith(f"effect/{task}/")]
    if effects:
        shares = ((name, max(x[name] for x in effects)) for name in effects[0])
        return (
            "Change of the gradient on one batch under another teacher, as a share of it: "
            + "; ".join(f"{name} {share:.2g}" for name, share in shares)
            + "."
        )
    if not found:
        return ""
    points = sorted(found)
    head = ["method", *(f"{what}, update {at}" for at in points for what in ("cosine", "signal to noise"))]
    rows = []
    for method in sorted(found[points[0]][0], key=lambda m: -mean_of(found[points[0]], m, "cosine")):
        cells = [
            (mean_of(found[at], method, key), n) for at in points for key, n in (("cosine", 2), ("signal_to_noise", 3))
        ]
        rows.append([LABELS[method], *(f"{x:.{n}f}" for x, n in cells)])
    return table(head, rows)


def mean_of(measured: list[dict[str, Any]], method: str, key: str) -> float:
    return statistics.fmean(x[method][key] for x in measured)


def rates_table(result: Result) -> str:
    """The accuracy at every rate on the choosing table; the chosen one is bold."""
    accuracy: dict[tuple[str, str, float], list[float]] = {}
    for run in result["choosing"]:
        accuracy.setdefault((run["task"], run["method"], run["rate"]), []).append(run["accuracy"])
    rows = []
    for task, chosen in result["chosen"].items():
        for method, best in chosen.items():
            means = {rate: _number(statistics.fmean(accuracy[task, method, rate])) for rate in RATES}
            rows.append([task, LABELS[method], *(f"**{x}**" if rate == best else x for rate, x in means.items())])
    return table(["task", "method", *(f"{rate:g}" for rate in RATES)], rows)


def comparisons(result: Result) -> str:
    rows = [
        [claim.task, rate, *(_bound(claim, runs) if isinstance(claim, Bound) else _comparison(claim, runs))]
        for claim, rate, runs in _claims(result)
    ]
    return table(["task", "rate", "claim", "table by table", "holds on"], rows)


def paired(result: Result) -> str:
    """Differences of the same student under two methods: initial student, prompts and questions cancel out."""
    rows = []
    for claim, rate, runs in _claims(result):
        if isinstance(claim, Bound):
            continue
        of = _by_student(runs, claim.better)
        for other in claim.others:
            than = _by_student(runs, other)
            both = [key for key in of if key in than]
            found = estimate([of[key] - than[key] for key in both])
            won = sum(of[key] > than[key] for key in both)
            cells = [f"{LABELS[claim.better]} - {LABELS[other]}", f"{found.mean:+.3f} ± {found.half:.3f}"]
            rows.append([claim.task, rate, *cells, f"{won} of {len(both)}"])
    return table(["task", "rate", "difference", "accuracy", "students that it is above 0 for"], rows)


def _by_student(runs: Runs, method: str) -> dict[tuple[int, int], float]:
    return {(run["table"], run["student"]): run["accuracy"] for run in runs.by_method[method]}


def _claims(result: Result) -> Iterator[tuple[Comparison | Bound, str, Runs]]:
    """Yield each claim whose runs are there with the rate that it is read at, and these runs."""
    for claim in (*COMPARISONS, *BOUNDS):
        if claim.task not in result["chosen"]:
            continue
        for common in (False, True) if TASKS[claim.task].common_rate else (False,):
            runs = Runs(result, claim.task, common=common)
            if {*_methods_of(claim)} <= {*runs.by_method}:
                yield claim, f"{TASKS[claim.task].common_rate:g} for all" if common else "each its best", runs


def _methods_of(claim: Comparison | Bound) -> tuple[str, ...]:
    return (claim.method,) if isinstance(claim, Bound) else (claim.better, *claim.others)


def _comparison(claim: Comparison, runs: Runs) -> list[str]:
    better, others = runs.tables(claim.better), [runs.tables(other) for other in claim.others]
    cells, held = [], 0
    for at, x in better.items():
        best = max((other[at] for other in others), key=lambda y: y.mean)
        cells.append(f"{x} / {best}")
        held += all(x.mean - other[at].mean >= claim.margin and x.low > other[at].high for other in others)
    margin = f" by {_number(claim.margin)}" if claim.margin else ""
    text = f"{LABELS[claim.better]} above {', '.join(LABELS[x] for x in claim.others)}{margin}"
    return [text, "; ".join(cells), f"{held} of {len(better)}"]


def _bound(claim: Bound, runs: Runs) -> list[str]:
    found = runs.tables(claim.method)
    held = sum(claim.least <= x.mean <= claim.most for x in found.values())
    text = f"at most {_number(claim.most)}" if claim.most < 1 else f"at least {_number(claim.least)}"
    return [f"{LABELS[claim.method]} {text}", "; ".join(map(str, found.values())), f"{held} of {len(found)}"]


def _number(x: float) -> str:
    return f"{x:.3f}".removeprefix("0")


# --- files -----------------------------------------------------------------------------------------------------------


def write(result: Result, folder: Path) -> list[Path]:
    """JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / "learning.json", folder / "learning.md"
    data.write_text(_compact(result), encoding="utf-8")
    text.write_text(f"# The learning study\n\n{markdown(result)}\n", encoding="utf-8")
    return [data, text]


def _compact(result: Result) -> str:
    """JSON with a line per run."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
