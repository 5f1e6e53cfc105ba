"""What a result says: figures, the Markdown report, the chart, and the summary tables of the pages.

A ratio is taken within each round, where both ran one after the other under the same load. Its median and quartiles
are then free of the machine's drift between rounds, which a ratio of two medians is not.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Entry = dict[str, Any]  # one case of a result
REFERENCE = "naive"  # what speeds are relative to
PEERS = (
    "naive",
    "naive, rows picked",
    "naive compiled",
    "TRL",
    "torch linear CE",
    "CCE",
    "Liger chunked",
    "Liger kernel",
)
# of the file that is named, and of some of its cases if they are named after it
SUMMARY = re.compile(r"(<!-- summary: (\S+)((?: \S+)*) -->\n).*?(<!-- end of summary -->)", re.DOTALL)


# --- figures -------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def metric(result: dict[str, Any]) -> str:
    """What speeds compare: user CPU seconds on a CPU, event time on a GPU."""
    return "user" if result["kind"] == "cpu" else "total"


def seconds(entry: Entry, name: str, key: str) -> list[float] | None:
    """Of each round: "forward", "backward", "total", "user" or "system"."""
    samples = entry["rows"].get(name, {}).get("samples")
    if not samples:
        return None
    return [s["total"] - s["forward"] if key == "backward" else s[key] for s in samples]


def ratio(entry: Entry, above: str, below: str, key: str) -> Spread | None:
    """Time of one over time of the other, round by round."""
    a, b = seconds(entry, above, key), seconds(entry, below, key)
    return None if a is None or b is None else spread([x / max(y, 1e-12) for x, y in zip(a, b, strict=True)])


def share(entry: Entry, name: str) -> float | None:
    """Floor over median wall time: 1 is the machine's limit."""
    total = seconds(entry, name, "total")
    return entry["floor_seconds"] / spread(total).median if total and entry["floor_seconds"] else None


def memory(entry: Entry, name: str) -> float | None:
    """Peak extra memory in units of the logits."""
    extra = entry["rows"].get(name, {}).get("extra_bytes")
    return None if extra is None else extra / entry["logits_bytes"]


# --- Markdown ------------------------------------------------------------------------------------------------------


