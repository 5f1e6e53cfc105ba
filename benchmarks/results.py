"""Figures out of a stored result: seconds, paired ratios, shares of the ceiling, memory. The report lays them out."""

from __future__ import annotations

from typing import Any

from .spread import Spread, paired_ratio, spread

Entry = dict[str, Any]  # one case of a result


def metric(result: dict[str, Any]) -> str:
    """What speeds are compared in: user CPU seconds on a CPU, event time on a GPU."""
    return "user" if result["kind"] == "cpu" else "total"


def samples(entry: Entry, name: str, key: str) -> list[float] | None:
    """Seconds of each round: "forward", "backward", "total", "user" or "system"."""
    row = entry["rows"].get(name)
    if row is None or not row.get("samples"):
        return None
    each = row["samples"]
    seconds = [s["total"] - s["forward"] for s in each] if key == "backward" else [s[key] for s in each]
    return [row["scale"] * s for s in seconds]


def seconds(entry: Entry, name: str, key: str) -> Spread | None:
    found = samples(entry, name, key)
    return None if found is None else spread(found)


def ratio(entry: Entry, numerator: str, denominator: str, key: str) -> Spread | None:
    """Time of one over time of the other, paired by round."""
    above, below = samples(entry, numerator, key), samples(entry, denominator, key)
    return None if above is None or below is None else paired_ratio(above, below)


def share(entry: Entry, name: str, key: str = "total") -> float | None:
    """Floor over median time: 1 is the machine's limit. From logits a third of the floor is the forward's."""
    taken = seconds(entry, name, key)
    work = entry["rows"].get(name, {}).get("work", 0)
    if taken is None or not work or taken.median <= 0:
        return None
    part = {"forward": 1 / 3, "backward": 2 / 3}.get(key, 1.0)
    return float(part * work * entry["floor_seconds"] / taken.median)


def extra_memory(entry: Entry, name: str) -> float | None:
    """Peak extra memory in units of the logits."""
    extra = entry["rows"].get(name, {}).get("extra_bytes")
    return None if extra is None else extra / entry["logits_bytes"]
