"""What a person looks at when the runs are done: `reward_curve.png` and a table, both made from the metrics files."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import OmegaConf

from opd.checkpoint import read_records

LABELS = {  # of a curve, and its colour
    "sft": ("SFT: text of the teacher", "#8c564b"),
    "distill": ("distillation: reverse KL", "#1f77b4"),
    "grpo": ("GRPO: reward", "#ff7f0e"),
    "kdrl": ("KDRL: reward + reverse KL", "#2ca02c"),
    "kdrl-full": ("reward + forward KL where no sample is right", "#9467bd"),
    "kdrl-direct": ("literal joint form: no teacher in its gradient", "#d62728"),
}
DASHED = "kdrl-direct"  # where both stay at 0, the curve of GRPO shows through it


@dataclass(frozen=True)
class Trial:
    """One run's name, mode and records."""

    name: str
    mode: str
    records: list[dict]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Updates and values of the records that have `key`."""
        found = [(r["step"], r[key]) for r in self.records if r.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


def read_trials(experiment: Path) -> list[Trial]:
    """The trials of an experiment that have begun, in the order of the modes' table."""
    trials = []
    for path in sorted(experiment.glob("*/metrics.jsonl")):
        records = read_records(path)
        if records:
            mode = OmegaConf.load(path.parent / "config.yaml").mode
            trials.append(Trial(path.parent.name, mode, records))
    return sorted(trials, key=lambda t: (list(LABELS).index(t.mode), t.name))


def smooth(values: list[float], span: int = 10) -> list[float]:
    """Mean over the last `span` values."""
    return [fmean(values[max(0, i - span) : i]) for i in range(1, len(values) + 1)]


def draw(experiment: Path) -> Path:
    """Draws held-out accuracy over updates as `reward_curve.png`, and writes the numbers as `reward_curve.csv`.

    Every mode has a curve, the mean of its trials. The band is one standard error, over the trials, or over the
    questions if there is one trial.
    """
    trials = read_trials(experiment)
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    ends: list[tuple[float, str, str]] = []
    for mode, (label, colour) in LABELS.items():
        of_mode = [dict(zip(*trial.series("accuracy"), strict=True)) for trial in trials if trial.mode == mode]
        if not of_mode:
            continue
        updates = sorted(set.intersection(*map(set, of_mode)))  # a run may still go on
        columns = [[values[update] for values in of_mode] for update in updates]
        mean = [fmean(column) for column in columns]
        if len(of_mode) > 1:
            error = [stdev(column) / len(column) ** 0.5 for column in columns]
        else:
            error = next(trial.series("accuracy_se")[1] for trial in trials if trial.mode == mode)
        axes.plot(updates, mean, color=colour, linewidth=2, linestyle=(0, (4, 3)) if mode == DASHED else "-")
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(updates, low, high, color=colour, alpha=0.18, linewidth=0)
        ends.append((mean[-1], label, colour))
    last = max((trial.records[-1]["step"] for trial in trials), default=1)
    teacher = [t.records[0]["teacher_accuracy"] for t in trials if "teacher_accuracy" in t.records[0]]
    if teacher:
        axes.axhline(teacher[0], color="0.45", linewidth=1, linestyle=(0, (6, 3)))
        axes.text(0, teacher[0] + 0.012, "the teacher", color="0.35", fontsize=10)
    for height, (_, text, colour) in zip(apart([y for y, *_ in sorted(ends)], 0.062), sorted(ends), strict=True):
        axes.text(last * 1.015, height, text, color=colour, fontsize=10, va="center")
    counts = {sum(trial.mode == mode for trial in trials) for mode in LABELS} - {0}
    seeds, at_most = max(counts, default=1), "up to " if len(counts) > 1 else ""
    axes.set_title("Held-out accuracy" + (f", mean of {at_most}{seeds} seeds" if seeds > 1 else ""), loc="left")
    axes.set(xlabel="update", ylim=(-0.04, 1.04), xlim=(0, last))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path = experiment / "reward_curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    rows = [
        f"{trial.name},{trial.mode},{r['step']},{r['accuracy']:.4f}\n"
        for trial in trials
        for r in trial.records
        if "accuracy" in r
    ]
    path.with_suffix(".csv").write_text("trial,mode,update,accuracy\n" + "".join(rows), encoding="utf-8")
    return path


def apart(heights: list[float], distance: float) -> list[float]:
    """Rising heights, moved up where two labels would lie closer than `distance`."""
    moved: list[float] = []
    for height in heights:
        moved.append(max([height, *(y + distance for y in moved[-1:])]))
    return moved


def table(experiment: Path) -> str:
    """Accuracy before and after with standard errors, a line a trial."""
    head = ("trial", "updates", "held-out accuracy", "gain", "reverse KL", "entropy")
    rows = [head]
    for trial in read_trials(experiment):
        first, last = trial.records[0], [r for r in trial.records if "accuracy" in r][-1]
        if len(rows) == 1:
            rows.append(("student before", "0", _plus_minus(first, "accuracy"), "", "", ""))
            if "teacher_accuracy" in first:
                rows.append(("teacher", "", _plus_minus(first, "teacher_accuracy"), "", "", ""))
        ends = [smooth(trial.series(key)[1])[-1:] for key in ("reverse_kl", "entropy")]
        tail = [f"{end[0]:.3f}" if end else "" for end in ends]
        gain = f"{last['accuracy'] - first['accuracy']:+.3f}"
        rows.append((trial.name, str(last["step"]), _plus_minus(last, "accuracy"), gain, *tail))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _plus_minus(record: dict, key: str) -> str:
    return f"{record[key]:.3f} ± {record[key + '_se']:.3f}"
