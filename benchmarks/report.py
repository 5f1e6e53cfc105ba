"""The Markdown report of a result, and the files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import charts, results
from .bars import bars
from .results import Entry
from .spread import Spread


def write(result: dict[str, Any], folder: Path, stem: str, *, pictures: bool = True) -> list[Path]:
    """JSON and Markdown, and charts where matplotlib is installed; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{stem}.json"
    data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = charts.draw(result, folder, stem) if pictures else []
    text = folder / f"{stem}.md"
    text.write_text(markdown(result, [path.name for path in drawn]), encoding="utf-8")
    return [data, text, *drawn]


def markdown(result: dict[str, Any], pictures: list[str] | None = None) -> str:
    facts = result["facts"]
    parts = [f"# {facts['device']}, `{result['grid']}` grid", _facts(result), _bars(result), _wrong(result)]
    for path in dict.fromkeys(entry["case"]["path"] for entry in result["cases"]):
        entries = [entry for entry in result["cases"] if entry["case"]["path"] == path and entry["rows"]]
        if entries:
            parts.append(f"## {path}")
            parts += [f"![{path}]({name})" for name in pictures or [] if name.endswith(f"-{path}.png")]
            parts += [_entry(result, entry) for entry in entries]
    return "\n\n".join(part for part in [*parts, _absent(result)] if part) + "\n"


def _facts(result: dict[str, Any]) -> str:
    facts, ceilings = result["facts"], result["ceilings"]
    lines = [f"{key} {value}" for key, value in facts.items() if key not in ("device", "threads")]
    lines += [f"threads {facts['threads']}"] if result["kind"] == "cpu" else []
    measured = [f"copy {ceilings['copy'] / 1e9:.1f} GB/s (read + write)"]
    measured += [f"{key} {value / 1e9:.0f} GFLOP/s" for key, value in ceilings.items() if key != "copy"]
    compared = "user CPU seconds" if result["kind"] == "cpu" else "CUDA event time, L2 overwritten before each sample"
    return (
        "; ".join(lines)
        + ".\n\nCeilings, measured in this run: "
        + "; ".join(measured)
        + f".\n\nForward and backward. Speeds compare {compared}: medians of paired runs, [quartiles]. "
        "Memory is the peak beyond the inputs, gradients included, in units of the logits."
    )


def _bars(result: dict[str, Any]) -> str:
    small = result["grid"] == "quick"
    note = "The quick grid is small: it shows that the suite works, not whether a bar is met.\n\n" if small else ""
    rows = [(b.what, b.bar, b.measured, b.met, f"`{b.case}`" if b.case else "") for b in bars(result)]
    return "## Bars\n\n" + note + table(("", "bar", "measured", "met", "case"), rows)


def _wrong(result: dict[str, Any]) -> str:
    """Whoever failed parity, or raised: never hidden in a table of times."""
    rows = [
        (f"`{entry['name']}`", name, row["error"])
        for entry in result["cases"]
        for name, row in entry["rows"].items()
        if row["error"]
    ]
    return "## Failed parity\n\nNot timed.\n\n" + table(("case", "contender", "error"), rows) if rows else ""


def _entry(result: dict[str, Any], entry: Entry) -> str:
    cpu, reference = result["kind"] == "cpu", entry["reference"]
    head = ["", "ms", "of it forward", *(["user CPU ms"] if cpu else []), f"speed beside {reference}"]
    head += ["of the ceiling", "extra memory", "value error", "gradient error", "first call, s"]
    rows = []
    for name, row in entry["rows"].items():
        if row["error"]:
            continue
        speed = results.ratio(entry, reference, name, results.metric(result))
        cells = [name, _ms(results.seconds(entry, name, "total")), _ms(results.seconds(entry, name, "forward"))]
        cells += [_ms(results.seconds(entry, name, "user"))] if cpu else []
        cells += ["1" if name == reference else _quartiles(speed), _percent(results.share(entry, name))]
        memory, held = results.extra_memory(entry, name), row.get("parity", {})
        cells += ["" if memory is None else f"{memory:.2f}×"]
        cells += [f"{held[key]:.1e}" if key in held else "" for key in ("value_error", "gradient_error")]
        rows.append((*cells, f"{row['first_seconds']:.1f}" if row["compiled"] else ""))
    scaled = {name: row["scale"] for name, row in entry["rows"].items() if row["scale"] != 1}
    notes = [f"{name}: measured on fewer tokens, times {scale:g}." for name, scale in scaled.items()]
    floor = f"Floor {entry['floor_seconds'] * 1e3:.2f} ms; logits {entry['logits_bytes'] / 2**20:.0f} MiB."
    return "\n\n".join([f"### `{entry['name']}`", " ".join([floor, *notes]), table(tuple(head), rows)])


def _absent(result: dict[str, Any]) -> str:
    lines = [f"- `{entry['name']}`: not run ({entry['not_run']})" for entry in result["cases"] if entry["not_run"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in result["cases"]:
        for name, reason in entry["absent"].items():
            reasons.setdefault((name, reason), []).append(entry["case"]["path"])
    lines += [f"- {name} ({', '.join(dict.fromkeys(paths))}): {reason}" for (name, reason), paths in reasons.items()]
    return "## Not in this run\n\n" + "\n".join(lines) if lines else ""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ms(x: Spread | None) -> str:
    if x is None:
        return ""
    digits = 2 if x.median < 0.1 else 0
    return f"{x.median * 1e3:.{digits}f} [{x.low * 1e3:.{digits}f}, {x.high * 1e3:.{digits}f}]"


def _quartiles(x: Spread | None) -> str:
    if x is None:
        return ""
    digits = 2 if x.median < 100 else 0
    return f"{x.median:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"
