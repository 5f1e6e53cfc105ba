"""PNG charts of a result: a figure a path, speed beside the reference and extra memory, one panel each."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from . import results
from .results import Entry

OURS, PEER = "#1f6f8b", "#b8b8b8"


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Paths of the figures; none, with a message, where matplotlib is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        print("no charts: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    drawn = []
    for path in dict.fromkeys(entry["case"]["path"] for entry in result["cases"]):
        entries = [e for e in result["cases"] if e["case"]["path"] == path and _bars(result, e)]
        if entries:
            target = folder / f"{stem}-{path}.png"
            figure = _figure(pyplot, result, path, entries)
            figure.savefig(target, dpi=120)
            pyplot.close(figure)
            drawn.append(target)
    return drawn


def _bars(result: dict[str, Any], entry: Entry) -> list[str]:
    return [name for name in entry["rows"] if results.samples(entry, name, results.metric(result))]


def _figure(pyplot: Any, result: dict[str, Any], path: str, entries: list[Entry]) -> Any:
    """A row of panels a case: bars from the reference's 1, with quartiles; dark bars are kdloss."""
    count = len(entries)
    height = sum(0.28 * len(_bars(result, entry)) + 0.75 for entry in entries) + 0.6
    ratios = [len(_bars(result, entry)) + 2 for entry in entries]
    figure, grid = pyplot.subplots(
        count, 2, figsize=(10, height), squeeze=False, layout="constrained", height_ratios=ratios
    )
    for (left, right), entry in zip(grid, entries, strict=True):
        names = _bars(result, entry)[::-1]
        colours = [OURS if entry["rows"][name]["ours"] else PEER for name in names]
        _speeds(left, result, entry, names, colours)
        memory = [results.extra_memory(entry, name) or 0.0 for name in names]
        right.barh(names, memory, color=colours)
        right.bar_label(right.containers[0], [f"{x:.2f}" if x else "" for x in memory], padding=3, fontsize=8)
        right.tick_params(labelleft=False)
        if not any(memory):
            right.set(xlim=(0, 1), xticks=[])
            right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center", fontsize=8, color="0.4")
        left.set_title(entry["name"], fontsize=9, loc="left")
        right.margins(x=0.15)
        for axes in (left, right):
            axes.tick_params(labelsize=8)
            axes.grid(axis="x", alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    unit = "user CPU time" if result["kind"] == "cpu" else "time"
    grid[-1][0].set_xlabel(f"speed beside {entries[-1]['reference']} ({unit}, median and quartiles)", fontsize=8)
    grid[-1][1].set_xlabel("peak extra memory, units of the logits", fontsize=8)
    figure.suptitle(f"{path}: forward + backward, {result['facts']['device']}", fontsize=10)
    return figure


def _speeds(axes: Any, result: dict[str, Any], entry: Entry, names: list[str], colours: list[str]) -> None:
    key, reference = results.metric(result), entry["reference"]
    spreads = [results.ratio(entry, reference, name, key) for name in names]
    medians = [s.median if s else 0.0 for s in spreads]
    below = [s.median - s.low if s else 0.0 for s in spreads]
    above = [s.high - s.median if s else 0.0 for s in spreads]
    axes.barh(names, medians, color=colours, xerr=(below, above), error_kw={"linewidth": 1, "capsize": 2})
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    axes.margins(x=0.15)
