"""Draws the pictures of the pages as SVG files beside them. Needs the extra `bench`.

    python docs/draw_pictures.py

Backgrounds are transparent and lines are of a medium grey, so that a picture can be read on a light and on a dark page.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent
BENCHMARKS = FOLDER.parent / "benchmarks" / "results" / "intel-xeon-2-cores" / "core.json"

GREY, BLUE, ORANGE = "#808080", "#4a90d9", "#e08214"
STYLE = {
    "svg.fonttype": "path",  # no font of the reader's is needed
    "svg.hashsalt": "kdloss",  # the same file in every run
    "font.size": 12,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """One cell is one unit on both axes; y grows downwards."""
    figure, axes = plt.subplots(figsize=(6.6, 6.6 * height / width))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def cell(axes: Axes, x: float, y: float, text: str, color: str = GREY, fill: bool = False, width: float = 1) -> None:
    box = Rectangle(
        (x + 0.04, y + 0.04), width - 0.08, 0.92, edgecolor=color, facecolor=color if fill else "none", lw=1.2
    )
    axes.add_patch(box)
    axes.text(x + width / 2, y + 0.52, text, ha="center", va="center", color="white" if fill else color, fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, lw=1, shrinkA=0, shrinkB=0)
    )


def alignment() -> Figure:
    """Tokens, labels, mask and what a server reports, of two sequences; the numbers are those of packing.md."""
    figure, axes = canvas(11.2, 8.6)
    tokens, left = [11, 12, 13, 14, 21, 22, 23, 24], 3.1
    colors = [BLUE] * 4 + [ORANGE] * 4
    response = [False, False, True, True, False, True, True, True]
    rows = {"input_ids": 0.9, "labels": 2.9, "loss_mask": 4.1, "teacher_logp": 5.3, "the server's": 7.3}
    for name, y in rows.items():
        axes.text(left - 0.2, y + 0.52, name, ha="right", va="center")
    for t, (token, color) in enumerate(zip(tokens, colors, strict=True)):
        x, last = left + t, t in (3, 7)
        trained = not last and response[t + 1]
        cell(axes, x, rows["input_ids"], str(token), color, fill=response[t])
        cell(axes, x, rows["labels"], "-100" if last else str(tokens[t + 1]), GREY if last else color, fill=trained)
        cell(axes, x, rows["loss_mask"], "✓" if trained else "", color if trained else GREY)
        cell(axes, x, rows["teacher_logp"], "" if last else f"p{tokens[t + 1]}", GREY if last else color)
        cell(axes, x, rows["the server's"], "None" if t in (0, 4) else f"p{token}", GREY if t in (0, 4) else color)
        if not last:
            arrow(axes, (x + 1.5, 1.95), (x + 0.5, 2.85), color)
            arrow(axes, (x + 1.5, 7.25), (x + 0.5, 6.35), color)
    axes.text(left + 2, 0.5, "sequence A", ha="center", color=BLUE)
    axes.text(left + 6, 0.5, "sequence B", ha="center", color=ORANGE)
    return figure


def packing() -> Figure:
    """A padded batch and the same tokens as one packed stream."""
    figure, axes = canvas(11.4, 7.6)
    lengths, colors, left, width = (5, 2, 4), (BLUE, ORANGE, "#3a9d5d"), 0.1, 5
    axes.text(left, 0.5, "padded, (B, L) = (3, 5): 4 of 15 entries are no tokens")
    axes.text(left, 5.1, "packed, (T,) = (11,), cut by cu_seqlens")
    start = 0
    bounds = [0]
    for row, (length, color) in enumerate(zip(lengths, colors, strict=True)):
        for t in range(width):
            cell(
                axes,
                left + t,
                0.9 + row,
                f"{'abc'[row]}{t}" if t < length else "pad",
                color if t < length else GREY,
                t < length,
            )
        for t in range(length):
            cell(axes, left + start + t, 5.5, f"{'abc'[row]}{t}", color, fill=True)
        start += length
        bounds.append(start)
    for bound in bounds:
        axes.plot([left + bound] * 2, [5.3, 6.7], color=GREY, lw=1.5)
        axes.text(left + bound, 7.15, str(bound), ha="center", va="center")
    return figure


def gradient_fields() -> Figure:
    """Where descending the forward and the reverse KL takes a bell-shaped student, for a teacher with two modes."""
    tokens = np.linspace(-6, 6, 121)
    p = np.exp(-((tokens + 2) ** 2) / 0.5) + 0.6 * np.exp(-((tokens - 2) ** 2) / 0.5)
    p /= p.sum()
    means, log_stds = np.meshgrid(np.linspace(-3, 3, 61), np.log(np.linspace(0.3, 2.7, 49)))
    distance, std = tokens - means[..., None], np.exp(log_stds)[..., None]
    q = np.exp(-(distance**2) / (2 * std**2))
    q /= q.sum(-1, keepdims=True)
    scores = np.stack([distance / std**2, distance**2 / std**2])  # of the logits, in the mean and in log std
    scores -= (q * scores).sum(-1, keepdims=True)  # of log q
    divergences = {
        "forward KL(p ‖ q): one end, as wide as both modes": ((p * np.log(p / q)).sum(-1), -(p * scores).sum(-1)),
        "reverse KL(q ‖ p): an end at each mode too": (
            (q * np.log(q / p)).sum(-1),
            (q * np.log(q / p) * scores).sum(-1),
        ),
    }
    figure, panels = plt.subplots(2, 1, figsize=(6.6, 6.6), sharex=True)
    for axes, (name, (value, gradient)), color in zip(panels, divergences.items(), (BLUE, ORANGE), strict=True):
        spread = std[..., 0]
        move = -gradient[0], -gradient[1] * spread  # d std = std * d log std
        grid = np.linspace(0.3, 2.7, 49)
        axes.streamplot(means[0], grid, *move, color=color, density=0.6, linewidth=1, arrowsize=1.1)
        inside = value[1:-1, 1:-1]
        neighbours = [value[1 + i : 48 + i, 1 + j : 60 + j] for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        for i, j in np.argwhere(np.all([inside < x for x in neighbours], axis=0)) + 1:
            axes.plot(means[i, j], spread[i, j], "o", color=GREY, ms=9)
        axes.set_title(name, fontsize=12, color=color)
        axes.set(ylabel="spread of the student", ylim=(0.3, 2.7), xlim=(-3, 3))
        axes.set_xticks([-2, 2], ["teacher's first mode", "its second"])
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("mean of the student")
    figure.subplots_adjust(left=0.1, right=0.98, top=0.95, bottom=0.1, hspace=0.16)
    return figure


def benchmarks() -> Figure:
    """Time and extra memory of plain torch and of peers, as multiples of what kdloss takes, one panel per quantity."""
    cases = {
        "log-probs from logits,\nV = 151936, bf16": "logits-T1024-V151936-bfloat16",
        "log-probs from hidden states,\n30 % trained, bf16": "hidden-T1024-V16384-D1024-trained30%-bfloat16",
        "KDRL from hidden states,\nfloat32": "kdrl-T1024-V16384-D1024-float32",
        "reverse KL from logits,\nV = 32000, bf16": "reverse-kl-T1024-V32000-bfloat16",
        "reverse KL from hidden\nstates, float32": "linear-reverse-kl-T512-V16384-D1024-teacherD1024-float32",
    }
    peers = {"naive": GREY, "naive compiled": "#b5b5b5", "TRL": ORANGE, "CCE": "#3a9d5d", "Liger chunked": "#9b6bc3"}
    rows = {case["name"]: case["rows"] for case in json.loads(BENCHMARKS.read_text("utf-8"))["cases"]}
    figure, panels = plt.subplots(1, 2, figsize=(6.6, 6.4), sharey=True)
    for axes, name, cost in zip(panels, ("time", "extra memory"), (_time, _memory), strict=True):
        for place, case in enumerate(cases.values()):
            found = [
                peer for peer in peers if "extra_bytes" in rows[case].get(peer, {}) and rows[case][peer]["samples"]
            ]
            for i, peer in enumerate(found):
                times = cost(rows[case][peer], rows[case]["kdloss"])
                y = place + (i - (len(found) - 1) / 2) * 0.16
                axes.barh(y, times, 0.14, color=peers[peer])
                axes.text(max(times, 1), y, f" {times:.2f}", va="center", fontsize=8)
        axes.axvline(1, color=BLUE, lw=1.5)
        axes.set_title(f"{name}, kdloss = 1", fontsize=11, color=BLUE)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.margins(x=0.15)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].invert_yaxis()
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in peers.values()]
    figure.legend(handles, peers, loc="lower center", ncol=5, fontsize=9, columnspacing=1, handlelength=1)
    figure.subplots_adjust(left=0.3, right=0.98, top=0.95, bottom=0.1, wspace=0.08)
    return figure


def _time(peer: dict[str, Any], ours: dict[str, Any]) -> float:
    """Of paired rounds, as in the report."""
    pairs = zip(peer["samples"], ours["samples"], strict=True)
    return float(np.median([theirs["user"] / own["user"] for theirs, own in pairs]))


def _memory(peer: dict[str, Any], ours: dict[str, Any]) -> float:
    return float(peer["extra_bytes"] / ours["extra_bytes"])


def _rounded(path: re.Match[str]) -> str:
    """The coordinates of a path to a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


PICTURES = {
    "alignment.svg": alignment,
    "packing.svg": packing,
    "gradient_fields.svg": gradient_fields,
    "benchmarks.svg": benchmarks,
}

if __name__ == "__main__":
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            svg = io.StringIO()
            draw().savefig(svg, metadata={"Date": None})
            short = re.sub(r' d="[^"]*"', _rounded, svg.getvalue())
            (FOLDER / name).write_text(short, "utf-8")