def write(result: dict[str, Any], folder: Path, stem: str, *, pictures: bool = True) -> list[Path]:
    """JSON and Markdown, and a chart where matplotlib is installed; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(result) + "\n", encoding="utf-8")
    drawn = draw(result, folder / f"{stem}.png") if pictures else []
    text.write_text(markdown(result, [path.name for path in drawn]), encoding="utf-8")
    return [data, text, *drawn]


def markdown(result: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    parts = [f"# {result['facts']['device']}, `{result['grid']}` grid", _facts(result)]
    parts += [f"![speed and memory of every contender]({name})" for name in pictures]
    parts += [_entry(result, entry) for entry in result["cases"]]
    return "\n\n".join(part for part in [*parts, absences(result)] if part) + "\n"


def _facts(result: dict[str, Any]) -> str:
    facts = "; ".join(f"{key} {value}" for key, value in result["facts"].items() if key != "device")
    limits = [f"copy {result['ceilings']['copy'] / 1e9:.1f} GB/s (read + write)"]
    limits += [f"{key} {x / 1e9:.0f} GFLOP/s" for key, x in result["ceilings"].items() if key != "copy"]
    compared = "user CPU seconds" if result["kind"] == "cpu" else "CUDA event time, L2 overwritten before each sample"
    return (
        f"{facts}.\n\nCeilings, measured in this run: {'; '.join(limits)}.\n\n"
        f"Forward and backward. Speeds compare {compared}: medians of paired rounds, [quartiles]; above 1 is faster "
        f"than {REFERENCE}. Memory is the peak beyond the inputs, gradients included, in units of the logits."
    )


def _entry(result: dict[str, Any], entry: Entry) -> str:
    """The table of a case, and who failed its parity, or raised: they are not timed."""
    cpu = result["kind"] == "cpu"
    head = ["", *(["user CPU ms"] if cpu else []), "wall ms", "of it forward", f"speed beside {REFERENCE}"]
    head += ["of the ceiling", "extra memory", "value error", "gradient error", "first call, s"]
    rows, wrong = [], []
    for name, row in entry["rows"].items():
        if row["error"]:
            wrong.append(f"{name}: not timed, {row['error']}.")
            continue
        cells = [_ms(seconds(entry, name, key)) for key in (*(["user"] if cpu else []), "total", "forward")]
        speed, part, extra = ratio(entry, REFERENCE, name, metric(result)), share(entry, name), memory(entry, name)
        cells += ["" if speed is None else "{:.2f} [{:.2f}, {:.2f}]".format(*speed)]
        cells += ["" if part is None else f"{part:.0%}", "" if extra is None else f"{extra:.2f}×"]
        cells += [f"{row['value_error']:.1e}", f"{row['gradient_error']:.1e}"]
        rows.append((name, *cells, f"{row['first_seconds']:.1f}" if row["compiles"] else ""))
    logits = f"Logits {entry['logits_bytes'] / 2**20:.0f} MiB."
    return "\n\n".join([f"## `{entry['name']}`", " ".join([logits, *wrong]), table(head, rows)])


def absences(result: dict[str, Any]) -> str:
    lines = [f"- `{name}`: not run, {reason}" for name, reason in result["not_run"].items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in result["cases"]:
        for name, reason in entry["absent"].items():
            reasons.setdefault((name, reason), []).append(entry["case"]["path"])
    lines += [f"- {name} ({', '.join(dict.fromkeys(paths))}): {reason}" for (name, reason), paths in reasons.items()]
    return "## Not in this run\n\n" + "\n".join(lines) if lines else ""


def without_paths(text: str) -> str:
    """Results are published, so they must not show where files lie on the machine."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ms(samples: list[float] | None) -> str:
    return "" if samples is None else "{:.2f} [{:.2f}, {:.2f}]".format(*(1e3 * x for x in spread(samples)))


def with_tables(page: str, made: dict[str, str]) -> str:
    """The page with its tables, each between `<!-- table: NAME -->` and `<!-- end -->`, replaced by those of `made`."""
    names = re.findall(r"<!-- table: (.*?) -->", page)
    if sorted(names) != sorted(made):
        raise ValueError(f"the page must hold the tables {sorted(made)} once each, got {names}")
    for name, text in made.items():
        mark, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, _, rest = page.partition(mark)
        page = f"{before}{mark}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


# --- the summary of a page -------------------------------------------------------------------------------------------


def documented(page: str, result: dict[str, Any], data: str) -> str:
    """The page with every summary of the stored `data` renewed; as it was if it has none."""

    def renewed(block: re.Match[str]) -> str:
        if block[2] != data:
            return block[0]
        return f"{block[1]}\n{summary(result, only=block[3].split())}\n\n{block[4]}"

    return SUMMARY.sub(renewed, page)


