"""What a person looks at when the runs are done: `reward_curve.png` and a table, both made from the metrics files."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import OmegaConf

from opd.checkpoint import read_records

COLOURS = {"sft": "#8c564b", "distill": "#1f77b4", "grpo": "#ff7f0e", "kdrl": "#2ca02c", "kdrl-direct": "#d62728"}


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
    return sorted(trials, key=lambda t: (list(COLOURS).index(t.mode), t.name))


def smooth(values: list[float], span: int = 10) -> list[float]:
    """Mean over the last `span` values."""
    return [fmean(values[max(0, i - span) : i]) for i in range(1, len(values) + 1)]


def draw(experiment: Path) -> Path:
    """Draws `reward_curve.png`: held-out accuracy and the reverse KL to the teacher, a colour a trial."""
    trials = read_trials(experiment)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for trial in trials:
        earlier = sum(other.mode == trial.mode for other in trials[: trials.index(trial)])
        style = {"color": COLOURS[trial.mode], "linestyle": ("-", "--", ":", "-.")[earlier % 4]}
        steps, accuracy = trial.series("accuracy")
        _, error = trial.series("accuracy_se")
        marks = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1.6}
        left.errorbar(steps, accuracy, yerr=error, label=trial.name, **marks, **style)
        if trial.mode != "sft":  # there the reward is the teacher's own
            steps, reward = trial.series("reward")
            left.plot(steps, smooth(reward), linewidth=1, alpha=0.35, **style)
        steps, reverse_kl = trial.series("reverse_kl")
        if steps:
            right.plot(steps, smooth(reverse_kl), linewidth=1.6, label=trial.name, **style)
    teacher = [t.records[0]["teacher_accuracy"] for t in trials if "teacher_accuracy" in t.records[0]]
    if teacher:
        left.axhline(teacher[0], color="0.4", linewidth=1, linestyle=(0, (6, 3)), label="teacher")
    left.set(title="Accuracy on held-out questions", xlabel="update", ylabel="fraction right, one sampled answer")
    left.set_ylim(-0.02, 1.04)
    right.set(title="Reverse KL to the teacher", xlabel="update", ylabel="nats a token, mean of 10 updates")
    if any(trial.series("reverse_kl")[0] for trial in trials):
        right.set_yscale("log")
    note = "points: ± one standard error; faint: reward while training, mean of 10"
    left.text(0.02, 0.02, note, transform=left.transAxes, fontsize=8, color="0.4")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    path = experiment / "reward_curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


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
