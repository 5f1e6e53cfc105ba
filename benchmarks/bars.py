"""The bars that the project set itself, each with what was measured: the table that a run is read for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import results
from .results import Entry
from .spread import Spread


class Bar(NamedTuple):
    """One line of the table."""

    what: str
    bar: str
    measured: str
    met: str  # "yes" | "no" | "not measured"
    case: str


def bars(result: dict[str, Any]) -> list[Bar]:
    """Every bar for this kind of device, also those that could not be measured."""
    return list((_cpu if result["kind"] == "cpu" else _gpu)(result))


def _cpu(result: dict[str, Any]) -> list[Bar]:
    lines = []
    for vocab, dtype in ((151936, "bfloat16"), (32000, "float32")):
        entry = _largest(result, lambda c, v=vocab, d=dtype: _is_logits(c, v, d))  # type: ignore[misc]
        label = f"logits V={vocab} {dtype}"
        lines += [
            _speed(result, entry, f"{label}, eager, beside naive", "kdloss", "naive", 1.1),
            _speed(result, entry, f"{label}, eager, beside naive split", "kdloss", "naive split", 1.0),
            _speed(result, entry, f"{label}, eager, beside TRL", "kdloss", "TRL", 1.0),
            _speed(result, entry, f"{label}, torch.compile, beside naive", "kdloss compiled", "naive", 2.0),
            _memory(entry, f"{label}, extra memory", 1.1),
        ]
    hidden = _largest(result, lambda c: c["path"] == "hidden" and c["dtype"] == "bfloat16" and not c["entropy"])
    lines.append(_speed(result, hidden, "hidden, bf16, beside naive", "kdloss", "naive", 0.9))
    hidden = hidden if hidden and hidden["case"]["tokens"] >= 2048 else None
    lines.append(_memory_beside_naive(hidden, "hidden, bf16, T ≥ 2048, extra memory beside naive", 0.5))
    return lines + _common(result, fraction=0.4, fused=1.1)


def _gpu(result: dict[str, Any]) -> list[Bar]:
    lines = []
    for entropy in (False, True):
        entry = _largest(
            result,
            lambda c, e=entropy: (  # type: ignore[misc]
                c["path"] == "logits" and c["entropy"] == e and c["tokens"] >= 4096 and c["vocab"] >= 128000
            ),
        )
        label = "logits → logp" + (" + entropy" if entropy else "")
        lines += [_share(entry, f"{label}, {key}", key, 0.9) for key in ("forward", "backward")]
        peers = ("TRL",) if entropy else ("TRL", "Liger CE")
        lines += [_speed(result, entry, f"{label}, beside {peer}", "kdloss", peer, 1.0) for peer in peers]
    for width, least in ((4096, 0.85), (1024, 0.65)):
        entry = _largest(result, lambda c, d=width: c["path"] == "hidden" and c["width"] == d)  # type: ignore[misc]
        lines.append(_share(entry, f"hidden → logp, D={width}", "total", least))
    lines += _common(result, fraction=0.35, fused=1.2)
    return [*lines, _share(_largest(result, lambda c: c["teacher_width"] > 0), "divergence from hidden", "total", 0.6)]


def _common(result: dict[str, Any], *, fraction: float, fused: float) -> list[Bar]:
    fractions = _largest(result, lambda c: c["path"] == "fractions")
    one_pass = _largest(result, lambda c: c["path"] == "fused")
    tail = _largest(result, lambda c: c["path"] == "tail")
    return [
        _at_most(result, fractions, "30 % of tokens trained, time of all", "kdloss 0.3", "kdloss 1", fraction),
        _speed(result, one_pass, "fused_linear_loss beside two steps", "kdloss fused", "kdloss two-step", fused),
        _at_most(result, tail, "kdrl_loss, T=32768, eager, time of the gather", "kdrl_loss", "gather", 0.05),
        _at_most(result, tail, "the same under torch.compile", "kdrl_loss compiled", "gather", 0.05),
    ]


def _is_logits(case: dict[str, Any], vocab: int, dtype: str) -> bool:
    return bool(case["path"] == "logits" and case["vocab"] == vocab and case["dtype"] == dtype and not case["entropy"])


def _largest(result: dict[str, Any], wanted: Callable[[dict[str, Any]], bool]) -> Entry | None:
    """Of the cases that ran and are wanted, the one with the most tokens, then the widest head."""
    found = [entry for entry in result["cases"] if wanted(entry["case"]) and entry["rows"]]
    return max(found, key=lambda entry: (entry["case"]["tokens"], entry["case"]["width"]), default=None)


def _speed(result: dict[str, Any], entry: Entry | None, what: str, ours: str, other: str, least: float) -> Bar:
    found = results.ratio(entry, other, ours, results.metric(result)) if entry else None
    return _line(what, f"≥ {least:g}× speed", entry, found, lambda x: f"{x:.2f}×", found and found.median >= least)


def _at_most(result: dict[str, Any], entry: Entry | None, what: str, ours: str, other: str, most: float) -> Bar:
    found = results.ratio(entry, ours, other, results.metric(result)) if entry else None
    return _line(what, f"≤ {most:.0%} of its time", entry, found, lambda x: f"{x:.2%}", found and found.median <= most)


def _share(entry: Entry | None, what: str, key: str, least: float) -> Bar:
    found = results.share(entry, "kdloss", key) if entry else None
    text = None if found is None else Spread(found, found, found, 1)
    met = found is not None and found >= least
    return _line(what, f"≥ {least:.0%} of the ceiling", entry, text, lambda x: f"{x:.0%}", met)


def _memory(entry: Entry | None, what: str, most: float) -> Bar:
    found = results.extra_memory(entry, "kdloss") if entry else None
    text = None if found is None else Spread(found, found, found, 1)
    met = found is not None and found <= most
    return _line(what, f"≤ {most:g}× the logits", entry, text, lambda x: f"{x:.2f}×", met)


def _memory_beside_naive(entry: Entry | None, what: str, most: float) -> Bar:
    ours, naive = (results.extra_memory(entry, name) if entry else None for name in ("kdloss", "naive"))
    found = None if ours is None or not naive else ours / naive
    text = None if found is None else Spread(found, found, found, 1)
    met = found is not None and found <= most
    return _line(what, f"≤ {most:g}× naive's", entry, text, lambda x: f"{x:.2f}×", met)


def _line(
    what: str, bar: str, entry: Entry | None, found: Spread | None, text: Callable[[float], str], met: object
) -> Bar:
    name = entry["name"] if entry else ""
    if found is None:
        return Bar(what, bar, "", "not measured", name)
    measured = text(found.median)
    if found.rounds > 1:
        measured += f" [{text(found.low)}, {text(found.high)}], {found.rounds} rounds"
    return Bar(what, bar, measured, "yes" if met else "no", name)