def summary(result: dict[str, Any], *, only: Sequence[str] = ()) -> str:
    """A row per case and contender of ours: what it takes, and each peer's time and memory as multiples of that.

    With `only`, the rows of these cases, and nothing below the table.
    """
    cases = [entry for entry in result["cases"] if not only or entry["name"] in only]
    names = [name for name in PEERS if any(seconds(e, name, "total") or _error(e, name) for e in cases)]
    unit = "user CPU ms" if result["kind"] == "cpu" else "ms"
    rows = []
    for entry in cases:
        for ours in [name for name, row in entry["rows"].items() if row["ours"] and name != "gather"]:
            time, extra = seconds(entry, ours, metric(result)), entry["rows"][ours].get("extra_bytes")
            if time is None:
                continue
            label = entry["name"].replace("bfloat16", "bf16").replace("float32", "f32")
            form = ours.removeprefix("kdloss").strip()
            taken = f"{1e3 * spread(time).median:.3g}, " + ("?" if extra is None else f"{extra / 2**20:.0f}")
            cells = [_beside(result, entry, ours, name) for name in names]
            rows.append((f"`{label}`{', ' + form if form else ''}", taken, *cells))
    facts = result["facts"]
    versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "trl", "liger-kernel", "cut-cross-entropy"))
    threads = f", {facts['threads']} thread" if result["kind"] == "cpu" else ""
    parts = [f"{facts['device']}{threads}; {versions}; {facts['date']}."]
    parts += [table(("case", f"kdloss: {unit}, MiB", *names), rows)]
    parts += [] if only else [_tail(result), absences(result).replace("## ", "")]
    return "\n\n".join(part for part in parts if part)


def _beside(result: dict[str, Any], entry: Entry, ours: str, peer: str) -> str:
    if _error(entry, peer):
        return "fails"
    speed, extra, own = ratio(entry, peer, ours, metric(result)), memory(entry, peer), memory(entry, ours)
    if speed is None:
        return ""
    return f"{_multiple(speed.median)}, {_multiple(extra / own) if extra and own else '?'}"


def _multiple(x: float) -> str:
    """Bold where the peer takes less than we do."""
    text = f"{x:.2f}" if x < 9.95 else f"{x:.0f}"
    return f"**{text}**" if float(text) < 1 else text


def _error(entry: Entry, name: str) -> bool:
    return bool(entry["rows"].get(name, {}).get("error"))


def _tail(result: dict[str, Any]) -> str:
    found = [(e, ratio(e, "kdloss", "gather", metric(result))) for e in result["cases"] if "gather" in e["rows"]]
    return "\n".join(
        f"`{entry['name']}`: `kdrl_loss` takes {part.median:.2%} of the time of the log-probs before it."
        for entry, part in found
        if part
    )


# --- the chart -----------------------------------------------------------------------------------------------------


def pyplot_if_installed() -> Any | None:
    """matplotlib.pyplot, which draws into files here; without it None, and a line on standard error."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ModuleNotFoundError:
        print("nothing is drawn: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    return importlib.import_module("matplotlib.pyplot")


def draw(result: dict[str, Any], target: Path) -> list[Path]:
    """Speed and memory of every contender: a line per case, a marker per contender. Empty without matplotlib."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return []
    entries = [entry for entry in result["cases"] if seconds(entry, REFERENCE, "total")][::-1]
    names = list(dict.fromkeys(name for entry in entries for name in entry["rows"] if name != "gather"))
    size = (13, 0.34 * len(entries) + 2)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for i, name in enumerate(sorted(names, key=lambda name: name.startswith("kdloss"))):
        speeds = [ratio(entry, REFERENCE, name, metric(result)) for entry in entries]
        points = {y: x.median for y, x in enumerate(speeds) if x}
        extras = {y: x for y, entry in enumerate(entries) if (x := memory(entry, name))}
        ours = name.startswith("kdloss")
        style = {"linestyle": "", "marker": "o" if ours else "sv^<>DpX"[i % 8], "markersize": 9 if ours else 6}
        for axes, found in ((left, points), (right, extras)):
            axes.plot(list(found.values()), list(found), label=name, color=f"C{i % 10}", alpha=0.85, **style)
    left.axvline(1, color="0.4", linewidth=0.8)
    left.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=8)
    unit = "user CPU time" if result["kind"] == "cpu" else "time"
    left.set(xscale="log", xlabel=f"speed beside {REFERENCE} ({unit}); right is faster")
    right.set(xscale="log", xlabel="peak extra memory, units of the logits; left is less")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        axes.tick_params(axis="x", which="both", labelsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"Forward + backward, {result['facts']['device']}", fontsize=11)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return [target]
