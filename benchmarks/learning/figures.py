"""Four figures, one per task, from a result alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import pyplot_if_installed

from .plan import TASKS
from .report import LABELS, Result, Runs, estimate, mean_of


def draw(result: Result, folder: Path) -> list[Path]:
    """A figure per task; none without matplotlib."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return []
    written = []
    for task, figure_of in (("A", _figure_a), ("B", _figure_b), ("C", _figure_c), ("D", _figure_d)):
        if task in result["chosen"]:
            figure = figure_of(result, pyplot)
            written.append(folder / f"{task}.png")
            figure.savefig(written[-1], dpi=110)
            pyplot.close(figure)
    return written


def _figure_a(result: Result, pyplot: Any) -> Any:
    """Curves; and, where it was measured, the cosine at the start beside the accuracy at the end, a line per method."""
    runs = Runs(result, "A")
    cosines = [
        x for name, x in result.get("measured", {}).items() if name.startswith("exact/A/") and name.endswith("/0")
    ]
    widths = [6.5, 3, 3] if cosines else [6.5]
    figure, axes = pyplot.subplots(
        1, len(widths), figsize=(sum(widths) + 1.5, 5), layout="constrained", squeeze=False, width_ratios=widths
    )
    curves = axes[0, 0]
    _curves(
        curves, runs, ("full-reverse", "full-forward", "sft", "top4-sampled", "sampled", "sampled-discount-1", "grpo")
    )
    _teacher_line(curves, result, "A")
    curves.set_title("A. Knowledge gap")
    if not cosines:
        return figure
    methods = sorted(
        (method for method in runs.by_method if method in cosines[0]), key=lambda m: statistics.fmean(runs.values(m))
    )
    signal, accuracy = axes[0, 1], axes[0, 2]
    for y, method in enumerate(methods):
        found = estimate(runs.values(method))
        signal.plot(mean_of(cosines, method, "cosine"), y, marker="o", color="C0")
        accuracy.errorbar(found.mean, y, xerr=found.half, marker="o", color="C3")
    signal.set_yticks(range(len(methods)), [LABELS[method] for method in methods], fontsize=8)
    accuracy.set_yticks(range(len(methods)), [""] * len(methods))
    signal.set_title("cosine with the exact gradient,\none batch at the start", fontsize=9)
    accuracy.set_title("accuracy\nat the end", fontsize=9)
    for ax in (signal, accuracy):
        ax.set_xlim(-0.08, 1.08)
        ax.grid(alpha=0.3)
    return figure


def _figure_b(result: Result, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    shown = ("forward-hopeless-and-grpo", "sft-then-grpo", "kdrl-switched", "kdrl-.3", "sampled", "grpo", "literal-.3")
    _curves(axes, Runs(result, "B"), shown)
    _teacher_line(axes, result, "B")
    axes.set_title("B. A teacher that is often wrong, a reward that is rare")
    return figure


def _figure_c(result: Result, pyplot: Any) -> Any:
    """The accuracy against the age of the rollouts."""
    commons = (False, True) if "choosing" in result else (False,)
    figure, axes = pyplot.subplots(
        1, len(commons), figsize=(6 * len(commons), 4.6), sharey=True, layout="constrained", squeeze=False
    )
    for ax, common in zip(axes[0], commons, strict=True):
        runs = Runs(result, "C", common=common)
        for i, (way, label) in enumerate(
            (
                ("ratio", "reward recomputed, ratio"),
                ("no-ratio", "reward recomputed, no ratio"),
                ("frozen-ratio", "reward frozen, ratio"),
                ("frozen-no-ratio", "reward frozen, no ratio"),
                ("folded", "reward frozen, folded into advantages"),
            )
        ):
            points = {0: "sampled"} | {
                age: name for age in (1, 4, 8) if (name := f"stale-{age}-{way}") in runs.by_method
            }
            found = [estimate(runs.values(method)) for method in points.values()]
            style = {"marker": "o", "capsize": 3, "color": f"C{i}", "label": label}
            ax.errorbar(list(points), [x.mean for x in found], [x.half for x in found], **style)
        _teacher_line(ax, result, "C")
        title = f"learning rate {TASKS['C'].common_rate:g}" if common or len(commons) == 1 else "the best rate of each"
        ax.set(
            xlabel="updates between sampling and training", ylabel="accuracy", title=f"C. {title}", ylim=(-0.03, 1.03)
        )
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return figure


def _figure_d(result: Result, pyplot: Any) -> Any:
    """Accuracy and reverse KL against the weight."""
    runs = Runs(result, "D", common="choosing" in result)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for form, alone, label, color in (
        ("kdrl", "sampled", "kdrl_loss", "C0"),
        ("literal", "literal-alone", "literal joint form", "C3"),
    ):
        found = {w: f"{form}-{w}" for w in (".1", "1", "3", "10") if f"{form}-{w}" in runs.by_method}
        found = (
            ({"0": "grpo"} if "grpo" in runs.by_method else {})
            | found
            | ({"alone": alone} if alone in runs.by_method else {})
        )
        places = [("0", ".1", "1", "3", "10", "alone").index(w) for w in found]
        for ax, key in zip(axes, ("accuracy", "reverse_kl"), strict=True):
            points = [estimate(runs.values(method, key)) for method in found.values()]
            ax.errorbar(
                places,
                [x.mean for x in points],
                [x.half for x in points],
                marker="o",
                capsize=3,
                color=color,
                label=label,
            )
    for ax, name in zip(axes, ("accuracy", "reverse KL to the teacher, nats a token"), strict=True):
        ax.set_xticks(range(6), ["0: GRPO", ".1", "1", "3", "10", "teacher\nalone"])
        ax.set(xlabel="weight of the teacher", ylabel=name)
        ax.grid(alpha=0.3)
    axes[1].set_yscale("log")
    _teacher_line(axes[0], result, "D")
    axes[0].legend(fontsize=9)
    axes[0].set_title("D. The sweep of weights")
    return figure


def _curves(ax: Any, runs: Runs, shown: Sequence[str]) -> None:
    """Means with their intervals, each with its label at its end."""
    ends = []
    for i, method in enumerate(x for x in shown if x in runs.by_method):
        points = runs.curve(method)
        x = [TASKS[runs.task].every * j for j in range(len(points))]
        ax.plot(x, [p.mean for p in points], color=f"C{i}")
        ax.fill_between(x, [p.low for p in points], [p.high for p in points], color=f"C{i}", alpha=0.15, linewidth=0)
        ends.append((points[-1].mean, x[-1], LABELS[method], f"C{i}"))
    last = -1.0
    for y, x_end, label, color in sorted(ends):  # from below, each at least a line above the last
        last = max(y, last + 0.05)
        ax.annotate(
            label, (x_end, y), xytext=(x_end * 1.02, last), fontsize=8, color=color, va="center", annotation_clip=False
        )
    if ends:
        ax.set_xlim(0, ends[0][1] * 1.6)
    ax.set(xlabel="updates", ylabel="accuracy on held-out messages", ylim=(-0.03, 1.03))
    ax.grid(alpha=0.3)


def _teacher_line(ax: Any, result: Result, task: str) -> None:
    levels = [x["accuracy"] for name, x in result["start"].items() if name.startswith(f"teacher/{task}/")]
    ax.axhline(statistics.fmean(levels), color="0.4", linestyle="--", linewidth=1)
    place = {"ha": "right", "fontsize": 8, "color": "0.3", "transform": ax.get_yaxis_transform()}
    ax.text(0.99, statistics.fmean(levels) + 0.01, "teacher", **place)
